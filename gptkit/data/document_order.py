"""Put the documents of a text into a random order of its own for each epoch, and read windows of that order.

The order is a map from places in the epoch to places in the text, so that no token is copied. Windows begin at a random
offset, which cuts them anew also where there is one document, or none that end-of-text ends.

Shapes: D documents, B windows, T tokens of a window (context_length).
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gptkit.data.token_shards import Tokens, TokenStream

SCAN_TOKENS = 1 << 20  # read at a time in search of the ends: 4 MiB
ORDER_OF_DOCUMENTS = 1  # sets these random numbers apart from others of the same seed and epoch
Places = npt.NDArray[np.int64]


class DocumentOrder(NamedTuple):
    """The documents of an epoch in their order, as a map from places in the epoch to places in the text."""

    ends: Places  # (D,) where each document ends in the epoch
    shifts: Places  # (D,) what a place in the epoch and the same token's place in the text differ by
    offset: int  # place in the epoch where the first window begins; the tokens before it follow the last document


def document_ends(tokens: TokenStream, end_of_text_id: int) -> Places:
    """Return where each document of a stream ends, its end-of-text included: (D,).

    What follows the last end-of-text counts as a document. This reads all tokens once, a block at a time.
    """
    found = []
    for start in range(0, len(tokens), SCAN_TOKENS):
        block = tokens.read(start, min(SCAN_TOKENS, len(tokens) - start), np.uint32)
        found.append(np.flatnonzero(block == end_of_text_id) + start + 1)
    ends = np.concatenate([np.empty(0, np.int64), *found])
    has_rest = len(tokens) > (ends[-1] if len(ends) else 0)
    return np.append(ends, len(tokens)) if has_rest else ends


def document_order(ends: Places, context_length: int, seed: int, epoch: int) -> DocumentOrder:
    """Return the random order of one epoch for documents that end at `ends` in the text, and its random offset."""
    rng = np.random.default_rng([seed, epoch, ORDER_OF_DOCUMENTS])
    order = rng.permutation(len(ends))
    lengths = np.diff(ends, prepend=0)[order]
    ends_in_epoch = np.cumsum(lengths)
    return DocumentOrder(ends_in_epoch, ends[order] - ends_in_epoch, int(rng.integers(context_length)))


def read_windows(
    tokens: TokenStream, order: DocumentOrder, windows: npt.NDArray[np.integer], context_length: int
) -> Tokens:
    """Return the tokens of some windows of an epoch, and the one after each: (B,) -> (B, T + 1) int64."""
    starts = order.offset + context_length * windows.astype(np.int64)
    places = (starts[:, None] + np.arange(context_length + 1)) % len(tokens)  # (B, T + 1), in the epoch
    documents = np.searchsorted(order.ends, places, side="right")
    return tokens.read_at(places + order.shifts[documents])
