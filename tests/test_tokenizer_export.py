"""tokenizer_export.py, against sentencepiece and tiktoken: transformers' AutoTokenizer gives the same ids and texts."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from conftest import SAMPLE_TOKENIZER, SHARED, call_command
from mutations import small_tokenizer
from random_models import CONTEXT
from test_tokenizer import OFFLINE, hf_folder, llm_jp_like

from gptkit.base.cli import UserError
from gptkit.interop.tokenizer_export import NAMES, compare_tokenizers, export_tokenizer
from gptkit.text.backends import SentencePieceBackend
from gptkit.text.tokenizer import PROBE, Tokenizer, load_hf, load_sentencepiece, load_tiktoken

SPECIAL_CASES = ["", " ", "  二つの空白  ", "　全角", "ABC Ａｂｃ １２３", "𠮟る😀", "</s><unk>[PAD]<|endoftext|>", "\t", "か\u3099が", "a\u00a0b", "ﾊﾝｶｸ…", "ﾊﾟﾘのｶﾞｽ"]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_sentencepiece(str(SAMPLE_TOKENIZER))


@pytest.fixture(scope="module")
def lines(sample_texts: list[str]) -> list[str]:
    found = [line for document in sample_texts for line in document.split("\n")]
    return [*SPECIAL_CASES, *found[:300], *sample_texts[:5]]


def rinna_like(documents: list[str], folder: Path, model_type: str) -> Tokenizer:
    """Train a tokenizer like rinna's: lower case only, NFKC, a dummy space before each line, no newline, no bytes."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line.lower() for document in documents for line in document.split("\n") if line),
        model_prefix=str(folder / "spiece"), model_type=model_type, vocab_size=1500, character_coverage=0.98,
        user_defined_symbols=["[CLS]"], pad_id=3, pad_piece="[PAD]", minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true, "eos_token": "</s>"}')
    return load_hf(str(folder))


def export_and_compare(tokenizer: Tokenizer, folder: Path, lines: list[str]) -> tuple[str | None, int]:
    """Return the first line that the exported tokenizer encodes differently, and the number of ties."""
    folder.mkdir()
    for name, content in export_tokenizer(tokenizer, CONTEXT).items():
        (folder / name).write_bytes(content)
    return compare_tokenizers(tokenizer, folder, lines)


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_tokenizer_like_rinnas_encodes_the_same(
    model_type: str, tmp_path: Path, sample_texts: list[str], lines: list[str]
) -> None:
    tokenizer = rinna_like(sample_texts, tmp_path, model_type)
    assert tokenizer.newline_id is not None
    assert tokenizer.unknown_id in [i for line in lines for i in tokenizer.encode(line)]
    different, n_ties = export_and_compare(tokenizer, tmp_path / "hf", lines)
    assert different is None
    assert n_ties <= 1  # the names of special tokens, whose characters are all unknown to it
    again = load_hf(str(tmp_path / "hf"))  # what --init_from reads
    texts = lines[len(SPECIAL_CASES) :]
    assert [again.encode(line) for line in texts] == [tokenizer.encode(line) for line in texts]
    assert again.end_of_text_id == tokenizer.end_of_text_id


@pytest.mark.skipif(not SHARED.is_dir(), reason="rinna's tokenizer is not part of the repository")
def test_rinnas_tokenizer_encodes_the_same(tmp_path: Path, lines: list[str]) -> None:
    different, n_ties = export_and_compare(load_hf(str(SHARED / "rinna-japanese-gpt2-small")), tmp_path / "hf", lines)
    assert different is None
    assert n_ties <= 1


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizers", "tiktoken", "cl100k"])
def test_other_tokenizers_encode_the_same(kind: str, tmp_path: Path, lines: list[str]) -> None:
    if kind == "tiktoken":  # it has so few tokens that there are ids without one
        lines = ["のの のの", "の"]
    tokenizer = load_tiktoken(OFFLINE) if kind == "cl100k" else small_tokenizer(kind)
    assert export_and_compare(tokenizer, tmp_path / "hf", lines) == (None, 0)


