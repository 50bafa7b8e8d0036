"""gptkit/data/validation_split.py: validation has about its share of the text, also of one work, and none is trained on."""

import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import SAMPLE_TOKENIZER, SAMPLE_TOKENS, SEPARATOR, TINY_MODEL, assert_user_error, call_command
from test_pretokenization import LOSSLESS, contents, times
from test_text_shards import write_shards

from gptkit.data.pretokenization import load_manifest, pretokenize
from gptkit.data.validation_split import find_cut
from gptkit.text.tokenizer import load_sentencepiece

WORDS = ("港", "坂道", "灯", "峠", "見えた", "帰る", "眠った", "歩く", "霧", "、", "雨が")


def work(seed: int, n_characters: int, paragraph: int = 60) -> str:
    """Return a text of about so many characters, in paragraphs of sentences, that is like no other one."""
    draw = random.Random(seed)
    lines: list[str] = []
    while sum(map(len, lines)) < n_characters:
        line = "　"
        while len(line) < draw.uniform(0.5, 1.5) * paragraph:
            line += "".join(draw.choices(WORDS, k=8)) + "。"
        lines.append(f"{line}\n")
    return "".join(lines)


def number_of(document: str) -> int:
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big")


def ordered(*documents: str) -> list[str]:
    """Return the documents by their hashes, after a number is put before the first so that its hash is the lowest."""
    first = next(f"{i}\n{documents[0]}" for i in itertools.count() if _is_lowest(f"{i}\n{documents[0]}", documents[1:]))
    return [first, *documents[1:]]


def _is_lowest(document: str, others: tuple[str, ...]) -> bool:
    return all(number_of(document) < number_of(other) for other in others)


def streams(folder: Path) -> dict[str, str]:
    """Return the text of each split, read from the files by NumPy alone, with SEPARATOR for end-of-text."""
    found = {}
    for split in ("train", "val"):
        ids = np.concatenate([np.load(path) for path in sorted(folder.glob(f"{split}_*.npy"))])
        found[split] = "".join(SEPARATOR if i == LOSSLESS.end_of_text_id else chr(i) for i in ids)
    return found


def split(tmp_path: Path, documents: list[str], val_fraction: float = 0.01, name: str = "out") -> dict[str, str]:
    text = write_shards(tmp_path / "text", [(SEPARATOR.join(documents) + SEPARATOR, False)])
    manifest = pretokenize(text, tmp_path / name, LOSSLESS, val_fraction)
    assert load_manifest(tmp_path / name, LOSSLESS) == manifest
    assert manifest["documents"] == len([document for document in documents if document.strip()])
    assert manifest["characters"] == sum(map(len, documents))
    found = streams(tmp_path / name)
    assert manifest["val"]["tokens"] == len(found["val"].replace(SEPARATOR, "x"))
    return found


def paragraphs(text: str) -> set[str]:
    return {line for line in text.replace(SEPARATOR, "\n").split("\n") if len(line) > 20}


SMALL = {
    "one work": [work(1, 20_000)],
    "one work twice": [work(1, 20_000)] * 2,
    "two works": [work(1, 10_000), work(2, 10_000)],
    "the long of two": ordered(work(1, 30_000), work(2, 200)),
    "the long of three": ordered(work(1, 30_000), work(2, 600), work(3, 700)),
    "the short of two": ordered(work(1, 12), work(2, 30_000)),
    "nine works": [work(i, 3_000) for i in range(9)],
    "a giant among many": ordered(work(1, 300_000), *(work(i, 500) for i in range(2, 60))),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("val_fraction", [0.01, 0.05, 0.2])
def test_validation_has_about_its_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, val_fraction: float
) -> None:
    documents = SMALL[name]
    found = split(tmp_path, documents, val_fraction)
    share = len(found["val"]) / (len(found["train"]) + len(found["val"]))
    assert val_fraction / 4 < share < val_fraction * 4, found["val"][:100]
    assert not paragraphs(found["val"]) & paragraphs(found["train"])
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("validation: ")]
    pieces = [piece for each in found.values() for piece in each.split(SEPARATOR)]
    whole = sum(piece in documents for piece in pieces) == len(documents)
    assert whole or re.search(
        r"the last [\d,]+ of [\d,]+ characters of a document in combined_0001.txt, cut at a", notes[0]
    )


