"""Find text shards and read their documents.

A document that is larger than a shard continues in the next ones; it belongs to the shard that it begins in, so
shards can be read one by one. dataset/prepare_aozora_jsonl.py writes the shards. Which documents are for validation is
left to validation_split.py, tokens to pretokenization.py.
"""

import codecs
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gptkit.base.cli import UserError
from gptkit.base.files import is_stray, read_json, sha256_of
from gptkit.base.locks import LOCK_FILE, lock_holder
from gptkit.text.formats import other_in_file, plain_text

T = TypeVar("T")
TEXT_FORMAT = "gptkit-text-shards"
DEFAULT_SEPARATOR = "<|endoftext|>"
SELF_CHECK_CHARS = 200_000  # characters of the corpus that a tokenizer is checked on before tokens are written


@dataclass(frozen=True)
class TextShards:
    """A folder of text shards."""

    paths: list[Path]
    continues: list[bool]  # whether the last document of shard i continues in shard i + 1
    separator: str
    sha256: list[str | None]  # from the manifest; None: no manifest
    by_hand: bool = False  # no manifest: files that people put there


def find_text_shards(data_dir: Path) -> TextShards:
    """Return the shards of prepare_aozora_jsonl.py, or else all .txt files, each ending a document. Raises UserError."""
    if not data_dir.is_dir():
        raise UserError(f"--data_dir {data_dir} is a file; name the folder of text shards")
    if (data_dir / "manifest.json").exists():
        try:
            manifest = read_json(data_dir / "manifest.json")
            if manifest["format"] != TEXT_FORMAT:
                raise ValueError(f"its format is {manifest['format']}, not {TEXT_FORMAT}")
            shards = manifest["shards"]
            found = TextShards(
                [data_dir / Path(shard["file"]).name for shard in shards],
                [bool(shard["continues"]) for shard in shards],
                str(manifest["separator"]),
                [shard.get("sha256") for shard in shards],
            )
            found.separator.encode()  # a lone surrogate is in no UTF-8 text
            missing = [path.name for path in found.paths if not path.is_file()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unusable(data_dir, f"{data_dir / 'manifest.json'} describes no text shards ({error!r})")
        if missing:
            raise _unusable(data_dir, f"{data_dir} lacks {missing[0]}, which its manifest names")
    else:
        if (data_dir / ".partial").exists():
            raise _unusable(data_dir, f"{data_dir} was left by a preparation that was stopped")
        paths = sorted(path for path in data_dir.glob("*.txt") if not is_stray(path.name) and not path.is_dir())
        if broken := next((path for path in paths if not path.is_file()), None):
            raise UserError(f"{broken} is a link to a file that does not exist; remove it, or restore the file")
        found = TextShards(paths, [False] * len(paths), DEFAULT_SEPARATOR, [None] * len(paths), by_hand=True)
    if not found.paths or not found.separator:
        raise UserError(f"{data_dir} holds no text shards (*.txt); dataset/prepare_aozora_jsonl.py makes them")
    return found


def _unusable(data_dir: Path, reason: str) -> UserError:
    """Return the error of a folder whose text shards are not complete, perhaps not yet."""
    holder = lock_holder(data_dir / LOCK_FILE)
    if holder:
        return UserError(f"{data_dir} is being prepared by {holder}; wait for it, then run the same command again")
    return UserError(f"{reason}; prepare the folder again")


def source_name(data_dir: Path) -> str | None:
    """Return the name of the file that text shards were made from, or None where it is unknown."""
    try:
        return str(read_json(data_dir / "manifest.json")["source"]["file"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def sample_documents(data_dir: Path, max_chars: int) -> list[str]:
    """Return the first documents of each shard, taken evenly and cut to about max_chars characters in all."""
    text = find_text_shards(data_dir)
    chosen = []
    for index in range(len(text.paths)):
        left = max_chars // len(text.paths)
        for document in documents_of_shard(text, index):
            if left <= 0:
                break
            chosen.append(document[:left])
            left -= len(document)
    return chosen


def documents_of_shard(text: TextShards, index: int) -> Iterator[str]:
    """Yield the documents that begin in shard `index`, in order, the last one to its end in the next shards."""
    return (document.decode() for document in _encoded_documents(text, index))


def _encoded_documents(text: TextShards, index: int) -> Iterator[bytes]:
    """Yield the documents of documents_of_shard in UTF-8. Raises UserError where one is not UTF-8."""
    separator = text.separator.encode()
    if text.by_hand and (other := _read(text.paths[index], other_in_file)):
        raise UserError(f"{text.paths[index]}: {other}")
    content = _read(text.paths[index], Path.read_bytes)
    if index > 0 and text.continues[index - 1]:  # the first document began in an earlier shard
        content = content.partition(separator)[2]
        if not content:
            return
    for path in shards_read_with(text, index)[1:]:
        rest, ended, _ = _read(path, Path.read_bytes).partition(separator)
        content += rest
        if ended:
            break
    start = 0
    while start < len(content):  # one document at a time: a split would copy them all
        end = content.find(separator, start)
        end = len(content) if end < 0 else end
        document, start = content[start:end], end + len(separator)
        try:
            decoded = document.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{text.paths[index]}: not UTF-8 ({error.reason}); convert the file to UTF-8")
        plain = plain_text(decoded)
        if plain.strip():
            yield document if plain == decoded else plain.encode()


def shards_read_with(text: TextShards, index: int) -> list[Path]:
    """Return shard `index` and those after it that a document of it may continue in."""
    last = index
    while text.continues[last] and last + 1 < len(text.paths):
        last += 1
    return text.paths[index : last + 1]


def hash_document(document: bytes) -> int:
    """Return the first 64 bits of the SHA-256 of a document in UTF-8."""
    return int.from_bytes(hashlib.sha256(document).digest()[:8], "big")


def hash_shard(path: Path) -> str:
    """Return the sha256 of a text shard. Raises UserError where it was removed."""
    return _read(path, sha256_of)


def _read(path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except FileNotFoundError:
        raise UserError(f"{path} was removed while the text was read; run the same command again")


def survey_shard(text: TextShards, index: int) -> tuple[str, list[tuple[int, int]], bool]:
    """Return the sha256 of shard `index`, (hash, bytes) of its documents, and was_read_otherwise.

    Raises UserError where it is not UTF-8.
    """
    documents = [(hash_document(document), len(document)) for document in _encoded_documents(text, index)]
    return hash_shard(text.paths[index]), documents, was_read_otherwise(text, index)


def was_read_otherwise(text: TextShards, index: int) -> bool:
    """Return whether versions before 0.2.0, which kept carriage returns, read other documents from shard `index`."""
    content, separator = _read(text.paths[index], Path.read_bytes), text.separator.encode()
    if text.by_hand:
        content = content.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n")
    return b"\r" in content or content.startswith(codecs.BOM_UTF8) or separator + codecs.BOM_UTF8 in content
