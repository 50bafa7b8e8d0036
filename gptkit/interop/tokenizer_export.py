"""Export our tokenizers as a tokenizer.json, which transformers' AutoTokenizer loads without sentencepiece or tiktoken.

The file also holds what training added: lower-casing, the newline token, bytes for text that has no piece. A text begins
with end-of-text, as in training, where special tokens are asked for (transformers' default); they are never recognized
within a text.

SentencePiece's algorithms are expressed as follows: unigram is the same there (Kudo 2018), but for names found in a text
and unknown characters (backends.hide_names) and the rounding of sums (compare_tokenizers); BPE becomes a list of merges,
which are all ways to join two pieces into a third, ordered by the third's score.
"""

import json
import math
import unicodedata
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptkit.base.cli import UserError
from gptkit.text.backends import (
    UNREACHABLE,
    SentencePieceBackend,
    TiktokenBackend,
    TokenizersBackend,
    any_but,
    escape,
    unused_character,
)

if TYPE_CHECKING:
    from gptkit.text.tokenizer import Tokenizer


# Lines that name what tokenizers treat specially, to be read as any text.
NAMES = ("</s><s><unk><pad>", "あ<0x41>い<0xE3><0x0A>", "[PAD] [CLS]あ[UNK]", "▁あ▁▁い ▁", " <|endoftext|>  あ")
USER_DEFINED_SCORE = -0.1  # with which sentencepiece's unigram prefers its user-defined symbols
REMEDY = "train one by dataset/train_tokenizer.py"


def export_tokenizer(tokenizer: "Tokenizer", context_length: int) -> dict[str, bytes]:
    """Return the contents of tokenizer.json and tokenizer_config.json by file name.

    Raises UserError where the tokenizer cannot be expressed in that format.
    """
    from tokenizers import AddedToken, normalizers, processors

    exported = _convert_backend(tokenizer)
    if tokenizer.lower_case:
        exported.normalizer = normalizers.Sequence([n for n in (normalizers.Lowercase(), exported.normalizer) if n])
    if tokenizer.newline_id is not None:
        exported.add_tokens([AddedToken("\n", normalized=False)])
        if exported.token_to_id("\n") != tokenizer.newline_id:
            raise UserError(
                f"tokenizer {tokenizer.name}: its ids have gaps, so its newline token cannot be exported; train with another tokenizer"
            )
    end = tokenizer.end_of_text
    exported.add_special_tokens([AddedToken(end, normalized=False, special=True)])
    exported.post_processor = processors.TemplateProcessing(
        single=f"{end} $A", pair=f"{end} $A $B", special_tokens=[(end, tokenizer.end_of_text_id)]
    )
    unknown = None if tokenizer.unknown_id is None else exported.id_to_token(tokenizer.unknown_id)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": pad_token(tokenizer),
        "padding_side": "left",  # a text is continued at its end
        "unk_token": unknown,
        "add_bos_token": True,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 adds token_type_ids, which GPTs refuse
    }
    return {
        "tokenizer.json": exported.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=1).encode(),
    }


def pad_token(tokenizer: "Tokenizer") -> str:
    """Return the name of the token that fills a batch: the tokenizer's own, or else end-of-text."""
    backend = tokenizer.backend
    return next(
        (name for name in ("<pad>", "[PAD]") if backend.id_of(name) in backend.special_ids), tokenizer.end_of_text
    )


def _convert_backend(tokenizer: "Tokenizer") -> Any:
    """Return a tokenizers.Tokenizer that encodes as the backend does, which may be changed. Raises UserError."""
    backend = tokenizer.backend
    if isinstance(backend, SentencePieceBackend):
        return _convert_sentencepiece(backend, tokenizer.lower_case)
    if isinstance(backend, TiktokenBackend):
        return _convert_tiktoken(backend)
    if isinstance(backend, TokenizersBackend):
        return backend.copy()
    raise UserError(
        f"tokenizer {tokenizer.name}: a {type(backend).__name__} cannot be exported; train with a SentencePiece, tiktoken"
        " or Hugging Face tokenizer"
    )


