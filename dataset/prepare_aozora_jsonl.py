"""Turn a JSONL of Aozora Bunko into text shards, combined_0001.txt, …, and a manifest.json that describes them.

Each line is a JSON object with a string `text` and, where filters are used, the catalogue's columns in `meta`. Each
document is followed by the separator. A document larger than a shard is cut after a paragraph and continues in the
next shard, with no separator at the cut. Nothing in a text is changed, so the shards, joined and split at the
separator, give the documents back, byte for byte. Tokens are left to pretokenize.py.
"""

import argparse
import contextlib
import filecmp
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import _script
from _script import MIB, Parser, Progress, UserError, check_output_dir, has_format, json_bytes, run_script, write_synced

FORMAT = "gptkit-text-shards"
MAX_LINE_BYTES = 32 * MIB  # ten million characters, more than any novel; longer lines would take too much memory
SHARD_NAME = re.compile(r"combined_\d{4,}\.txt")
# The first bytes of compressed files: a name may be wrong where a browser has unpacked the file that it fetched.
MAGIC: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\x00": lzma.open}


class BadLine(Exception):
    """A line that is not a document. The message says why."""


def parse_arguments() -> argparse.Namespace:
    parser = Parser("JSONL of Aozora Bunko -> text shards")
    data, shards, filters = (parser.add_argument_group(title) for title in ("data", "shards", "filters"))
    data.add_argument("--jsonl_path", required=True, help="a .jsonl, .jsonl.gz or .jsonl.xz file")
    data.add_argument("--output_dir", required=True, help="folder for the shards; an earlier result is replaced")
    shards.add_argument("--max_size_mb", type=float, default=25.0, help="most MiB per shard, with separators (25)")
    shards.add_argument("--separator", default="<|endoftext|>", help="written after each document (<|endoftext|>)")
    filters.add_argument("--orthography", nargs="+", metavar="文字遣い種別", help="keep only these, e.g. 新字新仮名")
    filters.add_argument("--author", nargs="+", metavar="姓名", help="keep only these authors, e.g. 夏目漱石")
    filters.add_argument("--min_chars", type=int, default=0, help="leave out documents with fewer characters")
    filters.add_argument("--max_chars", type=int, help="leave out documents with more characters")
    filters.add_argument(
        "--skip_bad_lines", action="store_true", help="count lines that are not documents, and continue"
    )
    return parser.parse_args()


def check(options: argparse.Namespace) -> None:
    """Raise UserError for wrong flags, paths and folders, before anything is read."""
    try:
        separator = options.separator.encode()
    except UnicodeEncodeError:
        raise UserError(f"--separator {options.separator!a} is not valid text; give one such as '<|endoftext|>'")
    if not separator:
        raise UserError("--separator is empty; give a string that no document contains, such as '<|endoftext|>'")
    if not options.max_size_mb * MIB >= len(separator) + 4 or options.max_size_mb == float("inf"):
        raise UserError(f"--max_size_mb {options.max_size_mb:g} holds no text; give the MiB per shard, such as 25")
    if options.max_chars is not None and options.max_chars < max(options.min_chars, 1):
        raise UserError(f"--max_chars {options.max_chars} leaves nothing; give more than --min_chars and 0")
    check_source(Path(options.jsonl_path))
    check_output_dir(Path(options.output_dir), lambda name: True)  # what it holds is checked when it is locked


def check_source(source: Path) -> None:
    """Raise UserError where --jsonl_path is not a file, naming the one that was probably meant."""
    if source.is_dir():
        raise UserError(f"--jsonl_path {source} is a folder; name the .jsonl file in it")
    if not source.is_file():
        likely = _script.likely_file(source)
        remedy = f"did you mean {likely}?" if likely else "dataset/download_aozora.py fetches it"
        raise UserError(f"--jsonl_path {source}: no such file; {remedy}")


