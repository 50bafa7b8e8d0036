"""gptkit/data/text_shards.py: documents that continue over the ends of shards, and folders that hold no text shards."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import SEPARATOR

from gptkit.base.cli import UserError
from gptkit.data.text_shards import documents_of_shard, find_text_shards, sample_documents, source_name

DOCUMENTS = [f"　{place}の灯が、{number}つ見えた。\n「もう{verb}の」\n" for number, (place, verb) in enumerate(
    [(place, verb) for place in ("港", "坂", "峠", "町", "島", "橋") for verb in ("行く", "帰る", "眠る", "歩く")]
)]  # fmt: skip


def write_shards(folder: Path, shards: Sequence[tuple[str | bytes, bool]], separator: str = SEPARATOR) -> Path:
    """Write text shards as prepare_aozora_jsonl.py does: (content, whether its last document continues)."""
    folder.mkdir(exist_ok=True)
    described = []
    for number, (content, continues) in enumerate(shards, start=1):
        name = f"combined_{number:04d}.txt"
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        described.append({"file": name, "continues": continues})
    manifest = {"format": "gptkit-text-shards", "version": 1, "separator": separator, "shards": described}
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    return folder


def documents_by_shard(folder: Path) -> list[list[str]]:
    text = find_text_shards(folder)
    return [list(documents_of_shard(text, index)) for index in range(len(text.paths))]


def write_chained(folder: Path) -> Path:
    """Write four text shards; the last document of the first continues in the second."""
    parts = [SEPARATOR.join(DOCUMENTS[start : start + 6]) + SEPARATOR for start in (0, 6, 12, 18)]
    parts[0], parts[1] = parts[0] + "あの長い話は", "まだ続く。" + SEPARATOR + parts[1]
    return write_shards(folder, [(part, number == 0) for number, part in enumerate(parts)])


@pytest.fixture
def chained(tmp_path: Path) -> Path:
    return write_chained(tmp_path / "text")


# Documents over the ends of shards


@pytest.mark.parametrize(
    ("shards", "expected"),
    [
        pytest.param([("一SEP二の", True), ("続きSEP三SEP", False)], [["一", "二の続き"], ["三"]], id="over two"),
        pytest.param(
            [("一SEP二の", True), ("続きの", True), ("続きの", True), ("終りSEP三SEP", False), ("四SEP", False)],
            [["一", "二の続きの続きの終り"], [], [], ["三"], ["四"]],
            id="shards inside a document",
        ),
        pytest.param([("一", True), ("の", True), ("終SEP", False)], [["一の終"], [], []], id="one document alone"),
        pytest.param([("一の", True), ("終SEP", False), ("二SEP", False)], [["一の終"], [], ["二"]], id="ends with it"),
        pytest.param([("一SEP", False), ("二SEP", False)], [["一"], ["二"]], id="cut between works"),
        pytest.param([("一SEP二", True), ("SEP三SEP", False)], [["一", "二"], ["三"]], id="cut before the separator"),
        pytest.param([("一の", True), ("終SEP二の", True), ("終SEP", False)], [["一の終"], ["二の終"], []], id="chain"),
        pytest.param([("一SEP二", True)], [["一", "二"]], id="the last shard is cut off"),
        pytest.param([("　\n一 SEP \nSEP二\nSEP", False)], [["　\n一 ", "二\n"]], id="blank documents are skipped"),
    ],
)  # fmt: skip
def test_a_document_belongs_to_the_shard_that_it_begins_in(
    tmp_path: Path, shards: list[tuple[str, bool]], expected: list[list[str]]
) -> None:
    write_shards(tmp_path / "text", [(content.replace("SEP", SEPARATOR), continues) for content, continues in shards])
    assert documents_by_shard(tmp_path / "text") == expected


def test_a_cut_may_lie_inside_a_character(tmp_path: Path) -> None:
    joined = f"港の{SEPARATOR}坂{SEPARATOR}".encode()
    write_shards(tmp_path / "text", [(joined[:4], True), (joined[4:], False)])
    assert documents_by_shard(tmp_path / "text") == [["港の"], ["坂"]]


def test_documents_are_the_same_wherever_shards_are_cut(tmp_path: Path) -> None:
    """Shards may be cut anywhere but inside a separator, and any number of times."""
    chance = random.Random(0)
    for trial in range(60):
        separator = chance.choice([SEPARATOR, "※※※", "§"])
        documents = [chance.choice(DOCUMENTS) * chance.randint(1, 3) for _ in range(chance.randint(1, 6))]
        joined, ends, inside = "", set(), set()
        for document in documents:
            inside |= set(range(len(joined) + len(document) + 1, len(joined) + len(document) + len(separator)))
            joined += document + separator
            ends.add(len(joined))
        places = sorted(set(range(1, len(joined))) - inside)
        cuts = [*sorted(chance.sample(places, chance.randint(0, 12))), len(joined)]
        shards = [(joined[a:b], b not in ends) for a, b in zip([0, *cuts], cuts, strict=False)]
        folder = write_shards(tmp_path / str(trial), shards, separator)
        assert [document for shard in documents_by_shard(folder) for document in shard] == documents


def test_sample_documents_takes_the_same_length_from_each_shard(tmp_path: Path) -> None:
    shards = [(f"{name * 9}{SEPARATOR}{name * 9}{SEPARATOR}", False) for name in "港坂峠"]
    folder = write_shards(tmp_path / "text", shards)
    assert sample_documents(folder, 12) == ["港" * 4, "坂" * 4, "峠" * 4]
    assert sample_documents(folder, 33) == [name * n for name in "港坂峠" for n in (9, 2)]
    assert sample_documents(folder, 10**6) == [name * 9 for name in "港坂峠" for _ in range(2)]


def test_the_source_of_text_shards_is_known_where_the_manifest_names_it(tmp_path: Path) -> None:
    assert source_name(write_shards(tmp_path / "text", [("港", False)])) is None
    manifest = json.loads((tmp_path / "text" / "manifest.json").read_bytes())
    (tmp_path / "text" / "manifest.json").write_text(json.dumps(manifest | {"source": {"file": "a.jsonl"}}))
    assert source_name(tmp_path / "text") == "a.jsonl"
    assert source_name(tmp_path / "elsewhere") is None


# What a user can get wrong


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "[]",
        "{}",
        '{"format": "gptkit-text-shards", "shards": [1]}',
        '{"format": "other", "separator": "x", "shards": [{"file": "combined_0001.txt", "continues": false}]}',
    ],
)
def test_a_manifest_that_describes_no_text_is_refused(chained: Path, manifest: str) -> None:
    (chained / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match=r"manifest\.json describes no text shards .*prepare the folder again"):
        find_text_shards(chained)


def test_a_shard_that_the_manifest_names_must_be_there(chained: Path) -> None:
    (chained / "combined_0003.txt").unlink()
    with pytest.raises(UserError, match=r"lacks combined_0003\.txt.*prepare the folder again"):
        find_text_shards(chained)
