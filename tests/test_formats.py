"""dataset/_formats.py, its copy in gptkit, and what every reader of text does with line ends and with other formats."""

import bz2
import gzip
import io
import json
import lzma
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    SAMPLE_TOKENS,
    SEPARATOR,
    SHARED,
    assert_user_error,
    call_command,
    write_jsonl,
)

from gptkit.base.cli import UserError
from gptkit.data.text_shards import documents_of_shard, find_text_shards
from gptkit.evaluation.documents import read_documents
from gptkit.text import formats
from gptkit.text.tokenizer import encode_prompt, load_sentencepiece

sys.path.insert(0, str(ROOT / "dataset"))  # as for `python dataset/train_tokenizer.py`

import _corpus

PREPARE, TRAIN = "dataset/prepare_aozora_jsonl.py", "dataset/train_tokenizer.py"
TEXT = "　川のほとりに小さな家があった。\n「おはよう」と彼は言った。\n"
JSONL = "".join(json.dumps({"text": TEXT * n}, ensure_ascii=False) + "\n" for n in (3, 4, 5)).encode()


def archive(kind: str, content: bytes) -> bytes:
    """Return an archive with one file of this content."""
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr("a.jsonl", content)
    else:
        with tarfile.open(fileobj=file, mode="w") as tar:
            member = tarfile.TarInfo("a.jsonl")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def encoded(encoding: str, mark: bytes = b"") -> Callable[[bytes], bytes]:
    return lambda content: mark + content.decode().encode(encoding)


