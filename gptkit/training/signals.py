"""SIGTERM, SIGINT and SIGHUP as a wish to stop: before training at once, within it after the step.

Rented machines are taken back by SIGTERM, Ctrl-C is SIGINT, a closed terminal is SIGHUP (which nohup has ignored, and
ignored it stays). A second signal ends the process at once, by the signal itself.
"""

import signal
import sys
from types import FrameType

STOPPED = 75  # the exit code, sysexits.h's EX_TEMPFAIL: the same command goes on
NAMES = ("SIGTERM", "SIGINT", "SIGHUP")  # Windows has no SIGHUP


class StopSignals:
    """Whether a signal asked this process to stop. To be made in the main thread, which alone may handle signals."""

    def __init__(self) -> None:
        self.received: str | None = None  # the signal's name
        self.at_once = True  # while there is nothing to finish
        numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
        self._numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        for number in self._numbers:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        for each in self._numbers:
            signal.signal(each, signal.SIG_DFL)
        self.received = signal.Signals(number).name
        if self.at_once:
            self.end("nothing of this session was to be saved")
        print(f"{self.received}: the step is finished and saved; a second signal quits at once", file=sys.stderr)

    def end(self, what: str) -> None:
        """End the process by SystemExit with STOPPED, saying what became of its work."""
        by = self.received or "a signal to another process"
        print(f"stopped by {by}: {what}; the same command goes on", file=sys.stderr)
        raise SystemExit(STOPPED)
