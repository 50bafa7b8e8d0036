"""What a run says: lines for a person, metrics.jsonl and samples.jsonl for programs, loss_curve.png for the eye, a bar.

Leaves to others what is reported and when, and to a Logger (gptkit/loggers.py makes it) where else it is shown.
"""

import errno
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gptkit.base.cli import QUIET_S, format_duration
from gptkit.base.files import as_dict, read_json

RUN_FILE, RUN_FORMAT = "config.json", "gptkit-run"  # the file that makes a folder a run's, and its "format"
MAX_NUMBER = 1e18  # a larger value is not a measurement of a run, and would break a chart


@dataclass(frozen=True)
class Logger:
    """Where else reports and samples are shown; by itself nowhere."""

    report: Callable[[int, Mapping[str, float]], None] = lambda step, values: None
    sample: Callable[[int, str], None] = lambda step, text: None
    roll_back: Callable[[int], None] = lambda step: None  # the steps after it are done again
    close: Callable[[], None] = lambda: None


class JsonlFile:
    """A file of JSON objects, one a line, each with its "step"; what a full disk does not take waits for the next."""

    def __init__(self, path: Path, say: Callable[[str], None], writes: bool = True) -> None:
        self.path, self._say, self._writes = path, say, writes
        self._unwritten: list[bytes] = []

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a line, whole or not at all; what cannot be written now comes before the next one."""
        if not self._writes:
            return
        self._unwritten.append(json_line(record))
        try:
            with open(self.path, "ab", buffering=0) as file:
                end = file.tell()
                try:
                    for part in self._unwritten:
                        if file.write(part) < len(part):
                            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(end)
                    raise
            self._unwritten.clear()
        except OSError as error:
            self._say(f"warning: {self.path} could not be written ({error}); its lines wait for the next one")

    def truncate_after(self, step: int) -> None:
        """Drop what comes after `step`, which is done again from there."""
        if not self._writes:
            return
        self._unwritten[:] = [line for line in self._unwritten if json.loads(line)["step"] <= step]
        truncate_jsonl(self.path, step)


class RunLog:
    """The log of one session of a run: from step first_step (0 in a new run) on to total_steps.

    Without `writes` it leaves its files alone: one process of several writes them.
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
        self.metrics_path = output_dir / "metrics.jsonl"
        self.curve_path = output_dir / "loss_curve.png"
        self.total_steps, self.tokens_per_step = total_steps, tokens_per_step
        self._elapsed_before_s, self._start = elapsed_s, time.monotonic()
        self._first_step = first_step
        self._said = self._start  # when the last line was printed
        self._reported = (first_step, self._start)
        self._logger = logger or Logger()
        self._metrics = JsonlFile(self.metrics_path, self.say, writes)
        self._samples = JsonlFile(output_dir / "samples.jsonl", self.say, writes)
        for file in (self._metrics, self._samples):
            file.truncate_after(first_step)
        self._bar = tqdm(
            total=total_steps, initial=first_step, unit="step", desc="pretrain", disable=not sys.stderr.isatty()
        )

    @property
    def session_s(self) -> float:
        """Seconds since this session's first step."""
        return time.monotonic() - self._start

    @property
    def elapsed_s(self) -> float:
        """Seconds of training, those of earlier sessions included."""
        return self._elapsed_before_s + self.session_s

    def say(self, text: str) -> None:
        """A line (or several) on standard output, clear of the bar."""
        self._said = time.monotonic()
        tqdm.write(text, sys.stdout)
        sys.stdout.flush()

    def step(self, n_done: int, total_steps: int) -> None:
        """Step number n_done is done, of total_steps: with a budget of time that number changes."""
        self.total_steps = self._bar.total = total_steps
        self._bar.update(1)
        if self._bar.disable and time.monotonic() - self._said > QUIET_S:
            self.say(f"step {n_done}/{self.total_steps}, ETA {self._eta(n_done)}")

    def report(self, n_done: int, epoch: int, **values: float) -> None:
        """One line and one object of metrics.jsonl: train_loss, val_loss, lr, grad_norm."""
        reported_step, reported_at = self._reported
        now = time.monotonic()
        rate = (n_done - reported_step) * self.tokens_per_step / max(now - reported_at, 1e-9)
        self._reported = (n_done, now)
        record: dict[str, Any] = {"step": n_done, "epoch": epoch, "tokens": n_done * self.tokens_per_step, **values}
        record |= {"tokens_per_s": round(rate, 1), "elapsed_s": round(self.elapsed_s, 2)}
        self._metrics.append(record)
        self.say(
            f"epoch {epoch}  step {n_done}/{self.total_steps}  train {values['train_loss']:.4f}  val {values['val_loss']:.4f}"
            f"  lr {values['lr']:.2e}  grad norm {values['grad_norm']:.3f}  {rate:,.0f} tokens/s  ETA {self._eta(n_done)}"
        )
        self._logger.report(n_done, {name: value for name, value in record.items() if name != "step"})

    def sample(self, n_done: int, text: str) -> None:
        """What the model writes after step n_done."""
        self.say(f"sample after step {n_done}: {text}")
        self._samples.append({"step": n_done, "tokens": n_done * self.tokens_per_step, "text": text})
        self._logger.sample(n_done, text)

    def roll_back(self, step: int) -> None:
        """Forget the reports and samples after `step`, which is done again from there."""
        for file in (self._metrics, self._samples):
            file.truncate_after(step)
        self._logger.roll_back(step)
        self._reported = (step, time.monotonic())
        self._bar.update(step - self._bar.n)

    def _eta(self, n_done: int) -> str:
        per_step_s = self.session_s / max(n_done - self._first_step, 1)
        return format_duration(per_step_s * (self.total_steps - n_done))

    def close(self) -> None:
        self._bar.close()
        self._logger.close()


def json_line(record: Mapping[str, Any]) -> bytes:
    """One line of a .jsonl, whose text a person can read; half a surrogate pair becomes JSON's escape of it."""
    return (json.dumps(record, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects with a step in a .jsonl; a line that is none, as a crash leaves it, is left out. No file: none."""
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
    """Drop lines after `step`: they come from steps that a resumed run does again."""
    if path.exists():
        kept = b"".join(json_line(record) for record in read_jsonl(path) if record["step"] <= step)
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_bytes(kept)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def run_name(output_dir: Path) -> str:
    """What a person calls the run whose files lie in that folder: exp001, of exp001/model_checkpoints."""
    folder = output_dir.resolve()
    return folder.parent.name if folder.name == "model_checkpoints" and folder.parent.name else folder.name


def draw_loss_curve(metrics_path: Path, path: Path) -> None:
    """Training and validation loss (nats a token) over tokens, as a PNG. A picture that fails is a warning."""
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
    for name, label in (("train_loss", "training"), ("val_loss", "validation")):
        axes.plot(tokens, [record[name] for record in metrics], label=label, marker="." if len(tokens) < 40 else None)
    axes.set(xlabel="million tokens", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, format="png", dpi=120, bbox_inches="tight")
        os.replace(partial, path)
    finally:
        pyplot.close(figure)
        partial.unlink(missing_ok=True)
