"""SIGTERM, SIGINT and SIGHUP in each phase of a run: within 10 seconds there is a checkpoint, and exit code 75.

The run that resumes from it ends byte for byte like one that was never stopped.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    call_command,
    command,
    curve,
    n_reported,
    newest,
    small_run,
    start_process,
)

from gptkit.training.checkpoints import verify_checkpoint
from gptkit.training.signals import EXIT_STOPPED

pytestmark = pytest.mark.slow  # each starts real runs
STEPS = ("--max_steps", 60)  # enough for a signal to come in time


def run_until(
    output: Path, arguments: tuple[object, ...], is_time: Callable[[str], bool], number: int
) -> tuple[int, float, str]:
    """Start the run and send it a signal once `is_time` of what it has printed.

    Return its exit code, the seconds from the signal to the end, and its standard error.
    """
    log, errors = output.with_suffix(".log"), output.with_suffix(".err")
    with open(log, "w") as out, open(errors, "w") as err:
        process = start_process(command("pretraining.py", *arguments), stdout=out, stderr=err)
    deadline = time.monotonic() + 120
    while not is_time(log.read_text("utf-8")):
        assert process.poll() is None, errors.read_text("utf-8")
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(number)
    start = time.monotonic()
    code = process.wait(timeout=60)
    return code, time.monotonic() - start, errors.read_text("utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, short_shards: Path) -> Path:
    """Return the output of a run that nobody stopped."""
    output = tmp_path_factory.mktemp("signals") / "whole"
    result = call_command("pretraining.py", *small_run(short_shards, output, "muon"), *STEPS)
    assert result.returncode == 0, result.stderr
    return output


@pytest.mark.parametrize(
    ("phase", "number", "more"),
    [
        ("start", signal.SIGTERM, ()),
        ("training", signal.SIGTERM, ("--eval_freq", 1000)),
        ("training", signal.SIGINT, ("--eval_freq", 1000)),
        ("training", signal.SIGHUP, ("--eval_freq", 1000)),
        ("evaluation", signal.SIGTERM, ("--eval_freq", 1, "--eval_iter", 400)),
        ("sampling", signal.SIGTERM, ("--print_sample_iter", 1)),
        ("saving", signal.SIGTERM, ("--save_ckpt_freq", 1)),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_signal_in_any_phase(
    tmp_path: Path, short_shards: Path, whole: Path, phase: str, number: signal.Signals, more: tuple[object, ...]
) -> None:
    output = tmp_path / "out"
    arguments = (*small_run(short_shards, output, "muon"), *STEPS)
    is_time = {
        "start": lambda printed: (output / ".lock").exists(),
        "training": lambda printed: "time: about" in printed,
        "evaluation": lambda printed: "step 3/" in printed,
        "sampling": lambda printed: "after step 5:" in printed,
        "saving": lambda printed: any(output.glob(".step_*.partial")),
    }[phase]
    code, seconds, errors = run_until(output, (*arguments, *more), is_time, number)
    assert code == EXIT_STOPPED == 75, errors
    assert seconds < 10
    assert f"stopped by {number.name}: " in errors
    assert "Traceback" not in errors
    if phase == "start":
        assert not output.exists() or not any(output.glob("*step_*"))
    else:
        verify_checkpoint(newest(output))
        assert not list(output.glob(".step_*.partial"))

    result = call_command("pretraining.py", *arguments)
    assert result.returncode == 0, result.stderr
    for file in ("model.safetensors", "training.safetensors"):
        assert (newest(output) / file).read_bytes() == (newest(whole) / file).read_bytes(), file
    if phase in ("start", "training"):  # in the others it reported at other steps
        last = slice(-1, None) if phase == "training" else slice(None)
        assert [r["val_loss"] for r in curve(output)[last]] == [r["val_loss"] for r in curve(whole)[last]]


def test_a_signal_while_the_model_is_compiled(
    tmp_path: Path, short_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler's own processes end too."""
    cache, output = tmp_path / "inductor", tmp_path / "out"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    arguments = (*small_run(short_shards, output, "muon"), *STEPS, "--compile")
    code, seconds, errors = run_until(output, arguments, lambda printed: any(cache.rglob("*.cpp")), signal.SIGTERM)
    assert code == EXIT_STOPPED, errors
    assert seconds < 10
    assert "stopped by SIGTERM: " in errors
    assert "Traceback" not in errors
    assert not output.exists() or not any(output.glob("*step_*"))


def test_a_stop_between_two_reports_leaves_no_trace(tmp_path: Path, short_shards: Path, whole: Path) -> None:
    """The training loss of a report is the mean of all steps since the last one, also those of an earlier session."""
    output = tmp_path / "out"
    arguments = (*small_run(short_shards, output, "muon"), *STEPS)
    code, _, errors = run_until(output, arguments, lambda printed: n_reported(output) >= 20, signal.SIGTERM)
    assert code == EXIT_STOPPED, errors
    state = json.loads((newest(output) / "state.json").read_bytes())
    assert state["n_losses"] == state["step"] % 10
    assert call_command("pretraining.py", *arguments).returncode == 0
    assert curve(output) == curve(whole)


def test_under_nohup_a_closed_terminal_is_ignored(tmp_path: Path, short_shards: Path) -> None:
    output = tmp_path / "out"
    process = start_process(
        ["nohup", *command("pretraining.py", *small_run(short_shards, output, "muon"), *STEPS)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not n_reported(output):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0


def test_a_second_signal_quits_at_once(tmp_path: Path) -> None:
    script = tmp_path / "waits.py"
    script.write_text(
        "import sys, time\nsys.path.insert(0, sys.argv[1])\nfrom gptkit.training.signals import StopSignals\n"
        "stop = StopSignals()\nstop.exits_at_once = False\nprint('ready', flush=True)\n"
        "while not stop.received:\n    time.sleep(0.01)\nprint(stop.received, flush=True)\ntime.sleep(60)\n"
    )
    process = start_process(
        [sys.executable, str(script), str(ROOT)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "SIGTERM\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == -signal.SIGTERM
    process.communicate()


def test_a_signal_while_the_interpreter_ends_changes_nothing(tmp_path: Path) -> None:
    script = tmp_path / "ends.py"
    script.write_text(
        "import os, sys, time\nsys.path.insert(0, sys.argv[1])\nfrom gptkit.training.signals import StopSignals\n"
        "class Slow:\n    def __del__(self, write=os.write, sleep=time.sleep):\n        write(1, b'ending\\n'), sleep(1)\n"
        "stop, slow = StopSignals(), Slow()\n"
    )
    process = start_process([sys.executable, str(script), str(ROOT)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "ending\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 0
    process.communicate()
