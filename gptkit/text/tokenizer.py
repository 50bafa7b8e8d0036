"""Text <-> token ids, with trained tokenizers: SentencePiece, Hugging Face's `tokenizers`, tiktoken.

Three things that tokenizers silently get wrong on Japanese are corrected here, once for all of them:

- A SentencePiece model is run by sentencepiece itself. transformers' T5Tokenizer, which rinna's Japanese GPT-2 asks
  for, turns unknown pieces into `</s>`; here unknown stays unknown, and end-of-text stands only after a document.
- Where a tokenizer cannot write a newline (rinna's turns it into a space), one token is added for it, after the
  last id, and each line is encoded alone.
- `do_lower_case` of a Hugging Face folder is obeyed: rinna's vocabulary has no capital Latin letters.

Special tokens are never read out of text: in a document, "</s>" is only characters.

TOKENIZERS, at the end, holds the kinds by the name that --tokenizer takes. A library's work is left to backends.py.
"""

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

from gptkit.base.cli import UserError, first_line, one_line, setting
from gptkit.base.files import read_json
from gptkit.base.paths import hub_folder, likely_path
from gptkit.text.backends import Backend, ReadFile, SentencePieceBackend, TiktokenBackend, TokenizersBackend
from gptkit.text.formats import plain_text
from gptkit.text.tokenizer_files import find_models, read_file

FORMAT = "gptkit-tokenizer"
DESCRIPTION_FILE = "gptkit_tokenizer.json"
# Encoded into the fingerprint, so that a new version of a library that gives other ids is noticed.
PROBE = "　吾輩は猫である。\n「ABC 𠮟る」と、Ａｂｃ１２３…… ﾊﾝｶｸ ゟ が が\tend </s><|endoftext|>\n"
# By the name that --tokenizer takes. Filled below, where the loaders are defined: their settings need its names.
TOKENIZERS: dict[str, "TokenizerKind"] = {}


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """Which tokenizer to use: the flags that pretokenize.py and pretraining.py share."""

    tokenizer: str = setting("hf", "where the tokenizer comes from", choices=TOKENIZERS, group="tokenizer")
    hf_name: str = setting(
        "rinna/japanese-gpt2-small", "with hf: a folder, or a repository of the Hugging Face hub", group="tokenizer"
    )
    tiktoken_name: str = setting("gpt2", "with tiktoken: the encoding, such as gpt2 or o200k_base", group="tokenizer")
    tokenizer_path: str | None = setting(None, "with sentencepiece: a .model file or its folder", group="tokenizer")
    accept_problems: bool = setting(False, "continue although the tokenizer damages this text", group="tokenizer")


@dataclass(frozen=True)
class TokenizerKind:
    """A kind of tokenizer: how it is loaded, and the backends that its saved form may name."""

    load: Callable[[TokenizerSettings], "Tokenizer"]  # raises UserError
    backends: tuple[type[Backend], ...]
    takes_path: bool = False  # whether it reads --tokenizer_path


Settings = TypeVar("Settings", bound=TokenizerSettings)


def with_model_tokenizer(settings: Settings, model: str | None) -> Settings:
    """Return the settings with the tokenizer of a folder or repository, where they name none of their own."""
    plain = TokenizerSettings()
    chosen = any(getattr(settings, name) != getattr(plain, name) for name in ("tokenizer", "hf_name", "tokenizer_path"))
    return settings if model is None or chosen else dataclasses.replace(settings, hf_name=model)


