"""Round the scores of a unigram model of SentencePiece, so that every library that reads it splits a text in the same way.

A model's file is a protobuf message whose fields 1 are its pieces, each a message with the piece (1), its score as a
float32 (2) and its type (3). The scores are changed in place, so that protobuf need not be installed.
"""

import struct

# float32 has 24 bits: sums of up to 2^18 have no rounding error. A line of Aozora Bunko has up to 2^15.
STEPS_PER_UNIT = 64
PIECE, SCORE = 1, 2
VARINT, LENGTH_DELIMITED, FIXED32 = 0, 2, 5


def round_scores(model: bytes) -> bytes:
    """Return the model with each score rounded to a multiple of 1 / STEPS_PER_UNIT.

    sentencepiece sums scores in float32 and others in float64, which disagree on two ways to split a text that are
    equally likely, such as "…………|……" and "……|…………". Without a rounding error all choose the same one.
    """
    rounded = bytearray(model)
    for number, start, end in _fields(model, 0, len(model)):
        if number == PIECE:
            for inner, score_start, score_end in _fields(model, start, end):
                if inner == SCORE:
                    (score,) = struct.unpack("<f", model[score_start:score_end])
                    rounded[score_start:score_end] = struct.pack("<f", round(score * STEPS_PER_UNIT) / STEPS_PER_UNIT)
    return bytes(rounded)


def _fields(message: bytes, start: int, end: int) -> list[tuple[int, int, int]]:
    """Return (number, start, end) of the value of each field of a protobuf message. Raises ValueError for other types."""
    found = []
    while start < end:
        tag, start = _varint(message, start)
        kind = tag & 7
        if kind == LENGTH_DELIMITED:
            size, start = _varint(message, start)
        elif kind == FIXED32:
            size = 4
        elif kind == VARINT:
            size = _varint(message, start)[1] - start
        else:
            raise ValueError(f"a field of type {kind}, which SentencePiece's models do not have")
        found.append((tag >> 3, start, start + size))
        start += size
    return found


def _varint(message: bytes, start: int) -> tuple[int, int]:
    """Return the whole number that begins at `start`, and where it ends."""
    value = shift = 0
    while message[start] & 0x80:
        value |= (message[start] & 0x7F) << shift
        start, shift = start + 1, shift + 7
    return value | message[start] << shift, start + 1
