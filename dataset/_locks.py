"""Keep two of the scripts in this folder from writing to one place.

gptkit/base/locks.py has the same, with the reasons; the scripts here import nothing outside their folder.
"""

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from _script import UserError, log, warn_once

try:
    import fcntl
except ImportError:  # on Windows
    import msvcrt

    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
# What those answer that open no file for reading and writing at once, as mounted buckets do.
NO_OPEN = {errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
# The bytes that are locked on Windows: far past the end, for nobody else can read a locked byte. Who shares the lock
# locks one of them, and who holds it alone all of them.
FIRST_LOCKED, N_LOCKED = 1 << 30, 64


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path` against other processes; wait for one that holds it, after a line that names it.

    The file is removed at the end, and its folders if they were made here and stayed empty. The lock is flock's, on
    Windows that of msvcrt, which ends with its process however that ends; gptkit/base/locks.py has the same and says why.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    descriptor = _acquire(path)
    try:
        yield
    finally:
        if descriptor is not None:
            if fcntl is None:  # Windows removes no file that somebody has open
                os.close(descriptor)
            if fcntl is None or _is_still_there(path, descriptor):
                with contextlib.suppress(OSError):
                    path.unlink()
            if fcntl is not None:
                os.close(descriptor)
        with contextlib.suppress(OSError):  # it holds something
            for folder in made:
                folder.rmdir()


def _acquire(path: Path) -> int | None:
    """Return the descriptor that holds the lock, or None where the file system has no locks."""
    is_told, n_reopened = False, 0
    while True:
        was_there = path.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _open(path)
        except (FileNotFoundError, FileExistsError):  # the one who made the folder has just removed it again
            n_reopened += 1
            if n_reopened > 50:
                raise
            continue
        except OSError as error:
            if error.errno not in NO_OPEN:
                raise
            _warn_of_no_lock(path, error)
            return None
        try:
            _lock(descriptor, shared=False)
        except OSError as error:
            holder = _holder_after(error, descriptor)
            os.close(descriptor)
            if holder is None:
                if not was_there:
                    with contextlib.suppress(OSError):
                        path.unlink()
                _warn_of_no_lock(path, error)
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
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return descriptor


def _open(path: Path) -> int:
    """Open a lock file, which is made if it is missing. Raises OSError."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        with contextlib.suppress(OSError):
            return os.open(path, os.O_RDONLY)  # it is of another user; to lock it, reading is enough
        raise


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


def _warn_of_no_lock(path: Path, error: OSError) -> None:
    warn_once(
        "lock",
        f"the file system of {path.parent} has no locks ({error.strerror}): take care that no other command writes to"
        " the same place at the same time",
    )


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
        _lock(descriptor, shared=True)
    except OSError as error:
        return _holder_after(error, descriptor)
    finally:
        os.close(descriptor)
    return None


def _holder_after(error: OSError, descriptor: int) -> str | None:
    """Return who holds a lock that flock could not take, or None where it failed since there are no locks here."""
    try:
        name = _read(descriptor, 1000).decode(errors="replace").strip()
    except OSError:  # CIFS lets nobody read a locked file
        name = "another process"
    # CIFS answers EACCES for both; a file that was never locked names nobody.
    is_held = isinstance(error, BlockingIOError) or (error.errno == errno.EACCES and name)
    return (name or "another process") if is_held else None


def _read(descriptor: int, n_bytes: int) -> bytes:
    """Return the beginning of an open file."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    return os.read(descriptor, n_bytes)


def unusable(folder: Path, reason: str) -> UserError:
    """Return the error of a folder whose text shards are not complete, perhaps not yet."""
    holder = lock_holder(folder / LOCK_FILE)
    if holder:
        return UserError(f"{folder} is being prepared by {holder}; wait for it, then run the same command again")
    return UserError(f"{reason}; prepare the folder again")
