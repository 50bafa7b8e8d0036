"""Our tokenizers as a tokenizer.json, which transformers' AutoTokenizer loads without sentencepiece or tiktoken.

What the training added stands in it too: lower-casing, the newline token, bytes for what has no piece. Only "▁"
(U+2581), which SentencePiece takes for a space, is read as one there. A text begins with end-of-text, as in training,
where special tokens are asked for (transformers' default); they are never read out of text.

SentencePiece's algorithms there: unigram the same (Kudo 2018); BPE by a list of merges, which are all ways to make a
piece of two others, in the order of the pieces' scores.
"""

import json
import math
import unicodedata
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptkit.base.cli import UserError
from gptkit.text.backends import SentencePieceBackend, TiktokenBackend, TokenizersBackend

if TYPE_CHECKING:
    from gptkit.text.tokenizer import Tokenizer


NEVER = -1e6  # a score below that of any reading


def export_tokenizer(tokenizer: "Tokenizer", context_length: int) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json. Raises UserError where the tokenizer cannot be given in that form."""
    from tokenizers import AddedToken, normalizers, processors

    backend = tokenizer.backend
    if isinstance(backend, SentencePieceBackend):
        made = _of_sentencepiece(backend)
    elif isinstance(backend, TiktokenBackend):
        made = _of_tiktoken(backend)
    else:
        assert isinstance(backend, TokenizersBackend)
        made = backend.copy()
    if tokenizer.lower_case:
        made.normalizer = normalizers.Sequence([n for n in (normalizers.Lowercase(), made.normalizer) if n])
    if tokenizer.newline_id is not None:
        made.add_tokens([AddedToken("\n", normalized=False)])
        if made.token_to_id("\n") != tokenizer.newline_id:
            raise UserError(f"tokenizer {tokenizer.name}: its ids have gaps, so a newline token cannot be exported")
    end = tokenizer.end_of_text
    made.add_special_tokens([AddedToken(end, normalized=False, special=True)])
    made.post_processor = processors.TemplateProcessing(
        single=f"{end} $A", pair=f"{end} $A $B", special_tokens=[(end, tokenizer.end_of_text_id)]
    )
    unknown = None if tokenizer.unknown_id is None else made.id_to_token(tokenizer.unknown_id)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": next((name for name in ("<pad>", "[PAD]") if made.token_to_id(name) is not None), end),
        "unk_token": unknown,
        "add_bos_token": True,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }
    return {
        "tokenizer.json": made.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=1).encode(),
    }


def _of_sentencepiece(backend: SentencePieceBackend) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE, Unigram

    model = backend.proto()
    kinds, kind = [piece.type for piece in model.pieces], type(model.pieces[0])
    special = (kind.CONTROL, kind.UNKNOWN)
    # A special piece must never be the way to read a text that only looks like it.
    pieces = [(piece.piece, NEVER if piece.type in special else piece.score) for piece in model.pieces]
    unknown_id = model.trainer_spec.unk_id
    byte_fallback = kind.BYTE in kinds
    if model.trainer_spec.model_type == model.trainer_spec.UNIGRAM:
        made = Tokenizer(Unigram(pieces, unknown_id, byte_fallback))
    elif model.trainer_spec.model_type == model.trainer_spec.BPE:
        scores = {text: score for (text, score), each in zip(pieces, kinds, strict=True) if each == kind.NORMAL}
        vocabulary = {text: i for i, (text, _) in enumerate(pieces)}
        made = Tokenizer(
            BPE(
                vocabulary,
                _merges(scores),
                unk_token=pieces[unknown_id][0],
                fuse_unk=True,
                byte_fallback=byte_fallback,
            )
        )
    else:
        raise UserError("this SentencePiece model is neither unigram nor BPE; it cannot be exported")
    how = model.normalizer_spec
    if model.trainer_spec.treat_whitespace_as_suffix:
        raise UserError("this SentencePiece model writes spaces after words; it cannot be exported")
    steps: list[Any] = []
    if how.precompiled_charsmap:  # there it does not put a mark to its letter where both take six bytes: か and U+3099
        steps += [normalizers.Replace(halves, whole) for halves, whole in _marked_kana()]
        steps += [normalizers.NFC(), normalizers.Precompiled(how.precompiled_charsmap)]
    if how.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" +"), " "), normalizers.Strip()]
    if how.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    # The space before each line that was no space. (Where newlines are pieces of the model, none is put there.)
    first = [decoders.Strip(" ", 1, 0), decoders.Replace("\n ", "\n")] if how.add_dummy_prefix else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *first])
    made.add_special_tokens(
        [AddedToken(t, normalized=False) for (t, _), k in zip(pieces, kinds, strict=True) if k in special]
    )
    made.add_tokens(
        [AddedToken(t, normalized=False) for (t, _), k in zip(pieces, kinds, strict=True) if k == kind.USER_DEFINED]
    )
    return made


def _marked_kana() -> list[tuple[str, str]]:
    """Half-width kana with a mark of voicing behind it, such as ｶﾞ, and the letter that NFKC makes of the two."""
    pairs = [chr(kana) + mark for kana in range(0xFF66, 0xFF9E) for mark in "\uff9e\uff9f"]
    made = [(pair, unicodedata.normalize("NFKC", pair)) for pair in pairs]
    return [(pair, letter) for pair, letter in made if len(letter) == 1]


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, the best piece first."""
    order = sorted(scores, key=lambda piece: -scores[piece])
    return [
        (piece[:cut], piece[cut:])
        for piece in order
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]


