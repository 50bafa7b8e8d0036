"""Let tokens that share a character learn from each other: a step of the optimizer that moves all of them together.

AdamW moves each row of embedding and head by what that token alone has seen. In Japanese most tokens of two or more
characters are rare, while their characters are frequent and mean much. Here a row is thought of as the sum of a vector of
its own and of vectors that tokens share: for their first character, their last, and each that they have; for the scripts of
the first, of the last, and of all in order; and for their length. So fastText's words are sums over their n-grams
(Bojanowski et al. 2017, arXiv 1607.04606). Only the sums exist: the gradient of a shared vector is the sum of those of the
rows that have it, and its AdamW step is added to each of these rows. Where all the vectors decay alike, so does their sum,
so that nothing else is to be kept, and the model remains what it is.

Shapes: V rows of the embedding (padding included), F shared vectors, C channels.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from gptkit.text.tokenizer import Tokenizer

UNREADABLE = "\ufffd"  # in what a token of single bytes decodes to
LONG = 4  # characters; longer tokens are alike
CONTINUATION = "##"  # before what WordPiece's tokens within a word decode to


@dataclass(frozen=True)
class Bags:
    """For each of some sums, the rows that it adds up: those from its offset to the next one's."""

    indices: torch.Tensor
    offsets: torch.Tensor

    def sum(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the sums, each (C,), of rows (…, C), on their device."""
        sums = F.embedding_bag(self.indices, rows.to(self.indices.device), self.offsets, mode="sum")
        return sums.to(rows.device)


@dataclass(frozen=True)
class SharedCharacters:
    """Which rows of an embedding have which vectors in common."""

    of_rows: Bags  # V sums of shared vectors
    of_shared: Bags  # F sums of rows
    n_shared: int


def share_characters(tokens: Sequence[str], n_rows: int, device: str = "cpu") -> SharedCharacters:
    """Return which of n_rows rows share what; `tokens` are the texts of the first of them, "" where one has none.

    The sums are made on that device.
    """
    numbers: dict[tuple[str, str], int] = {}
    of_rows: list[list[int]] = [[] for _ in range(n_rows)]
    for row, text in zip(of_rows, tokens, strict=False):
        if text and UNREADABLE not in text:
            row += [numbers.setdefault(role, len(numbers)) for role in _roles(text)]
    of_shared: list[list[int]] = [[] for _ in numbers]
    for row_number, row in enumerate(of_rows):
        for shared in row:
            of_shared[shared].append(row_number)
    return SharedCharacters(_bags(of_rows, device), _bags(of_shared, device), len(numbers))


def _roles(text: str) -> list[tuple[str, str]]:
    """Return what a token shares with others."""
    scripts = [_script(character) for character in text]
    return [
        ("first", text[0]),
        ("last", text[-1]),
        *(("any", character) for character in dict.fromkeys(text)),
        ("script of the first", scripts[0]),
        ("script of the last", scripts[-1]),
        ("scripts", " ".join(scripts[:LONG])),
        ("length", str(min(len(text), LONG))),
    ]


def _script(character: str) -> str:
    """Return a word such as HIRAGANA, CJK or LATIN, the first of the character's name in Unicode."""
    return re.split("[ -]", unicodedata.name(character, "UNNAMED"))[0]


def characters_of(tokenizer: Tokenizer, n_rows: int, device: torch.device) -> SharedCharacters:
    """Return which of n_rows rows of an embedding on that device share characters."""
    tokens = [tokenizer.decode([i]).removeprefix(CONTINUATION) for i in range(tokenizer.vocab_size)]
    where = "cpu" if device.type == "mps" else str(device)  # not every torch sums there
    return share_characters(tokens, n_rows, where)


def _bags(members: Sequence[Sequence[int]], device: str) -> Bags:
    lengths = torch.tensor([len(each) for each in members], dtype=torch.int64)
    indices = torch.tensor([i for each in members for i in each], dtype=torch.int64)
    return Bags(indices.to(device), (lengths.cumsum(0) - lengths).to(device))
