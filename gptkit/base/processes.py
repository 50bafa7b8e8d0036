"""Run a program as a part of this command, to which it leaves signals."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from types import FrameType
from typing import Any

# Windows has no SIGHUP, but SIGBREAK, of Ctrl-Break.
STOP_SIGNALS = [getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK") if hasattr(signal, n)]


def run_child(arguments: Sequence[str | bytes], *, with_its_own: bool = False, **how: Any) -> int:
    """Run a program and return its exit code: 128 + n where signal n ended it. `how` is for subprocess.Popen.

    A terminal sends Ctrl-C, and that it was closed, to all of its processes; a SIGTERM is passed on. With with_its_own,
    on POSIX, each of these is passed on to the program and all that it has started. Raises OSError where there is no
    such program.
    """
    child: subprocess.Popen[bytes] | None = None
    received: list[int] = []
    has_group = with_its_own and os.name == "posix"

    def pass_on() -> None:
        while child and received:
            number = received.pop()
            if has_group:
                with contextlib.suppress(ProcessLookupError):  # it has ended
                    os.killpg(child.pid, number)
            elif number == signal.SIGTERM:
                child.send_signal(number)

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)
        pass_on()

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, remember)
    try:
        child = subprocess.Popen(arguments, start_new_session=has_group, **how)
        pass_on()  # what came before
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code
