"""gptkit/training/run_log.py: what a run prints and writes, by a clock that the tests move."""

import fcntl
import json
import math
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, Clock, environment

from gptkit.base.cli import format_duration
from gptkit.training import run_log
from gptkit.training.run_log import RunLog, draw_loss_curve, read_jsonl, truncate_jsonl

VALUES = {"train_loss": 4.5, "val_loss": 4.75, "lr": 1e-3, "grad_norm": 0.5}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(run_log, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def metrics_of(*steps: int) -> str:
    return "".join(json.dumps({"step": step, "tokens": step * 100, **VALUES}) + "\n" for step in steps)


def test_a_report_is_a_printed_line_and_a_json_object(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path, first_step=0, total_steps=1000, tokens_per_step=2048, elapsed_s=0.0)
    clock.now += 20
    log.report(10, 1, **VALUES)
    clock.now += 80
    log.report(30, 2, **VALUES)
    log.close()
    first, second = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert first == {"step": 10, "epoch": 1, "tokens": 20480, **VALUES, "tokens_per_s": 1024.0, "elapsed_s": 20.0}
    assert second == {"step": 30, "epoch": 2, "tokens": 61440, **VALUES, "tokens_per_s": 512.0, "elapsed_s": 100.0}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (  # 990 steps to go at 2 seconds each
        "epoch 1  step 10/1000  train 4.5000  val 4.7500  lr 1.00e-03  grad norm 0.500  1,024 tokens/s  ETA 0:33:00"
    )
    assert len(lines) == 2


def test_a_resumed_log_continues_its_counts(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """The rate and the ETA are this session's, the elapsed time is the run's; reports after the checkpoint are removed."""
    (tmp_path / "metrics.jsonl").write_text(metrics_of(10, 20, 30) + '{"step": 40, "tok')
    log = RunLog(tmp_path, first_step=20, total_steps=120, tokens_per_step=100, elapsed_s=500.0)
    assert (tmp_path / "metrics.jsonl").read_text() == metrics_of(10, 20)
    clock.now += 30
    log.report(30, 1, **VALUES)
    assert (log.session_s, log.elapsed_s) == (30.0, 530.0)
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [10, 20, 30]
    assert records[-1]["tokens"] == 3000
    assert records[-1]["tokens_per_s"] == pytest.approx(33.3)
    assert records[-1]["elapsed_s"] == 530.0
    assert capsys.readouterr().out.rstrip().endswith("33 tokens/s  ETA 0:04:30")  # 90 steps at 3 seconds each


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ("", ""),
        (metrics_of(10, 20), metrics_of(10, 20)),
        (metrics_of(10, 20, 21), metrics_of(10, 20)),
        (metrics_of(30), ""),
        (metrics_of(10) + metrics_of(20)[:-1], metrics_of(10, 20)),  # only the newline is missing
        (metrics_of(10) + metrics_of(20)[:-20], metrics_of(10)),
        (metrics_of(10) + "\0\0\0\0", metrics_of(10)),  # as some file systems leave after a power cut
    ],
)
def test_reports_that_a_resumed_run_makes_again_are_removed(content: str, kept: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    truncate_jsonl(path, 20)
    assert path.read_text() == kept
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_run_has_no_metrics_yet(tmp_path: Path) -> None:
    assert read_jsonl(tmp_path / "metrics.jsonl") == []
    RunLog(tmp_path, 0, 10, 1, 0.0).close()
    assert list(tmp_path.iterdir()) == []


def test_without_a_terminal_a_line_is_printed_every_minute(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path, first_step=0, total_steps=100, tokens_per_step=1, elapsed_s=0.0)
    for n_done in range(1, 11):
        clock.now += 25
        log.step(n_done, 100)
    assert capsys.readouterr().out.splitlines() == [
        f"step {n_done}/100, ETA {format_duration(25 * (100 - n_done))}" for n_done in (3, 6, 9)
    ]
    log.print_line("a sample")
    clock.now += 25
    log.step(11, 100)
    assert capsys.readouterr().out == "a sample\n"


def test_a_run_whose_length_changes(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """With a budget of time, lines and reports show the latest number of steps and ETA."""
    log = RunLog(tmp_path, first_step=0, total_steps=100, tokens_per_step=1, elapsed_s=0.0)
    clock.now += 100
    log.step(1, 7)
    assert capsys.readouterr().out == "step 1/7, ETA 0:10:00\n"
    clock.now += 100
    log.step(2, 12)
    log.report(2, 1, **VALUES)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 2/12, ETA 0:16:40"
    assert "step 2/12 " in lines[1]
    assert lines[1].endswith("ETA 0:16:40")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.9, "0:00:59"), (60, "0:01:00"), (3723.5, "1:02:03"), (360_000, "100:00:00")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


CHILD = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from gptkit.training.run_log import RunLog
log = RunLog(Path({{folder!r}}), 0, 7, 10, 0.0)
for n_done in (1, 2, 3):
    log.step(n_done, 3)
    log.report(n_done, 1, train_loss=1.0, val_loss=2.0, lr=0.1, grad_norm=0.5)
log.print_line("吾輩は\\n猫である")
log.close()
"""


def check_lines(output: str) -> None:
    lines = output.splitlines()
    assert [line.split("  ")[1] for line in lines[:3]] == ["step 1/3", "step 2/3", "step 3/3"]
    assert lines[3:] == ["吾輩は", "猫である"]


def test_a_log_file_has_no_carriage_return(tmp_path: Path) -> None:
    """A bar, under nohup for example, would be a line of thousands of characters there."""
    result = subprocess.run(
        [sys.executable, "-c", CHILD.format(folder=str(tmp_path))], capture_output=True, env=environment(), timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert b"\r" not in result.stdout
    assert result.stderr == b""
    check_lines(result.stdout.decode())


def test_on_a_terminal_a_bar_does_not_mix_with_the_lines(tmp_path: Path) -> None:
    terminal, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # without a width tqdm draws nothing
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(folder=str(tmp_path))],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment(),
    )
    os.close(theirs)
    output, _ = child.communicate(timeout=60)
    shown = b""
    while True:
        try:
            block = os.read(terminal, 65536)
        except OSError:  # the terminal's end, on Linux
            break
        if not block:
            break
        shown += block
    os.close(terminal)
    assert child.returncode == 0, shown
    assert b"\r" not in output
    check_lines(output.decode())
    assert b"pretrain" in shown
    assert b"3/3" in shown


def png_size(path: Path) -> tuple[int, int]:
    """Return width and height in pixels, from the header at the beginning of a PNG."""
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    assert raw[12:16] == b"IHDR"
    return struct.unpack(">II", raw[16:24])


@pytest.mark.parametrize("n_reports", [0, 1, 100])
def test_the_loss_curve_is_a_picture(n_reports: int, tmp_path: Path) -> None:
    path = tmp_path / "loss_curve.png"
    path.write_text("an older one")
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(metrics_of(*range(1, n_reports + 1)))
    draw_loss_curve(metrics, path)
    width, height = png_size(path)
    assert 500 < height < width < 2000
    assert path.stat().st_size > 5000
    assert sorted(tmp_path.iterdir()) == [path, metrics]


def test_the_loss_curve_shows_both_losses(tmp_path: Path) -> None:
    """Each of them changes the picture, and so does a loss that is not a number."""
    pictures = set()
    for train_loss, val_loss in ((1.0, 2.0), (1.0, 3.0), (0.5, 2.0), (1.0, math.nan)):
        records = [
            {"step": 1, "tokens": 100, "train_loss": 4.0, "val_loss": 4.0},
            {"step": 2, "tokens": 200, "train_loss": train_loss, "val_loss": val_loss},
        ]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        draw_loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss_curve.png")
        pictures.add((tmp_path / "loss_curve.png").read_bytes())
    assert len(pictures) == 4


def test_a_picture_that_fails_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")  # a report without losses
    draw_loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss_curve.png")
    assert "could not be drawn" in capsys.readouterr().err
    assert not (tmp_path / "loss_curve.png").exists()


def test_a_line_that_cannot_be_written_is_written_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    log = RunLog(tmp_path, 0, 10, 8, 0.0)
    values = dict(train_loss=2.0, val_loss=3.0, lr=0.1, grad_norm=1.0)
    log.report(1, 1, **values)
    before = log.metrics_path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("gptkit.training.run_log.os.fsync", full)
        log.report(2, 1, **values)
    assert log.metrics_path.read_bytes() == before
    assert "could not be written" in capsys.readouterr().out
    log.report(3, 1, **values)
    log.close()
    assert [record["step"] for record in read_jsonl(log.metrics_path)] == [1, 2, 3]


def test_samples_are_written_as_reports_are(tmp_path: Path) -> None:
    """They are complete, whatever is in them, and removed where a resumed run, or one that diverged, repeats their steps."""
    texts = ["春\n夏\u2028秋\x85", '"\\', "\ud842", ""]  # line ends of many kinds, half a surrogate pair
    log = RunLog(tmp_path, 0, 10, 8, 0.0)
    for step, text in enumerate(texts, start=1):
        log.sample(step, text)
    log.close()
    path = tmp_path / "samples.jsonl"
    assert "春" in path.read_text("utf-8")
    expected = [{"step": n, "tokens": 8 * n, "text": text} for n, text in enumerate(texts, start=1)]
    assert read_jsonl(path) == expected
    log = RunLog(tmp_path, 3, 10, 8, 0.0)
    assert read_jsonl(path) == expected[:3]
    log.roll_back(2)
    log.close()
    assert read_jsonl(path) == expected[:2]
