"""--distill_from and --chain: what a teacher is, what is refused, and runs that stop anywhere and end in the same bytes."""

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    SAMPLE_TOKENS,
    TINY_MODEL,
    assert_user_error,
    call_command,
    command,
    curve,
    n_reported,
    newest,
    run_command,
    run_of,
    small_run,
    start_process,
    untrained,
)
from test_resume import run_and_kill
from torch.nn import functional as F

from gpt_model import GPTModel
from gptkit.base.files import sha256_of
from gptkit.evaluation.scoring import mean_loss
from gptkit.training.chain import link_settings
from gptkit.training.checkpoints import MODEL_FILE, read_state
from gptkit.training.compilation import compile_and_time, make_loss
from gptkit.training.distillation import Teacher, weights_sha256
from gptkit.training.loading import choose_checkpoint, load_checkpoint
from gptkit.training.settings import TrainingSettings

CPU = torch.device("cpu")


def teacher_of(model: GPTModel, share: float = 0.5) -> Teacher:
    return Teacher(model.eval().requires_grad_(False), share, {"weights": "0", "name": "teacher"}, model.hidden_states)


def some_batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(100, (2, 17), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:]


def random_model(**changes: int) -> GPTModel:
    model = untrained(**changes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def assert_same_bytes(found: Path, wanted: Path) -> None:
    assert newest(found).name == newest(wanted).name
    for file in ("model.safetensors", "training.safetensors"):
        assert (newest(found) / file).read_bytes() == (newest(wanted) / file).read_bytes(), file
    assert curve(found) == curve(wanted)


# The loss


def test_training_has_the_teacher_and_validation_the_plain_loss() -> None:
    model, teacher, batch = random_model(), random_model(n_layers=2, emb_dim=32), some_batch()
    loss_of_batch = make_loss(model, model.hidden_states, model.config.vocab_size, teacher_of(teacher))
    with torch.no_grad():
        logits, soft, targets = model(batch[0]).flatten(0, 1), teacher(batch[0]).flatten(0, 1), batch[1].flatten()
    n_ids = model.config.vocab_size
    plain = F.cross_entropy(logits, targets).item()
    log_p, log_q = (each[:, :n_ids].log_softmax(-1) for each in (logits, soft))
    divergence = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True).item()
    assert divergence > 0.01
    assert loss_of_batch(*batch).item() == pytest.approx(0.5 * plain + 0.5 * divergence, rel=1e-5)
    assert mean_loss(model, loss_of_batch, [batch], CPU, torch.float32) == pytest.approx(plain, rel=1e-5)


def test_the_teacher_computes_in_the_runs_dtype_and_its_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, teacher = random_model(), teacher_of(random_model())
    seen: list[torch.dtype] = []

    def slow(ids: torch.Tensor) -> torch.Tensor:
        hidden = teacher.model.trf_blocks[0].ff.up_proj(teacher.model.tok_emb(ids))
        seen.append(hidden.dtype)
        time.sleep(0.05)
        return torch.Tensor(teacher.model.hidden_states(ids))

    patient = Teacher(teacher.model, 0.5, teacher.identity, slow)
    _, parts_s = compile_and_time(
        model, model.config.vocab_size, False, some_batch(), CPU, torch.bfloat16, teacher=patient
    )
    assert set(seen) == {torch.bfloat16}
    assert parts_s["forward"] > 0.05
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


def test_the_teacher_is_compiled_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []

    def compiler(function: object) -> object:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compiler)
    model, teacher = random_model(), teacher_of(random_model())
    compile_and_time(model, model.config.vocab_size, True, some_batch(), CPU, torch.float32, teacher=teacher)
    assert len(compiled) == 2
    assert {function.__self__ for function in compiled} == {model, teacher.model}  # type: ignore[attr-defined]


# --distill_from


