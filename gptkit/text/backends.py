"""Tokenizer libraries behind one small interface: SentencePiece, Hugging Face's `tokenizers`, tiktoken.

Each backend is made from the bytes of its files alone, so that it can travel with a checkpoint. Special tokens are
never read out of text. Fetching files, end-of-text, newlines and lower case are left to tokenizer.py.
"""

import base64
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

UNREACHABLE = -1e6  # a score below that of every way to split the characters of a name
SCORE_STEPS_PER_UNIT = 64  # of our own unigram models, as dataset/_unigram.py rounds them
BYTE_NAME = "<0x{:02X}>"  # of the piece that stands for a byte
MAX_IDS = 1 << 24  # far above any vocabulary; what a damaged file claims is bounded by it
MAX_SPACE = 400_000  # at a million spaces and line ends in a row tiktoken's matcher overflows its stack
ReadFile = Callable[[str], bytes]  # the content of a saved file by its name; raises OSError or KeyError


def longest_space(text: str) -> int:
    """Return the length of the longest run of spaces and line ends in a text."""
    return max((len(run[0]) for run in re.finditer(r"\s+", text)), default=0)


def _require_ids(ids: Iterable[Any], what: str) -> None:
    """Raise ValueError where one of them is not a valid id."""
    for found in ids:
        if type(found) is not int or not 0 <= found < MAX_IDS:
            raise ValueError(f"{what} has the id {found!r}")


class Backend(Protocol):
    """The interface that a tokenizer library is wrapped in."""

    kind: str  # its name in a saved tokenizer's description
    vocab_size: int  # ids are below it
    unknown_id: int | None  # None: there is no such token
    special_ids: frozenset[int]  # ids that stand for no text: end-of-text, padding, unknown, …

    @classmethod
    def from_files(cls, read: ReadFile) -> "Backend":
        """Return the backend whose files() `read` gives by name. Raises OSError, KeyError or ValueError."""

    def id_of(self, piece: str) -> int | None:
        """Return the id of a token given by its name, or None."""

    def encode_lines(self, lines: Sequence[str]) -> list[list[int]]:
        """Return the ids of each line, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text that the ids stand for."""

    def normalize(self, line: str) -> str:
        """Apply the library's own normaliser: a line of known characters decodes to this, but for spaces at the ends."""

    def files(self) -> dict[str, bytes]:
        """Return all that from_files needs, by file name."""


class SentencePieceBackend:
    """A `.model` file of SentencePiece (Kudo & Richardson 2018)."""

    kind = "sentencepiece"
    FILE = "spiece.model"

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        if not model:  # the library would take it as no model given
            raise ValueError("not a SentencePiece model (it is empty)")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model ({error})")
        self._model = model
        sp = self._processor
        self.vocab_size = sp.vocab_size()
        self.pieces()  # raises UnicodeDecodeError, a ValueError, where one is not text
        self.unknown_id: int | None = sp.unk_id()
        self.special_ids = frozenset(
            i for i in range(self.vocab_size) if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)
        )

        # Inside the library "▁" stands for a space. A real one is encoded as its bytes, where both have their pieces and
        # the library adds and changes nothing between the parts.
        self._space_is_piece = self.id_of("▁") is not None
        is_plain = sp.normalize(" a\n b ").replace("▁", " ") == " a\n b "
        mark = [sp.piece_to_id(BYTE_NAME.format(byte)) for byte in "▁".encode()]
        self.keeps_mark = is_plain and self._space_is_piece and self.unknown_id not in mark
        self._cuts: dict[str, list[int]] = {"▁": mark} if self.keeps_mark else {}  # characters, with their ids
        # A unigram model sums scores in float32, where a long text leaves no digits for the difference of two ways to
        # split a word. So lines are encoded one by one where this means the same, and the scores are those of version
        # 0.2.0, which rounds them: tokens made by models of earlier versions stay what they are. BPE, whose scores are
        # whole numbers, sums nothing.
        newline = self.id_of("\n")
        scores = [sp.get_score(i) for i in range(self.vocab_size)]
        is_rounded = all((score * SCORE_STEPS_PER_UNIT).is_integer() for score in scores)
        is_unigram = not all(score.is_integer() for score in scores)
        is_split = newline is not None and not any("\n" in piece and piece != "\n" for piece in self.pieces())
        if is_plain and is_rounded and is_unigram and is_split:
            self._cuts["\n"] = [newline]  # type: ignore[list-item]
        self._cut = re.compile(f"([{''.join(self._cuts)}])") if self._cuts else None

    @classmethod
    def from_files(cls, read: ReadFile) -> "SentencePieceBackend":
        return cls(read(cls.FILE))

    def score(self, ids: Sequence[int]) -> float:
        """Return the sum of the scores of pieces: in a unigram model the logarithm of their probability."""
        return float(sum(self._processor.get_score(i) for i in ids if i < self.vocab_size))

    def proto(self) -> Any:
        """Return the model's protobuf message: pieces, scores and settings. Raises ImportError without protobuf."""
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[import-untyped]

        return ModelProto.FromString(self._model)

    def id_of(self, piece: str) -> int | None:
        found = self._processor.piece_to_id(piece)
        return found if self._processor.id_to_piece(found) == piece else None

    def end_of_text_piece(self) -> str | None:
        eos = self._processor.eos_id()
        return self._processor.id_to_piece(eos) if eos >= 0 else None

    def pieces(self) -> list[str]:
        return [self._processor.id_to_piece(i) for i in range(self.vocab_size)]

    def encode_lines(self, lines: Sequence[str]) -> list[list[int]]:
        encode = self._processor.encode
        if self._cut is None:
            return [encode(line) for line in lines]
        parts = [self._cut.split(line) for line in lines]
        return [[i for part in line for i in self._cuts.get(part) or encode(part)] for line in parts]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode(list(ids))
        return text if self._space_is_piece else text.replace("▁", " ")  # a space that had to become bytes

    def normalize(self, line: str) -> str:
        parts = line.split("▁") if self.keeps_mark else [line]  # as encode_lines does
        return "▁".join(self._processor.normalize(part).replace("▁", " ") for part in parts)

    def files(self) -> dict[str, bytes]:
        return {self.FILE: self._model}


