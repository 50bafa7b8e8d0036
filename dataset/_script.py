"""Functions shared by the scripts in this folder: errors of one line with exit code 2, progress, output folders.

`python dataset/x.py` finds modules in this folder and not in the root, so the scripts here import nothing outside it:
only the standard library, and tqdm for the bar on a terminal.
"""

import argparse
import codecs
import contextlib
import difflib
import errno
import io
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, cast

MIB = 1024 * 1024
STALLED_S = 5  # how long a write waits for the reader of a stream that is full
# In lower case, and equal to those of gptkit/base/files.py.
SYSTEM_FILES = {".ds_store", ".localized", ".directory", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
SYSTEM_FOLDERS = {"lost+found", "@eadir", "__macosx", "$recycle.bin", "system volume information"}
# What file systems without fsync answer to it; a broken or full disk answers otherwise.
NO_SYNC = {
    errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EROFS, errno.EBADF, errno.EACCES, errno.EPERM,
    errno.EISDIR, errno.ENOTTY,
}  # fmt: skip


class UserError(Exception):
    """A mistake that the user can correct. The message names the value and the remedy."""


class Parser(argparse.ArgumentParser):
    """An argparse parser for which a wrong flag is a UserError and abbreviations are not guessed."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, allow_abbrev=False)
        _warned_of.clear()  # a command begins

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
    errno.EACCES: "check who owns it and its permissions",
    errno.EPERM: "check who owns it and its permissions",
    errno.EROFS: "choose a folder that can be written to",
    errno.ENOTDIR: "a part of this path is a file; choose another",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EISDIR: "this is a folder where a file is needed; choose another",
    errno.ENOENT: "check the path, and that no other command removes or replaces it",
    errno.EEXIST: "another command has just made it; wait for that",
    errno.ENOTEMPTY: "another command has just written there; wait for that",
    errno.ESTALE: "the network drive has lost it",
    errno.EIO: "the disk or the network drive fails; check it",
    errno.ENOSYS: "this file system cannot do that; choose a folder on a local disk",
    errno.EOPNOTSUPP: "this file system cannot do that; choose a folder on a local disk",
    errno.EXDEV: "this file system cannot do that; choose a folder on a local disk",
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
                n_written = self._file.write(rest)
                if n_written is None and not select.select([], [self._file], [], STALLED_S)[1]:
                    break  # somebody has made the stream non-blocking, and it is full
                rest = rest[n_written or 0 :]
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
    # Where the locale (LC_ALL=C) knows only ASCII, which cannot show Japanese, UTF-8 is written.
    is_ascii = codecs.lookup(stream.encoding).name == "ascii" and "PYTHONIOENCODING" not in os.environ
    encoding = "utf-8" if is_ascii else stream.encoding
    return io.TextIOWrapper(cast(Any, LossyFile(stream)), encoding, "backslashreplace", line_buffering=True)


def run_script(main: Callable[[], None]) -> NoReturn:
    """Call main and exit: with code 0, or with an error of one line and code 2. What cannot be printed is dropped."""
    sys.stdout, sys.stderr = lossy(sys.stdout), lossy(sys.stderr)
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # prepare_process had taken it away
        main()
        sys.exit(0)
    except UserError as error:
        message = str(error)
    except OSError as error:
        remedy = _OS_REMEDIES.get(error.errno or 0)
        if getattr(error, "winerror", None) == 32:  # ERROR_SHARING_VIOLATION, on Windows
            remedy = "another program has it open; close that"
        if remedy is None:
            raise
        if error.errno == errno.ENOSPC and os.path.realpath(str(error.filename)).startswith("/dev/shm"):
            remedy = "make room in /dev/shm (df -h /dev/shm), or choose a folder on a disk"
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
    return name.startswith(".") or is_backup or name.lower() in SYSTEM_FILES | SYSTEM_FOLDERS


def check_output_dir(output: Path, is_own: Callable[[str], bool]) -> None:
    """Raise UserError where the folder is a file, lies below one, or holds a name that is not the script's own."""
    existing = next(path for path in (output, *output.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise UserError(f"--output_dir {output}: {existing} is a file; name a folder")
    names = os.listdir(output) if existing == output else []
    foreign = sorted(name for name in names if not (is_own(name) or is_stray(name)))
    if foreign:
        raise UserError(f"--output_dir {output} holds something else ({foreign[0]}); name a new or empty folder")


def likely_file(path: Path) -> Path | None:
    """Return the file that was probably meant: (un)compressed, a folder up or down, or with a typing error."""
    bare = str(path).removesuffix(".gz").removesuffix(".xz")
    candidates = [Path(bare), Path(f"{bare}.gz"), Path(f"{bare}.xz")]
    if not path.is_absolute():
        candidates += [Path("..") / path, Path(*path.parts[1:])]
    if path.parent.is_dir():
        names = [name for name in os.listdir(path.parent) if name.endswith((".jsonl", ".jsonl.gz", ".jsonl.xz"))]
        close = difflib.get_close_matches(path.name, names)
        candidates += [path.parent / name for name in close if not name.startswith(".")]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def has_format(path: Path, name: str) -> bool:
    """Return whether a JSON file exists and names this format at its beginning."""
    try:
        return f'"{name}"'.encode() in path.read_bytes()[:200]
    except OSError:
        return False


def json_bytes(value: Any) -> bytes:
    """Return a value as indented JSON in UTF-8 with a newline at the end."""
    return utf8_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode(errors="replace")


def write_synced(path: Path, content: bytes) -> None:
    """Write a file so that it survives a power cut."""
    with open(path, "wb") as file:
        file.write(content)
        sync(file)


def sync(file: Any) -> None:
    """Make what was written to an open file survive a power cut, or warn once where the file system cannot.

    Raises OSError where the disk is full or broken.
    """
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
        warn_once(
            "sync", f"this file system cannot sync ({error.strerror}): a power cut may lose what was just written"
        )


def probe_files(folder: Path) -> None:
    """Raise UserError where files of `folder`, which exists, cannot be renamed or removed: now, not when all is done."""
    old, new = (folder / f".probe.{os.getpid()}.{name}" for name in ("old", "new"))
    old.write_bytes(b"")
    try:
        new.write_bytes(b"")
        os.replace(new, old)
        old.unlink()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"the file system of {folder} cannot replace a file by another, or remove it ({error.strerror}), so nothing"
            " could be kept there; name a folder on a local disk, and copy that afterwards"
        )
    finally:
        for path in (old, new):
            with contextlib.suppress(OSError):
                path.unlink()


_warned_of: set[str] = set()


def warn_once(kind: str, message: str) -> None:
    """Print a warning in one line, unless this command gave one of its kind."""
    if kind not in _warned_of:
        _warned_of.add(kind)
        log(f"warning: {message}")
