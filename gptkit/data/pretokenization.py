"""Tokenize text shards into a folder of token shards, reuse those that still match, check and open them.

Each document is followed by end-of-text. For the text shard `combined_0001.txt` three files are written:
`train_combined_0001.npy`, `val_combined_0001.npy` and, last, `combined_0001.json`, a record of what they were made
from. Where the record still matches, they are reused, in a later run or after a kill. manifest.json is written after
all of them, and a reader trusts only a folder that has it.

Reading documents is left to text_shards.py, choosing those for validation to validation_split.py, the records to
token_records.py, and the format of a shard to token_shards.py.
"""

import functools
import hashlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from gptkit.base.cli import UserError
from gptkit.base.files import is_stray, write_atomically, write_json
from gptkit.base.probe import probe_files
from gptkit.data.executors import ExecutorError, ExecutorName, RunTasks, open_executor
from gptkit.data.text_shards import (
    TextShards,
    documents_of_shard,
    find_text_shards,
    hash_shard,
    shards_read_with,
    survey_shard,
)
from gptkit.data.token_locks import require_no_readers
from gptkit.data.token_records import (
    COUNTS,
    SPLITS,
    TOKEN_FORMAT,
    WRITTEN_HERE,
    damage,
    differences,
    read_record,
    sources_of,
    sources_of_earlier_version,
)
from gptkit.data.token_shards import Shard, TokenStream, has_size_of, open_token_shard, token_dtype, token_shard_bytes
from gptkit.data.validation_split import Split, choose_split

if TYPE_CHECKING:
    from gptkit.text.tokenizer import Tokenizer

MAX_HASHED_BYTES = 2 << 30  # bytes of token shards that are read at the start of a run, only to check them


def _tokenize_shard(
    text: TextShards, tokenizer: "Tokenizer", held_out: Split, output: Path, sources: list[dict[str, Any]], index: int
) -> dict[str, Any]:
    """Write the token shards of text shard `index`, then their record, and return it.

    The record holds the sources and, for each split, its file, sha256 and COUNTS.
    """
    parts: dict[str, list[Any]] = {split: [] for split in SPLITS}
    counts = {split: dict.fromkeys(COUNTS, 0) for split in SPLITS}
    dtype = token_dtype(tokenizer.vocab_size)
    each = (part for document in documents_of_shard(text, index) for part in held_out.parts(document))
    for split, content, n_documents in each:
        ids = np.array([*tokenizer.encode(content), tokenizer.end_of_text_id], dtype=dtype)
        parts[split].append(ids)
        n_unknown = 0 if tokenizer.unknown_id is None else int(np.count_nonzero(ids == tokenizer.unknown_id))
        for name, count in zip(COUNTS, (n_documents, len(ids), len(content), n_unknown), strict=True):
            counts[split][name] += count
    record = dict(sources[index])
    if [hash_shard(path) for path in shards_read_with(text, index)] != record["text"][:-1]:
        raise UserError(f"{text.paths[index]} changed while it was read; run the same command again")
    for split in SPLITS:
        npy = token_shard_bytes(np.concatenate([np.empty(0, dtype), *parts[split]]))
        file = f"{split}_{text.paths[index].stem}.npy"
        write_atomically(output / file, npy)
        record[split] = {"file": file, "sha256": hashlib.sha256(npy).hexdigest(), **counts[split]}
    write_json(output / f"{text.paths[index].stem}.json", record)
    return record


def pretokenize(
    data_dir: Path,
    output: Path,
    tokenizer: "Tokenizer",
    val_fraction: float,
    engine: ExecutorName = "local",
    num_workers: int = 1,
) -> dict[str, Any]:
    """Fill `output` with the tokens of data_dir's text, making only what does not match; return its manifest.

    The bytes do not depend on engine and workers. Prints to standard error what was tokenized, why, and what was
    reused. Raises UserError.
    """
    text = find_text_shards(data_dir.resolve())
    records = tokenize_missing(text, output, tokenizer, val_fraction, engine, num_workers)
    return _write_manifest(output, tokenizer, text, val_fraction, [records[i] for i in range(len(text.paths))])


