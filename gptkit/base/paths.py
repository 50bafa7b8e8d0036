"""Find the files and folders that flags name, on the disk or on the Hugging Face hub, and suggest likely ones."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from gptkit.base.cli import UserError
from gptkit.base.files import is_stray

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


def existing_path(path: str, flag: str) -> Path:
    """Return `path`, which must exist. Raises UserError, which names the path that was probably meant."""
    found = Path(path)
    if not path:  # it would be the working directory; perhaps a variable of the shell is not set
        raise UserError(f"{flag} is empty; name a file or folder")
    if found.exists():
        return found
    likely = likely_path(found)
    hint = f"; did you mean {likely}?" if likely else f" (looked from {Path.cwd()})"
    raise UserError(f"{flag} {path}: no such file or folder{hint}")


def hub_folder(name: str, flag: str, patterns: list[str]) -> Path:
    """Return the folder that a flag names, or huggingface_hub's copy of those files of a repository. Raises UserError."""
    if not name:
        raise UserError(f"{flag} is empty; name a folder, or a repository of the hub")
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        raise UserError(f"{flag} {name} is a file; name the folder that holds it")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        near = likely_path(Path(name))
        remedy = f"did you mean {near}?" if near else "give a folder, or a name on the hub"
        raise UserError(f"{flag} {name}: no such folder; {remedy}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"{flag} {name} is neither a folder nor a repository of the Hugging Face hub (or it is a private one)"
        )
    except (LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{flag} {name}: the Hugging Face hub cannot be reached ({type(error).__name__}); connect to the"
            " network once, or give a folder"
        )


def refuse_pickles(files: Iterable[Path]) -> None:
    """Raise UserError where one of the files is a pickle by its name."""
    for path in files:
        if path.suffix in PICKLES and not is_stray(path.name):
            raise UserError(
                f"{path} is a pickle, which can run any code when it is read, and is not opened; export the model as"
                " safetensors where it was made"
            )


def likely_path(path: Path) -> Path | None:
    """Return the existing path that differs from `path` only by leading `..`, or by a typo in its last name."""
    if path.is_absolute():
        candidates = []
    else:
        inner = Path(*[part for part in path.parts if part != ".."])
        candidates = [Path("../" * ups) / inner for ups in range(4) if inner.parts]
    for candidate in candidates:
        if candidate != path and candidate.exists():
            return candidate
    for candidate in [path, *candidates]:
        if candidate.parent.is_dir():
            names = [name for name in os.listdir(candidate.parent) if not is_stray(name)]
            close = difflib.get_close_matches(candidate.name, names, n=1)
            if close:
                return candidate.parent / close[0]
    return None