def hide_names(content: bytes) -> bytes:
    """Return a tokenizer.json whose Unigram model reads the names of special tokens and of bytes as other characters.

    tokenizers finds any name of the vocabulary in a text, and looks a run of unknown characters up there. So those names
    get a score below that of any other way, and a character that is no piece never stands beside another: it is split
    off where it becomes bytes, else all such characters become one that no name holds. The ids of other texts stay. A
    model with a character that is in pieces but no piece of its own, and one of another kind, is returned as it is.
    """
    described = json.loads(content)
    model = described["model"]
    if model.get("type") != "Unigram":
        return content
    has_bytes, unknown = bool(model.get("byte_fallback")), model.get("unk_id")
    hidden = {token["content"] for token in described.get("added_tokens") or () if token["special"]}
    hidden |= {BYTE_NAME.format(byte) for byte in range(256)} if has_bytes else set()
    hidden |= set() if unknown is None else {model["vocab"][unknown][0]}
    names = [name for name, _ in model["vocab"] if name not in hidden]
    single = {name for name in names if len(name) == 1}
    if not all(single.issuperset(name) for name in names):
        return content
    model["vocab"] = [[name, UNREACHABLE if name in hidden else score] for name, score in model["vocab"]]
    if has_bytes:
        split = {"type": "Split", "pattern": {"Regex": any_but(single)}, "behavior": "Isolated", "invert": False}
        _append_step(described, "pre_tokenizer", "pretokenizers", split)
    else:
        pattern = {"Regex": any_but({*single, " "})}  # a pre-tokenizer may write a space as "▁"
        replace = {"type": "Replace", "pattern": pattern, "content": unused_character(single)}
        _append_step(described, "normalizer", "normalizers", replace)
    return json.dumps(described, ensure_ascii=False).encode()


def _append_step(described: dict[str, Any], kind: str, steps: str, step: dict[str, Any]) -> None:
    """Let a step of a tokenizer.json be followed by one more, unless it ends with that one."""
    found = described.get(kind)
    before = found[steps] if found and found["type"] == "Sequence" else [found] if found else []
    if step not in before[-1:]:
        described[kind] = {"type": "Sequence", steps: [*before, step]}


def any_but(characters: Iterable[str]) -> str:
    """Return a regular expression, as tokenizers reads it, for one character that is none of those."""
    return f"[^{''.join(map(escape, sorted(characters)))}]"


def escape(text: str) -> str:
    """Return the text as a regular expression of tokenizers."""
    return "".join(f"\\x{{{ord(character):X}}}" for character in text)


def unused_character(characters: set[str]) -> str:
    """Return a character for private use that is none of those."""
    return next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in characters)


