"""Keep commands apart that make or read the same folder of token shards.

Who makes tokens waits for another who does; the parts of a job array (pretokenize.py --part) work side by side. A run
that trains reads the folder for as long as it lasts, and until then nobody changes it. A folder that nobody may write
to needs no locks.
"""

import contextlib
import os
from contextlib import AbstractContextManager
from pathlib import Path

from gptkit.base.cli import UserError
from gptkit.base.locks import LOCK_FILE, file_lock

READERS_FILE = ".readers"


def lock_making(folder: Path, is_part: bool = False) -> AbstractContextManager[object]:
    """Keep others from making tokens in `folder` within the block; the parts of a job array only keep out the rest."""
    if not _is_writable(folder):
        return contextlib.nullcontext()
    return file_lock(folder / LOCK_FILE, f"makes the token shards in {folder}", shared=is_part)


def lock_reading(folder: Path) -> AbstractContextManager[object]:
    """Keep the token shards in `folder` as they are within the block. To be entered within lock_making."""
    if not _is_writable(folder):
        return contextlib.nullcontext()
    return file_lock(folder / READERS_FILE, "checks who reads it", shared=True)


def require_no_readers(folder: Path) -> None:
    """Raise UserError where a run reads the token shards in `folder`. To be called within lock_making."""
    try:
        with file_lock(folder / READERS_FILE):
            pass
    except BlockingIOError as readers:
        raise UserError(
            f"the token shards in {folder} would change, and a run reads them ({readers}); wait for it, or name another"
            " folder for them"
        )


def _is_writable(folder: Path) -> bool:
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    return there.is_dir() and os.access(there, os.W_OK)
