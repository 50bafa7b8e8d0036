"""Read the lines of a JSONL, plain or compressed, and the documents in them."""

import gzip
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from _aozora import clean_notation
from _formats import plain_text
from _script import MIB, UserError

MAX_LINE_BYTES = 32 * MIB  # ten million characters, more than any novel; longer lines would take too much memory
# The first bytes of compressed files: a name may be wrong where a browser has unpacked the file that it fetched.
MAGIC: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\x00": lzma.open}


class BadLine(Exception):
    """A line that is not a document. The message says why."""


class Source:
    """The lines of a file, plain or compressed, and the position in the file that they reach."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.n_bytes = path.stat().st_size
        self._raw = open(path, "rb", buffering=MIB)
        head = self._raw.read(8)
        self._raw.seek(0)
        opened = next((opener for magic, opener in MAGIC.items() if head.startswith(magic)), None)
        self._file = cast(BinaryIO, opened(self._raw, "rb") if opened else self._raw)

    def position(self) -> int:
        return self._raw.tell()

    def lines(self) -> Iterator[bytes]:
        """Yield the lines; one longer than MAX_LINE_BYTES is cut. Raises UserError where the file is damaged."""
        number = 0
        try:
            while line := self._file.readline(MAX_LINE_BYTES + 1):
                number += 1
                yield line
                while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):  # skip the rest
                    line = self._file.readline(MAX_LINE_BYTES + 1)
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            raise UserError(f"{self.path}: damaged or cut short after line {number} ({error}); download it again")


class Document(NamedTuple):
    """A document and what was found in it."""

    text: str
    utf8: bytes  # the same
    meta: dict[str, Any]
    line_ends: int  # \r\n and \r that were read as newlines
    notation: Counter[str]  # marks of Aozora Bunko by kind; they are still in the text, unless it was cleaned


def document_of_line(line: bytes, separator: bytes, clean_aozora: bool) -> Document:
    """Return the document of one line. Raises BadLine."""
    if len(line) > MAX_LINE_BYTES:
        raise BadLine(f"longer than {MAX_LINE_BYTES // MIB} MiB")
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadLine("not UTF-8")
    except (ValueError, RecursionError):
        raise BadLine("not JSON")
    if not isinstance(value, dict):
        raise BadLine("not a JSON object")
    if "text" not in value:
        raise BadLine("no `text`")
    text, meta = value["text"], value.get("meta")
    if not isinstance(text, str):
        raise BadLine(f"`text` is not a string but {type(text).__name__}")
    line_ends = text.count("\r")
    text = plain_text(text)
    cleaned, notation = clean_notation(text)
    text = cleaned if clean_aozora else text
    try:
        utf8 = text.encode()
    except UnicodeEncodeError as error:
        raise BadLine(f"`text` has a lone surrogate at character {error.start + 1}, which no UTF-8 file can hold")
    # The text's end and the separator after it may also form one that begins earlier.
    end = utf8[-len(separator) :] + separator
    if separator in utf8 or end.index(separator) < len(end) - len(separator):
        name = repr(separator.decode())
        raise BadLine(
            f"`text` contains the separator {name}, which would cut the document (choose another --separator)"
        )
    return Document(text, utf8, meta if isinstance(meta, dict) else {}, line_ends, notation)