def test_the_works_of_the_report_are_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three works, one of them long, of which validation took 30,001 of 31,283 tokens."""
    long, *short = ordered(work(1, 30_000), work(2, 640), work(3, 640))
    found = split(tmp_path, [long, *short])
    beginning, *others = found["train"].split(SEPARATOR)
    assert others == [*short, ""]  # each document, also the one that was cut, ends with end-of-text
    assert found["val"] == long.removeprefix(beginning) + SEPARATOR
    assert beginning.endswith("。\n")
    n_val = len(found["val"]) - len(SEPARATOR)
    line = f"validation: the last {n_val} of {len(long):,} characters of a document in combined_0001.txt, cut at a paragraph"
    assert f"{line} (whole documents chosen by hash would be " in capsys.readouterr().err


def test_whole_works_near_the_share_are_split_as_ever(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By their hashes alone, with records of the same form: runs that began with version 0.1 resume."""
    documents = [work(i, 400) for i in range(60)]
    for val_fraction in (0.02, 0.1, 0.5):
        found = split(tmp_path, documents, val_fraction)
        threshold = max(int(val_fraction * 2**64), min(map(number_of, documents)) + 1)
        for name, is_val in (("train", False), ("val", True)):
            assert found[name].split(SEPARATOR)[:-1] == [d for d in documents if (number_of(d) < threshold) == is_val]
        record = json.loads((tmp_path / "out" / "combined_0001.json").read_bytes())
        assert list(record) == ["separator", "text", "tokenizer", "threshold", "train", "val"]
        assert record["threshold"] == threshold
    assert "validation: " not in capsys.readouterr().err


def test_the_split_does_not_depend_on_shards_and_workers(tmp_path: Path) -> None:
    long, *short = ordered(work(1, 30_000), work(2, 640), work(3, 640))
    expected = split(tmp_path, [long, *short])
    joined = SEPARATOR.join([long, *short]) + SEPARATOR
    for number, cuts in enumerate([(5_000, 9_000, 29_950), (len(long) + 3 + len(SEPARATOR),)]):
        edges = [0, *cuts, len(joined)]
        shards = [(joined[a:b], b < len(joined)) for a, b in itertools.pairwise(edges)]
        text = write_shards(tmp_path / f"text{number}", shards)
        pretokenize(text, tmp_path / f"out{number}", LOSSLESS, 0.01)
        assert streams(tmp_path / f"out{number}") == expected
    folders = [tmp_path / f"workers{n}" for n in (1, 2)]
    for n, folder in enumerate(folders, 1):
        pretokenize(text, folder, load_sentencepiece(str(SAMPLE_TOKENIZER)), 0.01, num_workers=n)
    assert contents(folders[0]) == contents(folders[1])


