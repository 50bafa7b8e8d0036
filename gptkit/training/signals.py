"""SIGTERM, SIGINT and SIGHUP as requests to stop: before training at once, within it after the step.

Rented machines are taken back by SIGTERM, Ctrl-C is SIGINT, a closed terminal is SIGHUP (which nohup has ignored, and
ignored it stays). A second signal ends the process at once, by the signal itself.
"""

import signal
import sys
from types import FrameType

EXIT_STOPPED = 75  # the exit code, sysexits.h's EX_TEMPFAIL: run the same command to resume
NAMES = ("SIGTERM", "SIGINT", "SIGHUP")  # Windows has no SIGHUP


class StopSignals:
    """Notices signals that ask this process to stop. To be made in the main thread, which alone may handle signals."""

    def __init__(self) -> None:
        self.received: str | None = None  # the signal's name
        self.exits_at_once = True  # while there is nothing to finish
        numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
        self._numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        for number in self._numbers:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        for each in self._numbers:
            signal.signal(each, signal.SIG_DFL)
        self.received = signal.Signals(number).name
        if self.exits_at_once:
            self.exit("nothing of this session was to be saved")
        print(f"{self.received}: the step is finished and saved; a second signal quits at once", file=sys.stderr)

    def exit(self, what: str) -> None:
        """Exit with code EXIT_STOPPED, after a message that says what became of the work."""
        by = self.received or "a signal to another process"
        print(f"stopped by {by}: {what}; run the same command to resume", file=sys.stderr)
        raise SystemExit(EXIT_STOPPED)
