"""Write files and folders that are complete or missing (temporary name, sync, rename), lock folders, read JSON."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gptkit.base.cli import utf8_text

LOCK_FILE = ".lock"
# In lower case: what file browsers leave in a folder, and folders that systems keep at the root of a disk.
SYSTEM_FILES = {".ds_store", ".localized", ".directory", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
SYSTEM_FOLDERS = {"lost+found", "@eadir", "__macosx", "$recycle.bin", "system volume information"}


def is_system_file(name: str) -> bool:
    """Return whether a file of that name was left by a file browser (.DS_Store, ._a.txt, Thumbs.db), and may go."""
    return name.startswith("._") or name.lower() in SYSTEM_FILES


def is_stray(name: str) -> bool:
    """Return whether a system or an editor puts files of that name beside those that people mean.

    These are hidden files, those of is_system_file, backups (a.txt~, #a.txt#) and folders such as lost+found.
    """
    is_backup = name.endswith("~") or name.startswith("~$") or (name.startswith("#") and name.endswith("#"))
    return name.startswith(".") or is_backup or is_system_file(name) or name.lower() in SYSTEM_FOLDERS


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader, or a crash, finds the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")  # of this process: another may write it too
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()  # else Python may still hold the content, and an empty file would be synced
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # an error of write() does not name the file
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as UTF-8 JSON with one trailing newline, atomically."""
    text = utf8_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n")  # a path may hold undecoded bytes
    write_atomically(path, text.encode(errors="replace"))


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder to write into, which then replaces `folder`; on an error, `folder` stays as it was."""
    folder = folder.resolve()
    partial, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "old"))

    def clear_leftovers() -> None:
        if old.exists() and not folder.exists():  # interrupted between the two renames
            os.replace(old, folder)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)

    clear_leftovers()
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in partial.iterdir():
            sync_file(path)
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        sync_folder(folder.parent)
    finally:
        clear_leftovers()


def sync_file(path: Path) -> None:
    """Make what was written to `path` survive a power cut."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames within `folder` survive a power cut (on systems where a folder can be opened)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def signature(paths: Iterable[Path]) -> list[tuple[str, int, int, int]]:
    """Return what changes when a file does: path, size, time of the last change (ns), inode. Raises OSError."""
    found = [(path, path.stat()) for path in paths]
    return [(str(path), status.st_size, status.st_mtime_ns, status.st_ino) for path, status in found]


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Make `folder` and lock it against other processes; remove it at the end if it was made here and stayed empty.

    Raises BlockingIOError, with what the holder wrote there, where another process holds it.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = acquire_lock(folder)
    try:
        yield
    finally:
        if made and os.listdir(folder) == [LOCK_FILE]:
            (folder / LOCK_FILE).unlink()
            for each in made:
                each.rmdir()
        os.close(lock)


def acquire_lock(folder: Path) -> int:
    """Lock `folder`, by an advisory lock on its file .lock, until the returned descriptor is closed.

    Raises BlockingIOError, with what the holder wrote there, where another process holds it.
    """
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        os.close(descriptor)
        raise BlockingIOError(holder)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def is_locked(folder: Path) -> bool:
    """Return whether a process has locked `folder`."""
    try:
        with open(folder / LOCK_FILE, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock file, or a file system without locks
        return False
    return False


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, as 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """Return the JSON value in `path`. Raises ValueError, also as JSONDecodeError and UnicodeDecodeError."""
    try:
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error


def as_dict(value: Any) -> dict[str, Any]:
    """Return a value that was read from a file if it is a dict, else {}."""
    return value if isinstance(value, dict) else {}
