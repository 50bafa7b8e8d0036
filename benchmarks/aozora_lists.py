"""The fixed texts of aozora.py: lists of documents of the corpus, which anybody with the corpus can make again.

The documents are ordered by the sha256 of their 作品ID. A list of n characters takes each in turn, unless the list
would exceed n or the document alone has more than n / 8, so that no document dominates it. A digest of each shows that
a corpus is the one that the results were measured with. "sample" is a list of dataset/sample/sample.jsonl, for tests.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import read_documents, run, script, write_jsonl

from gptkit.base.cli import UserError
from gptkit.base.paths import existing_path

Document = dict[str, Any]  # "text", and "meta" with 作品ID and 人物ID, as in the JSONL of the corpus
LONGEST_SHARE = 8  # a document may have an eighth of a list's characters
DEVELOPMENT, HELDOUT = "development", "heldout"
LONGEST_DEVELOPMENT = 20_000  # characters


@dataclass(frozen=True)
class FixedList:
    """What a list of documents must be: its counts, and the sha256 of its ids, joined by newlines."""

    n_documents: int
    n_characters: int
    sha256: str


# The lists by name, each with the most characters that it may have.
LIMITS = {"sample": 50_000, "350k": 350_000, "1M": 1_000_000, "4M": 4_000_000, "50M": 50_000_000}
FIXED = {
    "sample": FixedList(36, 49_882, "546c1f062cc49ab22025c846f3ecba47be44830444294ce4517c76b189715851"),
    "350k": FixedList(62, 349_988, "5775b9c6e6217958d8b3b3fe1bf0f6fb54cb982dbc7d719b92e5394fe38ced2a"),
    "1M": FixedList(103, 999_999, "ec0d8cd09da69735b1e8fd8fce3a0c3575dfda6a57f0686d2c1189eb90bb81c4"),
    "4M": FixedList(361, 3_999_975, "ffa9733c560112b27e4c4441d2ef97c4e10924d6e65c0542ff3fba3140d54e97"),
    "50M": FixedList(4_055, 49_999_977, "dae15410c5f72f93e6e8a13e6b8a4cb562c70ce35e48963bd0008d78904eb5c3"),
    DEVELOPMENT: FixedList(29, 263_421, "9d98e4f73f376795e9c56a954ceca5e44018ef98930bb8bc38a8c3f5e0931171"),
    HELDOUT: FixedList(44, 315_231, "b6f7ce228865b0cff3d4107ede168310977b6d759cc9042769afa103a48d5c30"),
}


def id_of(document: Document) -> str:
    """Return the 作品ID, which names a work. Raises UserError where there is none."""
    try:
        return str(document["meta"]["作品ID"])
    except (KeyError, TypeError):
        raise UserError("a document has no 作品ID in its meta; give the JSONL of the corpus")


def author_of(document: Document) -> str:
    """Return the 人物ID, which names the author of a work."""
    return str(document["meta"]["人物ID"])


def read_in_order(path: Path) -> list[Document]:
    """Return the documents of a .jsonl or .jsonl.xz file in the order from which the lists are taken. Raises UserError."""
    return sorted(read_documents(path), key=lambda document: hashlib.sha256(id_of(document).encode()).hexdigest())


def take(in_order: Sequence[Document], limit: int) -> list[Document]:
    """Return the documents of a list of at most `limit` characters."""
    taken, n_characters = [], 0
    for document in in_order:
        length = len(document["text"])
        if n_characters + length <= limit and length <= limit / LONGEST_SHARE:
            taken.append(document)
            n_characters += length
    return taken


def take_development(in_order: Sequence[Document], n_characters: int = 250_000) -> list[Document]:
    """Return short documents with more than n_characters, from the end of the order, to choose settings by.

    None is in the list of 4 million characters, and none by an author of the list of 1 million.
    """
    used = {id_of(document) for document in take(in_order, LIMITS["4M"])}
    authors = {author_of(document) for document in take(in_order, LIMITS["1M"])}
    taken: list[Document] = []
    n_taken = 0
    for document in reversed(in_order):
        length = len(document["text"])
        if length > LONGEST_DEVELOPMENT or id_of(document) in used or author_of(document) in authors:
            continue
        taken.append(document)
        n_taken += length
        if n_taken > n_characters:
            break
    return taken


def describe(documents: Sequence[Document]) -> FixedList:
    """Return the counts and the digest of a list."""
    joined = "\n".join(map(id_of, documents))
    n_characters = sum(len(document["text"]) for document in documents)
    return FixedList(len(documents), n_characters, hashlib.sha256(joined.encode()).hexdigest())


def require(documents: Sequence[Document], name: str, flag: str) -> None:
    """Raise UserError where the documents are not those of the list of that name."""
    found, fixed = describe(documents), FIXED[name]
    if found != fixed:
        raise UserError(
            f"{flag} gives {found.n_documents} documents with {found.n_characters:,} characters for the list {name}, not"
            f" its {fixed.n_documents} with {fixed.n_characters:,}; give the corpus that the lists were made of"
        )


def prepare_documents(track: str, jsonl_path: str, heldout_path: str | None, folder: Path) -> Path:
    """Make the text shards of a track in folder/text, once, and return the path of the works to score on.

    Without heldout_path those are the development works. Raises UserError where a list holds other works than it should.
    """
    in_order = read_in_order(existing_path(jsonl_path, "--jsonl_path"))
    documents = take(in_order, LIMITS[track])
    require(documents, track, "--jsonl_path")
    if heldout_path is None:
        works = take_development(in_order)
        require(works, DEVELOPMENT, "--jsonl_path")
        text_path = folder / f"{DEVELOPMENT}.jsonl"
        write_jsonl(text_path, works)
    else:
        text_path = existing_path(heldout_path, "--heldout_path")
        if track != "sample":
            require(read_documents(text_path), HELDOUT, "--heldout_path")
    if not (folder / "text" / "manifest.json").exists():
        write_jsonl(folder / "text.jsonl", documents)
        run(script("dataset/prepare_aozora_jsonl.py", jsonl_path=folder / "text.jsonl", output_dir=folder / "text"))
    return text_path
