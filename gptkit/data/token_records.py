"""Describe what the token shards of a text shard were made from, and compare such a record with the text of today."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptkit.base.files import read_json, sha256_of
from gptkit.data.text_shards import TextShards, shards_read_with
from gptkit.data.token_shards import has_size_of, open_token_shard, token_dtype
from gptkit.data.validation_split import Split

if TYPE_CHECKING:
    from gptkit.text.tokenizer import Tokenizer

TOKEN_FORMAT = "gptkit-token-shards"
SPLITS = ("train", "val")
COUNTS = ("documents", "tokens", "characters", "unknown_tokens")
MAX_COUNT = 1 << 53  # of one shard: all sums stay exact
WRITTEN_HERE = re.compile(rf"(?:{'|'.join(SPLITS)})_.*\.npy|\..*\.(?:npy|json)(?:\.\d+)?\.partial")


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in `path`, or None where there is none or it cannot be read."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def sources_of(
    text: TextShards, index: int, hashes: dict[Path, str], tokenizer: "Tokenizer", held_out: Split, otherwise: bool
) -> dict[str, Any]:
    """Return what the token shards of text shard `index` are made from.

    otherwise: whether versions before 0.2.0 read the text shard otherwise; else the record is the one that they wrote.
    """
    starts_inside = index > 0 and text.continues[index - 1]
    sources = {
        "separator": text.separator,
        "text": [hashes[shard] for shard in shards_read_with(text, index)] + [starts_inside],
        "tokenizer": tokenizer.fingerprint,
        **held_out.record(index),
    }
    return sources | ({"line_ends": "newlines"} if otherwise else {})


def differences(
    text: TextShards, output: Path, sources: list[dict[str, Any]], vocab_size: int
) -> tuple[list[dict[str, Any] | None], list[str | None]]:
    """Return the record of each text shard that an earlier run left, and why it does not match, or None."""
    old = [read_record(output / f"{path.stem}.json") for path in text.paths]
    return old, [difference(*pair, output, vocab_size) for pair in zip(old, sources, strict=True)]


def difference(old: dict[str, Any] | None, sources: dict[str, Any], output: Path, vocab_size: int) -> str | None:
    """Return why the record of an earlier run does not match, or None where it does."""
    if old is None:
        return "new"
    if old.get("separator") != sources["separator"] or old.get("text") != sources["text"]:
        return "the text changed"
    if old.get("tokenizer") != sources["tokenizer"]:
        return "the tokenizer changed"
    if any(old.get(name) != sources.get(name) for name in ("threshold", "cut")):
        return "the choice of validation documents changed"
    if old.get("line_ends") != sources.get("line_ends"):
        return "carriage returns are newlines now"
    return damage(old, output, vocab_size)


def damage(record: Any, folder: Path, vocab_size: int, is_read: bool = True) -> str | None:
    """Return what is wrong with a record or its token shards, or None; without is_read, by their sizes alone."""
    for split in SPLITS:
        try:
            shard = record[split]
            path = folder / shard["file"]
            if path.name != shard["file"] or not WRITTEN_HERE.fullmatch(path.name):  # it may lead out of the folder
                return f"its record names {shard['file']!a}"
            if not all(type(shard[name]) is int and 0 <= shard[name] < MAX_COUNT for name in COUNTS):
                return "its record has counts that are not numbers of tokens"
            has_size = has_size_of(path, shard["tokens"], token_dtype(vocab_size))
            if not has_size or (is_read and sha256_of(path) != shard["sha256"]):
                return f"{path.name} is missing or damaged"
            if not is_read:
                continue
            tokens = open_token_shard(path, token_dtype(vocab_size), shard["tokens"])[:]
            if len(tokens) and int(tokens.max()) >= vocab_size:
                return f"{path.name} has the id {tokens.max()}, and the tokenizer has {vocab_size} ids"
        except (KeyError, TypeError):
            return "its record is damaged"
        except ValueError as error:
            return str(error)
    return None


def sources_of_earlier_version(
    text: TextShards, output: Path, sources: list[dict[str, Any]], val_fraction: float, vocab_size: int
) -> list[dict[str, Any]] | None:
    """Return what a folder was made from that a version before 0.2.0 made of this text, or None where it was not.

    Those versions split by hash alone, and kept carriage returns. The runs that began with such tokens could not resume
    with others.
    """
    manifest, first = (read_record(output / name) or {} for name in ("manifest.json", f"{text.paths[0].stem}.json"))
    names = ("separator", "text", "tokenizer")
    threshold = {"threshold": first.get("threshold")}
    earlier = [{name: source[name] for name in names} | threshold for source in sources]
    if earlier == sources or manifest.get("val_fraction") != val_fraction:
        return None
    return None if any(differences(text, output, earlier, vocab_size)[1]) else earlier