class Tokenizer:
    """A tokenizer that turns text into ids for a GPT and back.

    Ids are 0 … vocab_size - 1, the added newline token included. end_of_text_id stands after each document, and
    before a prompt; encode never returns it.
    """

    def __init__(self, backend: Backend, name: str, end_of_text: str, lower_case: bool = False) -> None:
        found = backend.id_of(end_of_text)
        if found is None:
            raise UserError(f"tokenizer {name} has no token {end_of_text}, which its settings name as end-of-text")
        self.backend, self.name, self.end_of_text, self.lower_case = backend, name, end_of_text, lower_case
        self.end_of_text_id = found
        self.newline_id: int | None = None  # of the added token
        if "\n" not in backend.decode(backend.encode_lines(["あ\nあ"])[0]):
            self.newline_id = backend.vocab_size

    @property
    def vocab_size(self) -> int:
        return self.backend.vocab_size + (self.newline_id is not None)

    @property
    def unknown_id(self) -> int | None:
        return self.backend.unknown_id

    @property
    def never_generated(self) -> frozenset[int]:
        """Return the ids that a model must not generate: those without text (unknown, …), but for end-of-text."""
        return self.backend.special_ids - {self.end_of_text_id}

    @cached_property
    def byte_ids(self) -> tuple[int, ...]:
        """Return the ids of the bytes 0 … 255, for characters that have no token; () where there are none."""
        found = [self.backend.id_of(f"<0x{byte:02X}>") for byte in range(256)]
        return () if None in found else tuple(i for i in found if i is not None)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens. The text must be encodable as UTF-8."""
        if self.lower_case:
            text = text.lower()
        if self.newline_id is None:
            return self.backend.encode_lines([text])[0]
        lines = self.backend.encode_lines(text.split("\n"))
        ids = lines[0]
        for line in lines[1:]:
            ids.append(self.newline_id)
            ids += line
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, without end-of-text and other special tokens."""
        hidden = self.backend.special_ids | {self.end_of_text_id}
        shown = [i for i in ids if i not in hidden]
        if self.newline_id is None:
            return self.backend.decode(shown)
        lines: list[list[int]] = [[]]
        for i in shown:
            if i == self.newline_id:
                lines.append([])
            else:
                lines[-1].append(i)
        return "\n".join(self.backend.decode(line) for line in lines)

    def decode_continuation(self, before: list[int], ids: list[int]) -> str:
        """Return the text of `ids` after `before`: what a byte or a space stands for depends on the ids before it."""
        return self.decode(before + ids)[len(self.decode(before)) :]

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of files, settings and the ids of PROBE (64 hex digits): it differs where any id may."""
        digest = hashlib.sha256(json.dumps(self._settings(), sort_keys=True).encode())
        for name, content in sorted(self.backend.files().items()):
            digest.update(f"\n{name} {hashlib.sha256(content).hexdigest()}".encode())
        digest.update(json.dumps(self.encode(PROBE)).encode())
        return digest.hexdigest()

    def _settings(self) -> dict[str, Any]:
        return {"backend": self.backend.kind, "end_of_text": self.end_of_text, "lower_case": self.lower_case}

    def __reduce__(self) -> Any:  # pickled as its files, for worker processes
        return _unpickle, (tuple(sorted(self.files().items())),)

    def files(self) -> dict[str, bytes]:
        """Return the files that load_saved_tokenizer needs to load this tokenizer again, without a network."""
        description = {"format": FORMAT, "version": 1, "name": self.name} | self._settings()
        return self.backend.files() | {DESCRIPTION_FILE: json.dumps(description, ensure_ascii=False, indent=1).encode()}


@lru_cache(maxsize=1)
def _unpickle(files: tuple[tuple[str, bytes], ...]) -> Tokenizer:
    return _from_files(dict(files).__getitem__)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return end-of-text, which stood before each document in training, and a prompt's ids, none for "". Raises UserError."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"prompt {prompt!a} is not valid text; give it in UTF-8")
    ids = tokenizer.encode(plain_text(prompt))
    if prompt and not ids:
        raise UserError(f"prompt {prompt!r} holds no text for this tokenizer; give a beginning, such as 吾輩は")
    return [tokenizer.end_of_text_id, *ids]


def load_saved_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer whose files() were written to `folder`. Raises UserError."""
    try:
        tokenizer = _from_files(lambda name: (folder / name).read_bytes())
        tokenizer.decode([*tokenizer.encode(PROBE), *range(tokenizer.vocab_size)])
        return tokenizer
    except BaseException as error:  # a library written in Rust raises a class of its own
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise UserError(f"{folder}: no usable tokenizer ({one_line(error)})")


