"""Read the documents of a JSONL or text file, for evaluation.

Every mistake in the file is a UserError that names the line. How documents are scored is left to scoring.py.
"""

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from gptkit.base.cli import UserError
from gptkit.text.formats import other_in_file, other_than_jsonl, other_than_utf8, plain_text

SEPARATOR = "<|endoftext|>"  # between the documents of a .txt file
JSONL_NAMES = (".jsonl", ".jsonl.gz", ".jsonl.xz")
BLOCK_CHARS = 1 << 20
MAX_LINE_BYTES = 32 << 20  # of JSONL: ten million characters, more than any novel
# How compressed files begin: a name may lie, when a browser has unpacked what it fetched.
MAGIC: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\x00": lzma.open}


def read_documents(path: Path, max_chars: int | None = None) -> Iterator[str]:
    """Yield the documents of a JSONL or .txt file, one at a time; blank ones are skipped.

    In JSONL a document is the `text` of a line; a .txt file is one document, or several with <|endoftext|> between
    them. Line ends are read as newlines. With max_chars, only the first documents are read, as many complete
    ones as so many characters hold, and at least one. Raises UserError where the file has another format, or
    holds no text.
    """
    n_characters = 0
    for document in map(plain_text, _all_documents(path)):
        if not document.strip():
            continue
        if max_chars is not None and n_characters and n_characters + len(document) > max_chars:
            return
        n_characters += len(document)
        yield document
    if not n_characters:
        raise UserError(f"{path} holds no text, or only blank documents; name a file with text")


def _all_documents(path: Path) -> Iterator[str]:
    """Return the documents of a file by the format that its name ends in. Raises UserError for another format."""
    if path.name.lower().endswith(".txt"):
        return _documents_of_text(path)
    if path.name.lower().endswith(JSONL_NAMES):
        return _documents_of_jsonl(path)
    raise UserError(
        f"{path} is neither JSONL nor text by its name; name one that ends in {', '.join(JSONL_NAMES)} or .txt"
    )


def _documents_of_text(path: Path) -> Iterator[str]:
    rest = ""
    if other := other_in_file(path):
        raise UserError(f"{path}: {other}")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            while block := file.read(BLOCK_CHARS):
                *ended, rest = (rest + block).split(SEPARATOR)
                yield from ended
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}); convert the file to UTF-8")
    yield rest


def _documents_of_jsonl(path: Path) -> Iterator[str]:
    with open(path, "rb") as raw:
        head = raw.read(8)
        raw.seek(0)
        opened = next((opener for magic, opener in MAGIC.items() if head.startswith(magic)), None)
        number = n_documents = 0
        try:
            file = cast(BinaryIO, opened(raw, "rb") if opened else raw)
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
                line = line.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark
                if not line.strip():
                    continue
                try:
                    text = _text_of_line(line)
                except ValueError as problem:
                    remedy = 'each line must be an object such as {"text": "雨。"}'
                    other = other_than_jsonl(line) if not n_documents else None
                    raise UserError(f"{path}: {other}" if other else f"{path}: line {number}: {problem}; {remedy}")
                yield text
                n_documents += 1
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            raise UserError(f"{path}: damaged or cut short after line {number} ({error}); copy the file again")


def _text_of_line(line: bytes) -> str:
    """Return the `text` of a line. Raises ValueError where the line is not a document."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError((other_than_utf8(line) or "not UTF-8").partition(";")[0])
    except (ValueError, RecursionError):
        raise ValueError("not JSON")
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    text = value.get("text")
    if not isinstance(text, str):
        raise ValueError("no `text` that is a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`text` has a lone surrogate at character {error.start + 1}, which no UTF-8 file can hold")
    return text
