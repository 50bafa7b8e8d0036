"""A run that was killed and started again ends byte for byte like one that never stopped.

Real kills (SIGKILL: no chance to save) in the first epoch and in the second, with dropout and gradient accumulation.
"""

import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import assert_user_error, call_command, command, curve, environment, n_reported, newest, small_run

VARIED = (
    *("--lr_schedule", "linear", "--decay_schedule", "dip", "--cautious_decay", "--muon_scaling", "neurons"),
    *("--momentum_warmup", 40, "--embedding_decay", 0.1, "--share_characters", 0.5, "--further_tokens", 0.5),
)
ANEW = ("--shuffle", "documents", "--replace_rate", 0.1)


def run_and_kill(arguments: tuple[object, ...], output: Path, step: int) -> None:
    """Start the run and kill it after its report at `step`."""
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "arch", "flags"),
    [
        ("muon", "modern", ANEW),
        ("muon", "modern", VARIED),
        ("muon", "modern", ()),
        ("adamw", "gpt2", ()),
        ("galore_adamw", "modern", ()),
    ],
)
def test_killed_twice_equals_never_stopped(
    tmp_path: Path, short_shards: Path, optimizer: str, arch: str, flags: tuple[object, ...]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run, run_stopped = (
        (*small_run(short_shards, output, optimizer, arch), "--save_ckpt_freq", 10, "--average_epochs", 0.5, *flags)
        for output in (whole, stopped)
    )
    result = call_command("pretraining.py", *run)
    assert result.returncode == 0, result.stderr
    steps_per_epoch = curve(whole)[-1]["step"] // 2

    run_and_kill(run_stopped, stopped, step=20)
    run_and_kill(run_stopped, stopped, step=steps_per_epoch + 20)
    result = call_command("pretraining.py", *run_stopped)
    assert result.returncode == 0, result.stderr
    resumed_at = int(result.stdout.partition("resuming from ")[2].split()[0][-8:])
    assert steps_per_epoch < resumed_at < 2 * steps_per_epoch

    for file in ("model.safetensors", "training.safetensors", "averaged.safetensors"):
        assert (newest(stopped) / file).read_bytes() == (newest(whole) / file).read_bytes(), file
    assert curve(stopped) == curve(whole)

    again = call_command("pretraining.py", *run_stopped)
    assert again.returncode == 0
    assert "finished" in again.stdout


@pytest.mark.parametrize("flags", [(), ANEW], ids=["", "documents"])
def test_max_minutes_stops_and_the_same_command_resumes(
    tmp_path: Path, short_shards: Path, flags: tuple[object, ...]
) -> None:
    output = tmp_path / "out"
    arguments = (*small_run(short_shards, output, "adamw"), "--max_steps", 3, *flags)
    first = call_command("pretraining.py", *arguments, "--max_minutes", 0.00001)
    assert first.returncode == 0, first.stderr
    assert newest(output).name == "step_00000001"
    assert curve(output) == []  # a stop reports nothing that a run without it would not
    assert "stopped at step 1 of 3" in first.stdout
    second = call_command("pretraining.py", *arguments)
    assert "resuming from" in second.stdout
    assert newest(output).name == "step_00000003"

    whole = tmp_path / "whole"
    call_command("pretraining.py", *small_run(short_shards, whole, "adamw"), "--max_steps", 3, *flags)
    assert (newest(whole) / "model.safetensors").read_bytes() == (newest(output) / "model.safetensors").read_bytes()


def test_another_run_in_the_same_folder_is_refused(tmp_path: Path, short_shards: Path) -> None:
    output = tmp_path / "out"
    arguments = (*small_run(short_shards, output, "adamw"), "--max_steps", 2)
    assert call_command("pretraining.py", *arguments).returncode == 0
    before = {path: path.read_bytes() for path in newest(output).glob("*.*")}
    assert_user_error(call_command("pretraining.py", *arguments, "--seed", 7), "seed", "123", "7")
    assert_user_error(call_command("pretraining.py", *arguments, "--emb_dim", 64), "model")
    assert_user_error(call_command("pretraining.py", *arguments, "--resume", "none"), "--resume auto", str(output))
    assert {path: path.read_bytes() for path in newest(output).glob("*.*")} == before
