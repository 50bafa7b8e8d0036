"""The whole road with the README's own commands, from JSONL to text, on the sample corpus."""

import json
import shutil
from pathlib import Path

from conftest import SAMPLE, SAMPLE_TOKENIZER, run_command

TINY = ("--n_layers", 1, "--emb_dim", 32, "--n_heads", 2, "--context_length", 32, "--batch_size", 4, "--max_steps", 20)


def ok(script: str, *arguments: object, cwd: Path) -> str:
    result = run_command(script, *arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    assert "\r" not in result.stdout + result.stderr  # no progress bar in a file
    return result.stdout


def test_from_jsonl_to_text(tmp_path: Path) -> None:
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
    tokenizer = ("--tokenizer", "sentencepiece", "--tokenizer_path", SAMPLE_TOKENIZER)
    shared = (*tokenizer, "--n_epochs", 1, "--eval_freq", 10, "--eval_iter", 2, "--print_sample_iter", 10, *TINY)
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
    named = {"step", "tokens", "train_loss", "val_loss", "lr", "grad_norm", "tokens_per_s", "elapsed_s"}
    assert named <= metrics[0].keys()
    assert metrics[1]["tokens"] == 20 * 4 * 32
    assert metrics[1]["val_loss"] < metrics[0]["val_loss"] < 8
    assert (outputs / "loss_curve.png").read_bytes().startswith(b"\x89PNG")

    # Inference needs neither the dataset nor the tokenizer's first home.
    shutil.rmtree(dataset)
    arguments = ("--exp_dir", "exp001", "--prompt", "吾輩は猫である。", "--max_new_tokens", 20, "--top_k", 40)
    first = ok("inference.py", *arguments, "--temperature", "0.8", "--seed", 5, cwd=tmp_path)
    assert first.startswith("吾輩は猫である。")
    assert len(first) > len("吾輩は猫である。") + 1
    assert ok("inference.py", *arguments, "--temperature", "0.8", "--seed", 5, cwd=tmp_path) == first
    assert ok("inference.py", *arguments, "--seed", 6, "--checkpoint", "best", cwd=tmp_path) != first


def test_same_line_from_the_root_and_without_the_text(tmp_path: Path, sample_shards: Path) -> None:
    """--use_pretokenized on a machine that has only the token shards; ../ dropped when run from the root."""
    (tmp_path / "dataset").mkdir()
    shutil.copytree(sample_shards, tmp_path / "dataset" / "001")
    tokenizer = ("--tokenizer", "sentencepiece", "--tokenizer_path", SAMPLE_TOKENIZER)
    folders = ("--data_dir", "dataset/001", "--pretokenized_dir", "dataset/001_pretok", "--use_pretokenized")
    ok("pretokenize.py", *tokenizer, "--data_dir", "dataset/001", "--output_dir", "dataset/001_pretok", cwd=tmp_path)
    shutil.rmtree(tmp_path / "dataset" / "001")
    ok("pretraining.py", *tokenizer, *folders, *TINY, "--output_dir", "exp001/model_checkpoints", cwd=tmp_path)
    assert (tmp_path / "exp001" / "model_checkpoints" / "step_00000020" / "state.json").is_file()
