"""JSONL of Aozora Bunko -> text shards: combined_0001.txt, … and a manifest.json that describes them.

One JSON object a line, with a string `text` and, where filters are used, the catalogue's columns in
`meta`. Works are written whole, each followed by the separator; a work larger than a shard is cut after
a paragraph and goes on in the next shard, with no separator at the cut. Nothing in a text is changed,
so the shards joined and split at the separator give the works back, byte for byte.

Standalone: the standard library, and tqdm for the bar on a terminal. Tokens are pretokenize.py's work.
"""

import argparse
import gzip
import hashlib
import json
import lzma
import os
import shutil
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from _script import Parser, UserError, run_script

FORMAT = "gptkit-text-shards"
MIB = 1024 * 1024
MAX_LINE_BYTES = 128 * MIB  # a longer "line" is no work; the bound keeps memory bounded on any input
OWN_FILES = ("manifest.json", "combined_*.txt", ".partial")


class BadLine(Exception):
    """A line that is no work: what is wrong with it."""


def parse_arguments() -> argparse.Namespace:
    parser = Parser("JSONL of Aozora Bunko -> text shards")
    parser.add_argument("--jsonl_path", required=True, help="a .jsonl, .jsonl.gz or .jsonl.xz file")
    parser.add_argument("--output_dir", required=True, help="folder for the shards; an earlier result is replaced")
    parser.add_argument("--max_size_mb", type=float, default=25, help="most MiB a shard, separators counted (25)")
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
    source = Path(options.jsonl_path)
    if not source.is_file():
        near = [path for path in (source.with_name(source.name + ".gz"), source.with_name(source.name + ".xz"),
                                  source.with_suffix(""), Path("..") / source, Path(*source.parts[1:]))
                if path.is_file()]  # fmt: skip
        remedy = f"did you mean {near[0]}?" if near else "dataset/download_aozora.py fetches it"
        raise UserError(f"--jsonl_path {source}: no such file; {remedy}")
    output = Path(options.output_dir)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir {output} is a file; name a folder")
    if output.is_dir():
        own = {path.name for pattern in OWN_FILES for path in output.glob(pattern)}
        other = sorted(path.name for path in output.iterdir() if path.name not in own)
        manifest = output / "manifest.json"
        if not other and manifest.exists() and f'"{FORMAT}"'.encode() not in manifest.read_bytes()[:200]:
            other = ["manifest.json"]
        if other:
            raise UserError(f"--output_dir {output} holds something else ({other[0]}); name a new or empty folder")


