"""The log of a run: printed lines, a progress bar, metrics.jsonl and samples.jsonl for programs, loss_curve.png to look at.

What is reported, and when, is decided elsewhere. A Logger (training/loggers.py) may show it somewhere else too.
"""

import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gptkit.base.cli import QUIET_S, format_duration, print_line
from gptkit.base.files import as_dict, read_json, replace, sync
from gptkit.base.streams import log_line

RUN_FILE, RUN_FORMAT = "config.json", "gptkit-run"  # what a run is, and how that file is recognized
METRICS_FILE, SAMPLES_FILE, CURVE_FILE = "metrics.jsonl", "samples.jsonl", "loss_curve.png"
LOG_FILE = "run.log"  # what was printed
MAX_NUMBER = 1e18  # a larger value is not a measurement of a run, and would break a chart


@dataclass(frozen=True)
class Logger:
    """Where else reports and samples are shown; by default nowhere."""

    report: Callable[[int, Mapping[str, float]], None] = lambda step, values: None
    sample: Callable[[int, str], None] = lambda step, text: None
    roll_back: Callable[[int], None] = lambda step: None  # the steps after it are done again
    close: Callable[[], None] = lambda: None


class JsonlFile:
    """A file of JSON objects, one per line, each with its "step"; a line that a full disk refused is retried."""

    def __init__(self, path: Path, warn: Callable[[str], None], writes: bool = True) -> None:
        self.path, self._warn, self._writes = path, warn, writes
        self._unwritten: list[bytes] = []

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a line completely or not at all; what cannot be written now is written before the next one."""
        if not self._writes:
            return
        self._unwritten.append(json_line(record))
        try:
            with open(self.path, "ab", buffering=0) as file:
                end = file.tell()
                try:
                    for line in self._unwritten:
                        if file.write(line) < len(line):
                            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    sync(file.fileno())
                except OSError:
                    file.truncate(end)
                    raise
            self._unwritten.clear()
        except OSError as error:
            self._warn(f"warning: {self.path} could not be written ({error}); the next line retries")

    def truncate_after(self, step: int) -> None:
        """Drop what comes after `step`: the steps from there on are done again."""
        if not self._writes:
            return
        self._unwritten[:] = [line for line in self._unwritten if json.loads(line)["step"] <= step]
        truncate_jsonl(self.path, step)


class RunLog:
    """The log of one session of a run: from first_step (0 in a new run) to total_steps.

    Without `writes` it leaves its files alone: only the main process writes them.
    """

    def __init__(
        self,
        output_dir: Path,
        first_step: int,
        total_steps: int,
        tokens_per_step: int,
        elapsed_s: float,
        logger: Logger | None = None,
        writes: bool = True,
    ) -> None:
        self.metrics_path = output_dir / METRICS_FILE
        self.curve_path = output_dir / CURVE_FILE
        self.total_steps, self.tokens_per_step = total_steps, tokens_per_step
        self._elapsed_before_s, self._start = elapsed_s, time.monotonic()
        self._first_step = first_step
        self._printed_at = self._start  # when the last line was printed
        self._reported = (first_step, self._start)
        self._logger = logger or Logger()
        self._metrics = JsonlFile(self.metrics_path, self.print_line, writes)
        self._samples = JsonlFile(output_dir / SAMPLES_FILE, self.print_line, writes)
        for file in (self._metrics, self._samples):
            file.truncate_after(first_step)
        self._bar = tqdm(
            total=total_steps, initial=first_step, unit="step", desc="pretrain", disable=not sys.stderr.isatty()
        )

    @property
    def session_s(self) -> float:
        """Return the seconds since this session's first step."""
        return time.monotonic() - self._start

    @property
    def elapsed_s(self) -> float:
        """Return the seconds of training, those of earlier sessions included."""
        return self._elapsed_before_s + self.session_s

    def print_line(self, text: str) -> None:
        """Print a line (or several), clear of the progress bar."""
        self._printed_at = time.monotonic()
        print_line(text)

    def step(self, n_done: int, total_steps: int) -> None:
        """Show that n_done steps are done, of total_steps: with a budget of time that number changes."""
        self.total_steps = self._bar.total = total_steps
        self._bar.update(1)
        if time.monotonic() - self._printed_at > QUIET_S:
            line = f"step {n_done}/{self.total_steps}, ETA {self._eta(n_done)}"
            if self._bar.disable:
                self.print_line(line)
            else:
                self._printed_at = time.monotonic()
                log_line(line)

    def report(self, n_done: int, epoch: int, **values: float) -> None:
        """Print a line and append to metrics.jsonl: train_loss, val_loss (nats per token), lr, grad_norm.

        Where weights are averaged, averaged_val_loss is among the values too. What is not finite, as the norm of a step that was skipped, is left out there: JSON has no word for it.
        """
        reported_step, reported_at = self._reported
        now = time.monotonic()
        rate = (n_done - reported_step) * self.tokens_per_step / max(now - reported_at, 1e-9)
        self._reported = (n_done, now)
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        record: dict[str, Any] = {"step": n_done, "epoch": epoch, "tokens": n_done * self.tokens_per_step, **finite}
        record |= {"tokens_per_s": round(rate, 1), "elapsed_s": round(self.elapsed_s, 2)}
        self._metrics.append(record)
        averaged = f" ({values['averaged_val_loss']:.4f} averaged)" if "averaged_val_loss" in values else ""
        self.print_line(
            f"epoch {epoch}  step {n_done}/{self.total_steps}  train {values['train_loss']:.4f}  val {values['val_loss']:.4f}"
            f"{averaged}  lr {values['lr']:.2e}  grad norm {values['grad_norm']:.3f}  {rate:,.0f} tokens/s  ETA {self._eta(n_done)}"
        )
        self._logger.report(n_done, {name: value for name, value in record.items() if name != "step"})

    def sample(self, n_done: int, text: str) -> None:
        """Print a sample that the model generated after n_done steps, and append it to samples.jsonl."""
        self.print_line(f"sample after step {n_done}: {text}")
        self._samples.append({"step": n_done, "tokens": n_done * self.tokens_per_step, "text": text})
        self._logger.sample(n_done, text)

    def roll_back(self, step: int) -> None:
        """Drop the reports and samples after `step`: the steps from there on are done again."""
        for file in (self._metrics, self._samples):
            file.truncate_after(step)
        self._logger.roll_back(step)
        self._reported = (step, time.monotonic())
        self._bar.update(step - self._bar.n)

    def _eta(self, n_done: int) -> str:
        per_step_s = self.session_s / max(n_done - self._first_step, 1)
        return format_duration(per_step_s * (self.total_steps - n_done))

    def close(self) -> None:
        """Close the progress bar and the logger."""
        self._bar.close()
        self._logger.close()