def _convert_sentencepiece(backend: SentencePieceBackend, lower_case: bool) -> Any:
    """Return a tokenizers.Tokenizer with the pieces and normalization of a SentencePiece model. Raises UserError.

    The pieces there hold a space where SentencePiece has "▁", so that a "▁" in a text is a character like others.
    """
    from tokenizers import AddedToken, Regex, decoders, normalizers

    model = backend.proto()
    kind, spec = type(model.pieces[0]), model.normalizer_spec
    has_space = any(piece.piece == "▁" and piece.type == kind.NORMAL for piece in model.pieces)
    has_bytes = any(piece.type == kind.BYTE for piece in model.pieces)
    names = [piece.piece.replace("▁", " ") if has_space else piece.piece for piece in model.pieces]
    by_type = {
        number: [n for n, p in zip(names, model.pieces, strict=True) if p.type == number] for number in range(1, 7)
    }
    is_bpe = model.trainer_spec.model_type == model.trainer_spec.BPE
    # The text is in lower case before SentencePiece looks for them.
    found_in_text = [name for name in by_type[kind.USER_DEFINED] if not lower_case or name == name.lower()]
    adds_or_strips = spec.add_dummy_prefix or spec.remove_extra_whitespaces
    for is_so, reason in (
        (not is_bpe and model.trainer_spec.model_type != model.trainer_spec.UNIGRAM, "is neither unigram nor BPE"),
        (model.trainer_spec.treat_whitespace_as_suffix, "puts spaces after words (treat_whitespace_as_suffix)"),
        (not spec.escape_whitespaces, "does not write a space as ▁ (escape_whitespaces)"),
        (by_type[kind.UNUSED], "has unused pieces"),
        (is_bpe and adds_or_strips and found_in_text, "is BPE that adds or strips spaces around its own symbols"),
    ):
        if is_so:
            raise UserError(f"this SentencePiece model {reason}, so it cannot be exported; {REMEDY}")
    steps: list[Any] = []
    if spec.precompiled_charsmap:  # tokenizers does not join a letter and a mark of six bytes together: か and U+3099
        steps += [normalizers.Replace(pair, letter) for pair, letter in _voiced_kana()]
        steps += [normalizers.NFC(), normalizers.Precompiled(spec.precompiled_charsmap)]
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" +"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if not has_space:
        steps.append(normalizers.Replace(" ", "▁"))
    elif not backend.keeps_mark:
        steps.append(normalizers.Replace("▁", " "))
    if is_bpe:
        exported = _make_bpe(model, names, by_type[kind.NORMAL], has_bytes)
        exported.add_tokens([AddedToken(name, normalized=False) for name in found_in_text])
    else:
        exported, replacement = _make_unigram(model, names, has_bytes)
        steps += replacement
    exported.normalizer = normalizers.Sequence(steps) if steps else None
    # Remove the dummy space before each line. (Where newlines are pieces of the model, lines after the first have none.)
    spaces = " +" if spec.remove_extra_whitespaces else " "
    strip_dummy = [decoders.Replace(Regex(rf"(?<=\A|\n){spaces}"), "")] if adds_or_strips else []
    marks = [] if has_space else [decoders.Replace("▁", " ")]
    exported.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), *marks, *strip_dummy])
    special = [name for name in names if name in {*by_type[kind.CONTROL], *by_type[kind.UNKNOWN]}]
    exported.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    return exported


