"""Standard streams that are closed, full or without a reader end no command's work; run.log has what was printed."""

import fcntl
import io
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    LINUX_ONLY,
    ROOT,
    SAMPLE,
    SAMPLE_TOKENS,
    assert_user_error,
    call_command,
    command,
    n_reported,
    newest,
    reset_signals,
    small_run,
    start_process,
)

from gptkit.base.streams import LogFile, OutputStream
from gptkit.training.checkpoints import verify_checkpoint
from gptkit.training.signals import EXIT_STOPPED

STEPS = ("--max_steps", 60)
NEVER = ("--n_epochs", 100_000, "--save_ckpt_freq", 100_000)


class Refusing(io.RawIOBase):
    """A file that takes `room` bytes, then raises."""

    def __init__(self, room: int, error: Exception) -> None:
        self.room, self.error, self.written = room, error, b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if not self.room:
            raise self.error
        taken = bytes(data[: self.room])
        self.room -= len(taken)
        self.written += taken
        return len(taken)


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(5, "EIO"), OSError(28, "ENOSPC"), ValueError("closed")])
def test_what_a_stream_refuses_is_dropped(error: Exception) -> None:
    file = Refusing(4, error)
    stream = OutputStream(io.TextIOWrapper(io.BufferedWriter(file), "utf-8"))
    print("abc", file=stream)
    assert not stream.has_failed
    print("defgh", file=stream, flush=True)
    assert (file.written, stream.has_failed) == (b"abc\n", True)


def test_a_partial_write_is_continued() -> None:
    class Slow(Refusing):
        def write(self, data: Any) -> int:
            return super().write(data[:3])

    file = Slow(1000, OSError())
    print("吾輩は猫である", file=OutputStream(io.TextIOWrapper(io.BufferedWriter(file), "utf-8")))
    assert file.written.decode() == "吾輩は猫である\n"


def test_a_full_pipe_that_does_not_block_is_waited_for() -> None:
    """A terminal or pipe may be non-blocking because of another program that has it open."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    text = "花" * 100_000
    program = (
        f"import os, time; time.sleep(0.5); n = 0\nwhile n < {3 * len(text) + 1}: n += len(os.read({reader}, 9999))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], pass_fds=[reader])
    with open(writer, "w", encoding="utf-8") as file:
        stream = OutputStream(file)
        print(text, file=stream)
    assert process.wait(timeout=30) == 0
    assert not stream.has_failed
    os.close(reader)


def test_a_reader_that_does_not_read_is_not_waited_for_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal stopped by Ctrl-S, or a connection that hangs; once it reads again, it gets what is printed then."""
    monkeypatch.setattr("gptkit.base.streams.STALLED_S", 0.2)
    reader, writer = os.pipe()
    with open(writer, "w", encoding="utf-8") as file:
        stream = OutputStream(file)
        start = time.monotonic()
        print("花" * 100_000, file=stream)
        print("lost", file=stream)
        assert 0.2 < time.monotonic() - start < 2
        assert stream.has_failed
        os.set_blocking(reader, False)
        while len(os.read(reader, 1 << 20)) == 1 << 20:
            pass
        print("again", file=stream)
        assert os.read(reader, 100) == b"again\n"
    os.close(reader)


def test_a_log_has_lines_but_no_bars(tmp_path: Path) -> None:
    out, errors = (OutputStream(io.TextIOWrapper(io.BytesIO(), "ascii")) for _ in range(2))
    out.log = errors.log = LogFile(tmp_path / "run.log")
    errors.write("\rbar 1 of 2")
    print("報告", file=out)
    errors.write("\rbar 2 of 2")
    errors.write("\n")
    print("a", end="", file=errors)
    print("one\r\ntwo\rthree", file=out)
    print("b", file=errors)
    out.flush()
    assert (tmp_path / "run.log").read_bytes().decode() == "報告\none\ntwo\nthree\nab\n"


def test_a_log_on_a_full_disk_catches_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = LogFile(tmp_path / "run.log")
    log.append("a\n")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: (_ for _ in ()).throw(OSError(28, "full")))
        log.append("b\n")
    log.append("c\n")
    assert (tmp_path / "run.log").read_text() == "a\nb\nc\n"


def test_run_log_has_what_was_printed(tmp_path: Path, short_shards: Path) -> None:
    """Both streams, and both sessions of a run; a command that is refused before the run begins leaves no log."""
    output = tmp_path / "out"
    arguments = small_run(short_shards, output, "adamw")
    refused = call_command("pretraining.py", *arguments, "--data_dir", tmp_path / "none")
    assert_user_error(refused)
    assert not output.exists()
    first = call_command("pretraining.py", *arguments, "--max_steps", 10)
    second = call_command("pretraining.py", *arguments, "--max_steps", 20)
    damaged = call_command("pretraining.py", *arguments, "--max_steps", 20, "--optimizer", "muon")
    assert_user_error(damaged)
    logged = (output / "run.log").read_bytes().decode().split("\n")
    assert [line.split("  ")[1].split(" ", 1)[1] for line in logged if line.startswith("--- ")] == [
        " ".join(map(str, result.args[1:])) for result in (first, second, damaged)
    ]
    for stream in ("stdout", "stderr"):
        printed = "".join(getattr(result, stream) for result in (first, second, damaged)).splitlines()
        assert printed
        found = iter(logged)
        assert all(line in found for line in printed), stream  # in this order