def _from_files(read: ReadFile) -> Tokenizer:
    """Return the tokenizer whose files() `read` gives by name. Raises OSError, ValueError, KeyError or TypeError."""
    description = json.loads(read(DESCRIPTION_FILE))
    if not isinstance(description, dict) or description.get("format") != FORMAT or description.get("version") != 1:
        raise ValueError(f"{DESCRIPTION_FILE} is not one that this version reads")
    known = {backend.kind: backend for kind in TOKENIZERS.values() for backend in kind.backends}
    name = description["backend"]
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{DESCRIPTION_FILE} names the backend {name!r}; this version knows {', '.join(known)}")
    backend = known[name].from_files(read)
    return Tokenizer(backend, description["name"], description["end_of_text"], bool(description["lower_case"]))


def load_tokenizer(settings: TokenizerSettings) -> Tokenizer:
    """Return the tokenizer that the settings name. Raises UserError."""
    kind = TOKENIZERS.get(settings.tokenizer)
    if kind is None:
        raise UserError(f"--tokenizer {settings.tokenizer} is unknown; choose one of {', '.join(TOKENIZERS)}")
    if settings.tokenizer_path is not None and not kind.takes_path:
        takers = " or ".join(name for name, each in TOKENIZERS.items() if each.takes_path)
        raise UserError(f"--tokenizer_path {settings.tokenizer_path} needs --tokenizer {takers} beside it")
    return kind.load(settings)


def load_sentencepiece(path: str | None) -> Tokenizer:
    """Load --tokenizer_path: a .model file of SentencePiece, or a folder with one. Raises UserError."""
    if path is None:
        raise UserError(
            "--tokenizer sentencepiece needs --tokenizer_path, a .model file (dataset/train_tokenizer.py makes one)"
        )
    found = Path(path)
    if found.is_dir():
        models = find_models(found)
        if len(models) != 1:
            names = f" ({', '.join(model.name for model in models)})" if models else ""
            raise UserError(f"--tokenizer_path {path} holds {len(models)} .model files{names}; name the one meant")
        found = models[0]
    if not found.is_file():
        near = likely_path(found)
        raise UserError(f"--tokenizer_path {path}: no such file" + (f"; did you mean {near}?" if near else ""))
    try:
        backend = SentencePieceBackend(read_file(found))
    except ValueError as error:
        raise UserError(f"--tokenizer_path {found}: {error}")
    end_of_text = backend.end_of_text_piece()
    if end_of_text is None:
        raise UserError(
            f"--tokenizer_path {path} has no end-of-text token; train it with one (dataset/train_tokenizer.py)"
        )
    return Tokenizer(backend, str(path), end_of_text)


def load_tiktoken(name: str) -> Tokenizer:
    """Load --tiktoken_name: an encoding of tiktoken, such as gpt2, which it downloads once. Raises UserError."""
    import tiktoken

    try:
        encoding = tiktoken.get_encoding(name)
    except ValueError:
        names = ", ".join(tiktoken.list_encoding_names())
        raise UserError(f"--tiktoken_name {name} is not an encoding of tiktoken; there are {names}")
    except OSError as error:  # requests' errors are OSErrors
        reason = type(error).__name__
        raise UserError(f"--tiktoken_name {name} could not be fetched ({reason}); connect to the network once")
    return Tokenizer(TiktokenBackend.from_encoding(encoding), name, "<|endoftext|>")


# The files of a hub repository that a tokenizer needs; weights are not fetched.
HF_PATTERNS = [
    "*.model",
    "tokenizer*.json",
    "special_tokens_map.json",
    "config.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
]
# Without a tokenizer.json, the ids of these classes are not those of their SentencePiece model: they are shifted to
# fairseq's order.
SHIFTED_CLASSES = re.compile(
    "Camembert|XLMRoberta|MBart|BarthezTok|NllbTok|XGLM|PLBart|M2M100|BigBirdPeg|Pegasus|DebertaV2"
)


