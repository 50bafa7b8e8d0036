"""dataset/train_tokenizer.py: any text comes back, held-out documents are not trained on, equal text gives equal bytes."""

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from conftest import ROOT, SEPARATOR, assert_user_error, call_command, command, environment, run_command, write_jsonl
from hypothesis import example, given
from hypothesis import strategies as st

sys.path.insert(0, str(ROOT / "dataset"))  # as for `python dataset/train_tokenizer.py`

from train_tokenizer import Corpus, characters_with_a_piece, encode, find_corpus, read, sample, survey

VOCAB_SIZE = 400
WHO = ["母", "灯台守", "犬", "若い医者", "私", "船頭"]
WHEN = ["朝になると", "雪の晩", "祭の前の日に", "戦争のあと", "日曜日", "昼すぎまで"]
WHERE = ["坂の上", "港", "暗い廊下", "畑", "汽車の中", "橋"]
WHAT = ["黙って笑った", "雨を待っていた", "手紙を読んだ", "古い歌をうたった", "何も言わなかった", "眠っていた"]
RARE = "「ABC 12」と\t書いて、𠮟られた。"
TRICKY = [
    "",
    "\n",
    "　\n\n　空の行\n\n",
    " 前の空白、二  つ、後の空白 ",
    "▁",
    "▁ ▁▁\n▁",
    "</s><unk><pad><0x41>▅",
    "\0零\0",
    "終\r\n\r",
    "か\u3099と\u304c、ﾊﾝｶｸ①㍿",
    "𠮟😀\ufeff\ufffd\u2028\u200b",
]


def made_up_document(number: int, n_lines: int = 12) -> str:
    draw = random.Random(number)
    lines = [
        f"　{draw.choice(WHEN)}、{draw.choice(WHO)}は{draw.choice(WHERE)}で{draw.choice(WHAT)}。"
        for _ in range(n_lines)
    ]
    return "\n".join([*lines, f"　第{number}日、{RARE}", ""])


DOCUMENTS = [made_up_document(number, 400 if number == 7 else 12) for number in range(120)]


def prepared(folder: Path, documents: list[str], max_size_mb: float = 0.02) -> Path:
    """Prepare text shards with prepare_aozora_jsonl.py, so small that documents continue from one in the next."""
    source = write_jsonl(folder / "documents.jsonl", documents)
    flags = ("--jsonl_path", source, "--output_dir", folder / "001", "--max_size_mb", max_size_mb)
    result = call_command("dataset/prepare_aozora_jsonl.py", *flags)
    assert result.returncode == 0, result.stderr
    return folder / "001"


def run(data: Path, output: Path, *flags: object) -> subprocess.CompletedProcess:
    sized = flags if "--vocab_size" in flags else ("--vocab_size", VOCAB_SIZE, *flags)
    return call_command("dataset/train_tokenizer.py", "--data_dir", data, "--output_dir", output, *sized)


def trained(data: Path, output: Path, *flags: object) -> dict[str, Any]:
    result = run(data, output, *flags)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in output.iterdir()) == ["report.json", "spiece.model"]
    return json.loads((output / "report.json").read_bytes())


def processor_of(output: Path) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(output / "spiece.model"))


def number_of(document: str) -> int:
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepared(tmp_path_factory.mktemp("text"), DOCUMENTS)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert len(manifest["shards"]) > 3
    return folder


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tokenizer") / request.param
    trained(shards, output, "--model_type", request.param)
    return output


def test_special_pieces_and_settings(tokenizer: Path) -> None:
    sp = processor_of(tokenizer)
    assert sp.vocab_size() == VOCAB_SIZE
    assert [sp.id_to_piece(i) for i in range(5)] == ["<unk>", "</s>", "<pad>", "\n", "<0x00>"]
    assert (sp.unk_id(), sp.eos_id(), sp.pad_id(), sp.bos_id()) == (0, 1, 2, -1)
    assert sp.is_control(1) and sp.is_control(2)  # noqa: PT018
    assert sum(sp.is_byte(i) for i in range(VOCAB_SIZE)) == 256
    pieces = [sp.id_to_piece(i) for i in range(VOCAB_SIZE)]
    assert [piece for piece in pieces if "\n" in piece] == ["\n"]
    assert any("\u3000" in piece for piece in pieces)
    assert any(piece.endswith("。") and len(piece) > 1 for piece in pieces)
    assert sp.encode("犬\n犬").count(3) == 1


