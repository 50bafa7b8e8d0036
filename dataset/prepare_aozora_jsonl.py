"""JSONL of Aozora Bunko -> text shards: combined_0001.txt, … and a manifest.json that describes them.

One JSON object a line, with a string `text` and, where filters are used, the catalogue's columns in
`meta`. Works are written whole, each followed by the separator; a work larger than a shard is cut after
a paragraph and goes on in the next shard, with no separator at the cut. Nothing in a text is changed,
so the shards joined and split at the separator give the works back, byte for byte.

Standalone: the standard library, and tqdm for the bar on a terminal. Tokens are pretokenize.py's work.
"""

import argparse
import contextlib
import difflib
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from _script import Parser, UserError, run_script

FORMAT = "gptkit-text-shards"
MIB = 1024 * 1024
MAX_LINE_BYTES = 32 * MIB  # ten million characters, more than any novel; longer lines would take too much memory
SHARD_NAME = re.compile(r"combined_\d{4,}\.txt")
# How compressed files begin: a name may lie, when a browser has unpacked what it fetched.
MAGIC: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\x00": lzma.open}


class BadLine(Exception):
    """A line that is no work: what is wrong with it."""


def parse_arguments() -> argparse.Namespace:
    parser = Parser("JSONL of Aozora Bunko -> text shards")
    parser.add_argument("--jsonl_path", required=True, help="a .jsonl, .jsonl.gz or .jsonl.xz file")
    parser.add_argument("--output_dir", required=True, help="folder for the shards; an earlier result is replaced")
    parser.add_argument("--max_size_mb", type=float, default=25.0, help="most MiB a shard, separators counted (25)")
    parser.add_argument("--separator", default="<|endoftext|>", help="written after each work (<|endoftext|>)")
    parser.add_argument("--orthography", nargs="+", metavar="文字遣い種別", help="keep only these, e.g. 新字新仮名")
    parser.add_argument("--author", nargs="+", metavar="姓名", help="keep only these authors, e.g. 夏目漱石")
    parser.add_argument("--min_chars", type=int, default=0, help="leave out works with fewer characters")
    parser.add_argument("--max_chars", type=int, help="leave out works with more characters")
    parser.add_argument("--skip_bad_lines", action="store_true", help="count lines that are no work, and go on")
    return parser.parse_args()


def check(options: argparse.Namespace) -> None:
    """Raise UserError for what can be seen to be wrong before anything is read."""
    try:
        separator = options.separator.encode()
    except UnicodeEncodeError:
        raise UserError(f"--separator {options.separator!a} is not valid text; give one such as '<|endoftext|>'")
    if not separator:
        raise UserError("--separator is empty; give a string that no work contains, such as '<|endoftext|>'")
    if not options.max_size_mb * MIB >= len(separator) + 4 or options.max_size_mb == float("inf"):
        raise UserError(f"--max_size_mb {options.max_size_mb:g} holds no text; give the MiB a shard, such as 25")
    if options.max_chars is not None and options.max_chars < max(options.min_chars, 1):
        raise UserError(f"--max_chars {options.max_chars} leaves nothing; give more than --min_chars and 0")
    check_source(Path(options.jsonl_path))
    check_output(Path(options.output_dir))


def check_source(source: Path) -> None:
    if source.is_dir():
        raise UserError(f"--jsonl_path {source} is a folder; name the .jsonl file in it")
    if not source.is_file():
        likely = likely_file(source)
        remedy = f"did you mean {likely}?" if likely else "dataset/download_aozora.py fetches it"
        raise UserError(f"--jsonl_path {source}: no such file; {remedy}")