def _make_bpe(model: Any, names: list[str], normal: list[str], has_bytes: bool) -> Any:
    """Return a tokenizers.Tokenizer whose BPE joins the pieces of a SentencePiece model, named `names`, by score."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    scores = {name: piece.score for name, piece in zip(names, model.pieces, strict=True)}
    vocabulary = {name: i for i, name in enumerate(names)}
    unknown = names[model.trainer_spec.unk_id]
    return Tokenizer(
        BPE(
            vocabulary,
            _list_merges({name: scores[name] for name in normal}),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=has_bytes,
        )
    )


def _make_unigram(model: Any, names: list[str], has_bytes: bool) -> tuple[Any, list[Any]]:
    """Return a tokenizers.Tokenizer with the unigram model of SentencePiece, and what its normalizer must do last.

    Names of special pieces and of bytes are hidden as in backends.hide_names. Raises UserError where that does not suffice.
    """
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import Unigram

    kind = type(model.pieces[0])
    vocabulary: list[tuple[str, float]] = []
    normal, own_symbols, special = (list[str]() for _ in range(3))
    for name, piece in zip(names, model.pieces, strict=True):
        found, score = {
            kind.NORMAL: (normal, piece.score), kind.USER_DEFINED: (own_symbols, USER_DEFINED_SCORE)
        }.get(piece.type, (special, UNREACHABLE))  # fmt: skip
        found.append(name)
        vocabulary.append((name, score))
    single = {name for name in normal if len(name) == 1}
    for name in normal:
        if not single.issuperset(name):
            raise UserError(
                f"this SentencePiece model has a character only within its piece {name!r}, so it cannot be exported; {REMEDY}"
            )
    exported = Tokenizer(Unigram(vocabulary, model.trainer_spec.unk_id, has_bytes))
    if has_bytes:
        own = map(escape, sorted(own_symbols, key=len, reverse=True))
        exported.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*own, any_but(single)])), "isolated")
        return exported, []
    characters = single.union(*own_symbols)
    for name in special:
        if characters.issuperset(name) and not single.issuperset(name):
            raise UserError(
                f"this SentencePiece model's {name!r} cannot be told from a text like it, so it cannot be exported; {REMEDY}"
            )
    return exported, [normalizers.Replace(Regex(any_but(characters)), unused_character(characters))]


def _voiced_kana() -> list[tuple[str, str]]:
    """Return pairs of half-width kana and voicing mark, such as ｶﾞ, each with the letter that NFKC makes of the two."""
    pairs = [chr(kana) + mark for kana in range(0xFF66, 0xFF9E) for mark in "\uff9e\uff9f"]
    letters = [(pair, unicodedata.normalize("NFKC", pair)) for pair in pairs]
    return [(pair, letter) for pair, letter in letters if len(letter) == 1]


def _list_merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Return all pairs of pieces that join into a piece, sorted by the score of that piece, best first."""
    order = sorted(scores, key=lambda piece: -scores[piece])
    return [
        (piece[:cut], piece[cut:])
        for piece in order
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]


def _convert_tiktoken(backend: TiktokenBackend) -> Any:
    """Return a tokenizers.Tokenizer with the byte-level BPE of a tiktoken encoding. Raises UserError."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    ranks, pattern, special = backend.ranks(), backend.pattern, backend.special_tokens
    characters = _bytes_to_unicode()
    names = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            parts = _split_token(token, ranks)
            if len(parts) == 2:  # else no text is ever encoded as this token
                merges.append((names[parts[0]], names[parts[1]]))
    exported = Tokenizer(BPE({names[token]: rank for token, rank in ranks.items()}, merges))
    exported.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    exported.decoder = decoders.ByteLevel()
    names_by_id = {i: name for name, i in special.items()}
    others = [
        names_by_id.get(i, f"<|unused_{i}|>") for i in range(len(ranks), backend.vocab_size)
    ]  # tokenizers allows no gaps
    exported.add_special_tokens([AddedToken(name, normalized=False) for name in others])
    if any(exported.token_to_id(name) != i for name, i in special.items()):
        raise UserError(
            "the ids of this tiktoken encoding have gaps between its tokens, so it cannot be exported; train with another one"
        )
    return exported


def _bytes_to_unicode() -> list[str]:
    """Return a visible character for each byte, as in GPT-2's vocabulary: its own where it has one, else from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(256)]


def _split_token(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the parts into which byte-pair merges of lower ranks than the token's join its bytes."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, at = min([(ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(pairwise(parts))])
        if rank >= ranks[token]:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def compare_tokenizers(tokenizer: "Tokenizer", folder: Path, lines: Iterable[str]) -> tuple[str | None, int]:
    """Compare the tokenizer with the AutoTokenizer of an exported folder on some lines.

    Returns the first line that has other ids or decodes to another text there, or None; and the number of ties: lines
    that AutoTokenizer split in the other of two ways that a unigram model finds equally likely. sentencepiece sums
    scores in float32 and tokenizers in float64, so a tie may go either way, but for models of dataset/train_tokenizer.py,
    whose scores are rounded so that both sums are exact.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # otherwise each line longer than the context is a warning
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
