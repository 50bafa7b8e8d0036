"""gptkit/data/pretokenization.py and pretokenize.py: each document is tokenized once, and only what changed again."""

import hashlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from conftest import (
    SAMPLE,
    SAMPLE_TOKENIZER,
    SAMPLE_TOKENS,
    SEPARATOR,
    assert_user_error,
    call_command,
    command,
    environment,
    write_jsonl,
)
from test_text_shards import DOCUMENTS, documents_by_shard, write_chained, write_shards

from gptkit.base.cli import UserError
from gptkit.base.files import write_atomically
from gptkit.data.pretokenization import load_manifest, open_tokens, pretokenize
from gptkit.data.token_folder import describe_tokens
from gptkit.text.tokenizer import Tokenizer

MODEL = SAMPLE_TOKENIZER / "spiece.model"


class CodePoints:
    """A backend whose answers are known: a character's id is its code point; from `limit` on it is unknown."""

    kind = "code points"

    def __init__(self, limit: int) -> None:
        self.unknown_id, self.vocab_size, self.special_ids = limit, limit + 2, frozenset({limit, limit + 1})

    def id_of(self, piece: str) -> int | None:
        return self.unknown_id + 1 if piece == "</s>" else None

    def encode_lines(self, lines: Sequence[str]) -> list[list[int]]:
        return [[min(ord(character), self.unknown_id) for character in line] for line in lines]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def files(self) -> dict[str, bytes]:
        return {"limit": b"%d" % self.unknown_id}


LOSSLESS = Tokenizer(CodePoints(0x110000), "code points", "</s>")
TWO_BYTES = Tokenizer(CodePoints(0x10000 - 2), "two bytes", "</s>")  # 𠮟 is unknown to it


def prepare(source: Path, folder: Path, max_size_mb: float) -> Path:
    result = call_command(
        "dataset/prepare_aozora_jsonl.py",
        *("--jsonl_path", source, "--output_dir", folder, "--max_size_mb", max_size_mb),
    )
    assert result.returncode == 0, result.stderr
    return folder


def read_documents(folder: Path, split: str, tokenizer: Tokenizer = LOSSLESS) -> list[str]:
    """Return the documents of a split, read from the files by NumPy alone and split at end-of-text."""
    ids = np.concatenate([np.load(path) for path in sorted(folder.glob(f"{split}_*.npy"))]).tolist()
    documents: list[list[int]] = [[]]
    for i in ids:
        if i == tokenizer.end_of_text_id:
            documents.append([])
        else:
            documents[-1].append(i)
    assert documents.pop() == []  # the last one ends, too
    return [tokenizer.decode(document) for document in documents]