def json_line(record: Mapping[str, Any]) -> bytes:
    """Return a record as one line of a .jsonl, readable in any script; a lone surrogate becomes JSON's escape of it."""
    return (json.dumps(record, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects with a step in a .jsonl; broken lines, as a crash leaves them, are skipped. [] without a file."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # a text may hold U+2028
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
    return records


def read_run_config(output_dir: Path) -> dict[str, Any]:
    """Return the config.json of a run, or {} where there is none that can be read."""
    path = output_dir / RUN_FILE
    try:
        return as_dict(read_json(path)) if path.is_file() else {}
    except (OSError, ValueError):
        return {}


def as_number(value: Any) -> float | None:
    """Return a value of a record as a float, or None where it is not a number that can be plotted."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < MAX_NUMBER else None  # a NaN is not below anything


def truncate_jsonl(path: Path, step: int) -> None:
    """Drop lines after `step`: a resumed run does those steps again."""
    if path.exists():
        kept = b"".join(json_line(record) for record in read_jsonl(path) if record["step"] <= step)
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_bytes(kept)
            replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def run_name(output_dir: Path) -> str:
    """Return what a person calls the run in that folder: exp001, for exp001/model_checkpoints."""
    folder = output_dir.resolve()
    return folder.parent.name if folder.name == "model_checkpoints" and folder.parent.name else folder.name


def draw_loss_curve(metrics_path: Path, path: Path) -> None:
    """Draw training and validation loss (nats per token) over tokens, as a PNG. A failure is a warning."""
    try:
        _draw_loss_curve(read_jsonl(metrics_path), path)
    except Exception as error:  # whatever a drawing library raises, it must not end a run
        print(f"warning: {path} could not be drawn ({error})", file=sys.stderr)


def _draw_loss_curve(metrics: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    tokens = [record["tokens"] / 1e6 for record in metrics]
    labels = {"train_loss": "training", "val_loss": "validation"}
    if any("averaged_val_loss" in record for record in metrics):
        labels["averaged_val_loss"] = "validation, averaged weights"
    for name, label in labels.items():
        losses = [record.get(name, math.nan) for record in metrics]
        axes.plot(tokens, losses, label=label, marker="." if len(tokens) < 40 else None)
    axes.set(xlabel="million tokens", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, format="png", dpi=120, bbox_inches="tight")
        replace(partial, path)
    finally:
        pyplot.close(figure)
        partial.unlink(missing_ok=True)