def check_output(output: Path) -> None:
    """Raise UserError unless the folder is missing, empty, or holds only what this script wrote and may replace."""
    is_ours = has_format(output / "manifest.json", FORMAT) or (output / ".partial").is_dir()  # left by a killed run

    def is_own(name: str) -> bool:  # hidden files are .partial, or come from a file browser
        return name.startswith(".") or (is_ours and (name == "manifest.json" or bool(SHARD_NAME.fullmatch(name))))

    check_output_dir(output, is_own)


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


def document_of_line(line: bytes, separator: bytes) -> tuple[str, bytes, dict[str, Any]]:
    """Return (text, the same in UTF-8, meta) of one line. Raises BadLine."""
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
    return text, utf8, meta if isinstance(meta, dict) else {}


def reason_to_leave_out(text: str, meta: dict[str, Any], options: argparse.Namespace) -> str | None:
    """Return the first filter that leaves this document out, or None. Missing columns are read as empty."""
    if not text.strip():
        return "empty"
    if options.orthography and meta.get("文字遣い種別") not in options.orthography:
        return "orthography"
    if options.author:
        name = str(meta.get("姓名") or f"{meta.get('姓', '')}{meta.get('名', '')}")
        if "".join(name.split()) not in {"".join(author.split()) for author in options.author}:
            return "author"
    if len(text) < options.min_chars or (options.max_chars is not None and len(text) > options.max_chars):
        return "length"
    return None


class ShardWriter:
    """A writer of documents into shards of at most max_bytes, in the order in which they are added."""

    def __init__(self, folder: Path, max_bytes: int, separator: bytes) -> None:
        self.folder, self.max_bytes, self.separator = folder, max_bytes, separator
        self.shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None

    def add(self, text: str, utf8: bytes) -> None:
        """Write a document, given also in UTF-8, and the separator; it is cut only where it exceeds a shard."""
        n_separator = len(self.separator)
        if self._file and self.shards[-1]["bytes"] + len(utf8) + n_separator > self.max_bytes:
            self.close()
        n_characters = len(text)
        while len(utf8) + n_separator > self.max_bytes:
            end = self._cut(utf8)
            n_cut = len(utf8[:end].decode())
            self._write(utf8[:end], n_cut)
            self.close(continues=True)
            utf8, n_characters = utf8[end:], n_characters - n_cut
        self._write(utf8 + self.separator, n_characters)
        self.shards[-1]["works"] += 1

    def _cut(self, utf8: bytes) -> int:
        """Return where to cut: after the last paragraph that fits, else the last sentence, else a character."""
        limit = min(self.max_bytes, len(utf8) - 1)  # leave something for the next shard
        for mark in (b"\n", "。".encode()):
            found = utf8.rfind(mark, 0, limit)
            if found >= 0:
                return found + len(mark)
        while utf8[limit] & 0b1100_0000 == 0b1000_0000:  # a UTF-8 continuation byte
            limit -= 1
        return limit

    def _write(self, content: bytes, n_characters: int) -> None:
        if not self._file:
            name = f"combined_{len(self.shards) + 1:04d}.txt"
            self.shards.append({"file": name, "works": 0, "characters": 0, "bytes": 0})
            self._file = open(self.folder / name, "wb")
            self._digest = hashlib.sha256()
        self._file.write(content)
        self._digest.update(content)
        self.shards[-1]["bytes"] += len(content)
        self.shards[-1]["characters"] += n_characters

    def close(self, continues: bool = False) -> None:
        """End the open shard, if there is one. continues: its last document continues in the next."""
        if self._file:
            _script.sync(self._file)
            self._file.close()
            self._file = None
            self.shards[-1] |= {"sha256": self._digest.hexdigest(), "continues": continues}

    def abandon(self) -> None:
        """Close after an error, and do not let a disk that is still full raise again."""
        if self._file:
            with contextlib.suppress(OSError):
                self._file.close()


