"""Try what a command will need of a file system before it works for hours: mounts of buckets and drives refuse a lot.

What only costs safety or time is a warning of the function that meets it (files.py, locks.py). Without the rest nothing
would be kept, so it is an error at once. docs/filesystems.md lists what which mount can do.
"""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gptkit.base.cli import UserError, warn_once
from gptkit.base.files import move_folder, write_atomically

# What a disk answers that could keep a file but not now, or not of that name; these have remedies of their own.
NOT_OF_THE_SYSTEM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG}


def probe_files(folder: Path, name: str = "file") -> None:
    """Raise UserError where files of `folder` cannot be replaced or removed; `name` is the longest of their names.

    The folder may be missing yet. Raises OSError where it may not be written to, or has no room.
    """
    with _trial(folder, name):
        pass


def probe_output(folder: Path) -> None:
    """Raise UserError where the checkpoints and the log of a run could not be kept in `folder`, as probe_files does.

    Warns where its saves will not survive a power cut, will be copied, or will have no links.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with _trial(folder, "file") as path:
        with _attempt("append to a file", folder):  # metrics.jsonl and run.log
            with open(path, "ab", buffering=0) as file:
                file.write(b"3")
            if path.read_bytes() != b"23":
                raise OSError(errno.EIO, "what it held is lost")
        partial, checkpoint = path.with_name("partial"), path.with_name("checkpoint")
        with _attempt("write a safetensors file", folder):
            partial.mkdir()
            try:
                save_file({"x": torch.zeros(1)}, partial / "x")
            except SafetensorError as error:
                raise OSError(errno.EIO, str(error))
        with _attempt("rename a folder, nor copy it", folder):
            move_folder(partial, checkpoint)
        try:
            os.symlink(checkpoint.name, path.with_name("link"))
        except OSError as error:
            warn_once(
                "link",
                f"the links latest and best cannot be made in {folder} ({error.strerror}); name a checkpoint by its own"
                " folder, step_…",
            )


@contextlib.contextmanager
def _trial(folder: Path, name: str) -> Iterator[Path]:
    """Yield a file of content "2" in a new folder, which is removed. It lies in `folder`, or where that will be made."""
    trial = _make_trial(folder)
    path = trial / name
    try:
        with _attempt("replace a file by another", folder):
            path.write_bytes(b"1")
            write_atomically(path, b"2")
            if path.read_bytes() != b"2":
                raise OSError(errno.EIO, "it is as it was")
        yield path
        with _attempt("remove what it holds", folder):
            shutil.rmtree(trial)
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _make_trial(folder: Path) -> Path:
    for there in (folder, *folder.parents):
        try:
            return Path(tempfile.mkdtemp(prefix=".probe-", dir=there))
        except (FileNotFoundError, NotADirectoryError):  # perhaps only now: another command has removed what it made
            continue
        except OSError as error:
            error.filename = str(folder)
            raise
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))


@contextlib.contextmanager
def _attempt(what: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in NOT_OF_THE_SYSTEM:
            is_name = error.errno == errno.ENAMETOOLONG and error.filename
            error.filename = str(folder / Path(error.filename).name if is_name else folder)
            raise
        raise UserError(
            f"the file system of {folder} cannot {what} ({error.strerror}), so nothing could be kept there; name a folder"
            " on a local disk, and copy that afterwards, as rclone copy and aws s3 sync do"
        )
