"""The averaged weights of a run: what they are, that they change nothing else, and who uses them.

That they survive kills and rollbacks, and are the same for any number of processes, is also in test_resume.py and
test_parallel.py.
"""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    SAMPLE,
    SAMPLE_TOKENIZER,
    assert_user_error,
    call_command,
    curve,
    newest,
    small_run,
    untrained,
)
from safetensors.torch import load_file
from test_checkpoints import CPU, TOKENIZER
from test_guards import nan_at, state_of
from torch import nn

import demo
from gpt_model import GPTModel
from gptkit.base.cli import UserError
from gptkit.base.files import read_json
from gptkit.data.batches import validation_batches
from gptkit.data.token_folder import TokenFolder
from gptkit.evaluation.documents import read_documents
from gptkit.evaluation.scoring import score_documents
from gptkit.text.tokenizer import load_sentencepiece
from gptkit.training import checkpoints, recipe
from gptkit.training.averaging import WeightAverage
from gptkit.training.checkpoints import (
    AVERAGED_FILE,
    MODEL_FILE,
    SUMS_FILE,
    TRAINING_FILE,
    DamagedCheckpoint,
    save_checkpoint,
    verify_checkpoint,
    write_checksums,
)
from gptkit.training.loading import choose_checkpoint, load_chosen, load_model
from gptkit.training.saver import BackgroundWriter

STEPS_PER_EPOCH = 45  # of small_run


def averaging_run(shards: Path, output: Path, *more: object) -> tuple[object, ...]:
    """Return the arguments of a run of 30 steps that averages over half of an epoch."""
    steps = ("--max_steps", 30, "--save_ckpt_freq", 10, "--keep_checkpoints", 9, "--dtype", "float32")
    return (*small_run(shards, output, "muon"), *steps, "--average_epochs", 0.5, *more)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory, short_shards: Path) -> Path:
    """Return the folder of an averaging run; do not change it."""
    output = tmp_path_factory.mktemp("averaged") / "model_checkpoints"
    result = call_command("pretraining.py", *averaging_run(short_shards, output, "--print_sample_iter", 10))
    assert result.returncode == 0, result.stderr
    return output


def weights_of(output: Path, step: int, file: str) -> dict[str, torch.Tensor]:
    return load_file(output / f"step_{step:08d}" / file)


# The average


def test_the_average_is_that_of_its_formula() -> None:
    """NumPy in float64, and the long run against torch's own AveragedModel; nothing is drawn or changed but the average."""
    torch.manual_seed(1)
    model = nn.Linear(3, 2)
    average = WeightAverage(model, n_steps=20)
    expected = {name: weight.detach().double().numpy().copy() for name, weight in model.named_parameters()}
    for n in range(200):
        with torch.no_grad():
            for weight in model.parameters():
                weight += torch.randn_like(weight)
        average.update()
        decay = min(math.exp(-1 / 20), (1 + n) / (4 + n))
        for name, weight in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * weight.detach().double().numpy()
    assert average.n_updates == 200
    for name, found in average.tensors.items():
        np.testing.assert_allclose(found.numpy(), expected[name], atol=1e-5)

    theirs = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(math.exp(-1 / 20))
    )
    theirs.update_parameters(model)  # the first one only copies
    average.load({name: weight.detach() for name, weight in model.named_parameters()})
    average.n_updates = 10**6  # past the beginning, where the decay is smaller
    for _ in range(50):
        with torch.no_grad():
            for weight in model.parameters():
                weight += torch.randn_like(weight)
        average.update()
        theirs.update_parameters(model)
    for name, weight in theirs.module.named_parameters():
        torch.testing.assert_close(average.tensors[name], weight.detach())


def test_the_first_average_is_near_the_weights_and_not_the_initial_ones() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = WeightAverage(model, n_steps=1000)
    nn.init.ones_(model.weight)
    average.update()
    assert average.tensors["weight"].item() == pytest.approx(0.75)