def likely_file(path: Path) -> Path | None:
    """The file that was probably meant: (un)compressed, a folder up or down, or with a slip in its name."""
    bare = str(path).removesuffix(".gz").removesuffix(".xz")
    candidates = [Path(bare), Path(f"{bare}.gz"), Path(f"{bare}.xz")]
    if not path.is_absolute():
        candidates += [Path("..") / path, Path(*path.parts[1:])]
    if path.parent.is_dir():
        names = [name for name in os.listdir(path.parent) if name.endswith((".jsonl", ".jsonl.gz", ".jsonl.xz"))]
        candidates += [path.parent / name for name in difflib.get_close_matches(path.name, names)]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def check_output(output: Path) -> None:
    """The folder may be missing, empty, or hold what this script wrote: that alone is replaced."""
    there = next(path for path in (output, *output.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UserError(f"--output_dir {output}: {there} is a file; name a folder")
    if there != output:
        return
    manifest = output / "manifest.json"
    is_finished = manifest.is_file() and f'"{FORMAT}"'.encode() in manifest.read_bytes()[:200]
    ours = is_finished or (output / ".partial").is_dir()  # the latter was left by a killed run
    for name in sorted(os.listdir(output)):
        is_own = ours and (name == "manifest.json" or SHARD_NAME.fullmatch(name))
        if not is_own and not name.startswith("."):  # hidden files are .partial, or come from a file browser
            raise UserError(f"--output_dir {output} holds something else ({name}); name a new or empty folder")


class Source:
    """The lines of a file, plain or compressed, and how far into the file they reach."""

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
        number = 0
        try:
            while line := self._file.readline(MAX_LINE_BYTES + 1):
                number += 1
                yield line
                while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):  # the rest of a line too long
                    line = self._file.readline(MAX_LINE_BYTES + 1)
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            raise UserError(f"{self.path}: damaged or cut short after line {number} ({error}); download it again")


def work_of_line(line: bytes, separator: bytes) -> tuple[str, bytes, dict[str, Any]]:
    """(text, the same in UTF-8, meta) of one line. Raises BadLine."""
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
    # Also where the text's end and the separator after it make up one that begins earlier.
    end = utf8[-len(separator) :] + separator
    if separator in utf8 or end.index(separator) < len(end) - len(separator):
        shown = separator.decode()
        raise BadLine(f"`text` contains the separator {shown!r}, which would cut the work (choose another --separator)")
    return text, utf8, meta if isinstance(meta, dict) else {}


def reason_to_leave_out(text: str, meta: dict[str, Any], options: argparse.Namespace) -> str | None:
    """The first filter that leaves this work out, or None. Columns may be missing: read as empty."""
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
    """Writes works into shards of at most max_bytes, in the order they come."""

    def __init__(self, folder: Path, max_bytes: int, separator: bytes) -> None:
        self.folder, self.max_bytes, self.separator = folder, max_bytes, separator
        self.shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None

    def add(self, text: str, utf8: bytes) -> None:
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
        """Where to cut: after the last paragraph that fits, else after the last sentence, else after a character."""
        limit = min(self.max_bytes, len(utf8) - 1)  # something is left for the next shard
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
        """End the shard under way, if there is one. continues: its last work goes on in the next."""
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
            self.shards[-1] |= {"sha256": self._digest.hexdigest(), "continues": continues}

    def abandon(self) -> None:
        """After an error: close, and do not let a disk that is still full raise once more."""
        if self._file:
            with contextlib.suppress(OSError):
                self._file.close()


class Progress:
    """A bar on a terminal; elsewhere a line a shard, with rate and time left."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes, self.start, self.n_shards = max(n_bytes, 1), time.monotonic(), 0
        self.bar = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm

                self.bar = tqdm(total=n_bytes, unit="B", unit_scale=True, desc="prepare")
            except ImportError:
                pass

    def update(self, position: int, n_shards: int) -> None:
        if self.bar is not None:
            self.bar.update(position - self.bar.n)
        elif n_shards > self.n_shards:
            elapsed_s = time.monotonic() - self.start
            left_s = elapsed_s * (self.n_bytes - position) / max(position, 1)
            rate = position / MIB / max(elapsed_s, 1e-9)
            line = f"shard {n_shards}: {position / self.n_bytes:.0%} read, {rate:.1f} MiB/s, {left_s:.0f} s left"
            print(line, file=sys.stderr, flush=True)
        self.n_shards = n_shards

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def works(source: Source, options: argparse.Namespace, left_out: Counter[str]) -> Iterator[tuple[str, bytes]]:
    """(text, the same in UTF-8) of each work that is kept; the others are counted in left_out."""
    separator = options.separator.encode()
    for number, line in enumerate(source.lines(), start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark, which some editors add
        if line.isspace() or not line:
            continue
        try:
            text, utf8, meta = work_of_line(line, separator)
        except BadLine as problem:
            if not options.skip_bad_lines:
                remedy = "mend the line, or leave such lines out with --skip_bad_lines"
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
    progress = Progress(source.n_bytes)
    try:
        for text, utf8 in works(source, options, left_out):
            writer.add(text, utf8)
            progress.update(source.position(), len(writer.shards) - 1)  # the last one is under way
        writer.close()
    finally:
        writer.abandon()
        progress.close()
    if not writer.shards:
        counts = ", ".join(f"{reason}: {count}" for reason, count in sorted(left_out.items()))
        why = f"all its {left_out.total()} lines were left out ({counts})" if left_out else "the file is empty"
        raise UserError(f"{source.path}: no works; {why}; check the file and the filters")
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
    """Remove what a run that did not finish left. A finished result, known by its manifest, stays."""
    if not (output / "manifest.json").exists():
        remove_shards(output)
    shutil.rmtree(output / ".partial", ignore_errors=True)


def remove_shards(output: Path) -> None:
    for path in output.glob("combined_*.txt"):
        if SHARD_NAME.fullmatch(path.name):
            path.unlink()


def publish(partial: Path, output: Path, manifest: dict[str, Any]) -> None:
    """Move finished shards from `partial` into `output`; the manifest goes first if old, and comes last if new."""
    content = json.dumps(manifest, ensure_ascii=False, indent=1) + "\n"
    with open(partial / "manifest.json", "w", encoding="utf-8", newline="\n") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    (output / "manifest.json").unlink(missing_ok=True)
    remove_shards(output)
    for shard in manifest["shards"]:
        os.replace(partial / shard["file"], output / shard["file"])
    os.replace(partial / "manifest.json", output / "manifest.json")
    partial.rmdir()


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    check(options)
    output = Path(options.output_dir)
    was_there = output.is_dir()
    partial = output / ".partial"
    clear_unfinished(output)
    try:
        partial.mkdir(parents=True)
        manifest = write_shards(Source(Path(options.jsonl_path)), partial, options)
        publish(partial, output, manifest)
    except BaseException as error:
        clear_unfinished(output)
        if not was_there:
            with contextlib.suppress(OSError):
                output.rmdir()
        if isinstance(error, OSError) and error.filename is None:
            error.filename = options.output_dir  # a write that fails does not say where
        raise
    return manifest


def main() -> None:
    options = parse_arguments()
    manifest = prepare(options)
    left_out = "".join(f", {count} left out ({reason})" for reason, count in manifest["left_out"].items())
    print(f"{options.output_dir}: {manifest['works']} works in {len(manifest['shards'])} shards, "
          f"{manifest['characters']} characters, {manifest['bytes']} bytes{left_out}")  # fmt: skip


if __name__ == "__main__":
    run_script(main)
