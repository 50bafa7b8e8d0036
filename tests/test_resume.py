"""A run that was killed and started again ends byte for byte like one that never stopped.

Real processes and real kills (SIGKILL: no chance to save), in the first epoch and in the second, with dropout and
gradient accumulation.
"""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import SAMPLE_TOKENIZER, assert_user_error, command, environment, run_command

SMALL_RUN = (
    *("--tokenizer", "sentencepiece", "--tokenizer_path", SAMPLE_TOKENIZER, "--use_pretokenized"),
    *("--n_layers", 1, "--emb_dim", 32, "--n_heads", 2, "--context_length", 32, "--drop_rate", 0.1, "--device", "cpu"),
    *("--batch_size", 4, "--grad_accum_steps", 2, "--n_epochs", 2, "--lr", 0.003, "--eval_iter", 2),
    *("--eval_freq", 10, "--save_ckpt_freq", 30, "--print_sample_iter", 100),
)


def small_run(shards: Path, output: Path, optimizer: str, arch: str = "modern") -> tuple[object, ...]:
    return (*SMALL_RUN, "--data_dir", shards, "--output_dir", output, "--optimizer", optimizer, "--arch", arch)


def n_reported(output: Path) -> int:
    """The step of the last report in metrics.jsonl."""
    path = output / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def run_and_kill(arguments: tuple[object, ...], output: Path, step: int) -> None:
    """Start the run and kill it once it has reported `step`."""
    process = subprocess.Popen(
        command("pretraining.py", *arguments), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while n_reported(output) < step:
        assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def newest(output: Path) -> Path:
    return max(output.glob("step_*"))


def curve(output: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock; empty before the first report."""
    path = output / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    return [{key: value for key, value in r.items() if key not in ("tokens_per_s", "elapsed_s")} for r in records]


@pytest.mark.parametrize(("optimizer", "arch"), [("muon", "modern"), ("adamw", "gpt2"), ("galore_adamw", "modern")])
def test_killed_twice_equals_never_stopped(tmp_path: Path, sample_shards: Path, optimizer: str, arch: str) -> None:
    shards = Path(shutil.copytree(sample_shards, tmp_path / "001"))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    result = run_command("pretraining.py", *small_run(shards, whole, optimizer, arch))
    assert result.returncode == 0, result.stderr
    steps_per_epoch = curve(whole)[-1]["step"] // 2

    run_and_kill(small_run(shards, stopped, optimizer, arch), stopped, step=50)
    run_and_kill(small_run(shards, stopped, optimizer, arch), stopped, step=steps_per_epoch + 50)
    result = run_command("pretraining.py", *small_run(shards, stopped, optimizer, arch))
    assert result.returncode == 0, result.stderr
    resumed_at = int(result.stdout.partition("going on from ")[2].split()[0][-8:])
    assert steps_per_epoch < resumed_at < 2 * steps_per_epoch

    for file in ("model.safetensors", "training.safetensors"):
        assert (newest(stopped) / file).read_bytes() == (newest(whole) / file).read_bytes(), file
    assert curve(stopped) == curve(whole)

    again = run_command("pretraining.py", *small_run(shards, stopped, optimizer, arch))
    assert again.returncode == 0
    assert "finished" in again.stdout


def test_max_minutes_stops_and_the_same_command_goes_on(tmp_path: Path, sample_shards: Path) -> None:
    shards, output = Path(shutil.copytree(sample_shards, tmp_path / "001")), tmp_path / "out"
    arguments = (*small_run(shards, output, "adamw"), "--max_steps", 3)
    first = run_command("pretraining.py", *arguments, "--max_minutes", 0.00001)
    assert first.returncode == 0, first.stderr
    assert newest(output).name == "step_00000001"
    assert curve(output) == []  # a stop reports nothing that a run without it would not
    assert "stopped at step 1 of 3" in first.stdout
    second = run_command("pretraining.py", *arguments)
    assert "going on from" in second.stdout
    assert newest(output).name == "step_00000003"

    whole = tmp_path / "whole"
    run_command("pretraining.py", *small_run(shards, whole, "adamw"), "--max_steps", 3)
    assert (newest(whole) / "model.safetensors").read_bytes() == (newest(output) / "model.safetensors").read_bytes()


def test_another_run_in_the_same_folder_is_refused(tmp_path: Path, sample_shards: Path) -> None:
    shards, output = Path(shutil.copytree(sample_shards, tmp_path / "001")), tmp_path / "out"
    arguments = (*small_run(shards, output, "adamw"), "--max_steps", 2)
    assert run_command("pretraining.py", *arguments).returncode == 0
    before = {path: path.read_bytes() for path in newest(output).glob("*.*")}
    assert_user_error(run_command("pretraining.py", *arguments, "--seed", 7), "seed", "123", "7")
    assert_user_error(run_command("pretraining.py", *arguments, "--emb_dim", 64), "model")
    assert_user_error(run_command("pretraining.py", *arguments, "--resume", "none"), "--resume auto", str(output))
    assert {path: path.read_bytes() for path in newest(output).glob("*.*")} == before
