"""What users get wrong, given to the commands: they print one line that names the value and the remedy, and exit with 2.

The mistakes that concern dataset/prepare_aozora_jsonl.py stand in test_prepare.py.
"""

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    SAMPLE,
    SAMPLE_TOKENIZER,
    SAMPLE_TOKENS,
    SEPARATOR,
    TINY_MODEL,
    assert_user_error,
    call_command,
    command,
    environment,
    file_size_limit,
)

from gptkit.base.cli import UserError, parse
from gptkit.base.locks import LOCK_FILE, file_lock
from gptkit.distributed import fsdp
from gptkit.training.settings import TrainingSettings, check_training_settings

TWO_STEPS = (*SAMPLE_TOKENS, *TINY_MODEL, "--max_steps", 2)


@pytest.fixture
def shards(tmp_path: Path, sample_texts: list[str]) -> Path:
    """Return a folder with a plain text shard."""
    folder = tmp_path / "001"
    folder.mkdir()
    text = "".join(document + SEPARATOR for document in sample_texts[:4])
    (folder / "combined_0001.txt").write_text(text, "utf-8")
    return folder


def pretrain(shards: Path | str, output: Path, *more: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return call_command("pretraining.py", *TWO_STEPS, "--data_dir", shards, "--output_dir", output, *more, cwd=cwd)


def test_unknown_tokenizer(tmp_path: Path, shards: Path) -> None:
    assert_user_error(pretrain(shards, tmp_path / "out", "--tokenizer", "mecab"), "mecab")
    data = ("--data_dir", shards, "--output_dir", tmp_path / "out")
    hub = call_command("pretraining.py", *data, "--tokenizer", "hf", "--hf_name", "no/such-thing")
    assert_user_error(hub, "no/such-thing")
    tiktoken = call_command("pretraining.py", *data, "--tokenizer", "tiktoken", "--tiktoken_name", "gpt9")
    assert_user_error(tiktoken, "gpt9")
    alone = call_command("pretraining.py", *data, "--tokenizer_path", SAMPLE_TOKENIZER)
    assert_user_error(alone, "--tokenizer_path", "--tokenizer sentencepiece")
    missing = pretrain(shards, tmp_path / "out", "--tokenizer_path", tmp_path / "no.model")
    assert_user_error(missing, "no.model")
    assert not (tmp_path / "out").exists()


def test_data_folder_without_shards(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_user_error(pretrain(tmp_path / "empty", tmp_path / "out"), "empty", "prepare_aozora_jsonl.py")
    result = call_command(
        "pretokenize.py", *SAMPLE_TOKENS, "--data_dir", tmp_path / "empty", "--output_dir", tmp_path / "tok"
    )
    assert_user_error(result, "empty", "prepare_aozora_jsonl.py")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_missing_data_folder_names_the_one_probably_meant(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "exp001").mkdir()
    seen_from_experiment = pretrain("001", tmp_path / "out", cwd=tmp_path / "exp001")
    assert_user_error(seen_from_experiment, "--data_dir 001", "did you mean ../001?")
    assert_user_error(pretrain("../001", tmp_path / "out", cwd=tmp_path), "did you mean 001?")
    assert_user_error(pretrain(tmp_path / "01", tmp_path / "out"), f"did you mean {tmp_path / '001'}?")


def test_fewer_tokens_than_a_context(tmp_path: Path, shards: Path) -> None:
    assert_user_error(pretrain(shards, tmp_path / "out", "--context_length", 100_000), "100000", "--context_length")


def test_batch_larger_than_the_data(tmp_path: Path, shards: Path) -> None:
    assert_user_error(pretrain(shards, tmp_path / "out", "--batch_size", 9_999), "9999", "--batch_size")


def test_dimensions_that_do_not_fit(tmp_path: Path, shards: Path) -> None:
    assert_user_error(pretrain(shards, tmp_path / "out", "--n_heads", 3), "emb_dim 16", "n_heads 3")
    assert_user_error(pretrain(shards, tmp_path / "out", "--drop_rate", 1), "drop_rate", "1")
    assert_user_error(pretrain(shards, tmp_path / "out", "--batch_size", 0), "--batch_size 0")
    assert_user_error(pretrain(shards, tmp_path / "out", "--lr", "nan"), "--lr nan")
    assert_user_error(pretrain(shards, tmp_path / "out", "--device", "cuda:99"), "cuda:99")


def test_folders_that_hold_something_else(tmp_path: Path, shards: Path) -> None:
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_bytes(b"cat")
    (other / "notes.json").write_text("[1]")
    assert_user_error(pretrain(shards, tmp_path / "out", "--use_pretokenized", "--pretokenized_dir", other), "photos")
    result = call_command("pretokenize.py", *SAMPLE_TOKENS, "--data_dir", shards, "--output_dir", other)
    assert_user_error(result, "photos", "cat.jpg")
    assert sorted(path.name for path in other.iterdir()) == ["cat.jpg", "notes.json"]
    assert_user_error(pretrain(shards, other / "cat.jpg"), "cat.jpg")
    (other / "config.json").write_text('{"theme": "dark"}')
    assert_user_error(pretrain(shards, other), "photos", "config.json")
    assert (other / "config.json").read_text() == '{"theme": "dark"}'
    assert_user_error(pretrain(shards, tmp_path / "out", "--pretokenized_dir", tmp_path / "tok"), "--use_pretokenized")


def limit_memory() -> None:
    """Limit a child process to 3 GB of addresses, of which the libraries take some."""
    resource.setrlimit(resource.RLIMIT_AS, (3_000_000_000, 3_000_000_000))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to RLIMIT_AS")
@pytest.mark.skipif(torch.version.cuda is not None, reason="CUDA's libraries alone take more addresses")
def test_too_little_memory(tmp_path: Path, shards: Path) -> None:
    """The memory is too small for the optimizer's state, which comes after the trial step, and for the model itself."""
    small = ("--data_dir", shards, "--context_length", 16, "--batch_size", 2, "--max_steps", 2)
    for size in (("--emb_dim", 2048, "--n_layers", 4, "--n_heads", 8), ("--model_size", "1558M")):
        train = command("pretraining.py", *SAMPLE_TOKENS, *small, *size, "--output_dir", tmp_path / "out")
        result = subprocess.run(
            train, env=environment(), capture_output=True, encoding="utf-8", preexec_fn=limit_memory
        )
        assert_user_error(result, "out of memory", "--batch_size 2", "--model_size")


def test_full_disk_while_tokenizing_and_saving(tmp_path: Path, shards: Path) -> None:
    large, tokens, output = tmp_path / "large", tmp_path / "tokens", tmp_path / "out"
    large.mkdir()
    (large / "a.txt").write_text(SAMPLE.read_text("utf-8").replace("\n", SEPARATOR), "utf-8")
    tokenize = ("pretokenize.py", *SAMPLE_TOKENS, "--data_dir", large, "--output_dir", tokens)
    with file_size_limit(50_000):
        result = call_command(*tokenize)
    assert_user_error(result, "train_a.npy")
    assert not list(tokens.glob("*"))
    assert call_command(*tokenize).returncode == 0

    with file_size_limit(50_000):
        result = pretrain(shards, output, "--emb_dim", 64)
    assert_user_error(result, "make room")
    assert not list(output.glob("*step_*"))
    assert pretrain(shards, output, "--emb_dim", 64).returncode == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_folder_without_permission(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    assert_user_error(pretrain(shards, tmp_path / "closed" / "out"), "closed", "permissions")


def test_second_run_in_a_folder_in_use(tmp_path: Path, shards: Path) -> None:
    output = tmp_path / "out"
    with file_lock(output / LOCK_FILE):
        assert_user_error(pretrain(shards, output), "in use by another run", f"process {os.getpid()} on ")
    assert pretrain(shards, output).returncode == 0


def test_locale_that_cannot_show_japanese(tmp_path: Path, shards: Path) -> None:
    arguments = (*TWO_STEPS, "--data_dir", shards, "--output_dir", tmp_path / "out", "--print_sample_iter", 1)
    ascii_only = environment() | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    train = command("pretraining.py", *arguments)
    result = subprocess.run(train, env=ascii_only, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    assert "sample after step 2: \\u543e" in result.stdout


def test_settings_that_contradict(tmp_path: Path, shards: Path) -> None:
    assert_user_error(pretrain(shards, tmp_path / "out", "--min_lr", 1), "--min_lr 1.0", "--lr")
    for variant in (("--cautious_decay",), ("--muon_scaling", "rows"), ("--momentum_warmup", 5)):
        refused = pretrain(shards, tmp_path / "out", "--optimizer", "adamw", *variant)
        assert_user_error(refused, variant[0], "--optimizer muon", "adamw")
    not_utf8 = pretrain(shards, tmp_path / "out", "--start_context", os.fsdecode(b"\xff"))
    assert_user_error(not_utf8, "--start_context")


def infer(exp_dir: Path, prompt: str, *more: object) -> subprocess.CompletedProcess:
    return call_command("inference.py", "--exp_dir", exp_dir, "--prompt", prompt, *more)


def test_experiment_without_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "exp002").mkdir()
    assert_user_error(infer(tmp_path / "exp002", "雨"), "exp002", "holds no checkpoint")
    assert_user_error(infer(tmp_path / "exp02", "雨"), "did you mean", "exp002")


def test_prompts_that_cannot_be(trained: Path) -> None:
    assert_user_error(infer(trained, "雨", "--max_new_tokens", 0), "--max_new_tokens 0")
    assert_user_error(infer(trained, "雨", "--temperature", -1), "--temperature -1")
    assert_user_error(infer(trained, "雨", "--top_k", 0), "--top_k 0")
    assert_user_error(infer(trained, os.fsdecode(b"\xff\xfe")), "UTF-8")


def test_damaged_checkpoint(tmp_path: Path, trained: Path) -> None:
    for file, content in (("model.safetensors", b"\x00" * 50), ("state.json", b"{"), ("tokenizer/spiece.model", b"")):
        copy = Path(shutil.copytree(trained, tmp_path / file.replace("/", "_")))
        (path,) = copy.glob(f"model_checkpoints/step_*/{file}")
        path.write_bytes(content)
        assert_user_error(infer(copy, "雨"), "step_00000002")


def test_checkpoint_that_is_a_pickle_is_not_opened(tmp_path: Path, trained: Path) -> None:
    """In place of the weights there is a pickle that would create a file."""
    copy = Path(shutil.copytree(trained, tmp_path / "exp"))
    (path,) = copy.glob("model_checkpoints/step_*/model.safetensors")
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR.")
    assert_user_error(infer(copy, "雨"), "model.safetensors")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("version", ["2.6.0", "2.8.0+cu128", "2.8.1", "2.9.0a0+git1a2b3c4"])
def test_sharding_by_a_torch_that_does_it_wrongly(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """test_parallel.py has the whole command, for such a torch; here a process group would outlive the test."""
    monkeypatch.setattr(torch, "__version__", version)
    settings = parse(TrainingSettings, ["--data_dir", "001", "--parallel", "fsdp"])
    with pytest.raises(UserError, match=rf"torch 2\.9 or newer: {re.escape(version)} .* --parallel ddp"):
        check_training_settings(settings, 1)


@pytest.mark.parametrize("version", ["2.9.0+cu128", "2.10.0", "2.15.0+cu132", "3.0.0a0"])
def test_sharding_by_a_newer_torch(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert fsdp.is_correct()