def times(folder: Path) -> dict[str, int]:
    """Return the time at which each file but the manifest was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "manifest.json"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def redone(folder: Path, before: dict[str, int]) -> set[str]:
    """Return the shards that were written since; the three files of a shard are always written together."""
    changed = {name for name, when in times(folder).items() if before.get(name) != when}
    stems = {re.sub(r"^(train|val)_|\.\w+$", "", name) for name in changed}
    for stem in stems:
        assert {f"train_{stem}.npy", f"val_{stem}.npy", f"{stem}.json"} <= changed
    return stems


# What is written


@pytest.mark.parametrize("max_size_mb", [0.01, 0.05])
def test_every_document_is_tokenized_once_with_one_end_of_text(
    tmp_path: Path, sample_texts: list[str], max_size_mb: float
) -> None:
    text = prepare(SAMPLE, tmp_path / "text", max_size_mb)
    manifest = pretokenize(text, tmp_path / "out", LOSSLESS, 0.1)
    train, val = read_documents(tmp_path / "out", "train"), read_documents(tmp_path / "out", "val")
    assert val
    assert sorted(train + val) == sorted(sample_texts)
    assert [document for document in sample_texts if document in set(train)] == train  # in the text's order
    assert not set(train) & set(val)
    counted = [manifest[name] for name in ("documents", "tokens", "characters", "unknown_tokens")]
    n_characters = sum(map(len, sample_texts))
    assert counted == [len(sample_texts), n_characters + len(sample_texts), n_characters, 0]
    for split, documents in (("train", train), ("val", val)):
        assert manifest[split]["documents"] == len(documents)
        assert manifest[split]["characters"] == sum(map(len, documents))
        assert manifest[split]["tokens"] == sum(map(len, documents)) + len(documents)
    streams = open_tokens(tmp_path / "out", load_manifest(tmp_path / "out", LOSSLESS))
    assert [len(streams["train"]), len(streams["val"])] == [manifest[split]["tokens"] for split in ("train", "val")]
    n_ends = sum(np.count_nonzero(s.read(0, len(s)) == LOSSLESS.end_of_text_id) for s in streams.values())
    assert n_ends == len(sample_texts)


def test_the_command_with_a_real_tokenizer(tmp_path: Path, sample_shards: Path, sample_texts: list[str]):
    result = call_command(
        "pretokenize.py",
        *("--data_dir", sample_shards, "--output_dir", tmp_path / "out", "--num_workers", 1),
        *("--tokenizer", "sentencepiece", "--tokenizer_path", MODEL, "--val_fraction", 0.1),
    )
    assert result.returncode == 0, result.stderr
    processor = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))
    end = processor.eos_id()
    expected = [processor.encode(document) for document in sample_texts]
    found: list[list[int]] = []
    for split in ("train", "val"):
        ids = np.concatenate([np.load(path) for path in sorted((tmp_path / "out").glob(f"{split}_*.npy"))])
        ends = np.flatnonzero(ids == end)
        found += [part[part != end].tolist() for part in np.split(ids, ends)[: len(ends)]]
    assert sorted(found) == sorted(expected)
    n_tokens, n_characters = sum(map(len, expected)) + len(expected), sum(map(len, sample_texts))
    assert f"{len(sample_texts)} documents, {n_tokens:,} tokens" in result.stderr
    assert f"{n_characters / n_tokens:.2f} characters per token, 0 unknown" in result.stderr
    assert "\r" not in result.stderr
    assert re.search(r"combined_0001\.txt: tokenized \(new\), [\d,]+ tokens, [\d.]+ MB/s, \d+ s left", result.stderr)


def test_unknown_tokens_are_counted_in_each_split(tmp_path: Path) -> None:
    documents = [f"{document}{'𠮟' * number}" for number, document in enumerate(DOCUMENTS)]
    text = prepare(write_jsonl(tmp_path / "a.jsonl", documents), tmp_path / "text", 0.0005)
    manifest = pretokenize(text, tmp_path / "out", TWO_BYTES, 0.3)
    in_val = set(read_documents(tmp_path / "out", "val", TWO_BYTES))  # decode leaves 𠮟 out
    n_val = sum(document.count("𠮟") for document in documents if document.replace("𠮟", "") in in_val)
    n_all = sum(document.count("𠮟") for document in documents)
    assert 0 < n_val < n_all
    assert (manifest["unknown_tokens"], manifest["val"]["unknown_tokens"]) == (n_all, n_val)
    share = n_all / sum(map(len, documents)) * 10_000
    assert f"{n_all:,} unknown ({share:.1f} per 10,000 characters)" in describe_tokens(manifest)


def test_the_manifest_names_what_the_tokens_were_made_from(tmp_path: Path, sample_shards: Path) -> None:
    pretokenize(sample_shards, tmp_path / "out", TWO_BYTES, 0.2)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert load_manifest(tmp_path / "out", TWO_BYTES) == manifest
    assert manifest["tokenizer"] == {
        "name": "two bytes",
        "fingerprint": TWO_BYTES.fingerprint,
        "vocab_size": 65_536,
        "end_of_text_id": 65_535,
        "unknown_id": 65_534,
        "newline_id": None,
    }
    paths = sorted(sample_shards.glob("*.txt"))
    assert len(manifest["shards"]) == len(paths)
    for path, shard in zip(paths, manifest["shards"], strict=True):
        assert shard["text"][0] == hashlib.sha256(path.read_bytes()).hexdigest()
        for split in ("train", "val"):
            content = (tmp_path / "out" / shard[split]["file"]).read_bytes()
            assert shard[split]["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(("tokenizer", "dtype"), [(TWO_BYTES, "uint16"), (LOSSLESS, "uint32")])
def test_ids_take_two_bytes_where_they_fit(tmp_path: Path, tokenizer: Tokenizer, dtype: str) -> None:
    text = write_shards(tmp_path / "text", [(SEPARATOR.join([*DOCUMENTS, "彼を𠮟る", "￿"]) + SEPARATOR, False)])
    manifest = pretokenize(text, tmp_path / "out", tokenizer, 0.2)
    assert manifest["dtype"] == dtype
    ids = np.concatenate([np.load(path) for path in (tmp_path / "out").glob("*.npy")])
    assert ids.dtype == np.dtype(dtype)
    assert ids.max() == tokenizer.vocab_size - 1 == tokenizer.end_of_text_id


# Validation


def test_validation_documents_are_the_same_however_the_text_is_sharded(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    found = []
    for number, max_size_mb in enumerate([0.0001, 0.0005, 25]):
        text = prepare(source, tmp_path / f"text{number}", max_size_mb)
        pretokenize(text, tmp_path / f"out{number}", LOSSLESS, 0.25)
        found.append(set(read_documents(tmp_path / f"out{number}", "val")))
    pretokenize(text, tmp_path / "two_bytes", TWO_BYTES, 0.25)
    found.append(set(read_documents(tmp_path / "two_bytes", "val", TWO_BYTES)))
    assert found[0] == found[1] == found[2] == found[3]
    assert 2 <= len(found[0]) <= 12  # of 24


def test_validation_takes_about_val_fraction_and_a_larger_one_takes_more(tmp_path: Path) -> None:
    text = write_shards(tmp_path / "text", [("".join(f"{i}の話{SEPARATOR}" for i in range(2000)), False)])
    taken = []
    for fraction in (0.01, 0.1, 0.5):
        pretokenize(text, tmp_path / "out", LOSSLESS, fraction)
        taken.append(set(read_documents(tmp_path / "out", "val")))
        deviation = (2000 * fraction * (1 - fraction)) ** 0.5
        assert abs(len(taken[-1]) - 2000 * fraction) < 4 * deviation
    assert taken[0] < taken[1] < taken[2]


def test_there_is_always_a_validation_document_and_a_training_document(tmp_path: Path) -> None:
    text = write_shards(tmp_path / "text", [(SEPARATOR.join(DOCUMENTS), False)])
    manifest = pretokenize(text, tmp_path / "out", LOSSLESS, 1e-9)
    assert (manifest["val"]["documents"], manifest["train"]["documents"]) == (1, len(DOCUMENTS) - 1)


def test_equal_documents_are_all_in_the_same_split(tmp_path: Path) -> None:
    text = write_shards(tmp_path / "text", [(SEPARATOR.join(DOCUMENTS * 3), False)])
    pretokenize(text, tmp_path / "out", LOSSLESS, 0.25)
    train, val = (read_documents(tmp_path / "out", split) for split in ("train", "val"))
    assert not set(train) & set(val)
    assert len(train + val) == 3 * len(DOCUMENTS)


# Reused, or made again


@pytest.fixture
def chained(tmp_path: Path) -> Path:
    return write_chained(tmp_path / "text")


FIRST, SECOND, THIRD, FOURTH = (f"combined_{number:04d}" for number in range(1, 5))
ALL = {FIRST, SECOND, THIRD, FOURTH}


def tokenize(text: Path, capsys: pytest.CaptureFixture[str], **changes: Any) -> str:
    """Pretokenize into the folder `out` beside the text; return what was printed to standard error."""
    settings = {"tokenizer": LOSSLESS, "val_fraction": 0.3} | changes
    capsys.readouterr()
    manifest = pretokenize(text, text.parent / "out", **settings)
    assert json.loads((text.parent / "out" / "manifest.json").read_bytes()) == manifest
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def assert_equals_a_fresh_folder(text: Path, **changes: Any) -> None:
    settings = {"tokenizer": LOSSLESS, "val_fraction": 0.3} | changes
    pretokenize(text, text.parent / "fresh", **settings)
    assert contents(text.parent / "out") == contents(text.parent / "fresh")


def test_a_second_run_tokenizes_nothing(chained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = tokenize(chained, capsys)
    assert [line.partition(",")[0] for line in printed.splitlines()] == [
        f"combined_000{number}.txt: tokenized (new)" for number in range(1, 5)
    ]
    out = chained.parent / "out"
    before, manifest = times(out), (out / "manifest.json").read_bytes()
    assert tokenize(chained, capsys) == f"{out}: 4 of 4 token shards reused, text and tokenizer match\n"
    assert times(out) == before
    assert (out / "manifest.json").read_bytes() == manifest


@pytest.mark.parametrize(
    ("changed", "expected"),
    [(FIRST, {FIRST}), (SECOND, {FIRST, SECOND}), (THIRD, {THIRD}), (FOURTH, {FOURTH})],
)
def test_a_changed_byte_of_text_redoes_only_the_shards_with_it(
    chained: Path, capsys: pytest.CaptureFixture[str], changed: str, expected: set[str]
) -> None:
    tokenize(chained, capsys)
    out = chained.parent / "out"
    before = times(out)
    path = chained / f"{changed}.txt"
    content = bytearray(path.read_bytes())
    place = content.rindex(b"0" if changed == FIRST else "つ見えた".encode()) - (changed != FIRST)
    content[place] = ord("9")
    path.write_bytes(content)
    printed = tokenize(chained, capsys)
    assert redone(out, before) == expected
    for stem in ALL:
        assert (f"{stem}.txt: tokenized (the text changed)" in printed) == (stem in expected)
    assert f"{4 - len(expected)} of 4 token shards reused" in printed
    assert_equals_a_fresh_folder(chained)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tokenizer": TWO_BYTES}, "the tokenizer changed"),
        ({"val_fraction": 0.5}, "the choice of validation documents changed"),
    ],
)
def test_another_tokenizer_or_val_fraction_redoes_all(
    chained: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], why: str
) -> None:
    tokenize(chained, capsys)
    before = times(chained.parent / "out")
    printed = tokenize(chained, capsys, **changes)
    assert redone(chained.parent / "out", before) == ALL
    assert printed.count(f"tokenized ({why})") == 4
    assert "reused" not in printed
    assert_equals_a_fresh_folder(chained, **changes)


def test_another_separator_or_cut_redoes_what_it_changes(chained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenize(chained, capsys)
    before = times(chained.parent / "out")
    manifest = json.loads((chained / "manifest.json").read_bytes())
    manifest["shards"][2]["continues"] = True  # its last document, which is blank, continues in the fourth now
    (chained / "manifest.json").write_text(json.dumps(manifest))
    printed = tokenize(chained, capsys)
    assert redone(chained.parent / "out", before) == {THIRD, FOURTH}
    assert printed.count("tokenized (the text changed)") == 2
    assert_equals_a_fresh_folder(chained)
    (chained / "manifest.json").write_text(json.dumps(manifest | {"separator": "。"}))
    assert tokenize(chained, capsys).count("tokenized (the text changed)") == 4


@pytest.mark.parametrize("name", ["train_combined_0002.npy", "val_combined_0002.npy"])
@pytest.mark.parametrize("damage", ["missing", "cut short", "one bit"])
def test_a_damaged_or_missing_file_is_made_again(
    chained: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    tokenize(chained, capsys)
    path = chained.parent / "out" / name
    before = times(path.parent)
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(content[:-1])
    else:
        content[-1] ^= 1
        path.write_bytes(content)
    printed = tokenize(chained, capsys)
    assert redone(path.parent, before) == {SECOND}
    assert f"combined_0002.txt: tokenized ({name} is missing or damaged)" in printed
    assert "3 of 4 token shards reused" in printed
    assert_equals_a_fresh_folder(chained)


def test_without_records_a_shard_is_new_and_without_the_manifest_nothing_is(
    chained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenize(chained, capsys)
    out = chained.parent / "out"
    before = times(out)
    (out / "manifest.json").unlink()
    assert "4 of 4 token shards reused" in tokenize(chained, capsys)
    assert times(out) == before
    (out / f"{THIRD}.json").unlink()
    assert "combined_0003.txt: tokenized (new)" in tokenize(chained, capsys)
    assert redone(out, before) == {THIRD}
    assert_equals_a_fresh_folder(chained)


def test_an_interrupted_change_leaves_no_manifest(
    chained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the folder was complete before: a reader must not take a mixture of two tokenizers."""
    tokenize(chained, capsys)
    out = chained.parent / "out"
    n_written = 0

    def interrupted(path: Path, content: bytes) -> None:
        nonlocal n_written
        n_written += 1
        if n_written == 2:
            raise KeyboardInterrupt
        write_atomically(path, content)

    with monkeypatch.context() as patched:
        patched.setattr("gptkit.data.pretokenization.write_atomically", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokenize(chained, capsys, tokenizer=TWO_BYTES)
    with pytest.raises(UserError, match="holds no finished token shards"):
        load_manifest(out, TWO_BYTES)
    tokenize(chained, capsys, tokenizer=TWO_BYTES)
    assert_equals_a_fresh_folder(chained, tokenizer=TWO_BYTES)


def test_an_interrupted_removal_leaves_no_manifest(
    chained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer text shards the old manifest names token shards that are about to be removed."""
    tokenize(chained, capsys)
    manifest = json.loads((chained / "manifest.json").read_bytes())
    (chained / "manifest.json").write_text(json.dumps(manifest | {"shards": manifest["shards"][:3]}))

    def interrupted(path: Path, value: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gptkit.data.pretokenization.write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize(chained, capsys)
    with pytest.raises(UserError, match="holds no finished token shards"):
        load_manifest(chained.parent / "out", LOSSLESS)


def test_a_killed_command_resumes(tmp_path: Path) -> None:
    text = prepare(SAMPLE, tmp_path / "text", 0.01)
    n_shards, out = len(list(text.glob("*.txt"))), tmp_path / "out"
    arguments = ("--data_dir", text, "--output_dir", out, *SAMPLE_TOKENS)
    process = subprocess.Popen(command("pretokenize.py", *arguments), env=environment(), stderr=subprocess.PIPE)
    try:
        while len(list(out.glob("combined_*.json"))) < 5:
            assert process.poll() is None
            time.sleep(0.001)
    finally:
        process.kill()
    _, printed = process.communicate()
    assert process.returncode != 0
    finished = [path.stem for path in out.glob("combined_*.json")]
    assert 5 <= len(finished) < n_shards, printed
    assert not (out / "manifest.json").exists()
    before = times(out)

    result = call_command("pretokenize.py", *arguments, "--num_workers", 1)
    assert result.returncode == 0, result.stderr
    assert redone(out, before) == {path.stem for path in text.glob("*.txt")} - set(finished)
    assert f"{len(finished)} of {n_shards} token shards reused" in result.stderr
    fresh = ("--data_dir", text, "--output_dir", tmp_path / "fresh", *SAMPLE_TOKENS, "--num_workers", 1)
    result = call_command("pretokenize.py", *fresh)
    assert result.returncode == 0, result.stderr
    assert contents(out) == contents(tmp_path / "fresh")


def test_token_shards_whose_text_is_gone_are_removed(chained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenize(chained, capsys)
    out = chained.parent / "out"
    (out / ".train_combined_0009.npy.partial").write_bytes(b"left by a kill")
    (out / ".DS_Store").write_bytes(b"left by a file browser")
    shards = [(path.read_text("utf-8"), path.stem == FIRST) for path in sorted(chained.glob("*.txt"))]
    (chained / f"{FOURTH}.txt").unlink()
    write_shards(chained, shards[:3])
    printed = tokenize(chained, capsys)
    assert "3 of 3 token shards reused" in printed
    stems = {FIRST, SECOND, THIRD}
    expected = {f"{stem}.json" for stem in stems} | {
        f"{split}_{stem}.npy" for split in ("train", "val") for stem in stems
    }
    assert {path.name for path in out.iterdir()} == expected | {"manifest.json", ".DS_Store"}
    (out / ".DS_Store").unlink()
    assert_equals_a_fresh_folder(chained)


# Folders


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "train_books.txt",
        "val_pictures/cat.npy",
        "train_folder.npy/x",
        "train.npy",
        "settings.json",
        "manifest.json",
        "a.json",
        "film.partial",
    ],
)
def test_a_folder_with_something_else_is_refused_and_left_alone(chained: Path, name: str) -> None:
    out = chained.parent / "out"
    path = out / name
    path.parent.mkdir(parents=True)
    path.write_text('{"threshold": 0.5, "format": "gptkit-text-shards"}' if name != "a.json" else "{")
    before = contents(out)
    with pytest.raises(UserError, match=f"holds something else .{name.partition('/')[0]}.; name a new or empty folder"):
        pretokenize(chained, out, LOSSLESS, 0.3)
    assert contents(out) == before
    with pytest.raises(UserError, match="holds something else"):
        pretokenize(chained, chained, LOSSLESS, 0.3)  # the text's own folder


def test_the_command_refuses_a_folder_with_something_else(tmp_path: Path, sample_shards: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("大切")
    flags = ("--data_dir", sample_shards, *SAMPLE_TOKENS)
    result = call_command("pretokenize.py", *flags, "--output_dir", tmp_path / "out")
    assert_user_error(result, str(tmp_path / "out"), "notes.txt", "name a new or empty folder")
    assert contents(tmp_path / "out") == {"notes.txt": "大切".encode()}
    for inside in ("", "deep/er"):
        result = call_command("pretokenize.py", *flags, "--output_dir", tmp_path / "out" / "notes.txt" / inside)
        assert_user_error(result, "notes.txt is a file", "name a folder")


def test_text_files_without_a_manifest_are_read_as_people_make_them(tmp_path: Path) -> None:
    """On Windows, for example: a byte-order mark, \\r\\n and \\r; no separator at a file's end; other files beside them."""
    text = tmp_path / "text"
    text.mkdir()
    (text / "b.txt").write_bytes("\ufeff　港。\r\n灯。\r\n".encode())
    (text / "a.txt").write_bytes(f"坂。\r\n{SEPARATOR}\r\n \r\n{SEPARATOR}峠\r{SEPARATOR}".encode())
    (text / "c.txt").write_bytes(b"")
    (text / "notes.md").write_bytes(b"\xff")
    assert documents_by_shard(text) == [["坂。\n", "峠\n"], ["　港。\n灯。\n"], []]
    manifest = pretokenize(text, tmp_path / "out", LOSSLESS, 0.3)
    assert manifest["documents"] == 3
    assert {path.name for path in (tmp_path / "out").glob("*.npy")} == {
        f"{split}_{stem}.npy" for split in ("train", "val") for stem in "abc"
    }


def test_prepared_text_is_tokenized_byte_for_byte(tmp_path: Path) -> None:
    documents = ["一行\ufeff\n二行\v\x85\n", "\n\n三行\u2028\u3000\n", "</s>と<|endoftext"]
    for number, max_size_mb in enumerate([0.00003, 25]):
        source = write_jsonl(tmp_path / f"{number}.jsonl", documents)
        text = prepare(source, tmp_path / f"text{number}", max_size_mb)
        pretokenize(text, tmp_path / f"out{number}", LOSSLESS, 0.3)
        found = [
            document for split in ("train", "val") for document in read_documents(tmp_path / f"out{number}", split)
        ]
        assert sorted(found) == sorted(documents)


def test_tokens_of_a_version_that_kept_carriage_returns_are_used_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that a run on them resumes; text without carriage returns gives what it gave, down to the records."""
    for name, newline in (("lf", "\n"), ("crlf", "\r\n"), ("txt", "\r")):
        documents = [document.replace("\n", newline) for document in DOCUMENTS]
        text = prepare(write_jsonl(tmp_path / f"{name}.jsonl", documents), tmp_path / name, 0.0005)
        for shard in text.glob("*.txt"):  # as that version's prepare wrote them
            shard.write_bytes(shard.read_bytes().replace(b"\n", newline.encode()))
        if name == "txt":
            (text / "manifest.json").unlink()
        out = tmp_path / f"{name}_out"
        with monkeypatch.context() as patch:
            patch.setattr("gptkit.data.text_shards.plain_text", lambda text: text)
            patch.setattr("gptkit.data.text_shards.was_read_otherwise", lambda text, index: False)
            before = pretokenize(text, out, LOSSLESS, 0.01)
        capsys.readouterr()
        assert pretokenize(text, out, LOSSLESS, 0.01) == before
        warning = f"warning: {out} is used as an earlier version made it; "
        assert (warning in capsys.readouterr().err) == (name != "lf")
        anew = pretokenize(text, tmp_path / f"{name}_new", LOSSLESS, 0.01)
        assert (anew == before) == (name == "lf")
        assert warning not in capsys.readouterr().err
        assert anew["characters"] == sum(map(len, DOCUMENTS))
        pretokenize(text, tmp_path / f"{name}_new", LOSSLESS, 0.01)
        assert "earlier version" not in capsys.readouterr().err
        # Another share of validation documents is another run: its tokens are made anew.
        assert pretokenize(text, out, LOSSLESS, 0.4) != before
        assert (pretokenize(text, out, LOSSLESS, 0.01) == before) == (name == "lf")


# What a user can get wrong


def test_text_that_is_not_utf8_is_reported_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(SEPARATOR.join(DOCUMENTS), "utf-8")
    (tmp_path / "text" / "b.txt").write_bytes("港の灯".encode("shift_jis"))
    folders = ("--data_dir", tmp_path / "text", "--output_dir", tmp_path / "out")
    result = call_command("pretokenize.py", *folders, *SAMPLE_TOKENS, "--num_workers", 1)
    assert_user_error(result, "b.txt", "not UTF-8", "convert the file to UTF-8")
    assert not (tmp_path / "out").exists()


def test_a_data_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "notes.txt").write_text("港")
    for data_dir, parts in [
        (tmp_path / "text", ["holds no text shards", "prepare_aozora_jsonl.py"]),
        (tmp_path / "txet", [f"--data_dir {tmp_path / 'txet'}: no such file or folder", f"did you mean {tmp_path}/text?"]),
        (tmp_path / "notes.txt", ["notes.txt is a file", "name the folder"]),
    ]:  # fmt: skip
        folders = ("--data_dir", data_dir, "--output_dir", tmp_path / "out")
        result = call_command("pretokenize.py", *folders, *SAMPLE_TOKENS)
        assert_user_error(result, *parts)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([" ", "\n"], "holds 0 documents, only blank text; give text"),
        (["　港 \n"], "holds too little text.*give more text"),
    ],
)
def test_too_little_text_is_reported(tmp_path: Path, documents: list[str], message: str) -> None:
    text = write_shards(tmp_path / "text", [(SEPARATOR.join(documents) + SEPARATOR, False)])
    with pytest.raises(UserError, match=message):
        pretokenize(text, tmp_path / "out", LOSSLESS, 0.1)
    assert not (tmp_path / "out").exists()


def test_tokens_without_their_text_are_checked(chained: Path) -> None:
    out = chained.parent / "out"
    manifest = pretokenize(chained, out, LOSSLESS, 0.3)
    assert load_manifest(out, LOSSLESS) == manifest
    with pytest.raises(UserError, match="made by another tokenizer"):
        load_manifest(out, TWO_BYTES)
    path = out / f"train_{SECOND}.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path.name} is missing or damaged"):
        load_manifest(out, LOSSLESS)
    del manifest["tokenizer"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        load_manifest(out, LOSSLESS)


def test_a_preparation_that_was_stopped_is_refused(chained: Path) -> None:
    (chained / "manifest.json").unlink()
    (chained / ".partial").mkdir()
    with pytest.raises(UserError, match="prepare the folder again"):
        pretokenize(chained, chained.parent / "out", LOSSLESS, 0.3)


def test_text_that_differs_from_its_manifest_is_reported(
    tmp_path: Path, sample_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path(shutil.copytree(sample_shards, tmp_path / "text"))
    path = min(text.glob("*.txt"))
    path.write_bytes(path.read_bytes().replace("。".encode(), "、".encode(), 1))
    pretokenize(text, tmp_path / "out", LOSSLESS, 0.3)
    assert f"warning: {path} was edited or cut short since it was prepared" in capsys.readouterr().err


def test_a_matching_folder_is_not_written(tmp_path: Path, sample_shards: Path) -> None:
    """It may be read-only."""
    pretokenize(sample_shards, tmp_path / "out", LOSSLESS, 0.3)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    pretokenize(sample_shards, tmp_path / "out", LOSSLESS, 0.3)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_reader_refuses_what_is_unfinished_or_differs_from_its_manifest(chained: Path) -> None:
    with pytest.raises(UserError, match=r"holds no finished token shards; pretokenize\.py makes them"):
        load_manifest(chained, LOSSLESS)
    out = chained.parent / "out"
    manifest = pretokenize(chained, out, LOSSLESS, 0.3)
    path = out / f"train_{SECOND}.npy"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"train_combined_0002\.npy.*run pretokenize\.py again"):
        open_tokens(out, manifest)
    path.unlink()
    with pytest.raises(UserError, match=r"train_combined_0002\.npy.*run pretokenize\.py again"):
        open_tokens(out, manifest)


def test_many_tokens_are_not_read_to_be_checked(chained: Path) -> None:
    """Above a bound only names and sizes are checked."""
    out = chained.parent / "out"
    manifest = pretokenize(chained, out, LOSSLESS, 0.3)
    path = out / f"train_{SECOND}.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    n_bytes = manifest["tokens"] * 4
    assert load_manifest(out, LOSSLESS, max_hashed=n_bytes - 1) == manifest
    with pytest.raises(UserError, match=rf"{path.name} is missing or damaged"):
        load_manifest(out, LOSSLESS, max_hashed=n_bytes)
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{path.name} is missing or damaged"):
        load_manifest(out, LOSSLESS, max_hashed=0)