@pytest.mark.usefixtures("sample_tokens")
def test_a_run_learns_from_a_teacher_and_is_another_run_without(
    tmp_path: Path, trained: Path, sample_shards: Path
) -> None:
    """The teacher here is of other dimensions and another arch; the run resumes with it, wherever it has moved."""
    exp, moved = tmp_path / "exp", tmp_path / "moved"
    shutil.copytree(trained, tmp_path / "teacher")
    flags = ("--distill_from", tmp_path / "teacher", "--arch", "gpt2", "--emb_dim", 32)
    result = run_of(tmp_path, sample_shards, *flags)
    assert result.returncode == 0, result.stderr
    assert f"teacher: {newest(tmp_path / 'teacher' / 'model_checkpoints')}, " in result.stdout
    state = read_state(newest(exp))
    assert state["identity"]["teacher"]["weights"] == weights_sha256(newest(trained / "model_checkpoints"), MODEL_FILE)

    longer = (*flags, "--max_steps", 3)
    without = ("--arch", "gpt2", "--emb_dim", 32, "--max_steps", 3)
    assert_user_error(run_of(tmp_path, sample_shards, *without), "another teacher (--distill_from)", "now None")
    other = ("--distill_from", exp)
    (tmp_path / "second").mkdir()
    assert_user_error(
        run_of(tmp_path / "second", sample_shards, "--distill_from", tmp_path / "gone"), "--distill_from", "gone"
    )
    (tmp_path / "teacher").rename(moved)
    assert_user_error(run_of(tmp_path, sample_shards, *longer), "--distill_from", str(tmp_path / "teacher"))
    result = run_of(tmp_path, sample_shards, *longer, "--distill_from", moved, "--distill_weight", 0.25)
    assert result.returncode == 0, result.stderr
    assert "note: --distill_weight was 0.5 and is 0.25" in result.stderr
    assert newest(exp).name == "step_00000003"
    fresh = run_of(tmp_path / "second", sample_shards, *other)
    assert fresh.returncode == 0, fresh.stderr
    assert_user_error(
        run_of(tmp_path / "second", sample_shards, "--distill_from", moved), "another teacher", str(exp), str(moved)
    )


@pytest.mark.usefixtures("sample_tokens")
def test_a_run_of_an_earlier_version_resumes_without_a_teacher(tmp_path: Path, sample_shards: Path) -> None:
    assert run_of(tmp_path, sample_shards).returncode == 0
    path = newest(tmp_path / "exp") / "state.json"
    state = json.loads(path.read_bytes())
    assert state["identity"].pop("teacher", "missing") is None
    path.write_text(json.dumps(state), "utf-8")
    sums = path.with_name("SHA256SUMS")
    lines = [line for line in sums.read_text().splitlines() if not line.endswith("  state.json")]
    sums.write_text("\n".join([*lines, f"{sha256_of(path)}  state.json"]) + "\n")
    result = run_of(tmp_path, sample_shards, "--max_steps", 3)
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stdout


@pytest.mark.usefixtures("sample_tokens")
def test_what_is_no_teacher(tmp_path: Path, trained: Path, sample_shards: Path) -> None:
    exp = tmp_path / "exp"
    longer = run_of(tmp_path, sample_shards, "--context_length", 32, "--distill_from", trained)
    assert_user_error(longer, "--distill_from", "16 tokens", "this run's 32", "--context_length 16")
    empty = run_of(tmp_path, sample_shards, "--distill_from", tmp_path)
    assert_user_error(empty, f"--distill_from {tmp_path} holds no checkpoint")
    assert not exp.exists()  # nothing half written
    assert run_of(tmp_path, sample_shards).returncode == 0
    for name in (exp, tmp_path, newest(exp)):
        result = run_of(tmp_path, sample_shards, "--distill_from", name, "--max_steps", 3)
        assert_user_error(result, "--distill_from", "is the run in --output_dir itself")
    both = run_of(tmp_path, sample_shards, "--distill_from", trained, "--chain", 2)
    assert_user_error(both, "--chain 2", "--distill_from")


@pytest.mark.usefixtures("sample_tokens")
def test_a_teacher_of_another_tokenizer_is_refused(tmp_path: Path, sample_shards: Path) -> None:
    result = run_of(tmp_path, sample_shards, "--distill_from", ROOT / "tests" / "data" / "run_before_layers")
    assert_user_error(result, "--distill_from", "another tokenizer")
    assert not (tmp_path / "exp").exists()


@pytest.mark.slow
def test_a_distilled_run_killed_and_resumed_ends_in_the_same_bytes(tmp_path: Path, short_shards: Path) -> None:
    teacher, whole, stopped = tmp_path / "teacher", tmp_path / "whole", tmp_path / "stopped"
    result = call_command("pretraining.py", *small_run(short_shards, teacher, "muon"), "--n_epochs", 1)
    assert result.returncode == 0, result.stderr
    run, run_stopped = (
        (*small_run(short_shards, output, "muon"), "--save_ckpt_freq", 10, "--distill_from", teacher, "--seed", 5)
        for output in (whole, stopped)
    )
    result = call_command("pretraining.py", *run)
    assert result.returncode == 0, result.stderr
    run_and_kill(run_stopped, stopped, step=20)
    run_and_kill(run_stopped, stopped, step=60)
    result = call_command("pretraining.py", *run_stopped)
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stdout
    assert_same_bytes(stopped, whole)


# --chain


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def chain_of(shards: Path, output: Path, *flags: object) -> tuple[object, ...]:
    return (*small_run(shards, output, "muon"), "--n_epochs", 1, "--save_ckpt_freq", 10, "--chain", 2, *flags)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, short_shards: Path) -> Path:
    """Return the output folder of a chain of two that never stopped; do not change it."""
    output = tmp_path_factory.mktemp("chain") / "out"
    result = call_command("pretraining.py", *chain_of(short_shards, output))
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^link \d of \d: .*", result.stdout, re.MULTILINE) == [
        f"link 1 of 2: {output / 'link_1'}",
        f"link 2 of 2: {output}",
    ]
    return output


