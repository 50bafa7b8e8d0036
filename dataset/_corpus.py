"""Find and read a text: the text shards of prepare_aozora_jsonl.py, or a folder of .txt files."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _formats import other_in_file, plain_text
from _locks import unusable
from _script import UserError, is_stray

TEXT_FORMAT, DEFAULT_SEPARATOR = "gptkit-text-shards", "<|endoftext|>"
CHUNK = 1 << 20  # characters read at once: bounds memory on a text of any size


@dataclass(frozen=True)
class Corpus:
    """The files of a text and how they are read."""

    files: list[Path]
    continues: list[bool]  # whether the last document of file i continues in file i + 1
    separator: str
    by_hand: bool  # no manifest: files that people put there
    seen: dict[Path, tuple[int, int]] = field(default_factory=dict)  # size and time of each file when it was first read


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


def find_corpus(folder: Path) -> Corpus:
    """Return the shards that the manifest names, or else all .txt files, each ending a document. Raises UserError."""
    files = list_txt(folder)
    if (folder / "manifest.json").exists():
        try:
            manifest = json.loads((folder / "manifest.json").read_bytes())
            if manifest["format"] != TEXT_FORMAT:
                raise ValueError(f"its format is {manifest['format']}, not {TEXT_FORMAT}")
            files = [folder / Path(shard["file"]).name for shard in manifest["shards"]]
            continues = [bool(shard["continues"]) for shard in manifest["shards"]]
            corpus = Corpus(files, continues, str(manifest["separator"]), by_hand=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise unusable(folder, f"{folder}/manifest.json describes no text shards ({error!r})")
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise unusable(folder, f"{folder} lacks {missing[0]}, which its manifest names")
    elif (folder / ".partial").exists():
        raise unusable(folder, f"{folder} was left by a preparation that was stopped")
    else:
        corpus = Corpus(files, [False] * len(files), DEFAULT_SEPARATOR, by_hand=True)
    if not corpus.files or not corpus.separator:
        raise UserError(f"--data_dir {folder} holds no text (*.txt); dataset/prepare_aozora_jsonl.py makes text shards")
    return corpus


def read(corpus: Corpus) -> Iterator[tuple[int, str]]:
    """Yield (number of the document, a piece of its text), in order; pieces of at most about CHUNK characters."""
    number, rest, begins = 0, "", True
    held_back = [*(corpus.separator[:end] for end in range(len(corpus.separator) - 1, 0, -1)), "\r", ""]
    for path, continues in zip(corpus.files, corpus.continues, strict=True):
        if corpus.by_hand and (other := other_in_file(path)):
            raise UserError(f"{path}: {other}")
        try:
            with open(path, encoding="utf-8", newline="") as file:
                require_unchanged(file, path, corpus.seen)
                while chunk := file.read(CHUNK):
                    *ended, rest = (rest + chunk).split(corpus.separator)
                    for text in ended:
                        yield number, plain_text(text, begins)
                        number, begins = number + 1, True
                    begun = next(end for end in held_back if rest.endswith(end))  # it may end in the next chunk
                    piece, rest = rest.removesuffix(begun), begun
                    yield number, plain_text(piece, begins)
                    begins = begins and not piece
        except FileNotFoundError:
            raise UserError(f"{path} was removed while the text was read; run the same command again")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 ({error.reason}); convert the file to UTF-8")
        if not continues:
            yield number, plain_text(rest, begins)
            number, rest, begins = number + 1, "", True


def require_unchanged(file: Any, path: Path, seen: dict[Path, tuple[int, int]]) -> None:
    """Raise UserError where an open file is not the one that was open at the first call, by its size and time in `seen`."""
    status = os.fstat(file.fileno())
    found = status.st_size, status.st_mtime_ns
    if seen.setdefault(path, found) != found:
        raise UserError(f"{path} changed while the text was read; run the same command again")
