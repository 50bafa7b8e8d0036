"""Let no standard stream end a command's work, and copy what is printed to a log file.

A terminal may be closed, Ctrl-C ends the `tee` that reads a pipe too, and a log may fill its disk. What cannot be
written is then dropped, and the command continues.
"""

import codecs
import contextlib
import io
import os
import select
import sys
import weakref
from pathlib import Path
from typing import Any

STALLED_S = 5  # how long a write waits for the reader of a full stream: a stopped terminal must not stop training
# Bytes that are written at once: what a pipe with room takes (PIPE_BUF). A console of Windows takes whole characters.
PIECE = 4096 if os.name == "posix" else 1 << 20
MAX_UNWRITTEN = 1 << 20  # bytes of a log that wait for a full disk to have room


class _LossyFile(io.RawIOBase):
    """A file for writing that takes everything: what the file behind it refuses is dropped."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.has_failed = self._is_stalled = False

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        while rest:
            try:
                if not self._has_room():
                    self.has_failed = True
                    break
                n_written = self._file.write(rest[:PIECE])
            except (OSError, ValueError):  # ValueError: it was closed
                self.has_failed = True
                break
            rest = rest[n_written or 0 :]
        return len(data)

    def _has_room(self) -> bool:
        """Wait until the file takes more, or STALLED_S have passed; after that, no longer until it does again."""
        try:
            room = select.select([], [self._file], [], 0 if self._is_stalled else STALLED_S)[1]
        except (OSError, ValueError):  # not a file of the system, or on Windows
            return True
        self._is_stalled = not room
        return not self._is_stalled

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file.fileno()

    def isatty(self) -> bool:
        return self._file.isatty()


class OutputStream(io.TextIOWrapper):
    """A standard stream that drops what cannot be written. With a log, it copies its lines there.

    A text that begins with a carriage return is a progress bar: it is not copied.
    """

    def __init__(self, stream: io.TextIOWrapper | None) -> None:
        self.log: LogFile | None = None
        self._line, self._is_after_bar = "", False
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # kept, for it closes its file at its end
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()
        file = _LossyFile(getattr(self._stream.buffer, "raw", self._stream.buffer))
        file.has_failed = stream is None
        super().__init__(file, encoding_of(self._stream), "backslashreplace", line_buffering=True)  # type: ignore[arg-type]
        self._file = file

    @property
    def has_failed(self) -> bool:
        """Return whether the stream was closed, or refused something."""
        return self._file.has_failed

    def write(self, text: str) -> int:
        if self.log is not None and text:
            is_bar, is_end_of_bar = text.startswith("\r"), self._is_after_bar and text == "\n"
            new = "" if is_bar or is_end_of_bar else text.replace("\r\n", "\n").replace("\r", "\n")
            self._is_after_bar = is_bar
            line, self._line = self._line + new, ""  # taken first: a signal's handler may print within any call
            lines, newline, self._line = line.rpartition("\n")
            self.log.append(lines + newline)
        return super().write(text)

    def flush(self) -> None:
        if self.log is not None:  # the interpreter flushes at its end, too
            line, self._line = self._line, ""
            self.log.append(line)
        super().flush()


class LogFile:
    """A text file in UTF-8 that lines are appended to at once; those that a full disk refused are retried."""

    def __init__(self, path: Path) -> None:
        binary = getattr(os, "O_BINARY", 0)  # on Windows; else each newline would be written as two characters
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | binary, 0o666)
        weakref.finalize(self, os.close, self._descriptor)
        self._unwritten = b""

    def append(self, text: str) -> None:
        """Append a text. No failure raises."""
        new = text.encode(errors="backslashreplace")
        rest, self._unwritten = self._unwritten + new, b""  # taken first, as in OutputStream.write
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            self._unwritten = (rest + self._unwritten)[-MAX_UNWRITTEN:]

    def is_written_by(self, stream: Any) -> bool:
        """Return whether a stream was redirected to this file."""
        try:
            return os.path.sameopenfile(self._descriptor, stream.fileno())
        except (OSError, ValueError):
            return False


def replace_streams(*, standard_output: bool = True) -> None:
    """Replace standard error, and standard output unless it is what a command is for, by streams that never fail."""
    sys.stderr = without_failures(sys.stderr)
    if standard_output or sys.stdout is None:
        sys.stdout = without_failures(sys.stdout)
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding=encoding_of(sys.stdout), errors="backslashreplace")


def encoding_of(stream: io.TextIOWrapper) -> str:
    """Return the encoding for a stream: UTF-8 where the locale (LC_ALL=C) knows only ASCII, which cannot show Japanese."""
    is_ascii = codecs.lookup(stream.encoding).name == "ascii" and "PYTHONIOENCODING" not in os.environ
    return "utf-8" if is_ascii else stream.encoding


def without_failures(stream: Any) -> Any:
    """Return a stream that writes where `stream` does (None: nowhere) and never fails."""
    return OutputStream(stream) if stream is None or isinstance(stream, io.TextIOWrapper) else stream


def has_failed(stream: Any) -> bool:
    """Return whether a standard stream was closed, or did not take all that was printed until now."""
    return isinstance(stream, OutputStream) and stream.has_failed


def start_log(path: Path, title: str) -> None:
    """Append the title to a log file, and what is printed from here on to the end of the process.

    Where the user has redirected a stream to that file, only the stream is written there. Raises OSError.
    """
    log = LogFile(path)
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, OutputStream)]
    if not any(map(log.is_written_by, streams)):
        log.append(f"{title}\n")
        for stream in streams:
            stream.log = log


def stop_log() -> None:
    """Close the log file: from here on, what is printed is not logged. (Windows removes no file that is open.)"""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, OutputStream):
            stream.log = None


def log_line(text: str) -> None:
    """Write a line to the log file alone, if there is one: what a progress bar shows on the terminal."""
    if isinstance(sys.stderr, OutputStream) and sys.stderr.log is not None:
        sys.stderr.log.append(f"{text}\n")