def load_hf(name: str, flag: str = "--hf_name") -> Tokenizer:
    """Load the tokenizer that `flag` names: a folder, or a repository of the hub (fetched once). Raises UserError."""
    folder = hub_folder(name, flag, HF_PATTERNS)
    settings = _merged_settings(folder)
    backend = _hf_backend(f"{flag} {name}", folder, settings)
    end_of_text = settings.get("eos_token")
    if isinstance(end_of_text, dict):  # an AddedToken
        end_of_text = end_of_text.get("content")
    if end_of_text is None and isinstance(backend, SentencePieceBackend):
        end_of_text = backend.end_of_text_piece()
    if not isinstance(end_of_text, str):
        raise UserError(f"{flag} {name} names no end-of-text token (eos_token); choose a tokenizer for a GPT")
    return Tokenizer(backend, name, end_of_text, settings.get("do_lower_case") is True)


def _merged_settings(folder: Path) -> dict[str, Any]:
    """Merge special_tokens_map.json and tokenizer_config.json, whose values win. Raises UserError."""
    merged: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            try:
                value = read_json(folder / file)
            except ValueError as error:
                raise UserError(f"{folder / file}: not JSON ({error})")
            merged |= {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else {}
    return merged


def _hf_backend(what: str, folder: Path, settings: dict[str, Any]) -> Backend:
    """Choose SentencePiece where it alone decides the ids, else tokenizer.json, else what transformers converts."""
    models, path = find_models(folder), folder / TokenizersBackend.FILE
    by_tokenizers = by_sentencepiece = None
    try:
        if path.is_file():
            by_tokenizers = TokenizersBackend(read_file(path))
        if len(models) == 1:
            path = models[0]
            by_sentencepiece = SentencePieceBackend(read_file(path))
    except ValueError as error:
        raise UserError(f"{what}: {path.name}: {error}")
    names = " and ".join(model.name for model in models)
    if len(models) > 1 and not by_tokenizers:
        raise UserError(f"{what} holds different models, {names}; remove all but the one that is meant")
    if by_tokenizers and models and (not by_sentencepiece or by_sentencepiece.pieces() != by_tokenizers.pieces()):
        # tokenizer.json has added tokens, or another order of pieces.
        print(f"note: {folder} is read from tokenizer.json, whose pieces are not those of {names}", file=sys.stderr)
        return by_tokenizers
    if by_sentencepiece and not by_tokenizers and SHIFTED_CLASSES.search(str(settings.get("tokenizer_class"))):
        raise UserError(
            f"{what}: the ids of {settings['tokenizer_class']} differ from its SentencePiece model's;"
            " choose a repository with a tokenizer.json"
        )
    found = by_sentencepiece or by_tokenizers
    return found or _converted_by_transformers(what, folder)


def _converted_by_transformers(what: str, folder: Path) -> Backend:
    """Return the backend of the tokenizer that transformers converts from the folder's files. Raises UserError."""
    from transformers import AutoTokenizer

    try:
        fast = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).backend_tokenizer
        return TokenizersBackend(fast.to_str().encode())
    except Exception as error:  # it raises many kinds for a folder without a tokenizer
        raise UserError(
            f"{what} holds no SentencePiece model and no tokenizer.json that can be used ({first_line(error)})"
        )


TOKENIZERS |= {
    "hf": TokenizerKind(lambda settings: load_hf(settings.hf_name), (SentencePieceBackend, TokenizersBackend)),
    "tiktoken": TokenizerKind(lambda settings: load_tiktoken(settings.tiktoken_name), (TiktokenBackend,)),
    "sentencepiece": TokenizerKind(
        lambda settings: load_sentencepiece(settings.tokenizer_path), (SentencePieceBackend,), takes_path=True
    ),
}