def tokenize_missing(
    text: TextShards,
    output: Path,
    tokenizer: "Tokenizer",
    val_fraction: float,
    engine: ExecutorName,
    num_workers: int,
    part: tuple[int, int] = (1, 1),
) -> dict[int, dict[str, Any]]:
    """Tokenize the shards that lack a matching record; return the matching records, by shard. Raises UserError.

    With part (k, n) only each n-th shard from the k-th on is tokenized.
    """
    _refuse_foreign_folder(output)
    try:
        with open_executor(engine, min(num_workers, len(text.paths))) as run:
            surveys = dict(run(functools.partial(survey_shard, text), range(len(text.paths))))
            hashes = {path: surveys[i][0] for i, path in enumerate(text.paths)}
            for path, sha256 in zip(text.paths, text.sha256, strict=True):
                if sha256 not in (None, hashes[path]):
                    print(f"warning: {path} was edited or cut short since it was prepared", file=sys.stderr)
            held_out, note = choose_split(text, {i: survey[1] for i, survey in surveys.items()}, val_fraction)
            sources = [sources_of(text, i, hashes, tokenizer, held_out, surveys[i][2]) for i in range(len(text.paths))]
            earlier = sources_of_earlier_version(text, output, sources, val_fraction, tokenizer.vocab_size)
            if earlier:
                sources = earlier
                note = f"warning: {output} is used as an earlier version made it; remove it to split and read the text anew"
            if note:
                print(note, file=sys.stderr)
            return _update(text, output, tokenizer, held_out, sources, run, part)
    except ExecutorError as error:
        raise UserError(str(error))


def _update(
    text: TextShards,
    output: Path,
    tokenizer: "Tokenizer",
    held_out: Split,
    sources: list[dict[str, Any]],
    run: RunTasks,
    part: tuple[int, int],
) -> dict[int, dict[str, Any]]:
    """Tokenize, with `run`, what does not match its sources; return the records that match then."""
    output.mkdir(parents=True, exist_ok=True)
    old, found = differences(text, output, sources, tokenizer.vocab_size)
    records = {i: record for i, record in enumerate(old) if record is not None and found[i] is None}
    reasons = {i: why for i, why in enumerate(found) if why and i % part[1] == part[0] - 1}
    if reasons:
        require_no_readers(output)
        probe_files(
            output, max((f"train_{path.stem}.npy" for path in text.paths), key=lambda name: len(os.fsencode(name)))
        )
        (output / "manifest.json").unlink(missing_ok=True)  # from here on the folder is incomplete
    if records:
        print(f"{output}: {len(records)} of {len(old)} token shards reused, text and tokenizer match", file=sys.stderr)
    sizes = {i: text.paths[i].stat().st_size for i in reasons}  # bytes
    start, n_done, n_all = time.monotonic(), 0, sum(sizes.values())
    task = functools.partial(_tokenize_shard, text, tokenizer, held_out, output.resolve(), sources)
    with tqdm(total=n_all, unit="B", unit_scale=True, desc="pretokenize", disable=not sys.stderr.isatty()) as bar:
        for index, record in run(task, list(reasons)):
            records[index] = record
            n_done += sizes[index]
            rate = n_done / max(time.monotonic() - start, 1e-9)
            n_tokens = sum(record[split]["tokens"] for split in SPLITS)
            tqdm.write(
                f"{text.paths[index].name}: tokenized ({reasons[index]}), {n_tokens:,} tokens, {rate / 1e6:.1f} MB/s,"
                f" {(n_all - n_done) / rate:.0f} s left",
                sys.stderr,
            )
            bar.update(sizes[index])
    return records