def read_documents(source: Source, options: argparse.Namespace, left_out: Counter[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (text, the same in UTF-8) of each document that is kept; the others are counted in left_out."""
    separator = options.separator.encode()
    for number, line in enumerate(source.lines(), start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark, which some editors add
        if line.isspace() or not line:
            continue
        try:
            text, utf8, meta = document_of_line(line, separator)
        except BadLine as problem:
            if not options.skip_bad_lines:
                remedy = "correct the line, or leave such lines out with --skip_bad_lines"
                raise UserError(f"{source.path}: line {number}: {problem}; {remedy}")
            left_out["bad line"] += 1
            continue
        reason = reason_to_leave_out(text, meta, options)
        if reason:
            left_out[reason] += 1
        else:
            yield text, utf8


def write_shards(source: Source, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Fill `folder` with shards and return the manifest."""
    writer = ShardWriter(folder, int(options.max_size_mb * MIB), options.separator.encode())
    left_out: Counter[str] = Counter()
    progress = Progress(source.n_bytes, "prepare")
    try:
        for text, utf8 in read_documents(source, options, left_out):
            writer.add(text, utf8)
            progress.update(source.position(), len(writer.shards) - 1)  # the last one is still open
        writer.close()
    finally:
        writer.abandon()
        progress.close()
    if not writer.shards:
        counts = ", ".join(f"{reason}: {count}" for reason, count in sorted(left_out.items()))
        why = f"all its {left_out.total()} lines were left out ({counts})" if left_out else "the file is empty"
        raise UserError(f"{source.path}: no documents; {why}; check the file and the filters")
    names = ("max_size_mb", "separator", "orthography", "author", "min_chars", "max_chars", "skip_bad_lines")
    totals = {key: sum(shard[key] for shard in writer.shards) for key in ("works", "characters", "bytes")}
    n_lines = totals["works"] + left_out.total()
    return {
        "format": FORMAT,
        "version": 1,
        "source": {"file": source.path.name, "bytes": source.n_bytes, "lines": n_lines},
        "options": {name: getattr(options, name) for name in names},
        "separator": options.separator,
        "left_out": dict(sorted(left_out.items())),
        **totals,
        "shards": writer.shards,
    }


def clear_unfinished(output: Path) -> None:
    """Remove what an unfinished run left. A finished result, which has a manifest, stays."""
    if not (output / "manifest.json").exists():
        remove_shards(output)
    shutil.rmtree(output / ".partial", ignore_errors=True)


def remove_shards(output: Path) -> None:
    """Remove the text shards in a folder."""
    for path in output.glob("combined_*.txt"):
        if SHARD_NAME.fullmatch(path.name):
            path.unlink()


def publish(partial: Path, output: Path, manifest: dict[str, Any]) -> None:
    """Move finished shards from `partial` into `output`: an old manifest is removed first, the new one comes last.

    A result that is there already, byte for byte, stays: someone may be reading it.
    """
    write_synced(partial / "manifest.json", json_bytes(manifest))
    names = os.listdir(partial)
    if filecmp.cmpfiles(partial, output, names, shallow=False)[0] == names:
        return shutil.rmtree(partial)
    (output / "manifest.json").unlink(missing_ok=True)
    remove_shards(output)
    for shard in manifest["shards"]:
        os.replace(partial / shard["file"], output / shard["file"])
    os.replace(partial / "manifest.json", output / "manifest.json")
    partial.rmdir()


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Write the shards and return their manifest; an error leaves an earlier result as it was. Raises UserError."""
    output = Path(options.output_dir)
    partial = output / ".partial"
    clear_unfinished(output)
    try:
        partial.mkdir(parents=True)
        manifest = write_shards(Source(Path(options.jsonl_path)), partial, options)
        publish(partial, output, manifest)
    except BaseException as error:
        clear_unfinished(output)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = options.output_dir  # a write that fails does not name the file
        raise
    return manifest


def main() -> None:
    options = parse_arguments()
    check(options)
    with _script.file_lock(Path(options.output_dir) / _script.LOCK_FILE):
        check_output(Path(options.output_dir))
        manifest = prepare(options)
    left_out = "".join(f", {count} left out ({reason})" for reason, count in manifest["left_out"].items())
    print(f"{options.output_dir}: {manifest['works']} documents in {len(manifest['shards'])} shards, "
          f"{manifest['characters']} characters, {manifest['bytes']} bytes{left_out}")  # fmt: skip


if __name__ == "__main__":
    run_script(main)
