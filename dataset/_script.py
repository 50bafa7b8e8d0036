"""Functions shared by the scripts in this folder: errors of one line with exit code 2, progress, output folders.

`python dataset/x.py` finds modules in this folder and not in the root, so the scripts here import nothing outside it:
only the standard library, and tqdm for the bar on a terminal.
"""

import argparse
import contextlib
import difflib
import errno
import io
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

MIB = 1024 * 1024
LOCK_FILE = ".lock"


class UserError(Exception):
    """A mistake that the user can correct. The message names the value and the remedy."""


class Parser(argparse.ArgumentParser):
    """An argparse parser for which a wrong flag is a UserError and abbreviations are not guessed."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, allow_abbrev=False)
        _warned_of.clear()  # a command begins

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


def run_script(main: Callable[[], None]) -> NoReturn:
    """Call main and exit: with code 0, or with an error of one line and code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # continue where the locale cannot show Japanese
    try:
        main()
        print(end="", flush=True)
        sys.exit(0)
    except BrokenPipeError:  # the reader of our output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
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
    names = os.listdir(output) if existing == output else []
    foreign = sorted(name for name in names if name != LOCK_FILE and not is_own(name))
    if foreign:
        raise UserError(f"--output_dir {output} holds something else ({foreign[0]}); name a new or empty folder")


def require_unchanged(file: Any, path: Path, seen: dict[Path, tuple[int, int]]) -> None:
    """Raise UserError where an open file is not the one that was open at the first call, by its size and time in `seen`."""
    status = os.fstat(file.fileno())
    found = status.st_size, status.st_mtime_ns
    if seen.setdefault(path, found) != found:
        raise UserError(f"{path} changed while the text was read; run the same command again")


def unusable(folder: Path, reason: str) -> UserError:
    """Return the error of a folder whose text shards are not complete, perhaps not yet."""
    holder = lock_holder(folder / LOCK_FILE)
    if holder:
        return UserError(f"{folder} is being prepared by {holder}; wait for it, then run the same command again")
    return UserError(f"{reason}; prepare the folder again")


def likely_file(path: Path) -> Path | None:
    """Return the file that was probably meant: (un)compressed, a folder up or down, or with a typing error."""
    bare = str(path).removesuffix(".gz").removesuffix(".xz")
    candidates = [Path(bare), Path(f"{bare}.gz"), Path(f"{bare}.xz")]
    if not path.is_absolute():
        candidates += [Path("..") / path, Path(*path.parts[1:])]
    if path.parent.is_dir():
        names = [name for name in os.listdir(path.parent) if name.endswith((".jsonl", ".jsonl.gz", ".jsonl.xz"))]
        candidates += [path.parent / name for name in difflib.get_close_matches(path.name, names)]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def has_format(path: Path, name: str) -> bool:
    """Return whether a JSON file exists and names this format at its beginning."""
    try:
        return f'"{name}"'.encode() in path.read_bytes()[:200]
    except OSError:
        return False


def json_bytes(value: Any) -> bytes:
    """Return a value as indented JSON in UTF-8 with a newline at the end."""
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


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
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EROFS):
            raise
        warn_once(
            "sync", f"this file system cannot sync ({error.strerror}): a power cut may lose what was just written"
        )


_warned_of: set[str] = set()


def warn_once(kind: str, message: str) -> None:
    """Print a warning in one line, unless this command gave one of its kind."""
    if kind not in _warned_of:
        _warned_of.add(kind)
        log(f"warning: {message}")


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path` against other processes; wait for one that holds it, after a line that names it.

    The file is removed at the end, and its folders if they were made here and stayed empty. The lock is flock's, which
    ends with its process however that ends; gptkit/base/locks.py has the same and says why.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    descriptor = _acquire(path)
    try:
        yield
    finally:
        if descriptor is not None:
            if _is_still_there(path, descriptor):
                with contextlib.suppress(OSError):
                    path.unlink()
            os.close(descriptor)
        with contextlib.suppress(OSError):  # it holds something
            for folder in made:
                folder.rmdir()


def _acquire(path: Path) -> int | None:
    """Return the descriptor that holds the lock, or None where the system has no locks."""
    is_told, n_reopened = False, 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if fcntl is None:
                return None
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except (FileNotFoundError, FileExistsError):  # the one who made the folder has just removed it again
            n_reopened += 1
            if n_reopened > 50:
                raise
            continue
        except PermissionError:  # of another user; to lock it, reading is enough
            descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder_after(error, descriptor)
            os.close(descriptor)
            if holder is None:
                with contextlib.suppress(OSError):
                    path.unlink()
                warn_once("lock", f"the file system of {path.parent} has no locks ({error.strerror}): take care that no"
                          " other command writes to the same place at the same time")  # fmt: skip
                return None
            if not is_told:
                log(f"waiting for {holder}, which writes to {path.parent}")
                is_told = True
            time.sleep(0.1)
            continue
        if not _is_still_there(path, descriptor) and n_reopened < 50:  # some mounts number a file anew each time
            n_reopened += 1
            os.close(descriptor)
            continue
        with contextlib.suppress(OSError):  # a full disk; the lock holds without a name too
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return descriptor


def _is_still_there(path: Path, descriptor: int) -> bool:
    """Return whether `path` is the open file: a lock on one that its holder has removed keeps nobody out."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def lock_holder(path: Path) -> str | None:
    """Return the name of the process that holds the lock file `path`, or None."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return _holder_after(error, descriptor)
    finally:
        os.close(descriptor)
    return None


def _holder_after(error: OSError, descriptor: int) -> str | None:
    """Return who holds a lock that flock could not take, or None where it failed since there are no locks here."""
    try:
        name = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
    except OSError:  # CIFS lets nobody read a locked file
        name = "another process"
    # CIFS answers EACCES for both; a file that was never locked names nobody.
    is_held = isinstance(error, BlockingIOError) or (error.errno == errno.EACCES and name)
    return (name or "another process") if is_held else None
