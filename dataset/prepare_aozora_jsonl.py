"""Turn a JSONL of Aozora Bunko into text shards, combined_0001.txt, …, and a manifest.json that describes them.

Each line is a JSON object with a string `text` and, where filters are used, the catalogue's columns in `meta`. Each
document is followed by the separator. A document larger than a shard is cut after a paragraph and continues in the
next shard, with no separator at the cut. Nothing in a text is changed but \\r\\n and \\r, which become newlines, and a
byte-order mark at its beginning (and, with --clean_aozora, the notation of Aozora Bunko): the shards, joined and split
at the separator, give the documents back. Tokens are left to pretokenize.py.
"""

from _startup import prepare_process

if __name__ == "__main__":
    prepare_process()  # before the imports below

import argparse
import contextlib
import filecmp
import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from _formats import by_signature, other_than_jsonl, other_than_utf8
from _jsonl import BadLine, Source, document_of_line
from _locks import LOCK_FILE, file_lock
from _script import (
    MIB,
    Parser,
    Progress,
    UserError,
    check_output_dir,
    has_format,
    json_bytes,
    likely_file,
    log,
    probe_files,
    run_script,
    sync,
    write_synced,
)

FORMAT = "gptkit-text-shards"
SHARD_NAME = re.compile(r"combined_\d{4,}\.txt")


def parse_arguments() -> argparse.Namespace:
    parser = Parser("JSONL of Aozora Bunko -> text shards")
    data, shards, filters = (parser.add_argument_group(title) for title in ("data", "shards", "filters"))
    data.add_argument("--jsonl_path", required=True, help="a .jsonl, .jsonl.gz or .jsonl.xz file")
    data.add_argument("--output_dir", required=True, help="folder for the shards; an earlier result is replaced")
    data.add_argument(
        "--clean_aozora", action="store_true", help="remove ruby and notes, write gaiji and accents as characters"
    )
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
    if b"\r" in separator:
        raise UserError("--separator contains a carriage return, which is read as a newline; choose another")
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
        likely = likely_file(source)
        remedy = f"did you mean {likely}?" if likely else "dataset/download_aozora.py fetches it"
        raise UserError(f"--jsonl_path {source}: no such file; {remedy}")


def check_output(output: Path) -> None:
    """Raise UserError unless the folder is missing, empty, or holds only what this script wrote and may replace."""
    is_ours = has_format(output / "manifest.json", FORMAT) or (output / ".partial").is_dir()  # left by a killed run

    def is_own(name: str) -> bool:
        return is_ours and (name == "manifest.json" or bool(SHARD_NAME.fullmatch(name)))

    check_output_dir(output, is_own)


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
            sync(self._file)
            self._file.close()
            self._file = None
            self.shards[-1] |= {"sha256": self._digest.hexdigest(), "continues": continues}

    def abandon(self) -> None:
        """Close after an error, and do not let a disk that is still full raise again."""
        if self._file:
            with contextlib.suppress(OSError):
                self._file.close()


def read_documents(
    source: Source, options: argparse.Namespace, left_out: Counter[str], found: Counter[str]
) -> Iterator[tuple[str, bytes]]:
    """Yield (text, the same in UTF-8) of each document that is kept, counting in `found` what was found in them.

    The others are counted in left_out. Raises UserError at a bad line, and where the file is something else than JSONL.
    """
    separator = options.separator.encode()
    n_documents = n_other = 0
    other = None  # what the file is, if it is no JSONL in UTF-8
    for number, line in enumerate(source.lines(), start=1):
        line = line.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark, which some editors add
        if line.isspace() or not line:
            continue
        try:
            document = document_of_line(line, separator, options.clean_aozora)
        except BadLine as problem:
            encoding = other_than_utf8(line)
            other = other or (encoding if n_documents else other_than_jsonl(line))
            if other and not n_documents and (by_signature(line) or not options.skip_bad_lines):
                raise UserError(f"{source.path}: {other}")
            if not options.skip_bad_lines:
                what = encoding.partition(";")[0] if encoding else problem
                remedy = "correct the line, or leave such lines out with --skip_bad_lines"
                raise UserError(f"{source.path}: line {number}: {what}; {remedy}")
            left_out["bad line"] += 1
            n_other += encoding is not None
            continue
        n_documents += 1
        reason = reason_to_leave_out(document.text, document.meta, options)
        if reason:
            left_out[reason] += 1
            continue
        found["line ends"] += document.line_ends
        found["works with notation"] += bool(document.notation)
        found.update(document.notation)
        yield document.text, document.utf8
    if other and (n_other > n_documents or not n_documents):
        raise UserError(f"{source.path}: {other}")


def write_shards(source: Source, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Fill `folder` with shards and return the manifest."""
    writer = ShardWriter(folder, int(options.max_size_mb * MIB), options.separator.encode())
    left_out: Counter[str] = Counter()
    found: Counter[str] = Counter()
    progress = Progress(source.n_bytes, "prepare")
    try:
        for text, utf8 in read_documents(source, options, left_out, found):
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
    names = (
        "max_size_mb",
        "separator",
        "orthography",
        "author",
        "min_chars",
        "max_chars",
        "skip_bad_lines",
        "clean_aozora",
    )
    totals = {key: sum(shard[key] for shard in writer.shards) for key in ("works", "characters", "bytes")}
    n_lines = totals["works"] + left_out.total()
    return {
        "format": FORMAT,
        "version": 1,
        "source": {"file": source.path.name, "bytes": source.n_bytes, "lines": n_lines},
        "options": {name: getattr(options, name) for name in names},
        "separator": options.separator,
        "left_out": dict(sorted(left_out.items())),
        "line_ends": found.pop("line ends"),
        "notation": {"works": found.pop("works with notation"), **dict(sorted(found.items()))},
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


def report_changes(manifest: dict[str, Any], is_cleaned: bool) -> None:
    """Print what was found in the text: line ends that became newlines, and notation with the remedy."""
    if manifest["line_ends"]:
        log(f"note: {manifest['line_ends']} carriage returns in the text were written as newlines")
    counts = {kind: count for kind, count in manifest["notation"].items() if kind != "works"}
    if counts:
        works = f"{manifest['notation']['works']} of {manifest['works']} documents"
        kinds = ", ".join(f"{kind}: {count}" for kind, count in counts.items())
        what = "is still in the text; --clean_aozora removes it"
        if is_cleaned:
            what = "was cleaned" + ("; unknown gaiji became 〓" if "unknown gaiji" in counts else "")
        log(f"note: the notation of Aozora Bunko in {works} ({kinds}) {what}")


def main() -> None:
    options = parse_arguments()
    check(options)
    with file_lock(Path(options.output_dir) / LOCK_FILE):
        check_output(Path(options.output_dir))
        probe_files(Path(options.output_dir))
        manifest = prepare(options)
    report_changes(manifest, options.clean_aozora)
    left_out = "".join(f", {count} left out ({reason})" for reason, count in manifest["left_out"].items())
    print(f"{options.output_dir}: {manifest['works']} documents in {len(manifest['shards'])} shards, "
          f"{manifest['characters']} characters, {manifest['bytes']} bytes{left_out}")  # fmt: skip


if __name__ == "__main__":
    run_script(main)