def test_the_links_are_ordinary_runs(chain: Path, tmp_path: Path, short_shards: Path) -> None:
    """They are, byte for byte, those that two commands make, each with its seed."""
    first, second = tmp_path / "first", tmp_path / "second"
    common = ("--n_epochs", 1, "--save_ckpt_freq", 10)
    assert call_command("pretraining.py", *small_run(short_shards, first, "muon"), *common).returncode == 0
    more = ("--distill_from", first, "--seed", 124)
    assert call_command("pretraining.py", *small_run(short_shards, second, "muon"), *common, *more).returncode == 0
    assert_same_bytes(chain / "link_1", first)
    assert_same_bytes(chain, second)
    assert {path.name for path in chain.iterdir()} >= {"link_1", "run.log", "sessions.jsonl", "config.json"}
    logs = [(folder / "run.log").read_text("utf-8") for folder in (chain / "link_1", chain)]
    assert [log.count("finished 45 steps") for log in logs] == [1, 1]
    assert [log.count("teacher: ") for log in logs] == [0, 1]
    assert not list(chain.rglob(".lock"))


def test_a_finished_link_is_left_alone(chain: Path, tmp_path: Path, short_shards: Path) -> None:
    """That holds between the links, too: here the first one alone is there."""
    output = tmp_path / "out"
    shutil.copytree(chain / "link_1", output / "link_1")
    before = contents(output)
    result = call_command("pretraining.py", *chain_of(short_shards, output))
    assert result.returncode == 0, result.stderr
    assert "link 1 of 2" not in result.stdout
    assert contents(output).items() >= before.items()
    assert_same_bytes(output, chain)
    again = call_command("pretraining.py", *chain_of(short_shards, output))
    assert again.returncode == 0, again.stderr
    assert "the run is finished at step 45" in again.stdout
    assert contents(output).items() >= before.items()


def test_a_link_killed_before_its_end_was_recorded(chain: Path, tmp_path: Path, short_shards: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(chain / "link_1", output / "link_1")
    (output / "link_1" / "sessions.jsonl").unlink()
    result = call_command("pretraining.py", *chain_of(short_shards, output))
    assert result.returncode == 0, result.stderr
    assert f"{output / 'link_1'}: the run is finished at step 45" in result.stdout
    assert_same_bytes(output, chain)


def test_without_shared_tokens_the_text_is_tokenized_once(tmp_path: Path, sample_shards: Path) -> None:
    result = run_of(tmp_path, sample_shards, "--no-use_pretokenized", "--chain", 3)
    assert result.returncode == 0, result.stderr
    assert [path.parent for path in tmp_path.rglob("tokens")] == [tmp_path / "exp"]
    assert read_state(newest(tmp_path / "exp"))["identity"]["teacher"]["name"].startswith(str(tmp_path / "exp/link_2"))


@pytest.mark.usefixtures("sample_tokens")
def test_max_minutes_stops_the_chain(tmp_path: Path, sample_shards: Path) -> None:
    result = run_of(tmp_path, sample_shards, "--chain", 2, "--max_minutes", 0.00001)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "exp" / "link_1").exists() or "link 2 of 2" not in result.stdout
    assert "run the same command to resume" in result.stdout


@pytest.mark.usefixtures("sample_tokens")
def test_another_run_in_the_folder_of_a_chain_is_refused(tmp_path: Path, sample_shards: Path) -> None:
    assert run_of(tmp_path, sample_shards).returncode == 0
    before = contents(tmp_path)
    result = run_of(tmp_path, sample_shards, "--chain", 2)
    assert_user_error(result, f"--output_dir {tmp_path / 'exp'}", "--chain 2")
    assert contents(tmp_path) == before


def test_the_last_link_is_chosen(chain: Path, tmp_path: Path) -> None:
    """Once it has checkpoints; before that, the highest link that has."""
    assert choose_checkpoint(str(chain), "newest") == newest(chain)
    exp = tmp_path / "exp"
    output = exp / "model_checkpoints"
    for number in (1, 2, 10):
        shutil.copytree(chain / "link_1", output / f"link_{number}")
    (output / "link_11").mkdir()
    for folder in (exp, output):
        assert choose_checkpoint(str(folder), "newest") == newest(output / "link_10")
    shutil.copytree(newest(chain), output / newest(chain).name)
    for folder in (exp, output):
        assert choose_checkpoint(str(folder), "newest") == newest(output)


