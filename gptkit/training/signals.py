"""Handle SIGTERM, SIGINT and SIGHUP as requests to stop: before training at once, during it after the current step.

Rented machines are taken back by SIGTERM, Ctrl-C is SIGINT, a closed terminal is SIGHUP (where nohup has set it to be
ignored, it stays ignored). A second signal ends the process at once, by the signal itself.
"""

import atexit
import signal
import sys
from types import FrameType

from gptkit.base.processes import STOP_SIGNALS

EXIT_STOPPED = 75  # the exit code, sysexits.h's EX_TEMPFAIL: run the same command to resume


class StopSignals:
    """Notices signals that ask this process to stop. Create it in the main thread, which alone may handle signals."""

    def __init__(self) -> None:
        self.received: str | None = None  # the signal's name
        self.exits_at_once = True  # while there is nothing to finish
        self._numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        for number in self._numbers:
            signal.signal(number, self._handle)
        atexit.register(self._ignore)

    def _ignore(self) -> None:
        """Ignore the signals while the interpreter ends: nothing is left to save, and the exit code is decided."""
        for number in self._numbers:
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        for each in self._numbers:
            signal.signal(each, signal.SIG_DFL)
        self.received = signal.Signals(number).name
        if self.exits_at_once:
            self.exit("there was nothing to save yet")
        print(f"{self.received}: finishing the step and saving; a second signal ends the run at once", file=sys.stderr)

    def exit(self, what: str) -> None:
        """Print what became of the work, and exit with code EXIT_STOPPED."""
        by = self.received or "a signal to another process"
        print(f"stopped by {by}: {what}; run the same command to resume", file=sys.stderr)
        raise SystemExit(EXIT_STOPPED)
