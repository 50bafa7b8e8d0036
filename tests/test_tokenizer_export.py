"""tokenizer_export.py, against sentencepiece and tiktoken: transformers' AutoTokenizer gives the same ids and texts."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from conftest import SAMPLE_TOKENIZER, SHARED
from mutations import small_tokenizer
from random_models import CONTEXT
from test_tokenizer import OFFLINE

from gptkit.base.cli import UserError
from gptkit.interop.tokenizer_export import compare_tokenizers, export_tokenizer
from gptkit.text.backends import SentencePieceBackend
from gptkit.text.tokenizer import Tokenizer, load_hf, load_sentencepiece, load_tiktoken

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