def test_any_text_comes_back(tokenizer: Path) -> None:
    sp = processor_of(tokenizer)

    @given(st.text() | st.text(alphabet=" ▁\n\u3000犬a"))
    def check(text: str) -> None:
        ids = encode(sp, text)
        assert sp.decode(ids) == text
        assert sp.unk_id() not in ids
        if "▁" not in text:
            assert ids == sp.encode(text)  # what is read by sentencepiece alone is the same

    for text in [*TRICKY, *DOCUMENTS]:
        check = example(text)(check)
    check()


def test_a_space_comes_back_where_the_text_had_none(tmp_path: Path) -> None:
    data = prepared(tmp_path, [document.replace(RARE, "") for document in DOCUMENTS])
    for kind in ("bpe", "unigram"):
        trained(data, tmp_path / kind, "--model_type", kind, "--vocab_size", 340)
        sp = processor_of(tmp_path / kind)
        assert sp.decode(sp.encode(" 犬 と  猫 ")) == " 犬 と  猫 "


def test_the_report_is_correct(tokenizer: Path, shards: Path) -> None:
    report = json.loads((tokenizer / "report.json").read_bytes())
    threshold = max(2**64 // 50, min(map(number_of, DOCUMENTS)) + 1)
    held_out = [document for document in DOCUMENTS if number_of(document) < threshold]
    n_characters, n_tokens = (
        len("".join(held_out)),
        sum(len(processor_of(tokenizer).encode(document)) for document in held_out),
    )
    assert (report["works"], report["characters"]) == (120, len("".join(DOCUMENTS)))
    assert report["vocab_size"] == VOCAB_SIZE
    assert report["model_type"] == tokenizer.name
    assert report["sha256"] == hashlib.sha256((tokenizer / "spiece.model").read_bytes()).hexdigest()
    n_newlines = sum(document.count("\n") for document in DOCUMENTS) - sum(
        document.count("\n") for document in held_out
    )
    assert report["trained_on_characters"] == report["characters"] - n_characters - n_newlines
    assert report["measured"] == {
        "held_out_works": len(held_out),
        "characters": n_characters,
        "tokens": n_tokens,
        "characters_per_token": round(n_characters / n_tokens, 4),
        "unknown_tokens": 0,
        "lossless": True,
    }


def test_what_is_printed(shards: Path, tmp_path: Path) -> None:
    """By a process of its own, whose standard error shows the library's output too."""
    flags = ("--data_dir", shards, "--output_dir", tmp_path / "out", "--vocab_size", VOCAB_SIZE)
    result = run_command("dataset/train_tokenizer.py", *flags)
    found = json.loads((tmp_path / "out" / "report.json").read_bytes())["measured"]
    printed = result.stdout.splitlines()
    assert len(printed) == 1
    assert f"{found['characters_per_token']:.3f} characters per token" in printed[0]
    assert "lossless: yes" in printed[0]
    progress = result.stderr.splitlines()  # and nothing of sentencepiece's hundreds of lines
    assert [line.split()[0] for line in progress] == ["reading", "training", "trained"]
    assert "\r" not in result.stderr


def test_the_same_text_gives_the_same_bytes(tokenizer: Path, tmp_path: Path) -> None:
    data = prepared(tmp_path, DOCUMENTS, max_size_mb=1)  # and in other shards
    again = tmp_path / "again"
    trained(data, again, "--model_type", tokenizer.name)
    trained(data, again, "--model_type", tokenizer.name)  # an earlier result is replaced
    for name in ("spiece.model", "report.json"):
        assert (again / name).read_bytes() == (tokenizer / name).read_bytes()


def test_held_out_documents_are_not_trained_on(shards: Path) -> None:
    corpus = find_corpus(shards)
    documents = survey(corpus)
    lines = set(sample(corpus, documents, 10**9))
    is_held_out = [document.is_held_out for document in documents if not document.is_blank]
    held_out: set[str] = set()
    trained_on: set[str] = set()
    for document, held in zip(DOCUMENTS, is_held_out, strict=True):
        (held_out if held else trained_on).update(document.split("\n"))
    assert held_out - trained_on  # the line with the document's number
    assert lines == trained_on - {""}


def test_few_documents_leave_one_held_out_and_some_to_train_on(tmp_path: Path) -> None:
    for name, documents, expected in (
        ("one", DOCUMENTS[:1], [False]),
        ("equal", [DOCUMENTS[0], DOCUMENTS[0]], [False, False]),
        (
            "two",
            DOCUMENTS[:2],
            [number_of(document) == min(map(number_of, DOCUMENTS[:2])) for document in DOCUMENTS[:2]],
        ),
    ):
        (tmp_path / f"{name}").mkdir()
        (tmp_path / name / "a.txt").write_text(SEPARATOR.join(documents), "utf-8")
        assert [document.is_held_out for document in survey(find_corpus(tmp_path / name))] == expected
    low = [text for text in map(str, range(1000)) if number_of(text) < 2**64 // 50][:3]
    (tmp_path / "a.txt").write_text(SEPARATOR.join(low), "utf-8")
    assert sum(document.is_held_out for document in survey(find_corpus(tmp_path))) == 1


def test_the_longer_of_two_documents_is_trained_on(tmp_path: Path) -> None:
    """Whichever has the lower hash: the tokenizer would see next to nothing of the text."""
    for number in range(4):
        documents = [made_up_document(number, 3), made_up_document(number + 10, 300)]
        (tmp_path / "a.txt").write_text(SEPARATOR.join(documents), "utf-8")
        assert [document.is_held_out for document in survey(find_corpus(tmp_path))] == [True, False]


def test_one_document_is_measured_on_itself(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text("".join(DOCUMENTS) + SEPARATOR + "\n", "utf-8")
    report = trained(data, tmp_path / "out")
    assert (report["works"], report["measured"]["held_out_works"], report["measured"]["lossless"]) == (1, 0, True)
    assert "on the training text" in run(data, tmp_path / "out").stdout


def joined(corpus: Corpus) -> list[str]:
    documents: list[str] = []
    for number, text in read(corpus):
        documents += [""] * (number + 1 - len(documents))
        documents[number] += text
    return documents


@pytest.mark.parametrize("chunk", [1, 2, 7, 30, 10**6])
def test_documents_are_read_completely(chunk: int, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands at a chunk's end: a separator, a shard's end."""
    monkeypatch.setattr("_corpus.CHUNK", chunk)
    corpus = find_corpus(shards)
    assert any(corpus.continues)
    assert [document for document in joined(corpus) if document] == DOCUMENTS


@pytest.mark.parametrize("chunk", [1, 10**6])
def test_a_folder_of_files(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file ends a document; a byte-order mark and \\r\\n are not part of it; other files are ignored."""
    monkeypatch.setattr("_corpus.CHUNK", chunk)
    (tmp_path / "b.txt").write_bytes("三\n<|endoftext|>\n".encode())
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "一\r\n<|endoftext|>二<|endoftext".encode())
    (tmp_path / "notes.md").write_text("記", "utf-8")
    corpus = find_corpus(tmp_path)
    assert joined(corpus) == ["一\n", "二<|endoftext", "三\n", "\n"]
    assert [document.is_blank for document in survey(corpus)] == [False, False, False, True]


@pytest.mark.parametrize("max_chars", [1, 100, 1000, 5000, 10**9])
def test_the_sample_is_bounded_and_even(max_chars: int, tmp_path: Path) -> None:
    lines = [f"{number:04d}" + "あ" * (number % 7) for number in range(2000)]
    (tmp_path / "a.txt").write_text("\n".join(lines), "utf-8")
    corpus = find_corpus(tmp_path)
    taken = sample(corpus, survey(corpus), max_chars)
    n_all, n_taken = sum(map(len, lines)), sum(map(len, taken))
    assert taken == sorted(taken)
    if max_chars > n_all:
        assert taken == lines
    else:
        assert 0.7 * max_chars <= n_taken <= max_chars + 10
        first_half = sum(len(line) for line in taken if int(line[:4]) < 1000)
        assert abs(first_half - n_taken / 2) <= 11


def test_long_lines_are_trained_on(tmp_path: Path) -> None:
    """The trainer's positions end at 65,535, and it leaves out longer lines without a warning."""
    (tmp_path / "a.txt").write_text("".join(DOCUMENTS).replace("\n", "") * 8, "utf-8")
    assert len((tmp_path / "a.txt").read_text("utf-8")) > 70_000
    report = trained(tmp_path, tmp_path / "out")
    assert report["trained_on_characters"] == report["characters"]
    assert report["measured"]["characters_per_token"] > 1.5


def test_special_names_in_the_text_are_characters(tmp_path: Path) -> None:
    """They must not become pieces, which would then exist twice."""
    odd = "彼は</s>と<pad>と<0x41>と<unk>を書いた"
    (tmp_path / "a.txt").write_text("".join(f"{odd}{document}" for document in DOCUMENTS), "utf-8")
    for kind in ("bpe", "unigram"):
        report = trained(tmp_path, tmp_path / "out", "--model_type", kind)
        assert report["measured"]["lossless"]
        sp = processor_of(tmp_path / "out")
        pieces = [sp.id_to_piece(i) for i in range(VOCAB_SIZE)]
        assert len(set(pieces)) == VOCAB_SIZE
        assert 1 not in sp.encode("</s>")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_line_with_a_sign_of_the_trainer_is_trained_on(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(DOCUMENTS).replace("\n", "▅▁\0\n"), "utf-8")
    assert trained(tmp_path, tmp_path / "out", "--model_type", kind)["measured"]["lossless"]
    sp = processor_of(tmp_path / "out")
    pieces = {sp.id_to_piece(i) for i in range(VOCAB_SIZE)}
    assert "朝" in pieces
    assert not {"▅", "\0"} & pieces


def test_a_frequent_character_gets_a_piece_and_a_rare_one_does_not() -> None:
    lines = ["犬" * 900 + "猫" * 60 + "鳥" * 39 + "𠮟"]
    assert characters_with_a_piece(lines, 400) == {"犬", "猫", "鳥", "𠮟"}  # 4 / 400^1.5 of the text: one in 2,000
    assert characters_with_a_piece([line * 30 + "亀" for line in lines], 400) == {"犬", "猫", "鳥", "𠮟"}
    assert characters_with_a_piece(["".join(map(chr, range(0x4E00, 0x5000)))], 400) == set(
        map(chr, range(0x4E00, 0x4E00 + 104))
    )  # three quarters of what 261 fixed pieces leave


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_vocabulary_too_large_names_the_largest(kind: str, shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run(shards, output, "--model_type", kind, "--vocab_size", 60000)
    assert_user_error(result, "--vocab_size 60000", "the largest possible is")
    assert not output.exists()
    largest = int(result.stderr.split()[-1])
    trained(shards, output, "--model_type", kind, "--vocab_size", largest)
    result = run(shards, tmp_path / "more", "--model_type", kind, "--vocab_size", largest + 1)
    assert_user_error(result, f"the largest possible is {largest}")


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """A folder with good text and some that cannot be used."""
    for name in (
        "good",
        "no_text",
        "blank",
        "not_utf8",
        "missing_shard",
        "other_manifest",
        "broken_manifest",
        "little",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "good" / "a.txt").write_text(SEPARATOR.join(DOCUMENTS), "utf-8")
    (tmp_path / "blank" / "a.txt").write_text(f"\n {SEPARATOR}\u3000\n", "utf-8")
    (tmp_path / "not_utf8" / "a.txt").write_bytes("坂の上".encode("cp932"))
    shard = {"file": "combined_0001.txt", "continues": False}
    manifest = {"format": "gptkit-text-shards", "separator": SEPARATOR, "shards": [shard]}
    (tmp_path / "missing_shard" / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    (tmp_path / "other_manifest" / "manifest.json").write_text(json.dumps(manifest | {"format": "tokens"}), "utf-8")
    (tmp_path / "broken_manifest" / "manifest.json").write_text("{", "utf-8")
    (tmp_path / "little" / "a.txt").write_text("犬。", "utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("data", "flags", "words"),
    [
        ("good", ["--vocab_size", 261], ["--vocab_size 261", "300"]),
        ("good", ["--vocab_size", "many"], ["--vocab_size", "many"]),
        ("good", ["--max_chars", 0], ["--max_chars 0"]),
        ("good", ["--model_type", "word"], ["--model_type", "bpe"]),
        ("nowhere", [], ["nowhere", "no such folder"]),
        ("no_text", [], ["no_text", "*.txt"]),
        ("blank", [], ["blank", "no text"]),
        ("not_utf8", [], ["a.txt", "not UTF-8"]),
        ("missing_shard", [], ["combined_0001.txt", "prepare the folder again"]),
        ("other_manifest", [], ["manifest.json", "tokens"]),
        ("broken_manifest", [], ["manifest.json", "prepare the folder again"]),
        ("little", [], ["--vocab_size 400", "too little text"]),
        ("good", ["--max_chars", 1], ["--vocab_size 400", "the largest possible is"]),
    ],
)
def test_a_mistake_is_reported_in_one_line(bad: Path, data: str, flags: list[object], words: list[str]) -> None:
    result = run(bad / data, bad / "out", *flags)
    assert_user_error(result, *words)
    assert not result.stdout
    assert not (bad / "out").exists()


def test_the_path_that_was_meant_is_named(bad: Path) -> None:
    (bad / "exp").mkdir()
    flags = ("--data_dir", "good", "--output_dir", "out")
    assert_user_error(call_command("dataset/train_tokenizer.py", *flags, cwd=bad / "exp"), "did you mean ../good?")


@pytest.mark.parametrize("name", ["notes.txt", "spiece.model", "report.json"])
def test_an_output_folder_that_holds_something_else_is_left_alone(name: str, bad: Path) -> None:
    (bad / "out").mkdir()
    (bad / "out" / name).write_text("{}", "utf-8")
    assert_user_error(run(bad / "good", bad / "out"), "out", name, "something else")
    assert [path.name for path in (bad / "out").iterdir()] == [name]
    assert (bad / "out" / name).read_text("utf-8") == "{}"
    assert_user_error(run(bad / "good", bad / "out" / name), "is a file")


def test_a_mistake_leaves_an_earlier_result_as_it_was(bad: Path) -> None:
    trained(bad / "good", bad / "out")
    before = {path.name: path.read_bytes() for path in (bad / "out").iterdir()}
    assert_user_error(run(bad / "not_utf8", bad / "out"), "not UTF-8")
    assert {path.name: path.read_bytes() for path in (bad / "out").iterdir()} == before


def test_what_a_killed_run_left_is_replaced(bad: Path) -> None:
    """Killed between its two renames: the model is there, the report is not."""
    (bad / "out" / ".partial").mkdir(parents=True)
    (bad / "out" / ".partial" / "report.json").write_text("{", "utf-8")
    (bad / "out" / "spiece.model").write_bytes(b"old")
    trained(bad / "good", bad / "out")


def test_an_interrupt_ends_training_at_once(tmp_path: Path) -> None:
    """The library itself would continue to train for many seconds."""
    draw = random.Random(1)
    kana = [chr(code) for code in range(0x3041, 0x3094)]
    words = ["".join(draw.choices(kana, k=3)) for _ in range(3000)]
    (tmp_path / "a.txt").write_text("\n".join("".join(draw.choices(words, k=15)) for _ in range(60000)), "utf-8")
    flags = ("--data_dir", tmp_path, "--output_dir", tmp_path / "out", "--model_type", "unigram")
    process = subprocess.Popen(
        command("dataset/train_tokenizer.py", *flags), stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stderr
    while not process.stderr.readline().startswith("training"):
        pass
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == -signal.SIGINT
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]  # which locks no more