def test_only_the_shard_with_the_cut_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A longer text has a larger share, so the cut moves; shards of other documents do not change."""
    long, other = ordered(work(1, 30_000), work(2, 20_000))
    text = write_shards(tmp_path / "text", [(long, False), (other, False), ("一つの話。\n" * 100, False)])
    before_cut = pretokenize(text, tmp_path / "out", LOSSLESS, 0.01)["shards"][0]["cut"]
    before = times(tmp_path / "out")
    write_shards(text, [(long, False), (other, False), ("一つの話。\n" * 3_000, False)])
    capsys.readouterr()
    manifest = pretokenize(text, tmp_path / "out", LOSSLESS, 0.01)
    assert manifest["shards"][0]["cut"] < before_cut
    printed = capsys.readouterr().err
    assert "combined_0001.txt: tokenized (the choice of validation documents changed)" in printed
    assert "combined_0003.txt: tokenized (the text changed)" in printed
    changed = {name for name, when in times(tmp_path / "out").items() if before[name] != when}
    assert "combined_0002.json" not in changed
    assert "1 of 3 token shards reused" in printed
    pretokenize(text, tmp_path / "fresh", LOSSLESS, 0.01)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_folder_of_an_earlier_version_is_used_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its threshold alone decided, so that validation has the long work; the run that began with it can resume."""
    documents = ordered(work(1, 30_000), work(2, 640), work(3, 640))
    split(tmp_path, documents)
    path = tmp_path / "out" / "combined_0001.json"
    record = json.loads(path.read_bytes())
    threshold = max(int(0.01 * 2**64), number_of(documents[0]) + 1)
    record = {name: record[name] for name in record if name != "cut"} | {"threshold": threshold}
    for name, chosen in (("train", documents[1:]), ("val", documents[:1])):
        ids = [*map(ord, "\x00".join([*chosen, ""]))]
        file = tmp_path / "out" / record[name]["file"]
        np.save(file, np.array([i or LOSSLESS.end_of_text_id for i in ids], "<u4"))
        record[name] |= {"tokens": len(ids), "characters": sum(map(len, chosen)), "documents": len(chosen)}
        record[name]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    path.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", "utf-8")
    before = contents(tmp_path / "out")
    capsys.readouterr()
    assert streams(tmp_path / "out")["val"] == documents[0] + SEPARATOR
    split(tmp_path, documents)
    printed = capsys.readouterr().err
    assert f"warning: {tmp_path / 'out'} is used as an earlier version made it; " in printed
    del before["manifest.json"]
    assert contents(tmp_path / "out").items() >= before.items()


def cases_of_cuts() -> Iterator[tuple[str, float, str]]:
    yield work(5, 3_000), 0.1, "paragraph"
    yield work(5, 3_000).replace("\n", ""), 0.1, "sentence"
    yield "She said so. It was late. " * 30, 0.1, "sentence"
    yield "あ" * 999, 0.1, "character"
    yield "か\u3099" * 500, 0.1, "character"  # decomposed が
    yield work(5, 3_000) + "\n" * 2_000 + "　" * 500, 0.1, "paragraph"  # white space at the end is no text
    yield "港。", 0.01, "character"
    yield "\r\n".join(["一行の話"] * 300), 0.05, "paragraph"


@pytest.mark.parametrize(("document", "share", "where"), list(cases_of_cuts()))
def test_where_a_work_is_cut(document: str, share: float, where: str) -> None:
    cut_at, found = find_cut(document, share)
    assert found == where
    before, after = document[:cut_at], document[cut_at:]
    assert before.strip()
    assert after.strip()
    part = len(after.strip().encode()) / len(document.strip().encode())
    assert part <= max(2.1 * share, 1 / 2)
    assert part >= share / 2.1
    if where == "paragraph":
        assert before.endswith("\n")
    elif where == "sentence":
        assert before.rstrip().endswith(("。", "."))
    assert not after.startswith("\u3099")


def test_one_work_is_trained_on(tmp_path: Path) -> None:
    """A folder with one .txt file is enough, and the run says what is held out; a text that is too short says what helps."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(work(1, 4_000), "utf-8")
    arguments = (*SAMPLE_TOKENS, "--data_dir", tmp_path / "text", "--max_steps", 2, "--device", "cpu")
    result = call_command("pretraining.py", *arguments, *TINY_MODEL, "--output_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert re.search(r"validation: the last \d+ of 4,\d+ characters of a document in a\.txt, cut at a", result.stderr)
    (tmp_path / "text" / "a.txt").write_text("春の夜。", "utf-8")
    result = call_command("pretraining.py", *arguments, *TINY_MODEL, "--output_dir", tmp_path / "short")
    assert_user_error(result, "training tokens are fewer than a context of 16", "smaller --context_length")