class Source:
    """The lines of a file, plain or compressed, and how far into the file they reach."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.n_bytes = path.stat().st_size
        self._raw: BinaryIO = open(path, "rb")
        opened = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix)
        self._file = cast(BinaryIO, opened(self._raw, "rb")) if opened else self._raw

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


def work_of_line(line: bytes, separator: str) -> tuple[str, dict[str, Any]]:
    """(text, meta) of one line. Raises BadLine."""
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
        text.encode()
    except UnicodeEncodeError as error:
        raise BadLine(f"`text` has a lone surrogate at character {error.start + 1}, which no UTF-8 file can hold")
    if (text + separator).index(separator) != len(text):
        raise BadLine(
            f"`text` contains the separator {separator}, which would cut the work (choose another --separator)"
        )
    return text, meta if isinstance(meta, dict) else {}


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

    def add(self, text: str) -> None:
        content = text.encode()
        n_separator = len(self.separator)
        if self._file and self.shards[-1]["bytes"] + len(content) + n_separator > self.max_bytes:
            self._close(continues=False)
        while len(content) + n_separator > self.max_bytes:
            end = self._cut(content)
            self._write(content[:end])
            self._close(continues=True)
            content = content[end:]
        self._write(content, self.separator)
        self.shards[-1]["works"] += 1

    def _cut(self, content: bytes) -> int:
        """Where to cut: after the last paragraph that fits, else after the last sentence, else after a character."""
        for mark in (b"\n", "。".encode()):
            found = content.rfind(mark, 0, self.max_bytes)
            if found >= 0:
                return found + len(mark)
        end = self.max_bytes
        while content[end] & 0b1100_0000 == 0b1000_0000:  # a UTF-8 continuation byte
            end -= 1
        return end

    def _write(self, content: bytes, separator: bytes = b"") -> None:
        if not self._file:
            name = f"combined_{len(self.shards) + 1:04d}.txt"
            self.shards.append({"file": name, "works": 0, "characters": 0, "bytes": 0})
            self._file = open(self.folder / name, "wb", buffering=MIB)
            self._digest = hashlib.sha256()
        for part in (content, separator):
            self._file.write(part)
            self._digest.update(part)
        self.shards[-1]["bytes"] += len(content) + len(separator)
        self.shards[-1]["characters"] += len(content.decode())

    def _close(self, continues: bool) -> None:
        assert self._file
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self.shards[-1] |= {"sha256": self._digest.hexdigest(), "continues": continues}

    @property
    def n_finished(self) -> int:
        return len(self.shards) - bool(self._file)

    def finish(self) -> None:
        if self._file:
            self._close(continues=False)


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
            print(f"shard {n_shards}: {position / self.n_bytes:.0%} read, {position / MIB / max(elapsed_s, 1e-9):.1f} MiB/s,"
                  f" {left_s:.0f} s left", file=sys.stderr, flush=True)  # fmt: skip
        self.n_shards = n_shards

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def write_shards(source: Source, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Fill `folder` with shards and return the manifest."""
    writer = ShardWriter(folder, int(options.max_size_mb * MIB), options.separator.encode())
    left_out: Counter[str] = Counter()
    n_lines = 0
    progress = Progress(source.n_bytes)
    for number, line in enumerate(source.lines(), start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark, which some editors add
        if line.isspace():
            continue
        n_lines += 1
        try:
            text, meta = work_of_line(line, options.separator)
        except BadLine as problem:
            if not options.skip_bad_lines:
                raise UserError(
                    f"{source.path}: line {number}: {problem}; mend the line, or leave such lines out with --skip_bad_lines"
                )
            left_out["bad line"] += 1
            continue
        reason = reason_to_leave_out(text, meta, options)
        if reason:
            left_out[reason] += 1
        else:
            writer.add(text)
        progress.update(source.position(), writer.n_finished)
    writer.finish()
    progress.close()
    if not writer.shards:
        counts = ", ".join(f"{reason}: {count}" for reason, count in sorted(left_out.items()))
        why = f"all its {n_lines} lines were left out ({counts})" if n_lines else "the file is empty"
        raise UserError(f"{source.path}: no works; {why}; check the file and the filters")
    names = ("max_size_mb", "separator", "orthography", "author", "min_chars", "max_chars", "skip_bad_lines")
    totals = {key: sum(shard[key] for shard in writer.shards) for key in ("works", "characters", "bytes")}
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


def publish(partial: Path, output: Path, manifest: dict[str, Any]) -> None:
    """Move finished shards from `partial` into `output`; the manifest goes first if old, and comes last if new."""
    content = json.dumps(manifest, ensure_ascii=False, indent=1) + "\n"
    with open(partial / "manifest.json", "w", encoding="utf-8", newline="\n") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    (output / "manifest.json").unlink(missing_ok=True)
    for old in output.glob("combined_*.txt"):
        old.unlink()
    for shard in manifest["shards"]:
        os.replace(partial / shard["file"], output / shard["file"])
    os.replace(partial / "manifest.json", output / "manifest.json")
    partial.rmdir()


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    check(options)
    source = Source(Path(options.jsonl_path))
    output = Path(options.output_dir)
    was_there = output.is_dir()
    partial = output / ".partial"
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    try:
        partial.mkdir(parents=True)
        manifest = write_shards(source, partial, options)
        publish(partial, output, manifest)
    except BaseException:
        shutil.rmtree(partial if was_there else output, ignore_errors=True)
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