def test_a_refusal_that_nobody_can_read_is_in_run_log(tmp_path: Path, short_shards: Path) -> None:
    output = tmp_path / "out"
    arguments = (*small_run(short_shards, output, "adamw"), "--context_length", 100_000)
    process = start_process(
        command("pretraining.py", *arguments), preexec_fn=lambda: (os.close(1), os.close(2), reset_signals())
    )
    assert process.wait(timeout=100) == 2
    assert (output / "run.log").read_text("utf-8").splitlines()[-1].startswith("error: ")


def test_the_log_of_a_user_is_not_removed(tmp_path: Path, short_shards: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "run.log").write_text("mine\n")
    call_command("pretraining.py", *small_run(short_shards, output, "adamw"), "--context_length", 100_000)
    assert (output / "run.log").read_text("utf-8").startswith("mine\n")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_stream_that_the_user_sends_to_run_log_is_not_copied(tmp_path: Path, short_shards: Path, stream: str) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with open(output / "run.log", "w") as file:
        streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | {stream: file}
        process = start_process(
            command("pretraining.py", *small_run(short_shards, output, "adamw"), "--max_steps", 10), **streams
        )
        assert process.wait(timeout=100) == 0
    assert (output / "run.log").read_text("utf-8").count("step 10/10") == (1 if stream == "stdout" else 0)


