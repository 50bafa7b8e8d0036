"""Run a program as a part of this command, to which it leaves signals."""

import signal
import subprocess
from collections.abc import Sequence
from types import FrameType
from typing import Any

# Windows has no SIGHUP, but SIGBREAK, of Ctrl-Break.
STOP_SIGNALS = [getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK") if hasattr(signal, n)]


def run_child(arguments: Sequence[str | bytes], **how: Any) -> int:
    """Run a program and return its exit code: 128 + n where signal n ended it. `how` is for subprocess.Popen.

    A terminal sends Ctrl-C, and that it was closed, to all of its processes; a SIGTERM is passed on. Raises OSError
    where there is no such program.
    """
    child: subprocess.Popen[bytes] | None = None

    def leave_to_child(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and child:
            child.send_signal(number)

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, leave_to_child)
    try:
        child = subprocess.Popen(arguments, **how)
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code