HOSTILE = [
    "</s>", "<unk>", "<s>", "<pad>", "<0x41>", "<0xE3>", "<0x0A>", "<", "/s>", "▁", " ", "  ", "\n", "\t", "\r", "\0", "\x1f", "\x85",
    "\u2028", "\u3000", "\ufeff", "\ue000", "\uffff", "\U0010ffff", "😀", "👨\u200d👩", "𠮟", "魑魅", "か\u3099", "ﾊﾟ", "İ", "……",
    "――", "ああ", "の", "。", "「", "雨が降る", "ABC", "<|endoftext|>", "[PAD]",
]  # fmt: skip


def hostile_texts(n: int) -> list[str]:
    """Return texts of parts that tokenizers treat specially, single and in runs."""
    draw = random.Random(0)
    return [
        "".join(draw.choice(HOSTILE) * draw.choice((1, 1, 1, 2, 7, 40)) for _ in range(draw.choice((1, 2, 4, 20))))
        for _ in range(n)
    ]


@pytest.fixture(scope="module")
def own_unigram(tmp_path_factory: pytest.TempPathFactory, sample_shards: Path) -> Tokenizer:
    folder = tmp_path_factory.mktemp("own") / "unigram"
    flags = ("--data_dir", sample_shards, "--output_dir", folder, "--vocab_size", 1500, "--model_type", "unigram")
    result = call_command("dataset/train_tokenizer.py", *flags)
    assert result.returncode == 0, result.stderr
    return load_sentencepiece(str(folder))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_transformers_alone_reads_any_text_by_our_own_tokenizers(
    kind: str, own_unigram: Tokenizer, tokenizer: Tokenizer, tmp_path: Path, lines: list[str], sample_texts: list[str]
) -> None:
    """Equal ids, without a tie: of lines, documents and hostile texts. </s> and <0x41> in a text are characters."""
    from transformers import AutoTokenizer

    ours = own_unigram if kind == "unigram" else tokenizer
    assert export_and_compare(ours, tmp_path / "hf", [PROBE, *NAMES]) == (None, 0)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in [*lines, *sample_texts, *hostile_texts(2000)]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == ours.encode(text), text
        assert theirs.decode(ids) == text
    again = load_hf(str(tmp_path / "hf"))  # what --init_from reads
    assert [again.encode(text) for text in hostile_texts(300)] == [ours.encode(text) for text in hostile_texts(300)]


