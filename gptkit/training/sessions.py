"""sessions.jsonl: each session of a run (its start, and each time it was resumed), its settings, and how it ended.

    {"step": 0, "time": …, "settings": {…}, "environment": {…}, "end": {"time": …, "step": 60, "how": "finished", …}}

A session without an end was killed, or is running. Nothing in a line names the machine or its folders but the user's
own settings.
"""

import contextlib
import dataclasses
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch

from gptkit import __version__
from gptkit.base import devices
from gptkit.base.cli import UserError, first_line, utf8_text, warnings_given
from gptkit.base.files import read_json, write_atomically
from gptkit.base.locks import LOCK_FILE, file_lock
from gptkit.base.probe import probe_output
from gptkit.base.streams import has_failed, log_line, start_log, stop_log
from gptkit.distributed.process_group import is_main_process, main_process
from gptkit.training.checkpoints import STATE_FILE, find_checkpoints, read_state_or_empty
from gptkit.training.run_log import (
    CURVE_FILE,
    LOG_FILE,
    METRICS_FILE,
    RUN_FILE,
    RUN_FORMAT,
    SAMPLES_FILE,
    json_line,
    read_jsonl,
)

SESSIONS_FILE = "sessions.jsonl"
Locks = contextlib.ExitStack  # what a run holds, each until its end


@contextlib.contextmanager
def record_session(output_dir: Path, step: int, settings: Any, environment: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Record the session that runs within the block, in the main process; drop sessions that began after `step`.

    Yields a dict, into which the block writes how it ended: step, how (finished or stopped), reason.
    """
    if not is_main_process():
        yield {}
        return
    path = output_dir / SESSIONS_FILE
    earlier = [session for session in read_jsonl(path) if session["step"] <= step]
    session = {"step": step, "time": _now(), "settings": non_default_settings(settings), "environment": environment}
    _write(path, [*earlier, session])
    end: dict[str, Any] = {}
    try:
        yield end
    except BaseException as error:
        if not end:
            how = "stopped" if isinstance(error, SystemExit) else "failed"
            end |= {"step": None, "how": how, "reason": f"{type(error).__name__}: {first_line(error)}"}
        raise
    finally:
        _write(path, [*earlier, session | {"end": {"time": _now(), **end}}])


@contextlib.contextmanager
def lock_output(output_dir: Path) -> Iterator[Locks]:
    """Make the output folder, keep other runs out of it, and log there what is printed.

    Yields the locks of the main process, to which others may be added. Raises UserError where another run is there, and
    where the file system could not keep what a run writes.
    """
    with Locks() as locks:
        try:
            if is_main_process():
                probe_output(output_dir)
                locks.enter_context(file_lock(output_dir / LOCK_FILE))
                locks.enter_context(_log_output(output_dir))
        except BlockingIOError as holder:
            raise UserError(
                f"--output_dir {output_dir} is in use by another run, {holder}; wait for it or name another folder"
            )
        yield locks


@contextlib.contextmanager
def _log_output(output_dir: Path) -> Iterator[None]:
    """Log what is printed from here on to the end of the process.

    A run that is refused before it began leaves no log, unless its message cannot be seen elsewhere.
    """
    path = output_dir / LOG_FILE
    is_new = not path.exists()
    try:
        start_log(path, f"--- {_now()}  {utf8_text(shlex.join(sys.argv))}")
        for message in warnings_given():  # of the file system, before there was a log
            log_line(f"warning: {message}")
    except OSError as error:
        print(f"warning: {path} could not be opened ({error}); what is printed is not logged there", file=sys.stderr)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            is_seen = not (has_failed(sys.stdout) or has_failed(sys.stderr))
            if is_new and is_seen and set(os.listdir(output_dir)) <= {LOCK_FILE, LOG_FILE}:
                stop_log()
                path.unlink()


def check_output_dir(output_dir: str, resume: Literal["auto", "none"]) -> Path:
    """Return the output folder, which need not exist. Raises UserError where it holds anything but a run."""
    folder = Path(output_dir)
    if not output_dir or (folder.exists() and not folder.is_dir()):
        raise UserError(f"--output_dir {output_dir!r} is not a folder; name one")
    if resume == "none" and find_checkpoints(folder):
        raise UserError(
            f"--output_dir {folder} holds a run already; name another folder, or resume it with --resume auto"
        )
    copy = next((folder / name for name in ("latest", "best") if (folder / name / STATE_FILE).is_file()), None)
    if copy and not find_checkpoints(folder):
        step = read_state_or_empty(copy).get("step")
        raise UserError(
            f"--output_dir {folder} holds {copy.name}, a copy of a checkpoint of step {step}, and no step_… folder; rename"
            f" it to step_{step or 0:08d} to resume from it, or name another folder"
        )
    written = [name for name in (RUN_FILE, METRICS_FILE, SAMPLES_FILE, CURVE_FILE) if (folder / name).exists()]
    try:
        is_run = not written or read_json(folder / RUN_FILE)["format"] == RUN_FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        is_run = False
    if not is_run:
        raise UserError(f"--output_dir {folder} holds something else ({written[0]}); name a new or empty folder")
    return folder


def non_default_settings(settings: Any) -> dict[str, Any]:
    """Return the settings, fields of a dataclass, that differ from their defaults."""
    values = {field.name: (getattr(settings, field.name), field.default) for field in dataclasses.fields(settings)}
    return {name: value for name, (value, default) in values.items() if value != default}


@main_process
def describe_environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a run's numbers may depend on besides its settings."""
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": devices.describe_device(device),
        "dtype": devices.dtype_name(dtype),
        "system": f"{platform.system()} {platform.machine()}",
        "revision": git_revision(Path(__file__).parent),
    }


def git_revision(folder: Path) -> str | None:
    """Return the git revision of a folder, with -dirty where files are changed; None where there is none, or no git."""
    command = ["git", "--no-optional-locks", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return found.stdout.strip() or None


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _write(path: Path, sessions: list[dict[str, Any]]) -> None:
    try:
        write_atomically(path, b"".join(map(json_line, sessions)))
    except OSError as error:  # a record must not end what it records
        print(f"warning: {path} could not be written ({error})", file=sys.stderr, flush=True)