def test_the_planners_average_reaches_as_far_back_as_it_asks_for() -> None:
    """At the end of a run, a weight that has grown by 1 in each step lies n_steps behind in its average, less a half."""
    n_steps = recipe.AVERAGE_SHARE * 1000
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = WeightAverage(model, n_steps)
    for _ in range(1000):
        with torch.no_grad():
            model.weight += 1
        average.update()
    assert model.weight.item() - average.tensors["weight"].item() == pytest.approx(n_steps, rel=0.03)


def test_no_average() -> None:
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.0)
    average.update()
    average.load({})
    before = model.weight.detach().clone()
    with average.swapped_in():
        assert torch.equal(model.weight, before)
    assert not average.is_on
    assert average.n_updates == 0


def test_weights_are_swapped_and_restored_to_the_bit_also_after_an_error() -> None:
    model = untrained()
    average = WeightAverage(model, 3.0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 1
    average.update()
    mine = {name: tensor.clone() for name, tensor in average.tensors.items()}
    theirs = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    places = [weight.data_ptr() for weight in model.parameters()]
    with pytest.raises(KeyError), average.swapped_in():
        assert all(torch.equal(weight, mine[name]) for name, weight in model.named_parameters())
        raise KeyError
    assert all(torch.equal(weight, theirs[name]) for name, weight in model.named_parameters())
    assert all(torch.equal(tensor, mine[name]) for name, tensor in average.tensors.items())
    assert [weight.data_ptr() for weight in model.parameters()] == places


@pytest.mark.parametrize("damage", [{}, {"weight": torch.ones(1)}, {"bias": torch.ones(3)}])
def test_an_average_of_another_model_is_refused(damage: dict[str, torch.Tensor]) -> None:
    average = WeightAverage(nn.Linear(2, 2), 3.0)
    tensors = {"weight": torch.ones(2, 2), "other": torch.ones(2)} if not damage else {"weight": torch.ones(2, 2)}
    with pytest.raises(ValueError, match="average"):
        average.load({"bias": torch.ones(2), **tensors, **damage})


# A run


def test_a_run_averages_and_changes_nothing_else(tmp_path: Path, short_shards: Path, averaged: Path) -> None:
    output = tmp_path / "plain"
    flags = averaging_run(short_shards, output, "--print_sample_iter", 10, "--average_epochs", 0)
    assert call_command("pretraining.py", *flags).returncode == 0
    for step in (10, 20, 30):
        folder, other = (each / f"step_{step:08d}" for each in (output, averaged))
        for file in (MODEL_FILE, TRAINING_FILE):
            assert (folder / file).read_bytes() == (other / file).read_bytes(), (step, file)
        assert {path.name for path in other.iterdir()} - {path.name for path in folder.iterdir()} == {AVERAGED_FILE}
        assert state_of(other).keys() - state_of(folder).keys() == {"n_averaged"}
        assert state_of(other)["n_averaged"] == step
        assert state_of(other)["val_loss"] == curve(averaged)[step // 10 - 1]["averaged_val_loss"]
        verify_checkpoint(other)
    assert [report | {"averaged_val_loss": 0} for report in curve(output)] == [
        report | {"averaged_val_loss": 0} for report in curve(averaged)
    ]
    assert state_of(newest(averaged))["best_val_loss"] == min(r["averaged_val_loss"] for r in curve(averaged))
    samples = [(each / "samples.jsonl").read_text("utf-8") for each in (output, averaged)]
    assert samples[0] != samples[1]  # the average writes


def test_the_reported_loss_is_that_of_the_averaged_weights(averaged: Path, short_shards: Path) -> None:
    tokens = short_shards.with_name("001_pretok")
    streams = TokenFolder(tokens, read_json(tokens / "manifest.json")).open()
    batches = validation_batches(streams["val"], 32, 4, 2)
    for file, name in ((MODEL_FILE, "val_loss"), (AVERAGED_FILE, "averaged_val_loss")):
        model = GPTModel.from_dimensions(state_of(newest(averaged))["identity"]["model"]).eval()
        model.load_state_dict(weights_of(averaged, 30, file))
        with torch.no_grad():
            nats = [nn.functional.cross_entropy(model(x)[..., :3000].flatten(0, 1), y.flatten()) for x, y in batches]
        assert curve(averaged)[-1][name] == pytest.approx(torch.stack(nats).mean().item(), abs=1e-4)


def test_skipped_steps_and_rollbacks(tmp_path: Path, short_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each average follows from the one before and the weights; after the rollback, from that of the checkpoint."""
    seen: list[tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
    update = WeightAverage.update

    def watched(self: WeightAverage) -> None:
        update(self)
        weights = {name: weight.detach().clone() for name, weight in self._weights.items()}
        seen.append((self.n_updates, weights, {name: tensor.clone() for name, tensor in self.tensors.items()}))

    monkeypatch.setattr(WeightAverage, "update", watched)
    output = tmp_path / "out"
    with nan_at({5, 16, 17, 18}):  # one that is skipped; three in a row: back to step 10
        result = call_command("pretraining.py", *averaging_run(short_shards, output, "--max_bad_steps", 3))
    assert result.returncode == 0, result.stderr
    assert "going back to" in result.stdout
    assert [number for number, *_ in seen] == [*range(1, 15), *range(10, 30)]  # 9 updates in 10 steps
    average = {}
    for place, (number, weights, found) in enumerate(seen):
        decay = min(math.exp(-1 / (0.5 * STEPS_PER_EPOCH)), number / (3 + number))
        if place == 14:
            average = {name: tensor.double() for name, tensor in weights_of(output, 10, AVERAGED_FILE).items()}
        if place:
            average = {name: decay * tensor + (1 - decay) * weights[name].double() for name, tensor in average.items()}
            for name, tensor in average.items():
                torch.testing.assert_close(found[name], tensor.float(), msg=name)
        else:
            average = {name: tensor.double() for name, tensor in found.items()}
    assert state_of(newest(output))["n_averaged"] == 29
    assert all(torch.equal(seen[-1][2][n], t) for n, t in weights_of(output, 30, AVERAGED_FILE).items())


def test_a_run_that_resumes_has_the_same_average(tmp_path: Path, short_shards: Path, averaged: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(averaged, output, symlinks=True)
    for step in (20, 30):
        shutil.rmtree(output / f"step_{step:08d}")
    result = call_command("pretraining.py", *averaging_run(short_shards, output, "--print_sample_iter", 10))
    assert result.returncode == 0, result.stderr
    assert "note:" not in result.stderr
    for file in (AVERAGED_FILE, MODEL_FILE, TRAINING_FILE):
        assert (newest(output) / file).read_bytes() == (newest(averaged) / file).read_bytes(), file
    assert curve(output) == curve(averaged)


def test_averaging_begins_and_ends_within_a_run(tmp_path: Path, short_shards: Path) -> None:
    output = tmp_path / "out"

    def train(n_steps: int, average_epochs: float) -> str:
        flags = averaging_run(short_shards, output, "--max_steps", n_steps, "--average_epochs", average_epochs)
        result = call_command("pretraining.py", *flags)
        assert result.returncode == 0, result.stderr
        return result.stderr

    train(10, 0)
    notes = train(11, 0.5)
    assert notes.count("has no averaged weights; their average begins here") == 1
    before, after = weights_of(output, 10, MODEL_FILE), weights_of(output, 11, MODEL_FILE)
    for name, tensor in weights_of(output, 11, AVERAGED_FILE).items():
        torch.testing.assert_close(tensor, 0.25 * before[name] + 0.75 * after[name])
    assert state_of(newest(output))["n_averaged"] == 1
    assert "no averaged weights" not in train(12, 0)
    assert not (newest(output) / AVERAGED_FILE).exists()
    assert "n_averaged" not in state_of(newest(output))
    assert load_chosen(str(output), "averaged", GPTModel.from_dimensions, CPU)[3] is False


# Files


@pytest.fixture
def copied(averaged: Path, tmp_path: Path) -> Path:
    """Return an experiment with the averaging run."""
    shutil.copytree(averaged, tmp_path / "exp" / "model_checkpoints", symlinks=True)
    return tmp_path / "exp"


def test_a_damaged_average_is_a_damaged_checkpoint(
    copied: Path, short_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = copied / "model_checkpoints"
    for step, damage in ((30, "changed"), (20, "gone")):
        path = output / f"step_{step:08d}" / AVERAGED_FILE
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        if damage == "gone":
            path.unlink()
        for training in (True, False):
            with pytest.raises(DamagedCheckpoint, match=AVERAGED_FILE):
                verify_checkpoint(path.parent, training)
    assert choose_checkpoint(str(copied), "newest").name == "step_00000010"
    assert "step_00000030 is damaged (averaged.safetensors is not what was saved)" in capsys.readouterr().err
    result = call_command("pretraining.py", *averaging_run(short_shards, output))
    assert "step_00000010" in result.stdout.partition("resuming from ")[2].splitlines()[0]


def test_an_average_that_does_not_fit_is_refused(copied: Path, short_shards: Path) -> None:
    """Its checksums hold."""
    folder = newest(copied / "model_checkpoints")
    shutil.copy(folder / TRAINING_FILE, folder / AVERAGED_FILE)
    names = [line.split("  ")[1] for line in (folder / SUMS_FILE).read_text().splitlines()]
    write_checksums(folder, [folder / name for name in names])
    result = call_command("pretraining.py", *averaging_run(short_shards, folder.parent, "--max_steps", 31))
    assert_user_error(result, "is damaged", "not those of this model")
    assert_user_error(call_command("inference.py", "--exp_dir", copied, "--prompt", "雨"), "is damaged")
    plain = ("--exp_dir", copied, "--prompt", "雨", "--max_new_tokens", 2, "--checkpoint", "newest")
    assert call_command("inference.py", *plain).returncode == 0


def test_a_stray_average_is_not_used(copied: Path) -> None:
    folder = newest(copied / "model_checkpoints")
    lines = (folder / SUMS_FILE).read_text().splitlines(keepends=True)
    (folder / SUMS_FILE).write_text("".join(line for line in lines if AVERAGED_FILE not in line))
    found, _, _, is_averaged = load_chosen(str(copied), "averaged", GPTModel.from_dimensions, CPU)
    assert (found, is_averaged) == (folder, False)


def test_an_average_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not finite"):
        save_checkpoint(
            tmp_path, {"step": 2}, {"w": torch.ones(2)}, {}, TOKENIZER, averaged={"w": torch.tensor([1, math.inf])}
        )
    assert not list(tmp_path.iterdir())


def test_the_disk_must_have_room_for_the_average(
    tmp_path: Path, short_shards: Path, averaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (newest(averaged) / MODEL_FILE).stat().st_size
    room = 2 * size + size // 2  # for the weights and muon's state, and not for all of the average
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=room, total=1 << 40))
    refused = call_command("pretraining.py", *averaging_run(short_shards, tmp_path / "out"))
    assert_user_error(refused, "MiB free and a checkpoint takes about")
    writer = BackgroundWriter(tmp_path, 1)
    monkeypatch.setattr(
        checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=(1 << 20) + 6_000, total=1 << 40)
    )
    weights = {"w": torch.ones(1000)}
    writer.save({"step": 1, "val_loss": None}, weights, {}, TOKENIZER, weights)
    writer.wait()
    assert writer.failure
    writer.save({"step": 1, "val_loss": None}, weights, {}, TOKENIZER)
    writer.close()
    assert writer.failure is None


# Who uses it


def make_best(exp_dir: Path, step: int) -> None:
    """Let the checkpoint of that step have the lowest validation loss."""
    folder = exp_dir / "model_checkpoints" / f"step_{step:08d}"
    state = state_of(folder)
    (folder / "state.json").write_text(json.dumps(state | {"val_loss": 0.5}))
    names = [line.split("  ")[1] for line in (folder / SUMS_FILE).read_text().splitlines()]
    write_checksums(folder, [folder / name for name in names])


@pytest.mark.parametrize(
    ("choice", "step", "file"),
    [
        ("averaged", 30, AVERAGED_FILE),
        ("newest", 30, MODEL_FILE),
        ("best", 20, AVERAGED_FILE),
        (None, 30, AVERAGED_FILE),
    ],
)
def test_each_command_uses_the_weights_that_are_chosen(
    copied: Path, tmp_path: Path, choice: str | None, step: int, file: str
) -> None:
    """Evaluation, generation, and an export, whose logits in transformers are those of the weights."""
    transformers = pytest.importorskip("transformers")
    make_best(copied, 20)
    folder = copied / "model_checkpoints" / f"step_{step:08d}"
    flags = ("--exp_dir", copied, *(("--checkpoint", choice) if choice else ()))
    name = f"{folder} (averaged weights)" if file == AVERAGED_FILE else str(folder)
    model = load_model(folder, GPTModel.from_dimensions, 3000, CPU, file == AVERAGED_FILE).eval()
    expected = load_file(folder / file)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())

    text = call_command("inference.py", *flags, "--prompt", "雨", "--max_new_tokens", 3, "--device", "cpu")
    assert f"{name}: " in text.stderr
    score = call_command("evaluate_model.py", *flags, "--text_path", SAMPLE, "--max_chars", 300, "--device", "cpu")
    found = json.loads(score.stdout)
    assert f"{name}: " in score.stderr
    assert found["checkpoint"] == str(folder)
    assert found.get("weights") == ("averaged" if file == AVERAGED_FILE else None)
    assert found["loss"] == pytest.approx(loss_on_sample(model), abs=1e-4)

    export = call_command("export_hf.py", *flags, "--output_dir", tmp_path / "hf")
    assert export.returncode == 0, export.stderr
    assert f"(of {name}, " in export.stderr
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.randint(3000, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, model(ids)[..., :3000], atol=1e-4, rtol=1e-4)
    card = (tmp_path / "hf" / "README.md").read_text("utf-8")
    assert ("exponential moving average" in card) == (file == AVERAGED_FILE)
    report = curve(copied / "model_checkpoints")[step // 10 - 1]
    assert f"{report['averaged_val_loss' if file == AVERAGED_FILE else 'val_loss']:.4f} nats/token" in card


def loss_on_sample(model: GPTModel) -> float:
    """Return the mean loss on the first document of the sample, in nats per token."""
    tokenizer = load_sentencepiece(str(SAMPLE_TOKENIZER))
    return score_documents(model, tokenizer, read_documents(SAMPLE, 300), 32).loss


def test_the_page_writes_with_the_average_where_there_is_one(copied: Path, poem: tuple[Path, str]) -> None:
    folders = demo.find_folders([str(copied)])
    assert [folder.name[-2:] for folder in folders.values()] == ["30", "20", "10"]
    folder = next(iter(folders.values()))
    expected = load_file(folder / AVERAGED_FILE)
    assert torch.equal(demo.load_model(folder, CPU).model.tok_emb.weight, expected["tok_emb.weight"])
    (folder,) = demo.find_folders([str(poem[0])]).values()
    assert torch.equal(
        demo.load_model(folder, CPU).model.tok_emb.weight, load_file(folder / MODEL_FILE)["tok_emb.weight"]
    )


def test_the_records_of_a_run_show_the_average(averaged: Path, tmp_path: Path) -> None:
    result = call_command("report.py", "--exp_dir", averaged, "--output", tmp_path / "page.html")
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "検証（平均した重み）" in page
    assert f"{min(report['averaged_val_loss'] for report in curve(averaged)):.4f} <small>" in page
    line = next(line for line in (averaged / "run.log").read_text("utf-8").splitlines() if "step 30/30" in line)
    last: Any = curve(averaged)[-1]
    assert re.search(rf"val {last['val_loss']:.4f} \({last['averaged_val_loss']:.4f} averaged\)", line)