def test_a_model_gets_what_it_takes(own_unigram: Tokenizer, tmp_path: Path) -> None:
    """No token_type_ids, which GPTs refuse; a batch is filled on the left, where text is continued on the right."""
    from transformers import AutoTokenizer

    export_and_compare(own_unigram, tmp_path / "hf", [])
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    found = theirs(["雨が", "雨が降っていた。"], padding=True)
    assert set(found) == {"input_ids", "attention_mask"}
    end, pad = own_unigram.end_of_text_id, own_unigram.backend.id_of("<pad>")
    first, second = found["input_ids"]
    assert second == [end, *own_unigram.encode("雨が降っていた。")]
    assert first == [pad] * (len(second) - len(first_ids := [end, *own_unigram.encode("雨が")])) + first_ids
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text("utf-8"))
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]  # transformers 4 would add token_type_ids


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("plain", [True, False])
def test_other_peoples_sentencepiece_models(
    model_type: str, byte_fallback: bool, plain: bool, tmp_path: Path, sample_texts: list[str]
) -> None:
    """With and without bytes, with sentencepiece's defaults and without: its own symbols and unknown characters."""
    settings = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
    lines = [line for document in sample_texts for line in document.split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "spiece"), model_type=model_type, vocab_size=1500,
        character_coverage=0.98, byte_fallback=byte_fallback, minloglevel=2,
        user_defined_symbols=["[印]", "ああ"] if plain or model_type == "unigram" else [], **(settings if plain else {}),
    )  # fmt: skip
    tokenizer = load_sentencepiece(str(tmp_path / "spiece.model"))
    hostile = [
        "</s><unk><s>",
        "<0x41> 魑魅魍魎</s>",
        "[印]あ[印] 魑ああ",
        " [印] ",
        "ああああ魑",
        "𠮟[",
        "印]<",
        "a\x85\u2028\x85",
        "\x85",
    ]
    assert export_and_compare(tokenizer, tmp_path / "hf", [*NAMES, PROBE, *hostile, *lines[:300]])[0] is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "word"}, "neither unigram nor BPE"),
        ({"treat_whitespace_as_suffix": True}, "spaces after words"),
        ({"model_type": "bpe", "user_defined_symbols": ["[印]"]}, "around its own symbols"),
    ],
)
def test_what_cannot_be_expressed_is_refused(
    settings: dict[str, Any], reason: str, tmp_path: Path, sample_texts: list[str]
) -> None:
    lines = (" ".join(line.split("、")) for document in sample_texts for line in document.split("\n"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(tmp_path / "x"), minloglevel=2, hard_vocab_limit=False,
        **({"vocab_size": 2500} | settings),
    )  # fmt: skip
    with pytest.raises(UserError, match=f"{reason}.*; train one by dataset/train_tokenizer.py"):
        export_tokenizer(load_sentencepiece(str(tmp_path / "x.model")), CONTEXT)


def test_a_unigram_json_is_exported(tmp_path: Path, sample_texts: list[str], lines: list[str]) -> None:
    for style in ("llm-jp", "metaspace"):
        folder = hf_folder(tmp_path / style, None, llm_jp_like(sample_texts, style).to_str(), eos_token="</s>")
        assert export_and_compare(load_hf(folder), tmp_path / f"{style}-hf", [*NAMES, PROBE, *lines]) == (None, 0)


def test_a_different_tokenizer_is_noticed(tmp_path: Path, tokenizer: Tokenizer, lines: list[str]) -> None:
    export_and_compare(tokenizer, tmp_path / "hf", [])
    path = tmp_path / "hf" / "tokenizer.json"
    changed = json.loads(path.read_text("utf-8"))
    changed["model"]["merges"] = changed["model"]["merges"][:200]
    path.write_text(json.dumps(changed), "utf-8")
    different, _ = compare_tokenizers(tokenizer, tmp_path / "hf", lines)
    assert different in lines


def test_a_tie_may_go_either_way(tmp_path: Path) -> None:
    """Two equally likely ways to split a text count as equal; two that are not equally likely are a difference."""

    class ByCharacters(SentencePieceBackend):
        tied = True

        def encode_lines(self, lines: Any) -> list[list[int]]:
            return [
                [i for character in line for i in super(ByCharacters, self).encode_lines([character])[0]]
                for line in lines
            ]

        def score(self, ids: Any) -> float:
            return -1.0 if self.tied else super().score(ids)

    backend = ByCharacters((SAMPLE_TOKENIZER / "spiece.model").read_bytes())
    tokenizer = Tokenizer(backend, "x", "</s>")
    assert export_and_compare(tokenizer, tmp_path / "hf", ["雨が降っていた。"]) == (None, 1)
    backend.tied = False
    assert compare_tokenizers(tokenizer, tmp_path / "hf", ["雨", "雨が降っていた。"]) == ("雨が降っていた。", 0)


def test_an_unknown_backend_is_refused() -> None:
    class OtherBackend:
        vocab_size = 3

    tokenizer = small_tokenizer("tokenizers")
    tokenizer.backend = OtherBackend()  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"a OtherBackend cannot be exported; train with a SentencePiece, tiktoken or"):
        export_tokenizer(tokenizer, CONTEXT)