def _refuse_foreign_folder(output: Path) -> None:
    """Raise UserError where `output` is a file, or holds files that were not written here."""
    there = next(path for path in (output, *output.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UserError(f"{output}: {there} is a file; name a folder for the token shards")
    if there != output:
        return
    other = sorted(path.name for path in output.iterdir() if not _is_ours(path) and not is_stray(path.name))
    if other:
        raise UserError(f"{output} holds something else ({other[0]}); name a new or empty folder for the token shards")


def _is_ours(path: Path) -> bool:
    """Return whether a file in a token folder was written here, and may be replaced or removed."""
    if path.suffix == ".json":
        record = read_record(path) or {}
        return record.get("format") == TOKEN_FORMAT or {"threshold", *SPLITS} <= record.keys()
    return path.is_file() and WRITTEN_HERE.fullmatch(path.name) is not None


def manifest_of(
    name: str, tokenizer: "Tokenizer", val_fraction: float, records: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the content of manifest.json for such records, made by `tokenizer` under the name `name`."""
    attributes = ("fingerprint", "vocab_size", "end_of_text_id", "unknown_id", "newline_id")
    return {
        "format": TOKEN_FORMAT,
        "version": 1,
        "tokenizer": {"name": name, **{attribute: getattr(tokenizer, attribute) for attribute in attributes}},
        "dtype": token_dtype(tokenizer.vocab_size),
        "val_fraction": val_fraction,
        **{name: sum(record[split][name] for record in records for split in SPLITS) for name in COUNTS},
        **{split: {name: sum(record[split][name] for record in records) for name in COUNTS} for split in SPLITS},
        "fingerprint": hashlib.sha256(
            "".join(r[split]["sha256"] for r in records for split in SPLITS).encode()
        ).hexdigest(),
        "shards": records,
    }


def _write_manifest(
    output: Path, tokenizer: "Tokenizer", text: TextShards, val_fraction: float, records: list[dict[str, Any]]
) -> dict[str, Any]:
    """Remove token shards whose text is gone, then write manifest.json and return it."""
    named = {"manifest.json", *(f"{path.stem}.json" for path in text.paths)} | {
        record[split]["file"] for record in records for split in SPLITS
    }
    stale = [path for path in output.iterdir() if path.name not in named and _is_ours(path)]
    if stale:
        require_no_readers(output)
        (output / "manifest.json").unlink(missing_ok=True)  # it may name them
    for path in stale:
        path.unlink()
    manifest = manifest_of(tokenizer.name, tokenizer, val_fraction, records)
    if read_record(output / "manifest.json") != manifest:  # a folder that matches may be read-only
        write_json(output / "manifest.json", manifest)
    return manifest


def load_manifest(folder: Path, tokenizer: "Tokenizer", max_hashed: float = MAX_HASHED_BYTES) -> dict[str, Any]:
    """Return the manifest of a finished token folder, checked without its text. Raises UserError.

    Of shards with more than max_hashed bytes in all only names, sizes and counts are checked.
    """
    manifest = read_record(folder / "manifest.json")
    if manifest is None or manifest.get("format") != TOKEN_FORMAT or manifest.get("version") != 1:
        raise UserError(f"{folder} holds no finished token shards; pretokenize.py makes them")
    try:
        made_by = manifest["tokenizer"]
        if made_by["fingerprint"] != tokenizer.fingerprint:
            raise UserError(f"{folder} was made by another tokenizer, {made_by['name']}, and not {tokenizer.name}")
        records = manifest["shards"]
        is_read = manifest["tokens"] * np.dtype(token_dtype(tokenizer.vocab_size)).itemsize <= max_hashed
        found = (damage(record, folder, tokenizer.vocab_size, is_read) for record in records)
        problem = next(filter(None, found), None)
        if not problem and manifest != manifest_of(made_by["name"], tokenizer, manifest["val_fraction"], records):
            problem = "its manifest.json does not agree with its shards"
    except (KeyError, TypeError) as error:
        problem = f"its manifest.json is damaged ({error!r})"
    if problem:
        raise UserError(f"{folder}: {problem}; run pretokenize.py again, or copy the folder again")
    return manifest


def open_tokens(folder: Path, manifest: dict[str, Any]) -> dict[str, TokenStream]:
    """Open the tokens of each split. Raises UserError for a wrong size, and at the first read for a wrong header."""
    dtype = manifest["dtype"]

    def stream(split: str) -> TokenStream:
        paths = [folder / shard[split]["file"] for shard in manifest["shards"]]
        lengths = [shard[split]["tokens"] for shard in manifest["shards"]]
        for path, length in zip(paths, lengths, strict=True):
            if not has_size_of(path, length, dtype):
                raise UserError(f"{path} is missing or damaged; run pretokenize.py again")

        def open_shard(number: int) -> Shard:
            try:
                return open_token_shard(paths[number], dtype, lengths[number])
            except ValueError as error:
                raise UserError(f"{error}; run pretokenize.py again")

        return TokenStream.lazy(lengths, open_shard)

    return {split: stream(split) for split in SPLITS}
