"""Write files and folders that are complete or missing (temporary name, sync, rename), and read JSON.

A file system may refuse a part of that, as network drives, mounted buckets and shared folders do: what only makes a
power cut harmless is then left out, after one warning.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptkit.base.cli import utf8_text, warn_once

if TYPE_CHECKING:
    import torch

# What file systems without fsync answer to it, on a folder above all; a broken or full disk answers otherwise.
NO_SYNC = {
    errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EROFS, errno.EBADF, errno.EACCES, errno.EPERM,
    errno.EISDIR, errno.ENOTTY,
}  # fmt: skip
# What those answer that cannot rename a folder; overlayfs (Docker) answers EXDEV for one of a lower layer, gcsfuse
# EMFILE for one of more files than its --rename-dir-limit, 0 by default, rclone EIO where its remote cannot, and CIFS and
# DrvFs EACCES while another program has a file in it open.
NO_RENAME = {
    errno.EXDEV, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EMFILE, errno.EIO,
    errno.EACCES,
}  # fmt: skip
IN_USE = {5, 32}  # Windows's error codes for what somebody has open: ERROR_ACCESS_DENIED, ERROR_SHARING_VIOLATION
PATIENCE_S = 2.0
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
    # Of this call alone: another may write the same file, on another machine in a process of the same number.
    temporary = path.with_name(f".{path.name}.{os.getpid()}{int.from_bytes(os.urandom(4), 'big'):010d}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()  # else Python may still hold the content, and an empty file would be synced
            sync(file.fileno())
        replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # an error of write() does not name the file
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def replace(path: Path, target: Path) -> None:
    """Rename a file onto `target`, or a folder to `target`, which is then missing. Raises OSError.

    Windows refuses that while anybody has it open, as scanners of new files do for a moment: that long it is retried.
    """
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            return os.replace(path, target)
        except PermissionError as error:
            if getattr(error, "winerror", None) not in IN_USE or time.monotonic() > until:
                raise
        time.sleep(0.05)


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
            move_folder(old, folder)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)

    clear_leftovers()
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in partial.iterdir():
            sync_file(path)
        if folder.exists():
            move_folder(folder, old)
        move_folder(partial, folder)
        sync_folder(folder.parent)
    finally:
        clear_leftovers()


def move_folder(folder: Path, target: Path) -> None:
    """Rename a folder to `target`, which is missing; where the file system refuses that, warn once, copy and remove it.

    A copy that fails leaves nothing of `target`. Raises OSError.
    """
    try:
        replace(folder, target)
        return
    except OSError as error:
        if error.errno not in NO_RENAME:
            raise
        reason = error.strerror
    try:
        target.mkdir()
        for path in sorted(folder.rglob("*")):  # a folder before what it holds
            copy = target / path.relative_to(folder)
            if path.is_dir():
                copy.mkdir()
            else:  # without its mode and times, which such a file system may refuse too
                shutil.copyfile(path, copy)
                sync_file(copy)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    warn_once(
        "copy",
        f"this file system refused to rename a folder ({reason}), which was copied instead; each checkpoint takes longer"
        " there, and for a moment twice its room",
    )
    shutil.rmtree(folder, ignore_errors=True)


def sync(descriptor: int) -> None:
    """Make what was written to an open file or folder survive a power cut, or warn once where it cannot be.

    Raises OSError where the disk is full or broken.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
        warn_once(
            "sync", f"this file system cannot sync ({error.strerror}): a power cut may lose what was just written"
        )


def sync_file(path: Path) -> None:
    """Make what was written to `path` survive a power cut, as `sync` does."""
    with open(path, "rb" if os.name == "posix" else "r+b") as file:  # Windows syncs only a file open for writing
        sync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames within `folder` survive a power cut, as `sync` does (on systems where a folder can be opened)."""
    if os.name != "posix":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
        return  # a folder that may be written to but not listed
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> float:
    """Return the bytes free on the disk of `folder`; infinity where the file system does not know it."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return math.inf
    return usage.free if usage.total else math.inf


def signature(paths: Iterable[Path]) -> list[tuple[str, int, int, int]]:
    """Return what changes when a file does: path, size, time of the last change (ns), inode. Raises OSError."""
    found = [(path, path.stat()) for path in paths]
    return [(str(path), status.st_size, status.st_mtime_ns, status.st_ino) for path, status in found]


def load_tensors(path: Path, device: "torch.device") -> dict[str, "torch.Tensor"]:
    """Return the tensors of a safetensors file, also where the file system cannot map it into memory.

    Raises OSError and SafetensorError.
    """
    from safetensors.torch import load, load_file

    try:
        return load_file(path, device=str(device))
    except (OSError, RuntimeError):  # it has several for what a network drive refuses
        return {name: tensor.to(device) for name, tensor in load(path.read_bytes()).items()}


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