def test_other_commands_take_the_last_link(chain: Path, tmp_path: Path) -> None:
    """An exported model opens in transformers as a stock Qwen3 with the same logits."""
    transformers = pytest.importorskip("transformers")
    text = call_command("inference.py", "--exp_dir", chain, "--prompt", "雨", "--max_new_tokens", 5)
    assert text.returncode == 0, text.stderr
    assert f"{newest(chain)}: " in text.stderr
    document = tmp_path / "text.txt"
    document.write_text("吾輩は猫である。", "utf-8")
    score = call_command("evaluate_model.py", "--exp_dir", chain, "--text_path", document)
    assert score.returncode == 0, score.stderr
    assert newest(chain).name in score.stdout + score.stderr
    export = call_command("export_hf.py", "--exp_dir", chain, "--output_dir", tmp_path / "hf")
    assert export.returncode == 0, export.stderr
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert type(stock).__name__ == "Qwen3ForCausalLM"
    ours, _ = load_checkpoint(newest(chain), GPTModel.from_dimensions, CPU)
    ids = torch.randint(100, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted = stock(ids).logits, ours.eval()(ids)
    n_ids = ours.config.vocab_size
    torch.testing.assert_close(found[..., :n_ids], wanted[..., :n_ids], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_chain_killed_in_each_link_ends_in_the_same_bytes(chain: Path, tmp_path: Path, short_shards: Path) -> None:
    output = tmp_path / "out"
    arguments = chain_of(short_shards, output)
    run_and_kill(arguments, output / "link_1", step=20)
    assert not list(output.glob("step_*"))
    run_and_kill(arguments, output, step=20)
    first = contents(output / "link_1")
    result = run_command("pretraining.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert contents(output / "link_1") == first
    assert_same_bytes(output / "link_1", chain / "link_1")
    assert_same_bytes(output, chain)


@pytest.mark.slow
def test_a_signal_stops_the_chain(tmp_path: Path, short_shards: Path) -> None:
    output = tmp_path / "out"
    process = start_process(
        command("pretraining.py", *chain_of(short_shards, output)),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while n_reported(output / "link_1") < 10 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "link 2 of 2" not in out
    assert "stopped by SIGTERM" in errors


def test_links_share_what_remains_of_the_budget(tmp_path: Path) -> None:
    settings = TrainingSettings(data_dir="text", chain=3, budget_minutes=60, output_dir=str(tmp_path), seed=7)
    folders = [tmp_path / "link_1", tmp_path / "link_2", tmp_path]
    links = [link_settings(settings, folders, number, 60.0 * used) for number, used in ((1, 0), (2, 18), (3, 40))]
    assert [link.budget_minutes for link in links] == [20, 21, 20]
    assert [link.output_dir for link in links] == list(map(str, folders))
    assert [link.distill_from for link in links] == [None, *map(str, folders[:2])]
    assert [link.seed for link in links] == [7, 8, 9]
    assert {link.chain for link in links} == {None}
    assert link_settings(settings, folders, 3, 3601.0).budget_minutes > 0  # 0 would be no budget


@pytest.mark.usefixtures("sample_tokens")
def test_a_share_that_is_over_before_the_first_step(tmp_path: Path, sample_shards: Path) -> None:
    """No teacher was made, and none is looked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptkit.training.pace.CLOSING_S", 1000.0)
        result = run_of(tmp_path, sample_shards, "--chain", 2, "--budget_minutes", 1)
    assert_user_error(result, "--budget_minutes leaves 0.5", "link_1", "give more")


@pytest.mark.slow
@pytest.mark.usefixtures("sample_tokens")
def test_a_chain_ends_with_its_budget(tmp_path: Path, sample_shards: Path) -> None:
    """Each of two has about half of it, and a second session counts what the first one used."""
    output = tmp_path / "out"
    data = (*SAMPLE_TOKENS, "--data_dir", sample_shards, "--use_pretokenized", "--device", "cpu")
    arguments = (*data, *TINY_MODEL, "--dtype", "float32", "--output_dir", output, "--chain", 2)
    start = time.monotonic()
    result = call_command("pretraining.py", *arguments, "--budget_minutes", 0.8)
    elapsed_s = time.monotonic() - start
    assert result.returncode == 0, result.stderr
    assert 30 < elapsed_s < 58  # asked for were 48
    first, last = (read_state(newest(folder)) for folder in (output / "link_1", output))
    assert 15 < first["elapsed_s"] <= 26
    assert 15 < last["elapsed_s"]
    assert last["settings"]["budget_minutes"] == pytest.approx(0.8 - first["elapsed_s"] / 60)
    again = call_command("pretraining.py", *arguments, "--budget_minutes", 0.8)
    assert again.returncode == 0, again.stderr
    assert "the run is finished" in again.stdout
    assert "note: " not in again.stderr
