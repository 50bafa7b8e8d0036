"""Functions shared by the scripts in this folder: errors of one line with exit code 2, progress, output folders.

`python dataset/x.py` finds modules in this folder and not in the root, so the scripts here import nothing outside it:
only the standard library, and tqdm for the bar on a terminal.
"""

import argparse
import errno
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, cast

MIB = 1024 * 1024


class UserError(Exception):
    """A mistake that the user can correct. The message names the value and the remedy."""


class Parser(argparse.ArgumentParser):
    """An argparse parser for which a wrong flag is a UserError and abbreviations are not guessed."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


_OS_REMEDIES = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room in the quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EACCES: "check its permissions",
    errno.EROFS: "choose a folder that can be written to",
    errno.ENOTDIR: "a part of this path is a file; choose another",
    errno.ENAMETOOLONG: "choose a shorter name",
}


class LossyFile(io.RawIOBase):
    """The file of a text stream, for writing, that takes everything: what the system refuses is dropped."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream  # it closes its file when nobody holds it
        self._file: Any = getattr(stream.buffer, "raw", stream.buffer)
        self.fileno, self.isatty = self._file.fileno, self._file.isatty  # type: ignore[method-assign]

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) or len(rest) :]
        except (OSError, ValueError):
            pass
        return len(data)


def lossy(stream: Any) -> Any:
    """Return a text stream that writes where a standard stream does (None: nowhere), and never fails."""
    if stream is None:
        stream = open(os.devnull, "w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    # backslashreplace: continue where the locale cannot show Japanese
    return io.TextIOWrapper(cast(Any, LossyFile(stream)), stream.encoding, "backslashreplace", line_buffering=True)


def run_script(main: Callable[[], None]) -> NoReturn:
    """Call main and exit: with code 0, or with an error of one line and code 2. What cannot be printed is dropped."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: a file that is opened would take its place, and get what is printed
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = lossy(sys.stdout), lossy(sys.stderr)
    try:
        main()
        sys.exit(0)
    except UserError as error:
        message = str(error)
    except OSError as error:
        remedy = _OS_REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        message = (
            f"{error.filename or 'writing'}: {os.strerror(error.errno or 0).lower()}; {remedy}, then run this again"
        )
    except KeyboardInterrupt:
        message = "interrupted; nothing was kept, run the same command again"
    print(f"error: {' '.join(map(str.strip, message.splitlines()))}", file=sys.stderr)
    sys.exit(2)


def log(message: str) -> None:
    """Print a line to standard error at once."""
    print(message, file=sys.stderr, flush=True)


class Progress:
    """A progress bar on a terminal; elsewhere a line per finished shard, with rate and time left."""

    def __init__(self, n_bytes: int, name: str) -> None:
        self.n_bytes, self.start, self.n_shards = max(n_bytes, 1), time.monotonic(), 0
        self.bar = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm

                self.bar = tqdm(total=n_bytes, unit="B", unit_scale=True, desc=name)
            except ImportError:
                pass

    def update(self, position: int, n_shards: int) -> None:
        """Show that `position` bytes are read and n_shards shards are finished."""
        if self.bar is not None:
            self.bar.update(position - self.bar.n)
        elif n_shards > self.n_shards:
            elapsed_s = time.monotonic() - self.start
            left_s = elapsed_s * (self.n_bytes - position) / max(position, 1)
            rate = position / MIB / max(elapsed_s, 1e-9)
            log(f"shard {n_shards}: {position / self.n_bytes:.0%} read, {rate:.1f} MiB/s, {left_s:.0f} s left")
        self.n_shards = n_shards

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def check_output_dir(output: Path, is_own: Callable[[str], bool]) -> None:
    """Raise UserError where the folder is a file, lies below one, or holds a name that is not the script's own."""
    existing = next(path for path in (output, *output.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise UserError(f"--output_dir {output}: {existing} is a file; name a folder")
    foreign = sorted(name for name in os.listdir(output) if not is_own(name)) if existing == output else []
    if foreign:
        raise UserError(f"--output_dir {output} holds something else ({foreign[0]}); name a new or empty folder")


def has_format(path: Path, name: str) -> bool:
    """Return whether a JSON file exists and names this format at its beginning."""
    return path.is_file() and f'"{name}"'.encode() in path.read_bytes()[:200]


def json_bytes(value: Any) -> bytes:
    """Return a value as indented JSON in UTF-8 with a newline at the end."""
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


def write_synced(path: Path, content: bytes) -> None:
    """Write a file so that it survives a power cut."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