class TokenizersBackend:
    """A `tokenizer.json` of Hugging Face's `tokenizers`."""

    kind = "tokenizers"
    FILE = "tokenizer.json"

    def __init__(self, content: bytes) -> None:
        from tokenizers import Tokenizer as HFTokenizer

        try:
            self._hidden = hide_names(content)  # what is encoded by; it has the same tokens
            self._tokenizer = HFTokenizer.from_buffer(self._hidden)
        except Exception as error:  # the library raises a plain Exception
            raise ValueError(f"not a tokenizer.json that this version of tokenizers reads ({error})")
        self._content = content
        self._tokenizer.encode_special_tokens = True  # special tokens in text are only characters
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        _require_ids(vocabulary.values(), "its vocabulary")
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        model = json.loads(content).get("model", {})
        unknown = model.get("unk_token")
        self.unknown_id: int | None = model.get("unk_id") if unknown is None else vocabulary.get(unknown)
        _require_ids([] if self.unknown_id is None else [self.unknown_id], "its unknown token")
        added = self._tokenizer.get_added_tokens_decoder()
        unknown_ids = frozenset() if self.unknown_id is None else frozenset({self.unknown_id})
        self.special_ids = frozenset(i for i, token in added.items() if token.special) | unknown_ids

    @classmethod
    def from_files(cls, read: ReadFile) -> "TokenizersBackend":
        return cls(read(cls.FILE))

    def copy(self) -> Any:
        """Return a new tokenizers.Tokenizer that encodes as this one does, which the caller may change."""
        from tokenizers import Tokenizer as HFTokenizer

        return HFTokenizer.from_buffer(self._hidden)

    def id_of(self, piece: str) -> int | None:
        return self._tokenizer.token_to_id(piece)

    def pieces(self) -> list[str | None]:
        return [self._tokenizer.id_to_token(i) for i in range(self.vocab_size)]

    def encode_lines(self, lines: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch(list(lines), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def normalize(self, line: str) -> str:
        normalizer = self._tokenizer.normalizer
        if normalizer is None:
            return line
        text: str = normalizer.normalize_str(line)
        return text.replace("▁", " ") if "▁" in normalizer.normalize_str("a b") else text

    def files(self) -> dict[str, bytes]:
        return {self.FILE: self._content}


class TiktokenBackend:
    """An encoding of OpenAI's tiktoken: byte-pair ranks, a pattern that splits text, special tokens."""

    kind = "tiktoken"
    RANKS_FILE = "ranks.tiktoken"  # the library's own form: a line per token, base64 of its bytes, a space, its rank
    SETTINGS_FILE = "tiktoken.json"

    def __init__(self, ranks: bytes, settings: bytes) -> None:
        import tiktoken

        try:
            pairs = (line.split() for line in ranks.splitlines())
            mergeable_ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
            options = json.loads(settings)
            self.special_tokens: dict[str, int] = options["special_tokens"]
            ids = (*mergeable_ranks.values(), *self.special_tokens.values())
            _require_ids(ids, "it")
            if len(set(ids)) != len(ids):
                raise ValueError("two tokens have the same id")
            self.pattern: str = options["pattern"]
            self._encoding = tiktoken.Encoding(
                "saved", pat_str=self.pattern, mergeable_ranks=mergeable_ranks, special_tokens=self.special_tokens
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a saved tiktoken encoding ({error})")
        self._files = {self.RANKS_FILE: ranks, self.SETTINGS_FILE: settings}
        self.vocab_size = self._encoding.max_token_value + 1
        self.unknown_id: int | None = None
        unused = set(range(self.vocab_size)) - set(mergeable_ranks.values())  # o200k_base has gaps
        self.special_ids = frozenset(unused)

    @classmethod
    def from_files(cls, read: ReadFile) -> "TiktokenBackend":
        return cls(read(cls.RANKS_FILE), read(cls.SETTINGS_FILE))

    @classmethod
    def from_encoding(cls, encoding: Any) -> "TiktokenBackend":
        """Return the backend of a tiktoken.Encoding."""
        ranks = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in encoding._mergeable_ranks.items())
        settings = {"pattern": encoding._pat_str, "special_tokens": encoding._special_tokens}
        return cls(ranks, json.dumps(settings, ensure_ascii=False).encode())

    def id_of(self, piece: str) -> int | None:
        return self.special_tokens.get(piece)

    def ranks(self) -> dict[bytes, int]:
        """Return the id of each token, by its bytes, special tokens aside."""
        return dict(self._encoding._mergeable_ranks)

    def encode_lines(self, lines: Sequence[str]) -> list[list[int]]:
        return [
            self._encode_pieces(line) if longest_space(line) > MAX_SPACE else self._encoding.encode_ordinary(line)
            for line in lines
        ]

    def _encode_pieces(self, line: str) -> list[int]:
        """Cut a line by the library's pattern outside of its matcher, and encode each piece: the ids are the library's.

        Prints a warning that names the document by its beginning.
        """
        import regex

        begin = line.strip()[:24]
        print(f"warning: the document that begins {begin!r} has {longest_space(line):,} spaces or line ends in a row",
              file=sys.stderr)  # fmt: skip
        pieces = (match[0] for match in regex.finditer(self.pattern, line))
        return [i for piece in pieces for i in self._encoding._encode_single_piece(piece)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode(list(ids))

    def normalize(self, line: str) -> str:
        return line

    def files(self) -> dict[str, bytes]:
        return dict(self._files)
