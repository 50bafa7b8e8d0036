"""Send reports and samples to loggers, besides the files of the output folder. None is required.

TensorBoard, Weights & Biases and trackio, each imported only when it is asked for. They show what metrics.jsonl and
samples.jsonl keep anyway, so when a logger fails, the run prints a warning and continues without it.
"""

import html
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gptkit.base.cli import UserError, one_line
from gptkit.training.run_log import Logger, read_jsonl, run_name

PROJECT = "gptkit"  # of wandb and trackio, unless WANDB_PROJECT or TRACKIO_PROJECT says otherwise
# Without a network, wandb would retry without end.
WANDB_TIMEOUTS_S = {"WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "600"}


def import_logger(name: str, output_dir: Path) -> None:
    """Import the package of a logger. Raises UserError where it is missing."""
    if name == "none":
        return
    os.environ.setdefault("TRACKIO_DIR", str(output_dir.resolve() / "trackio"))  # read when trackio is imported
    try:
        importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise UserError(f"--logger {name} needs the package {name} ({error}); run: pip install {name}")


def open_logger(name: str, output_dir: Path, first_step: int, settings: Mapping[str, Any]) -> Logger:
    """Open the logger of that name for the steps after first_step.

    Where that is not 0, it continues what an earlier session showed. Open it before the files of the output folder are
    truncated to first_step, since it reads from them what that was.
    """
    if name == "none":
        return Logger()
    open_backend = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}[name]
    try:
        return ignore_failures(name, open_backend(output_dir, first_step, settings))
    except Exception as error:  # whatever such a package raises, it must not end a run
        _warn(name, error)
        return Logger()


def ignore_failures(name: str, logger: Logger) -> Logger:
    """Wrap a logger so that when it fails, one warning is printed and it is not called again."""
    failed = False

    def guard(call: Callable[..., None]) -> Callable[..., None]:
        def guarded_call(*arguments: Any) -> None:
            nonlocal failed
            if not failed:
                try:
                    call(*arguments)
                except Exception as error:
                    failed = True
                    _warn(name, error)

        return guarded_call

    return Logger(guard(logger.report), guard(logger.sample), guard(logger.roll_back), guard(logger.close))


def _warn(name: str, error: Exception) -> None:
    reason = one_line(error)
    print(f"warning: --logger {name} failed ({reason}); continuing without it", file=sys.stderr, flush=True)


def skip_repeated_steps(logger: Logger, output_dir: Path, first_step: int) -> Logger:
    """Wrap a logger that cannot remove steps, so that steps done again after a resume or a rollback are skipped.

    It shows them as they were the first time.
    """

    def once(call: Callable[[int, Any], None], file: str) -> Callable[[int, Any], None]:
        shown = max((line["step"] for line in read_jsonl(output_dir / file)), default=0) if first_step else 0

        def call_once(step: int, what: Any) -> None:
            nonlocal shown
            if step > shown:
                shown = step
                call(step, what)

        return call_once

    return Logger(
        report=once(logger.report, "metrics.jsonl"),
        sample=once(logger.sample, "samples.jsonl"),
        close=logger.close,
    )


def _tensorboard(output_dir: Path, first_step: int, settings: Mapping[str, Any]) -> Logger:
    from torch.utils.tensorboard import SummaryWriter

    def open_after(step: int) -> Any:
        """Open a writer that drops what was shown of later steps; TensorBoard ignores a purge_step of None."""
        return SummaryWriter(str(output_dir / "tensorboard"), purge_step=step + 1)

    writer = open_after(first_step)

    def report(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def sample(step: int, text: str) -> None:
        writer.add_text("sample", text.replace("\n", "  \n"), step)  # Markdown, where two spaces make a line end
        writer.flush()

    def roll_back(step: int) -> None:
        nonlocal writer
        writer.close()
        writer = open_after(step)

    def close() -> None:
        writer.close()

    return Logger(report, sample, roll_back, close)


def _wandb(output_dir: Path, first_step: int, settings: Mapping[str, Any]) -> Logger:
    import wandb

    for name, seconds in WANDB_TIMEOUTS_S.items():
        os.environ.setdefault(name, seconds)

    def begin(mode: Any) -> Any:
        return wandb.init(
            dir=str(output_dir),
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run_name(output_dir)),
            id=os.environ.get("WANDB_RUN_ID", _wandb_id(output_dir) if first_step else None),
            resume="allow",
            config=dict(settings),
            allow_val_change=True,
            mode=mode,
            settings=wandb.Settings(console="off"),
        )

    mode = None  # what the user's environment says
    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
        mode = "offline"  # without an account, wandb would ask for one and wait
    try:
        run = begin(mode)
    except wandb.Error as error:
        print(
            f"warning: wandb cannot be reached ({error}); {output_dir}/wandb keeps what `wandb sync` can send",
            file=sys.stderr,
        )
        run = begin("offline")
    run.define_metric("*", step_metric="step")  # wandb's own count of steps takes each only once, report or sample
    page = '<pre style="white-space: pre-wrap">{}</pre>'
    return skip_repeated_steps(
        Logger(
            report=lambda step, values: run.log({"step": step, **values}),
            sample=lambda step, text: run.log({"step": step, "sample": wandb.Html(page.format(html.escape(text)))}),
            close=run.finish,
        ),
        output_dir,
        first_step,
    )


def _wandb_id(output_dir: Path) -> str | None:
    """Return the id of the run in the newest of wandb's folders: wandb/run-20260102_030405-ID or offline-run-…-ID."""
    found = [re.fullmatch(r"(?:offline-)?run-(\d{8}_\d{6})-(.+)", path.name) for path in output_dir.glob("wandb/*")]
    return max(((match[1], match[2]) for match in found if match), default=(None, None))[1]


def _trackio(output_dir: Path, first_step: int, settings: Mapping[str, Any]) -> Logger:
    import trackio

    run = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", PROJECT),
        name=_trackio_name(output_dir),
        config=dict(settings),
        resume="allow",
        embed=False,
    )
    return skip_repeated_steps(
        Logger(
            report=lambda step, values: run.log(dict(values), step=step),
            sample=lambda step, text: run.log({"sample": trackio.Markdown(text.replace("\n", "  \n"))}, step=step),
            close=run.finish,
        ),
        output_dir,
        first_step,
    )


def _trackio_name(output_dir: Path) -> str:
    """Return the run's name and its start time: trackio knows a run by its name, and there may be another exp001."""
    began = [session.get("time") for session in read_jsonl(output_dir / "sessions.jsonl") if session["step"] == 0]
    return " ".join([run_name(output_dir), *map(str, began[-1:])])
