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
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "lost+found", "@eadir", "$recycle.bin"}


class UserError(Exception):
    """A mistake that the user can correct. The message names the value and the remedy."""


class Parser(argparse.ArgumentParser):
    """An argparse parser for which a wrong flag is a UserError and abbreviations are not guessed."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, allow_abbrev=False)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the command line. Text is read as UTF-8 in any locale, but paths must stay as the system gave them."""
        options = super().parse_args(args, namespace)
        for name, value in vars(options).items():
            if isinstance(value, (str, list)) and not name.endswith(("_dir", "_path")):
                text = [utf8_text(each) for each in value] if isinstance(value, list) else utf8_text(value)
                setattr(options, name, text)
        return options

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def utf8_text(argument: str) -> str:
    """Return an argument as the UTF-8 that its bytes are, also where the locale (LC_ALL=C) could not read them."""
    try:
        return argument.encode(errors="surrogateescape").decode()
    except UnicodeError:
        return argument


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


def is_stray(name: str) -> bool:
    """Return whether a system or an editor puts files of that name beside others: hidden ones, Thumbs.db, a.txt~."""
    is_backup = name.endswith("~") or name.startswith("~$") or (name.startswith("#") and name.endswith("#"))
    return name.startswith(".") or is_backup or name.lower() in SYSTEM_FILES


def check_output_dir(output: Path, is_own: Callable[[str], bool]) -> None:
    """Raise UserError where the folder is a file, lies below one, or holds a name that is not the script's own."""
    existing = next(path for path in (output, *output.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise UserError(f"--output_dir {output}: {existing} is a file; name a folder")
    foreign = []
    if existing == output:
        foreign = sorted(name for name in os.listdir(output) if not (is_own(name) or is_stray(name)))
    if foreign:
        raise UserError(f"--output_dir {output} holds something else ({foreign[0]}); name a new or empty folder")


def list_txt(data_dir: Path) -> list[Path]:
    """Return the .txt files in a folder, sorted, without what systems and editors leave.

    Raises UserError where there is no such folder, naming the one that was probably meant, and for a link to nothing.
    """
    if not data_dir.is_dir():
        near = [path for path in (Path("..") / data_dir, Path(*data_dir.parts[1:])) if path.parts and path.is_dir()]
        remedy = f"did you mean {near[0]}?" if near else "dataset/prepare_aozora_jsonl.py makes one"
        raise UserError(f"--data_dir {data_dir}: no such folder; {remedy}")
    files = sorted(path for path in data_dir.glob("*.txt") if not is_stray(path.name) and not path.is_dir())
    if broken := next((path for path in files if not path.is_file()), None):
        raise UserError(f"{broken} is a link to a file that does not exist; remove it, or restore the file")
    return files


def has_format(path: Path, name: str) -> bool:
    """Return whether a JSON file exists and names this format at its beginning."""
    return path.is_file() and f'"{name}"'.encode() in path.read_bytes()[:200]


def json_bytes(value: Any) -> bytes:
    """Return a value as indented JSON in UTF-8 with a newline at the end."""
    return utf8_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode(errors="replace")


def write_synced(path: Path, content: bytes) -> None:
    """Write a file so that it survives a power cut."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
