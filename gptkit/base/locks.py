"""Keep two commands from writing to one place: lock files that name their holder and end with its process.

    with file_lock(folder / LOCK_FILE, "writes to it"): …     # a second command waits, after a line that names the first

The lock is flock's, on Windows that of msvcrt, which the system releases however the holder ends, by SIGKILL too. The
package filelock does not fit: where flock is missing (ENOSYS) it takes the mere existence of a file for a lock, which a
killed process would leave behind; other refusals (ENOLCK, ENOTSUP) it raises; on Windows nobody can read the name in a
file that it locks, and nothing can be shared. Here a file system that refuses locks costs one warning.
dataset/_locks.py has the same for scripts that stand alone.
"""

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from gptkit.base.cli import warn_once

try:
    import fcntl
except ImportError:  # on Windows
    import msvcrt

    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
POLL_S = 0.1
PATIENCE_S = 0.5  # before a lock counts as held: one who only asks about it holds it for a moment
# What those answer that open no file for reading and writing at once, as mounted buckets do.
NO_OPEN = {errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
MAX_REOPENED = 50  # some mounts give a file a new inode number each time
# The bytes that are locked on Windows: far past the end, for nobody else can read a locked byte. Who shares the lock
# locks one of them, and who holds it alone all of them.
FIRST_LOCKED, N_LOCKED = 1 << 30, 64


@contextlib.contextmanager
def file_lock(path: Path, wait_for: str | None = None, *, shared: bool = False) -> Iterator[int | None]:
    """Hold the lock file `path` against other processes; with `shared`, only against those who want it alone.

    Yields the descriptor that holds it, which a child process may inherit, to hold it to its own end; None without locks.

    Its folder is made if it is missing. At the end the file is removed, and the folder if it was made here and stayed
    empty. Where another process holds the lock, a line says so ("waiting for process 12 on HOST, which {wait_for}") and
    it is waited for; without wait_for, raises BlockingIOError with the holder's name.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    descriptor = _acquire(path, wait_for, shared)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            _release(path, descriptor)
        with contextlib.suppress(OSError):  # it holds something
            for folder in made:
                folder.rmdir()


def lock_holder(path: Path) -> str | None:
    """Return the name of the process that holds the lock file `path` alone, or None."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        _lock(descriptor, shared=True)
    except OSError as error:
        return _read_holder(descriptor) if _is_held(error, descriptor) else None
    finally:
        os.close(descriptor)
    return None


def _acquire(path: Path, wait_for: str | None, shared: bool) -> int | None:
    """Return the descriptor that holds the lock, or None where the file system has no locks."""
    asked_at, is_told, n_reopened = time.monotonic(), False, 0
    while True:
        was_there = path.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _open(path)
        except (FileNotFoundError, FileExistsError):  # the one who made the folder has just removed it again
            n_reopened += 1
            if n_reopened > MAX_REOPENED:
                raise
            continue
        except OSError as error:
            if error.errno not in NO_OPEN:
                raise
            _warn_of_no_lock(path, error)
            return None
        try:
            _lock_and_sign(descriptor, shared)
        except OSError as error:
            holder = _read_holder(descriptor) if _is_held(error, descriptor) else None
            os.close(descriptor)
            if holder is None:
                if not was_there:
                    with contextlib.suppress(OSError):
                        path.unlink()
                _warn_of_no_lock(path, error)
                return None
            if wait_for is None and time.monotonic() - asked_at > PATIENCE_S:
                raise BlockingIOError(holder)
            if wait_for is not None and not is_told:
                print(f"waiting for {holder}, which {wait_for}", file=sys.stderr, flush=True)
                is_told = True
            time.sleep(POLL_S)
            continue
        if _is_still_there(path, descriptor) or n_reopened >= MAX_REOPENED:
            return descriptor
        n_reopened += 1
        os.close(descriptor)


def _open(path: Path) -> int:
    """Open a lock file, which is made if it is missing. Raises OSError."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        with contextlib.suppress(OSError):
            return os.open(path, os.O_RDONLY)  # it is of another user; to lock it, reading is enough
        raise


def _warn_of_no_lock(path: Path, error: OSError) -> None:
    warn_once(
        "lock",
        f"the file system of {path.parent} has no locks ({error.strerror}): take care that no other command writes to"
        " the same place at the same time",
    )


def _lock(descriptor: int, shared: bool) -> None:
    """Lock an open file, or change its lock. Raises BlockingIOError where another process holds it, and OSError."""
    if fcntl is not None:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return

    def call(how: str, number: int, n_bytes: int) -> None:
        os.lseek(descriptor, FIRST_LOCKED + number, os.SEEK_SET)
        msvcrt.locking(descriptor, getattr(msvcrt, how), n_bytes)  # type: ignore[attr-defined]

    with contextlib.suppress(OSError):  # it holds nothing yet
        call("LK_UNLCK", 0, N_LOCKED)
    for number in range(N_LOCKED if shared else 1):
        with contextlib.suppress(PermissionError):
            return call("LK_NBLCK", number, 1 if shared else N_LOCKED)
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def _lock_and_sign(descriptor: int, shared: bool) -> None:
    """Lock, and write the name of this process. Raises OSError."""
    name = f"process {os.getpid()} on {socket.gethostname()}\n".encode()
    try:
        _lock(descriptor, shared=False)
        with contextlib.suppress(OSError):  # a full disk; the lock holds without a name too
            os.ftruncate(descriptor, 0)  # the names of holders that were killed
    except (BlockingIOError, PermissionError):
        if not shared:
            raise
    if shared:
        _lock(descriptor, shared=True)
    with contextlib.suppress(OSError):
        os.lseek(descriptor, 0, os.SEEK_END)
        os.write(descriptor, name)


def _release(path: Path, descriptor: int) -> None:
    """Remove the lock file, unless others share it, and end the lock."""
    if fcntl is None:
        os.close(descriptor)
        with contextlib.suppress(OSError):  # Windows removes no file that somebody has open
            path.unlink()
        return
    with contextlib.suppress(OSError):
        _lock(descriptor, shared=False)
        if _is_still_there(path, descriptor):
            path.unlink()
    os.close(descriptor)


def _is_still_there(path: Path, descriptor: int) -> bool:
    """Return whether `path` is the open file: a lock on one that its holder has removed keeps nobody out."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _is_held(error: OSError, descriptor: int) -> bool:
    """Return whether flock failed since another process holds the lock, and not since there are no locks here."""
    if error.errno == errno.EACCES:  # so CIFS answers for both; a file that was never locked names nobody
        try:
            return bool(_read(descriptor, 1))
        except OSError:
            return True
    return isinstance(error, BlockingIOError)


def _read_holder(descriptor: int) -> str:
    """Return the names that the holders of a lock wrote into its file."""
    try:
        names = _read(descriptor, 1000).decode(errors="replace").splitlines()
    except OSError:  # CIFS lets nobody read a locked file
        names = []
    return ", ".join(filter(None, names)) or "another process"


def _read(descriptor: int, n_bytes: int) -> bytes:
    """Return the beginning of an open file."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    return os.read(descriptor, n_bytes)
