"""sessions.jsonl: each time a run was begun or gone on with, by what, with which settings, and how that session ended.

    {"step": 0, "time": …, "settings": {…}, "environment": {…}, "end": {"time": …, "step": 60, "how": "finished", …}}

A session without an end was killed, or is at work. Nothing in a line names the machine or its folders, but what the
user's own settings name.
"""

import contextlib
import dataclasses
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from gptkit.base import devices
from gptkit.base.files import write_atomically
from gptkit.training.run_log import json_line, read_jsonl

SESSIONS_FILE = "sessions.jsonl"


@contextlib.contextmanager
def record_session(output_dir: Path, step: int, settings: Any, environment: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Keep a record of the session that the block is, from `step` on; sessions that began after it are forgotten.

    The block puts into the dict that it is given how it ended: step, how (finished or stopped), reason.
    """
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
            end |= {"step": None, "how": how, "reason": f"{type(error).__name__}: {error}".partition("\n")[0]}
        raise
    finally:
        _write(path, [*earlier, session | {"end": {"time": _now(), **end}}])


def non_default_settings(settings: Any) -> dict[str, Any]:
    """The settings, fields of a dataclass, that are not what they are by default."""
    values = {field.name: (getattr(settings, field.name), field.default) for field in dataclasses.fields(settings)}
    return {name: value for name, (value, default) in values.items() if value != default}


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What a run's numbers may depend on beside its settings."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": devices.describe_device(device),
        "dtype": devices.dtype_name(dtype),
        "system": f"{platform.system()} {platform.machine()}",
        "revision": git_revision(Path(__file__).parent),
    }


def git_revision(folder: Path) -> str | None:
    """The git revision of a folder, with -dirty where files are changed; None outside a repository or without git."""
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