def test_a_signal_while_a_line_is_logged_does_not_log_it_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal arrives as the file has taken the line, and its handler prints one itself, on the same stream."""
    stream = OutputStream(io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    stream.log = LogFile(tmp_path / "log")
    write, numbers = os.write, [signal.SIGUSR1]

    def write_and_receive(descriptor: int, data: bytes) -> int:
        n_written = write(descriptor, data)
        if numbers:
            signal.raise_signal(numbers.pop())
        return n_written

    monkeypatch.setattr(os, "write", write_and_receive)
    before = signal.signal(signal.SIGUSR1, lambda number, frame: print("a signal", file=stream, flush=True))
    try:
        print("a line", file=stream, flush=True)
        stream.write("a half")
        numbers.append(signal.SIGUSR1)
        stream.flush()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert sorted((tmp_path / "log").read_text("utf-8").splitlines()) == ["a halfa signal", "a line", "a signal"]


# Real runs on streams that are gone

Stream = tuple[int, Callable[[], None]]  # a descriptor to write to, and what makes it fail


def lost_pipe() -> Stream:
    """Return a pipe and a function that lets its reader leave, as a killed `tee` does."""
    reader, writer = os.pipe()
    return writer, lambda: os.close(reader)


def lost_terminal() -> Stream:
    """Return a terminal and a function that closes it."""
    master, slave = pty.openpty()
    return slave, lambda: os.close(master)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("lost", [lost_pipe, lost_terminal])
@pytest.mark.parametrize("both", [True, False])
def test_a_run_is_saved_though_its_output_is_gone(
    tmp_path: Path, short_shards: Path, lost: Callable[[], Stream], number: signal.Signals, both: bool
) -> None:
    output = tmp_path / "out"
    writer, lose = lost()
    process = start_process(
        command("pretraining.py", *small_run(short_shards, output, "adamw"), *NEVER),
        stdout=writer,
        stderr=writer if both else subprocess.DEVNULL,
    )
    os.close(writer)
    wait_for_report(process, output, 10)
    lose()
    wait_for_report(process, output, 30)
    process.send_signal(number)
    assert process.wait(timeout=60) == EXIT_STOPPED
    assert_saved(output, number)


@pytest.mark.slow
def test_a_closed_terminal_saves_the_run(tmp_path: Path, short_shards: Path) -> None:
    """It sends SIGHUP to the processes that it controls; run.log has no progress bars."""
    output = tmp_path / "out"
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))

    def take_terminal() -> None:
        reset_signals()
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    process = start_process(
        command("pretraining.py", *small_run(short_shards, output, "adamw"), *NEVER),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        preexec_fn=take_terminal,
    )
    os.close(slave)
    printed = b""
    while n_reported(output) < 30:
        assert process.poll() is None
        printed += os.read(master, 100_000)
    assert b"\r" in printed.replace(b"\r\n", b"")  # there was a bar
    os.close(master)
    assert process.wait(timeout=60) == EXIT_STOPPED
    assert_saved(output, signal.SIGHUP)


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["1", "2", "1 2", "0 1 2", pytest.param("full", marks=LINUX_ONLY)])
def test_a_run_without_standard_streams_ends_well(tmp_path: Path, short_shards: Path, closed: str) -> None:
    output = tmp_path / "out"

    def close() -> None:
        reset_signals()
        for descriptor in closed.split() if closed != "full" else []:
            os.close(int(descriptor))

    with open("/dev/full" if closed == "full" else os.devnull, "w") as file:
        process = start_process(
            command("pretraining.py", *small_run(short_shards, output, "adamw"), *STEPS),
            stdout=file,
            stderr=file,
            preexec_fn=close,
        )
    assert process.wait(timeout=100) == 0
    assert newest(output).name == "step_00000060"
    logged = (output / "run.log").read_text("utf-8")
    assert "step 60/60" in logged
    assert "Traceback" not in logged


def wait_for_report(process: subprocess.Popen, output: Path, step: int) -> None:
    deadline = time.monotonic() + 100
    while n_reported(output) < step:
        assert process.poll() is None, (output / "run.log").read_text("utf-8")
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_saved(output: Path, number: signal.Signals) -> None:
    """Assert that the signal stopped the run with a checkpoint, and that run.log and sessions.jsonl have it all."""
    verify_checkpoint(newest(output))
    step = int(newest(output).name.removeprefix("step_"))
    end = json.loads((output / "sessions.jsonl").read_text("utf-8").splitlines()[-1])["end"]
    assert (end["how"], end["reason"], end["step"]) == ("stopped", number.name, step)
    logged = (output / "run.log").read_bytes().decode()
    assert "\r" not in logged
    assert "%|" not in logged
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [line.split("step ")[1].split("/")[0] for line in logged.splitlines() if line.startswith("epoch ")] == [
        str(step) for step in steps
    ]
    assert logged.splitlines()[-1].startswith(f"stopped by {number.name}: step {step} of ")


def run_without_reader(script: str, *arguments: object, **how: Any) -> subprocess.CompletedProcess:
    """Run a command whose output pipes have no reader."""
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(command(script, *arguments), **{"stdout": writer, "stderr": writer} | how, timeout=100)
    os.close(writer)
    return process


def test_scripts_end_well_though_nobody_reads(tmp_path: Path) -> None:
    shards = ("dataset/prepare_aozora_jsonl.py", "--jsonl_path", SAMPLE, "--output_dir", tmp_path / "001")
    assert run_without_reader(*shards).returncode == 0
    assert (tmp_path / "001" / "manifest.json").exists()
    assert run_without_reader(*shards, preexec_fn=lambda: (os.close(1), os.close(2))).returncode == 0
    tokens = ("--data_dir", tmp_path / "001", "--output_dir", tmp_path / "001_pretok", "--num_workers", 2)
    assert run_without_reader("pretokenize.py", *SAMPLE_TOKENS, *tokens).returncode == 0
    assert (tmp_path / "001_pretok" / "manifest.json").exists()


def test_an_evaluation_that_nobody_reads_is_kept(tmp_path: Path, trained: Path) -> None:
    arguments = ("evaluate_model.py", "--exp_dir", trained, "--text_path", SAMPLE, "--max_chars", 100)
    assert run_without_reader(*arguments, cwd=tmp_path).returncode == 0
    expected = json.loads(call_command(*arguments).stdout)
    assert json.loads((tmp_path / "evaluate_model.out").read_text()) == expected


COMMANDS = (
    *("pretraining.py", "pretokenize.py", "inference.py", "demo.py", "evaluate_model.py", "export_hf.py", "report.py"),
    *("dataset/prepare_aozora_jsonl.py", "dataset/train_tokenizer.py", "dataset/download_aozora.py"),
)


# Runs a script that is interrupted when it imports a module.
INTERRUPTED = """
import os, runpy, signal, sys

class Interrupt:
    def find_spec(self, name, *where):
        if name in ("gptkit.base.cli", "_script"):
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
sys.argv = [sys.argv[1], "--help"]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", COMMANDS)
def test_ctrl_c_during_the_imports_prints_nothing(script: str) -> None:
    process = start_process(
        [sys.executable, "-c", INTERRUPTED, str(ROOT / script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.communicate(timeout=60)[0] == b""
    assert process.returncode == -signal.SIGINT


@pytest.mark.slow
@LINUX_ONLY
@pytest.mark.parametrize("seconds", [0.05, 0.1, 0.15, 0.2])
def test_ctrl_c_while_the_workers_start_prints_no_traceback(
    tmp_path: Path, sample_shards: Path, seconds: float
) -> None:
    """A terminal sends the signal to all processes of a command."""
    arguments = (*SAMPLE_TOKENS, "--data_dir", sample_shards, "--output_dir", tmp_path / "out", "--num_workers", 2)
    process = start_process(
        command("pretokenize.py", *arguments), stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < 3:  # the workers, and multiprocessing's tracker of resources
        assert process.poll() is None
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (errors, process.returncode) == ("interrupted\n", 130)