# A file's content from that of UTF-8 text, and what a message must name: what it is, and the remedy.
OTHERS: dict[str, tuple[Callable[[bytes], bytes], tuple[str, ...]]] = {
    "utf-16": (encoded("utf-16"), ("not UTF-8 but UTF-16;", "iconv -f UTF-16 -t UTF-8")),
    "utf-16 big": (encoded("utf-16-be", b"\xfe\xff"), ("not UTF-8 but UTF-16;", "iconv -f UTF-16 -t")),
    "utf-16 little, no mark": (encoded("utf-16-le"), ("UTF-16 (little-endian)", "iconv -f UTF-16LE -t")),
    "utf-16 big, no mark": (encoded("utf-16-be"), ("UTF-16 (big-endian)", "iconv -f UTF-16BE -t")),
    "utf-32": (encoded("utf-32"), ("not UTF-8 but UTF-32;", "iconv -f UTF-32 -t")),
    "utf-32 big, no mark": (encoded("utf-32-be"), ("UTF-32 (big-endian)", "iconv -f UTF-32BE -t")),
    "shift_jis": (encoded("shift_jis"), ("not UTF-8 but Shift_JIS;", "iconv -f ")),
    "cp932": (lambda content: content.decode().replace("川", "①").encode("cp932"), ("Shift_JIS", "iconv -f CP932 -t")),
    "euc-jp": (encoded("euc_jp"), ("not UTF-8 but EUC-JP;", "iconv -f EUC-JP -t")),
    "iso-2022-jp": (encoded("iso2022_jp"), ("not UTF-8 but ISO-2022-JP", "iconv -f ISO-2022-JP -t")),
    "zip": (lambda content: archive("zip", content), ("a zip archive", "unzip")),
    "tar": (lambda content: archive("tar", content), ("a tar archive", "tar -xf")),
    "bzip2": (bz2.compress, ("bzip2", "bunzip2")),
    "zstd": (lambda content: b"\x28\xb5\x2f\xfd" + bytes(99), ("zstd", "unzstd")),
    "7z": (lambda content: b"7z\xbc\xaf\x27\x1c" + bytes(99), ("a 7z archive", "7z x")),
    "pdf": (lambda content: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", ("a PDF", "pdftotext")),
    "parquet": (lambda content: b"PAR1\x15\x04\x15\x10\n\xff" + bytes(99), ("a Parquet file", "to_json")),
    "lfs": (
        lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        ("Git LFS", "git lfs pull"),
    ),
    "png": (lambda content: (ROOT / "docs" / "demo.png").read_bytes()[:5000], ("a picture",)),
    "binary": (lambda content: b"\xc0" + bytes(range(256)) * 9, ("binary data",)),
}
ONLY_JSONL: dict[str, tuple[Callable[[bytes], bytes], tuple[str, ...]]] = {
    "html": (lambda content: b"<!DOCTYPE html>\n<html>\n", ("an HTML or XML page", "download the file itself")),
    "xhtml": (lambda content: b'<?xml version="1.0" encoding="Shift_JIS"?>\n', ("an HTML or XML page",)),
    "json array": (lambda content: b"[" + content.rstrip().replace(b"\n", b",\n") + b"]", ("a list", "jq -c '.[]'")),
    "pretty json": (lambda content: b'{\n "text": "a"\n}\n', ("over several lines", "jq -c .")),
    "carriage returns": (lambda content: content.replace(b"\n", b"\r"), ("carriage return alone", "tr '\\r' '\\n'")),
    "text": (lambda content: TEXT.encode(), ("text and not JSONL", "--data_dir")),
    "tar.gz": (lambda content: gzip.compress(archive("tar", content)), ("a tar archive", "tar -xf")),
    "shift_jis in xz": (lambda content: lzma.compress(encoded("shift_jis")(content)), ("Shift_JIS",)),
}


def test_the_copy_in_gptkit_is_equal() -> None:
    """The scripts stand alone, and gptkit imports none of them."""
    ours, theirs = (ROOT / name for name in ("gptkit/text/formats.py", "dataset/_formats.py"))
    code, copy = (path.read_text("utf-8").split('"""', 2)[2] for path in (ours, theirs))
    assert code == copy


@pytest.mark.parametrize("name", [*OTHERS, *ONLY_JSONL])
@pytest.mark.parametrize("flags", [(), ("--skip_bad_lines",)], ids=["", "skip"])
def test_prepare_names_what_is_no_jsonl(name: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    """Also with --skip_bad_lines, which must not leave an empty corpus of it."""
    make, parts = (OTHERS | ONLY_JSONL)[name]
    (tmp_path / "a.jsonl").write_bytes(make(JSONL))
    result = call_command(PREPARE, "--jsonl_path", tmp_path / "a.jsonl", "--output_dir", tmp_path / "out", *flags)
    assert_user_error(result, f"{tmp_path / 'a.jsonl'}: ", *parts)
    assert "skip_bad_lines" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", OTHERS)
def test_text_files_name_what_is_no_utf8(name: str, tmp_path: Path) -> None:
    """A folder of .txt files for pretokenize.py and train_tokenizer.py, a .txt and a .jsonl for evaluate_model.py."""
    make, parts = OTHERS[name]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(TEXT * 9, "utf-8")
    bad = tmp_path / "text" / "b.txt"
    bad.write_bytes(make(TEXT.encode() * 9))
    folders = ("--data_dir", tmp_path / "text", "--output_dir", tmp_path / "out")
    for result in (
        call_command("pretokenize.py", *folders, *SAMPLE_TOKENS, "--num_workers", 1),
        call_command(TRAIN, *folders, "--vocab_size", 300),
    ):
        assert_user_error(result, f"{bad}: ", *parts)
        assert not (tmp_path / "out").exists()
    (tmp_path / "a.jsonl").write_bytes(make(JSONL))
    for path in (bad, tmp_path / "a.jsonl"):
        with pytest.raises(UserError) as caught:
            list(read_documents(path))
        assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize("name", ONLY_JSONL)
def test_evaluation_names_what_is_no_jsonl(name: str, tmp_path: Path) -> None:
    make, parts = ONLY_JSONL[name]
    (tmp_path / "a.jsonl").write_bytes(make(JSONL))
    with pytest.raises(UserError) as caught:
        list(read_documents(tmp_path / "a.jsonl"))
    assert all(part in str(caught.value) for part in parts)


def test_the_remedy_gives_the_text_back(tmp_path: Path) -> None:
    """As Shift_JIS, iconv would make ¥n of the \\n in JSON, which is still JSON; and 〜 stays what it was where it can."""
    for content, encoding in ((JSONL, "CP932"), ("〜水と川の間\n".encode(), "SHIFT_JIS")):
        shift_jis = content.decode().encode("shift_jis")
        described = formats.other_than_utf8(shift_jis)
        assert described is not None
        assert f"(iconv -f {encoding} -t UTF-8)" in described
        result = subprocess.run(["iconv", "-f", encoding, "-t", "UTF-8"], input=shift_jis, capture_output=True)
        assert result.stdout == content


def test_utf8_is_never_called_anything_else() -> None:
    """Whatever it holds, cut anywhere, and with damage in it."""
    chance = random.Random(0)
    signs = "あアー漢字、。「」　\n\tABC~\\é縺ｱﾊﾝ①𠮟①〓\u2028\x1b$B\x00\ufeff"
    for _ in range(3000):
        text = "".join(chance.choice(signs) for _ in range(chance.randint(1, 60))).replace("\0", "", 0)
        if "\0" in text and chance.random() < 0.9:
            text = text.replace("\0", "")
        assert formats.other_than_utf8(text.encode()) is None, text
        assert formats.other_than_utf8(("雨。" + text).encode()[:-1]) is None, text
    damaged = bytearray(TEXT.encode() * 5)
    for place in (10, 200, 333):
        damaged[place] = 0xFF
    assert formats.other_than_utf8(bytes(damaged)) is None
    assert formats.other_than_utf8(b"") is None


@pytest.mark.parametrize(
    "data", ["café señor naïve".encode("latin-1"), "日本国憲法前文".encode("cp932"), "日本国宪法前言".encode("gb18030")]
)
def test_what_is_in_an_encoding_that_is_not_known_is_converted_and_not_left_out(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + data + b'"}\n')
    result = call_command(PREPARE, "--jsonl_path", tmp_path / "a.jsonl", "--output_dir", tmp_path / "out")
    assert_user_error(result, "not UTF-8", "convert")
    assert "--skip_bad_lines" not in result.stderr


@pytest.mark.parametrize(
    "encoding", ["shift_jis", "cp932", "euc_jp", "iso2022_jp", "utf-16-le", "utf-16-be", "utf-32-le"]
)
def test_encodings_of_real_text_are_told_apart(encoding: str) -> None:
    """On each line of the sample, as long as it has kana and the encoding has its characters."""
    names = {"utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE", "utf-32-le": "UTF-32LE", "iso2022_jp": "ISO-2022-JP"}
    names |= {"shift_jis": "SHIFT_JIS", "cp932": "SHIFT_JIS", "euc_jp": "EUC-JP"}
    lines = [
        json.loads(line)["text"] for line in (ROOT / "dataset/sample/sample.jsonl").read_text("utf-8").splitlines()
    ]
    lines = [line for text in lines for line in text.split("\n") if len(line) > 20]
    wrong = n_encoded = 0
    for line in lines:
        try:
            data = f"{line}\n".encode(encoding)
        except UnicodeEncodeError:
            continue
        n_encoded += 1
        found = formats.other_than_utf8(data) or ""
        wrong += f"iconv -f {names[encoding]} " not in found and "iconv -f CP932 " not in found
        assert "iconv" not in found or any(f"-f {name} " in found for name in (names[encoding], "CP932")), (line, found)
    assert n_encoded > 500
    assert wrong <= n_encoded / 100


def test_one_line_in_another_encoding_is_a_bad_line(tmp_path: Path) -> None:
    line = JSONL.splitlines(keepends=True)[0]
    source = tmp_path / "a.jsonl"
    source.write_bytes(JSONL + encoded("shift_jis")(line) + JSONL)
    flags = ("--jsonl_path", source, "--output_dir", tmp_path / "out")
    result = call_command(PREPARE, *flags)
    assert_user_error(result, f"{source}: line 4: not UTF-8 but Shift_JIS; correct the line", "--skip_bad_lines")
    assert call_command(PREPARE, *flags, "--skip_bad_lines").returncode == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_bytes())["left_out"] == {"bad line": 1}
    # A file in another encoding of which some lines happen to be ASCII is none to skip lines of.
    source.write_bytes(b'{"text": "ASCII"}\n' + encoded("shift_jis")(JSONL))
    assert_user_error(call_command(PREPARE, *flags, "--skip_bad_lines"), f"{source}: not UTF-8 but Shift_JIS")


# Line ends

WORKS = [
    "　雨が降る。\n「もう行くの」\n\n坂の上。\n" * 3,
    "港の灯が\v消え\x85た。\u2028\n\n",
    "あ\nい\n\n\nう",
    "峠\n",
    "町の灯",
]
LINE_ENDS = {"crlf": "\r\n", "cr": "\r", "lf": "\n"}


def write_form(form: str, newline: str, folder: Path) -> tuple[Path, Path | None]:
    """Write WORKS with these line ends as JSONL, as text shards of an older version, or as .txt: (folder, JSONL)."""
    works = ["\ufeff" * (newline != "\n") + work.replace("\n", newline) for work in WORKS]
    folder.mkdir()
    if form == "jsonl":
        jsonl = write_jsonl(folder / "a.jsonl", works)
        result = call_command(PREPARE, "--jsonl_path", jsonl, "--output_dir", folder / "001")
        assert result.returncode == 0, result.stderr
        return folder / "001", jsonl
    content = "".join(work + SEPARATOR for work in works).encode()
    (folder / "combined_0001.txt").write_bytes(content)
    if form == "shards":
        shards = [{"file": "combined_0001.txt", "continues": False}]
        manifest = {"format": "gptkit-text-shards", "version": 1, "separator": SEPARATOR, "shards": shards}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder, None


@pytest.mark.parametrize("newline", LINE_ENDS)
@pytest.mark.parametrize("form", ["jsonl", "shards", "txt"])
def test_one_rule_for_line_ends(form: str, newline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever line ends a text has and in which form: the same documents, tokens and counts, and the same tokenizer."""
    reference, _ = write_form("txt", "\n", tmp_path / "reference")
    text, jsonl = write_form(form, LINE_ENDS[newline], tmp_path / "text")
    for folder in (reference, text):
        out = ("--data_dir", folder, "--output_dir")
        result = call_command("pretokenize.py", *out, f"{folder}_tokens", *SAMPLE_TOKENS, "--num_workers", 1,
                              "--accept_problems")  # fmt: skip
        assert result.returncode == 0, result.stderr
    expected, found = (json.loads(Path(f"{f}_tokens/manifest.json").read_bytes()) for f in (reference, text))
    assert found["fingerprint"] == expected["fingerprint"]
    assert [found[name] for name in ("documents", "tokens", "characters", "train", "val")] == [
        expected[name] for name in ("documents", "tokens", "characters", "train", "val")
    ]
    for chunk in (1, 3, 1 << 20):
        monkeypatch.setattr("_corpus.CHUNK", chunk)
        documents = [""] * (len(WORKS) + 1)
        for number, piece in _corpus.read(_corpus.find_corpus(text)):
            documents[number] += piece
        assert [document for document in documents if document] == WORKS
    assert list(read_documents(jsonl or text / "combined_0001.txt")) == WORKS
    if jsonl:
        manifest = json.loads((text / "manifest.json").read_bytes())
        assert manifest["characters"] == sum(map(len, WORKS))
        assert manifest["bytes"] == (text / "combined_0001.txt").stat().st_size
        assert manifest["line_ends"] == (0 if newline == "lf" else "".join(WORKS).count("\n"))
        assert (text / "combined_0001.txt").read_text("utf-8").split(SEPARATOR)[:-1] == WORKS


def test_a_carriage_return_and_its_newline_may_lie_in_two_shards(tmp_path: Path) -> None:
    parts = ["一行\r", "\n二行\r", "三行\ufeff\r\n" + SEPARATOR]
    shards = [{"file": f"combined_000{i}.txt", "continues": i < 3} for i in (1, 2, 3)]
    for shard, part in zip(shards, parts, strict=True):
        (tmp_path / str(shard["file"])).write_bytes(part.encode())
    manifest = {"format": "gptkit-text-shards", "version": 1, "separator": SEPARATOR, "shards": shards}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    expected = "一行\n二行\n三行\ufeff\n"
    assert list(documents_of_shard(find_text_shards(tmp_path), 0)) == [expected]
    assert "".join(piece for _, piece in _corpus.read(_corpus.find_corpus(tmp_path))) == expected


def test_a_prompt_has_newlines_too() -> None:
    tokenizer = load_sentencepiece(str(SAMPLE_TOKENS[3]))
    assert encode_prompt(tokenizer, "\ufeff雨。\r\n雪\r風") == encode_prompt(tokenizer, "雨。\n雪\n風")


def test_byte_order_marks_begin_lines_or_texts(tmp_path: Path) -> None:
    """As in files that were joined; elsewhere U+FEFF is a character."""
    line = json.dumps({"text": "雨\ufeffが降る。"}).encode() + b"\n"
    marked = json.dumps({"text": "\ufeff雪が降る。"}, ensure_ascii=False).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes((b"\xef\xbb\xbf" + line + b"\xef\xbb\xbf\n" + marked) * 2)
    documents = ["雨\ufeffが降る。", "雪が降る。"] * 2
    result = call_command(PREPARE, "--jsonl_path", tmp_path / "a.jsonl", "--output_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "combined_0001.txt").read_text("utf-8").split(SEPARATOR)[:-1] == documents
    assert list(read_documents(tmp_path / "a.jsonl")) == documents


def test_a_separator_with_a_carriage_return_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", WORKS)
    result = call_command(
        PREPARE, "--jsonl_path", source, "--output_dir", tmp_path / "out", "--separator", "\r\n--\r\n"
    )
    assert_user_error(result, "--separator contains a carriage return")


@pytest.mark.skipif(not (SHARED / "faults").is_dir(), reason="needs the shared inputs")
def test_the_reported_files() -> None:
    for name, part in (("utf16.jsonl", "UTF-16"), ("sjis.jsonl", "Shift_JIS"), ("aozora.zip", "a zip archive")):
        assert part in (formats.other_than_jsonl((SHARED / "faults" / name).read_bytes()) or "")
