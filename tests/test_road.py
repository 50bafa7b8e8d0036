"""The whole road with the README's own commands, from JSONL to generated text, on the sample corpus."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

from conftest import SAMPLE, SAMPLE_TOKENS, call_command, run_command

TINY = ("--n_layers", 1, "--emb_dim", 32, "--n_heads", 2, "--context_length", 32, "--batch_size", 4, "--max_steps", 20)


def ok(script: str, *arguments: object, cwd: Path, run: Callable[..., CompletedProcess] = run_command) -> str:
    """Run a command, assert that it ends well, and return what it prints."""
    result = run(script, *arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    assert "\r" not in result.stdout + result.stderr  # no progress bar in a file
    return result.stdout


def test_from_jsonl_to_text(tmp_path: Path) -> None:
    """Each command once as a process, which finds gptkit without this one's sys.path."""
    dataset, exp001 = tmp_path / "dataset", tmp_path / "exp001"
    dataset.mkdir()
    exp001.mkdir()
    shutil.copy(SAMPLE, dataset / "aozorabunko-dedupe-clean.jsonl")
    ok(
        "dataset/prepare_aozora_jsonl.py",
        *("--jsonl_path", "./dataset/aozorabunko-dedupe-clean.jsonl", "--output_dir", "./dataset/001"),
        *("--max_size_mb", "0.05", "--separator", "<|endoftext|>"),
        cwd=tmp_path,
    )
    shared = (*SAMPLE_TOKENS, "--n_epochs", 1, "--eval_freq", 10, "--eval_iter", 2, "--print_sample_iter", 10, *TINY)
    out = ok(
        "pretraining.py",
        *("--data_dir", "../dataset/001", "--use_pretokenized", "--pretokenized_dir", "../dataset/001_pretok"),
        *shared,
        *("--output_dir", "model_checkpoints"),
        cwd=exp001,
    )
    assert out.count("sample after step") == 2
    manifest = json.loads((dataset / "001_pretok" / "manifest.json").read_text("utf-8"))
    assert manifest["documents"] == len(SAMPLE.read_text("utf-8").splitlines())

    outputs = exp001 / "model_checkpoints"
    metrics = [json.loads(line) for line in (outputs / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [record["step"] for record in metrics] == [10, 20]
    keys = {"step", "tokens", "train_loss", "val_loss", "lr", "grad_norm", "tokens_per_s", "elapsed_s"}
    assert keys <= metrics[0].keys()
    assert metrics[1]["tokens"] == 20 * 4 * 32
    assert metrics[1]["val_loss"] < metrics[0]["val_loss"] < 8
    assert (outputs / "loss_curve.png").read_bytes().startswith(b"\x89PNG")

    # Inference needs neither the dataset nor the tokenizer's first home.
    shutil.rmtree(dataset)
    arguments = ("--exp_dir", "exp001", "--prompt", "吾輩は猫である。", "--max_new_tokens", 20, "--top_k", 40)
    first = ok("inference.py", *arguments, "--temperature", "0.8", "--seed", 5, cwd=tmp_path)
    assert first.startswith("吾輩は猫である。")
    assert len(first) > len("吾輩は猫である。") + 1
    again = (*arguments, "--temperature", "0.8", "--seed", 5)
    assert ok("inference.py", *again, cwd=tmp_path, run=call_command) == first
    other = (*arguments, "--seed", 6, "--checkpoint", "best")
    assert ok("inference.py", *other, cwd=tmp_path, run=call_command) != first


def test_same_line_from_the_root_and_without_the_text(tmp_path: Path, sample_shards: Path) -> None:
    """--use_pretokenized works on a machine that has only the token shards; from the root the paths have no ../."""
    (tmp_path / "dataset").mkdir()
    shutil.copytree(sample_shards, tmp_path / "dataset" / "001")
    tokens = ("--data_dir", "dataset/001", "--output_dir", "dataset/001_pretok")
    ok("pretokenize.py", *SAMPLE_TOKENS, *tokens, cwd=tmp_path, run=call_command)
    shutil.rmtree(tmp_path / "dataset" / "001")
    folders = ("--data_dir", "dataset/001", "--pretokenized_dir", "dataset/001_pretok", "--use_pretokenized")
    output = ("--output_dir", "exp001/model_checkpoints")
    ok("pretraining.py", *SAMPLE_TOKENS, *folders, *TINY, *output, cwd=tmp_path, run=call_command)
    assert (tmp_path / "exp001" / "model_checkpoints" / "step_00000020" / "state.json").is_file()
