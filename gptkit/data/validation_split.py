"""Choose what of a corpus is for validation: about --val_fraction of the text, and nothing of it is trained on.

Documents go by their hash, those below a threshold to validation, so that a document stays on its side however the text
is split into shards. In a small corpus one document may be most of the text. Then documents are taken in the order of
their hashes only until validation has its share, and of the one that is too long for that the end alone is held out,
from a paragraph on. The choice depends on the text and on val_fraction alone.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptkit.base.cli import UserError
from gptkit.data.text_shards import TextShards, documents_of_shard, hash_document

# Documents are chosen by their hashes alone where validation has at most four times its share of the text and at least
# a quarter of it, and training at least a quarter of its own.
TOLERANCE = 4
MIN_BYTES = 256  # validation's share is at least this (some 50 tokens), or a tenth of a text that is smaller still
PARAGRAPH, SENTENCE = re.compile(r"\n+"), re.compile(r"[。．！？!?]+[」』）”\])]*|\.(?=\s)")
Survey = Sequence[tuple[int, int]]  # (hash, bytes in UTF-8) of each document of a text shard


@dataclass(frozen=True)
class Split:
    """Which documents are for validation: those with a lower hash than the threshold, and the end of one more."""

    threshold: int
    cut_hash: int | None = None  # of the document that is cut, and of its copies
    cut_at: int = 0  # characters of it that are trained on
    cut_shards: frozenset[int] = frozenset()  # the shards that it begins in

    def record(self, shard: int) -> dict[str, Any]:
        """Return what the token shards of a text shard depend on."""
        cut = {"cut": [self.cut_hash, self.cut_at]} if shard in self.cut_shards else {}
        return {"threshold": self.threshold, **cut}

    def parts(self, document: str) -> Iterator[tuple[str, str, int]]:
        """Yield (split, text, 1 where the document counts as one of that split) of a document.

        Each part is followed by end-of-text, so the first part of a document that is cut ends with one too. It is not
        the end of the document, but the next one must begin after end-of-text, as every prompt does: without it, a
        model would learn from a small corpus that documents continue into each other.
        """
        found = hash_document(document.encode())
        if found == self.cut_hash:
            yield "train", document[: self.cut_at], 1
            yield "val", document[self.cut_at :], 0
        else:
            yield "val" if found < self.threshold else "train", document, 1


def choose_split(text: TextShards, surveys: Mapping[int, Survey], val_fraction: float) -> tuple[Split, str]:
    """Return the split of a corpus, and a line that says what was done where whole documents did not fit, or "".

    `surveys` holds the documents of each shard by its number. Raises UserError where there is too little text.
    """
    sizes: Counter[int] = Counter()  # bytes of the documents with a hash: equal ones are in the same split
    for survey in surveys.values():
        for found, n_bytes in survey:
            sizes[found] += n_bytes
    n_all = sum(sizes.values())
    if not sizes:
        raise UserError(f"{text.paths[0].parent} holds 0 documents, only blank text; give text in --data_dir")
    split = split_by_hash(sizes, val_fraction)
    n_val = sum(size for found, size in sizes.items() if found < split.threshold)
    share = max(val_fraction * n_all, min(MIN_BYTES, n_all / 10))  # bytes
    most = min(share * TOLERANCE, n_all - (1 - val_fraction) * n_all / TOLERANCE)
    if share / TOLERANCE <= n_val <= most:
        return split, ""
    alone = f"whole documents chosen by hash would be {n_val / n_all:.1%} of the text, --val_fraction is {val_fraction}"
    n_val = n_documents = 0
    for found in sorted(sizes):
        if n_val >= share / 2:
            return Split(
                found
            ), f"validation: {n_documents} whole document(s), {n_val / n_all:.1%} of the text ({alone})"
        if n_val + sizes[found] > min(2 * share, (share + n_all) / 2):
            break
        n_val, n_documents = n_val + sizes[found], n_documents + 1
    split, what = cut_document(text, surveys, found, (share - n_val) / sizes[found])
    whole = f"{n_documents} whole document(s) and " if n_documents else ""
    return split, f"validation: {whole}{what} ({alone})"


def split_by_hash(hashes: Iterable[int], val_fraction: float) -> Split:
    """Return the split into whole documents by hash alone: about val_fraction of them, and at least one."""
    return Split(max(int(val_fraction * 2**64), min(hashes) + 1))


def cut_document(text: TextShards, surveys: Mapping[int, Survey], cut_hash: int, share: float) -> tuple[Split, str]:
    """Return the split that holds out the end of a document, and of those with lower hashes all; and what was cut.

    share: of the document's bytes. Raises UserError where it is too short to be cut.
    """
    shards = frozenset(shard for shard, survey in surveys.items() if cut_hash in dict(survey))
    first = min(shards)
    document = next(d for d in documents_of_shard(text, first) if hash_document(d.encode()) == cut_hash)
    cut_at, where = find_cut(document, share)
    if not 0 < cut_at < len(document):
        raise UserError(
            f"{text.paths[first].parent} holds too little text to hold some out for validation; give more text"
        )
    n_held_out = f"the last {len(document) - cut_at:,} of {len(document):,} characters of a document"
    return Split(cut_hash, cut_hash, cut_at, shards), f"{n_held_out} in {text.paths[first].name}, cut at a {where}"


def find_cut(document: str, share: float) -> tuple[int, str]:
    """Return where (in characters) the last `share` of a document's bytes begins, about, and what ends there.

    That is the paragraph nearest to it, or the sentence, or the character, where half to twice as much is held out. Both
    sides have more than white space; (0, …) where that is not possible.
    """
    start, end = len(document) - len(document.lstrip()), len(document.rstrip())
    utf8 = document[start:end].encode()

    def place(share: float) -> int:
        n_bytes = min(max(round(share * len(utf8)), 1), len(utf8))
        # At least one character, though the bytes may be fewer than it has.
        return end - max(len(utf8[-n_bytes:].decode(errors="ignore")), 1)

    low, high, wanted = place(2 * share), place(share / 2), place(share)
    for name, pattern in (("paragraph", PARAGRAPH), ("sentence", SENTENCE)):
        ends = [match.end() for match in pattern.finditer(document, max(low - 1, start), high)]
        ends = [found for found in ends if start < found < end]
        if ends:
            return min(ends, key=lambda found: abs(found - wanted)), name
    while wanted < end - 1 and unicodedata.category(document[wanted]).startswith("M"):  # a mark on the one before
        wanted += 1
    return (wanted if start < wanted else 0), "character"