def _of_tiktoken(backend: TiktokenBackend) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    ranks, pattern, special = backend.ranks(), backend.pattern, backend.special_tokens
    shown = _shown_bytes()
    names = {token: "".join(shown[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            parts = _parts(token, ranks)
            if len(parts) == 2:  # else no text ever comes to it
                merges.append((names[parts[0]], names[parts[1]]))
    made = Tokenizer(BPE({names[token]: rank for token, rank in ranks.items()}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    names_by_id = {i: name for name, i in special.items()}
    others = [names_by_id.get(i, f"<|unused_{i}|>") for i in range(len(ranks), backend.vocab_size)]  # no gaps there
    made.add_special_tokens([AddedToken(name, normalized=False) for name in others])
    if any(made.token_to_id(name) != i for name, i in special.items()):
        raise UserError("the ids of this tiktoken encoding have gaps between its tokens; it cannot be exported")
    return made


def _shown_bytes() -> list[str]:
    """A visible character for each byte, as GPT-2's vocabulary has them: its own, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(256)]


def _parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What byte-pair merges of a lower rank than the token's make of its bytes."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [(ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(pairwise(parts))]
        rank, at = min(found)
        if rank >= ranks[token]:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def compare_tokenizers(tokenizer: "Tokenizer", folder: Path, lines: Iterable[str]) -> tuple[str | None, int]:
    """What AutoTokenizer makes of lines, from an exported folder: the first one with other ids or another text, or None;
    and how many were read in the other one of two ways that a unigram model finds equally likely.

    sentencepiece adds scores up in float32, tokenizers in float64, so such a tie may fall either way.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # or each line beyond the context is a warning
    exported = AutoTokenizer.from_pretrained(folder)
    n_ties = 0
    for line in lines:
        ours, theirs = tokenizer.encode(line), exported(line, add_special_tokens=False)["input_ids"]
        text = tokenizer.decode(ours)
        if exported.decode(theirs, skip_special_tokens=True) != text:
            return line, n_ties
        if ours != theirs:
            backend = tokenizer.backend
            if not isinstance(backend, SentencePieceBackend) or tokenizer.decode(theirs) != text:
                return line, n_ties
            if not math.isclose(backend.score(ours), backend.score(theirs), rel_tol=1e-6):
                return line, n_ties
            n_ties += 1
    return None, n_ties
