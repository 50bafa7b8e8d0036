"""dataset/prepare_aozora_jsonl.py as a user runs it; where limits, signals or a terminal matter, as a real process."""

import fcntl
import gzip
import hashlib
import json
import lzma
import os
import pty
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from conftest import SEPARATOR, assert_user_error, call_command, command, reset_signals, write_jsonl

SCRIPT = "dataset/prepare_aozora_jsonl.py"
MIB = 1024 * 1024
PIECES = [
    "　雨はやんだ。\n「もう行くの」\n",
    "坂の上に𠮟る声。",
    "\n\n一行\v\x85\f\nABC\u2028\u3000\n",
    "港の灯が、ひとつ消えた。\n",
    "<|endoftext",
]


def jsonl_line(text: Any, **meta: str) -> bytes:
    """Return a line of JSONL with a document."""
    return json.dumps({"text": text, "footnote": "", "meta": meta}, ensure_ascii=False).encode() + b"\n"


def prepare_command(source: Path | str, output: Path | str, *flags: str | float) -> list[str]:
    return command(SCRIPT, "--jsonl_path", source, "--output_dir", output, *flags)


def run(source: Path | str, output: Path | str, *flags: str | float, **how: Any) -> subprocess.CompletedProcess[str]:
    return call_command(SCRIPT, "--jsonl_path", source, "--output_dir", output, *flags, **how)


def prepare(source: Path, output: Path, *flags: str | float) -> dict[str, Any]:
    result = run(source, output, *flags)
    assert result.returncode == 0, result.stderr
    return json.loads((output / "manifest.json").read_bytes())


def read_back(output: Path, separator: str = SEPARATOR) -> list[str]:
    """Return the documents, read from the shards joined in the manifest's order."""
    manifest = json.loads((output / "manifest.json").read_bytes())
    joined = b"".join((output / shard["file"]).read_bytes() for shard in manifest["shards"])
    texts = joined.decode().split(separator)
    assert texts.pop() == ""  # the last document has its separator too
    return texts


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() if path.is_file() else b"folder" for path in folder.iterdir()}


# Shards and manifest


def test_documents_come_back_byte_for_byte(tmp_path: Path) -> None:
    texts = ["".join(PIECES[(i * j) % 5] for j in range(1, i + 2)) for i in range(60)]
    manifest = prepare(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out", "--max_size_mb", 1024 / MIB)
    assert len(manifest["shards"]) > 5
    assert read_back(tmp_path / "out") == texts


def test_documents_of_every_length_around_a_shard_come_back(tmp_path: Path) -> None:
    limit = 60  # bytes; documents of 3 to 240 bytes, so that a cut falls at every possible place
    texts = (
        ["字" * n for n in range(1, 80)] + ["字" * n + "\n" for n in range(1, 30)] + ["a" * n for n in range(40, 70)]
    )
    texts += ["字。" * n for n in range(1, 20)] + ["𠮟" + "a" * n + "𠮟" * 20 for n in range(5)]
    manifest = prepare(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out", "--max_size_mb", limit / MIB)
    assert read_back(tmp_path / "out") == texts
    assert all(0 < shard["bytes"] <= limit for shard in manifest["shards"])
    for shard in manifest["shards"]:  # which can be decoded alone: no character is cut in two
        text = (tmp_path / "out" / shard["file"]).read_text(encoding="utf-8").replace(SEPARATOR, "")
        assert shard["characters"] == len(text) > 0


def test_separators_count_towards_the_limit(tmp_path: Path) -> None:
    text = "あ" * 100
    source = write_jsonl(tmp_path / "a.jsonl", [text] * 6)
    both = 2 * (len(text.encode()) + len(SEPARATOR))
    manifest = prepare(source, tmp_path / "fits", "--max_size_mb", both / MIB)
    assert [shard["works"] for shard in manifest["shards"]] == [2, 2, 2]
    assert [shard["bytes"] for shard in manifest["shards"]] == [both] * 3
    manifest = prepare(source, tmp_path / "one_byte_less", "--max_size_mb", (both - 1) / MIB)
    assert [shard["works"] for shard in manifest["shards"]] == [1] * 6


def test_a_document_larger_than_a_shard_is_cut_after_a_paragraph(tmp_path: Path) -> None:
    large = "".join(f"　第{i}の段落。まだ続く。\n" for i in range(100))
    source = write_jsonl(tmp_path / "a.jsonl", ["前の作品", large, "次の作品"])
    manifest = prepare(source, tmp_path / "out", "--max_size_mb", 1000 / MIB)
    shards = [(tmp_path / "out" / shard["file"]).read_text(encoding="utf-8") for shard in manifest["shards"]]
    assert shards[0] == "前の作品" + SEPARATOR  # no other document is cut for it
    assert all(shard.startswith("　第") and shard.endswith("。\n") for shard in shards[1:-1])
    assert all(SEPARATOR not in shard for shard in shards[1:-1])
    assert shards[-1].endswith("まだ続く。\n" + SEPARATOR + "次の作品" + SEPARATOR)
    assert [shard["continues"] for shard in manifest["shards"]] == [False] + [True] * (len(shards) - 2) + [False]
    assert [shard["works"] for shard in manifest["shards"]] == [1] + [0] * (len(shards) - 2) + [2]
    assert read_back(tmp_path / "out") == ["前の作品", large, "次の作品"]


def test_the_manifest_describes_the_shards(tmp_path: Path) -> None:
    texts = ["朝の𠮟り声。\n" * 9, "夕方", "夜" * 50]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = prepare(source, tmp_path / "out", "--max_size_mb", 200 / MIB, "--separator", "<終>")
    for shard in manifest["shards"]:
        content = (tmp_path / "out" / shard["file"]).read_bytes()
        assert shard["bytes"] == len(content)
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()
        assert shard["characters"] == len(content.decode().replace("<終>", ""))
    assert sorted(contents(tmp_path / "out")) == [*(shard["file"] for shard in manifest["shards"]), "manifest.json"]
    assert manifest["shards"][0]["file"] == "combined_0001.txt"
    assert manifest["works"] == sum(shard["works"] for shard in manifest["shards"]) == 3
    assert manifest["characters"] == sum(map(len, texts))
    assert manifest["bytes"] == sum(len(f"{text}<終>".encode()) for text in texts)
    assert manifest["source"] == {"file": "a.jsonl", "bytes": source.stat().st_size, "lines": 3}
    options = {
        "max_size_mb": 200 / MIB,
        "separator": "<終>",
        "orthography": None,
        "author": None,
        "min_chars": 0,
        "max_chars": None,
        "skip_bad_lines": False,
        "clean_aozora": False,
    }
    assert manifest["options"] == options
    assert manifest["left_out"] == {}
    manifest = prepare(source, tmp_path / "by_default")
    assert manifest["options"] == {**options, "max_size_mb": 25, "separator": "<|endoftext|>"}


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [piece * 30 for piece in PIECES])
    flags = ("--max_size_mb", 700 / MIB)
    prepare(source, tmp_path / "first", *flags)
    first = contents(tmp_path / "first")
    prepare(source, tmp_path / "second", *flags)
    assert contents(tmp_path / "second") == first
    prepare(source, tmp_path / "first")  # larger shards, so fewer
    assert len(contents(tmp_path / "first")) < len(first)
    prepare(source, tmp_path / "first", *flags)
    assert contents(tmp_path / "first") == first


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "packed.jsonl"])
def test_compressed_input_is_read_like_plain_input(tmp_path: Path, name: str) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", [piece * 30 for piece in PIECES])
    compress = lzma.compress if name.endswith(".xz") else gzip.compress
    (tmp_path / name).write_bytes(compress(plain.read_bytes()))
    prepare(plain, tmp_path / "plain", "--max_size_mb", 700 / MIB)
    prepare(tmp_path / name, tmp_path / "packed", "--max_size_mb", 700 / MIB)
    expected, found = contents(tmp_path / "plain"), contents(tmp_path / "packed")
    del expected["manifest.json"], found["manifest.json"]  # these name the source
    assert found == expected


def test_byte_order_mark_blank_lines_and_a_missing_last_newline_are_accepted(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(
        b"\xef\xbb\xbf"
        + jsonl_line("一")
        + b"\n \r\n"
        + jsonl_line("二").replace(b"\n", b"\r\n")
        + jsonl_line("三")[:-1]
    )
    assert prepare(source, tmp_path / "out")["source"]["lines"] == 3
    assert read_back(tmp_path / "out") == ["一", "二", "三"]


def test_filters_leave_out_and_count(tmp_path: Path) -> None:
    lines = [
        jsonl_line("残る作品その一", 文字遣い種別="新字新仮名", 姓名="山野 花子"),
        jsonl_line("残る作品その二", 文字遣い種別="新字新仮名", 姓="山野", 名="花子"),
        jsonl_line("旧い仮名の作品", 文字遣い種別="新字旧仮名", 姓名="山野花子"),
        jsonl_line("書き手が別の作品", 文字遣い種別="新字新仮名", 姓名="川辺太郎"),
        jsonl_line("列のない作品"),
        jsonl_line("短い", 文字遣い種別="新字新仮名", 姓名="山野花子"),
        jsonl_line("長い作品" * 9, 文字遣い種別="新字新仮名", 姓名="山野花子"),
        jsonl_line("　\n", 文字遣い種別="新字新仮名", 姓名="山野花子"),
        b'{"text": "meta is a list", "meta": []}\n',
    ]
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"".join(lines))
    flags = ("--orthography", "新字新仮名", "旧字旧仮名", "--author", "山野花子", "--min_chars", 3, "--max_chars", 20)
    manifest = prepare(source, tmp_path / "out", *flags)
    assert read_back(tmp_path / "out") == ["残る作品その一", "残る作品その二"]
    assert manifest["left_out"] == {"author": 1, "empty": 1, "length": 2, "orthography": 3}
    assert manifest["source"]["lines"] == 9
    assert manifest["options"]["orthography"] == ["新字新仮名", "旧字旧仮名"]


def test_progress_is_plain_lines_in_a_file_and_a_bar_on_a_terminal(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["静かな朝。\n" * 50] * 5)
    source.write_bytes(source.read_bytes() + b"broken\n")
    flags = ("--max_size_mb", 1000 / MIB)
    in_file = subprocess.run(prepare_command(source, tmp_path / "out", *flags), stderr=subprocess.PIPE).stderr.decode()
    assert "\r" not in in_file
    assert "shard 4: " in in_file
    assert " MiB/s, " in in_file
    assert " s left\n" in in_file
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # rows, columns
    subprocess.run(prepare_command(source, tmp_path / "out", *flags), stderr=theirs)
    on_terminal = os.read(ours, 100_000).decode()
    assert "prepare:" in on_terminal
    assert "shard 4" not in on_terminal
    assert on_terminal.splitlines()[-1].startswith("error: ")  # on its own line, below the bar


# Bad lines

BAD_LINES = {
    "not_json": (b'{"text": "abc"\n', "not JSON"),
    "deep": (b"[" * 100_000 + b"\n", "not JSON"),
    "not_utf8": (b'{"text": "\xff"}\n', "not UTF-8"),
    "not_an_object": (b'["text"]\n', "not a JSON object"),
    "no_text": (b'{"body": "abc"}\n', "no `text`"),
    "number": (b'{"text": 5}\n', "`text` is not a string but int"),
    "null": (b'{"text": null}\n', "`text` is not a string but NoneType"),
    "lone_surrogate": (b'{"text": "abc\\ud842"}\n', "`text` has a lone surrogate at character 4"),
    "separator": (jsonl_line("前==終==後"), "`text` contains the separator '==終=='"),
    "separator_at_the_join": (jsonl_line("前==終"), "`text` contains the separator '==終=='"),
    "too_long": (jsonl_line("あ" * (11 * MIB)), "longer than 32 MiB"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_or_skipped_and_counted(tmp_path: Path, name: str) -> None:
    line, problem = BAD_LINES[name]
    source = tmp_path / "a.jsonl"
    source.write_bytes(jsonl_line("良い行") + line + jsonl_line("終==次の良い行"))
    flags = ("--separator", "==終==")
    result = run(source, tmp_path / "out", *flags)
    assert_user_error(result, f"{source}: line 2: {problem}", "--skip_bad_lines")
    assert not (tmp_path / "out").exists()
    manifest = prepare(source, tmp_path / "out", *flags, "--skip_bad_lines")
    assert manifest["left_out"] == {"bad line": 1}
    assert read_back(tmp_path / "out", "==終==") == ["良い行", "終==次の良い行"]


# Bad files, folders and flags


@pytest.mark.parametrize("content", [b"", b"\n \n", gzip.compress(b"", mtime=0)])
def test_empty_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert_user_error(run(tmp_path / "a.jsonl", tmp_path / "out"), "a.jsonl", "the file is empty", "check the file")
    assert not (tmp_path / "out").exists()


def test_filters_that_leave_nothing(tmp_path: Path) -> None:
    result = run(write_jsonl(tmp_path / "a.jsonl", ["短い", "作品"]), tmp_path / "out", "--min_chars", 9)
    assert_user_error(result, "all its 2 lines were left out (length: 2)", "filters")


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
def test_cut_compressed_file(tmp_path: Path, compress: Any) -> None:
    lines = b"".join(jsonl_line(hashlib.sha256(bytes([i])).hexdigest() * 20) for i in range(200))
    packed = tmp_path / "a.jsonl.packed"
    packed.write_bytes(compress(lines)[:-20])
    assert_user_error(run(packed, tmp_path / "out", "--skip_bad_lines"), str(packed), "cut short", "download it again")
    assert not (tmp_path / "out").exists()


def test_missing_input_names_the_file_that_was_meant(tmp_path: Path) -> None:
    for name in ("dataset/aozora.jsonl.gz", "exp001/"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / "exp001").mkdir()
    (tmp_path / "dataset" / "aozora.jsonl.gz").write_bytes(b"")
    meant = "dataset/aozora.jsonl.gz"
    for folder, given, expected in [
        (".", "dataset/aozora.jsonl", meant),
        (".", "./dataset/aozora.jsonl.xz", meant),
        (".", "dataset/aozola.jsonl.gz", meant),
        (".", "../dataset/aozora.jsonl.gz", meant),
        ("exp001", "dataset/aozora.jsonl.gz", f"../{meant}"),
    ]:
        result = run(given, tmp_path / "out", cwd=tmp_path / folder)
        assert_user_error(result, f"--jsonl_path {Path(given)}: no such file; did you mean {expected}?")
    assert_user_error(run("corpus.jsonl", "out", cwd=tmp_path), "corpus.jsonl: no such file", "download_aozora.py")
    assert_user_error(run("dataset", "out", cwd=tmp_path), "--jsonl_path dataset is a folder", "name the .jsonl file")
    assert_user_error(run("", "out", cwd=tmp_path), "--jsonl_path")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json", "combined_0001.txt", "combined_notes.txt"])
def test_output_folder_that_holds_something_else(tmp_path: Path, name: str) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["作品"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"format": "else"}')
    before = contents(tmp_path / "out")
    assert_user_error(
        run(source, tmp_path / "out"), f"--output_dir {tmp_path / 'out'} holds", name, "new or empty folder"
    )
    assert contents(tmp_path / "out") == before


def test_a_hidden_file_is_not_something_else(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".gitkeep").write_text("")
    prepare(write_jsonl(tmp_path / "a.jsonl", ["作品"]), tmp_path / "out")
    assert (tmp_path / "out" / ".gitkeep").exists()


def test_output_path_that_is_a_file(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["作品"])
    before = source.read_bytes()
    for output in (source, source / "below"):
        assert_user_error(run(source, output), f"--output_dir {output}", "is a file; name a folder")
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--max_size_mb", "0"), ("--max_size_mb 0 ", "such as 25")),
        (("--max_size_mb", "-1"), ("--max_size_mb -1 ", "such as 25")),
        (("--max_size_mb", "nan"), ("--max_size_mb nan ", "such as 25")),
        (("--max_size_mb", "inf"), ("--max_size_mb inf ", "such as 25")),
        (("--max_size_mb", "0.00001"), ("--max_size_mb 1e-05 ", "such as 25")),
        (("--max_size_mb", "large"), ("--max_size_mb", "'large'", "--help")),
        (("--separator", ""), ("--separator is empty", "<|endoftext|>")),
        (("--separator", os.fsdecode(b"\xff")), ("--separator", "not valid text")),
        (("--max_chars", "0"), ("--max_chars 0 ", "--min_chars")),
        (("--min_chars", "9", "--max_chars", "8"), ("--max_chars 8 ", "--min_chars")),
        (("--max_size", "9"), ("--max_size", "--help")),
    ],
)
def test_wrong_flags(tmp_path: Path, flags: tuple[str, ...], words: tuple[str, ...]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["作品"])
    assert_user_error(run(source, tmp_path / "out", *flags), *words)
    assert not (tmp_path / "out").exists()


# Runs that cannot finish


def large_jsonl(path: Path) -> Path:
    """Write a JSONL of about 40 MB, with one document of 12 MB in it."""
    paragraph = "　" + "".join(f"{i}番目の窓に灯がともり、" for i in range(40)) + "夜が来た。\n"
    n_bytes = len(paragraph.encode())
    with open(path, "wb") as file:
        for i in range(28_000_000 // (30 * n_bytes)):
            file.write(jsonl_line(f"第{i}話\n" + paragraph * 30, 文字遣い種別="新字新仮名"))
        file.write(jsonl_line(paragraph * (12_000_000 // n_bytes)))
    return path


def run_with_files_of_1_mib(source: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """Run the command where no file may grow over 1 MiB."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))

    return subprocess.run(prepare_command(source, output), capture_output=True, text=True, preexec_fn=limit)


def test_a_file_that_cannot_grow_leaves_nothing_new_and_the_old_result(tmp_path: Path) -> None:
    small = write_jsonl(tmp_path / "small.jsonl", ["作品"])
    large = write_jsonl(tmp_path / "large.jsonl", ["港の灯が、ひとつ消えた。\n" * 1000] * 50)
    result = run_with_files_of_1_mib(large, tmp_path / "out")
    assert_user_error(result, f"{tmp_path / 'out'}: file too large", "ulimit -f")
    assert not (tmp_path / "out").exists()
    prepare(small, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert_user_error(run_with_files_of_1_mib(large, tmp_path / "out"), "file too large")
    assert contents(tmp_path / "out") == before


def test_full_disk(tmp_path: Path) -> None:
    """On a file system of 2 MiB in a mount namespace of its own, where the machine allows one."""
    (tmp_path / "disk").mkdir()
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    mount = f"mount -t tmpfs -o size=2m none '{tmp_path}/disk'; "
    if not shutil.which("unshare") or subprocess.run([*namespace, mount], capture_output=True).returncode:
        pytest.skip("no mount namespaces here; test_a_file_that_cannot_grow covers the same code")
    large = write_jsonl(tmp_path / "large.jsonl", ["港の灯が、ひとつ消えた。\n" * 1000] * 100)
    script = mount + '"$@" || code=$?; ls -A "$0"; exit $code'
    arguments = prepare_command(large, tmp_path / "disk" / "out", "--max_size_mb", 1)
    result = subprocess.run([*namespace, script, tmp_path / "disk", *arguments], capture_output=True, text=True)
    assert_user_error(result, f"{tmp_path / 'disk' / 'out'}: no space left on device", "make room on the disk")
    assert not result.stdout  # the disk is empty


def test_a_failed_run_keeps_the_old_result(tmp_path: Path) -> None:
    prepare(write_jsonl(tmp_path / "old.jsonl", ["古い作品"] * 9), tmp_path / "out", "--max_size_mb", 60 / MIB)
    before = contents(tmp_path / "out")
    new = write_jsonl(tmp_path / "new.jsonl", ["新しい作品"] * 9)
    new.write_bytes(new.read_bytes() + b"broken\n")
    assert_user_error(run(new, tmp_path / "out", "--max_size_mb", 60 / MIB), "line 10: not JSON")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_a_run_stopped_in_the_middle_leaves_nothing_that_looks_finished(tmp_path: Path, kind: signal.Signals) -> None:
    source = large_jsonl(tmp_path / "a.jsonl")
    arguments = prepare_command(source, tmp_path / "out", "--max_size_mb", 1)
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, preexec_fn=reset_signals)  # noqa: PLW1509
    assert process.stderr
    assert process.stderr.readline().startswith("shard 1: ")
    process.send_signal(kind)
    _, errors = process.communicate()
    if kind == signal.SIGINT:
        assert process.returncode == 2
        assert errors.splitlines()[-1].startswith("error: interrupted")
        assert not (tmp_path / "out").exists()
    else:
        assert process.returncode == -signal.SIGKILL
        assert sorted(contents(tmp_path / "out")) == [".lock", ".partial"]
    prepare(source, tmp_path / "out", "--max_size_mb", 1)
    prepare(source, tmp_path / "other", "--max_size_mb", 1)
    assert contents(tmp_path / "out") == contents(tmp_path / "other")


@pytest.mark.parametrize("n_moved", [0, 1, 2, 3])
@pytest.mark.parametrize("stop", ["os.kill(os.getpid(), 9)", "os.kill(os.getpid(), 2)"])
def test_a_stop_while_the_shards_are_moved_into_place(tmp_path: Path, n_moved: int, stop: str) -> None:
    """The manifest is moved last; the next run replaces what a killed one left."""
    prepare(write_jsonl(tmp_path / "old.jsonl", ["古い作品"] * 9), tmp_path / "out", "--max_size_mb", 30 / MIB)
    source = write_jsonl(tmp_path / "a.jsonl", ["ひ" * 15, "ふ" * 15, "み" * 15])
    arguments = prepare_command(source, tmp_path / "out", "--max_size_mb", 60 / MIB)
    stopped = (
        "import os, runpy, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.argv, moves, replace = sys.argv[1:], iter(range(1 + {n_moved})), os.replace\n"  # one in the probe
        f"os.replace = lambda a, b: replace(a, b) if next(moves, None) is not None else {stop}\n"
        "sys.path.insert(0, os.path.dirname(sys.argv[0]))\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    result = subprocess.run([sys.executable, "-c", stopped, *arguments[1:]], capture_output=True, text=True)
    if "9" in stop:
        assert result.returncode == -signal.SIGKILL, result.stderr
        moved = [f"combined_000{i + 1}.txt" for i in range(n_moved)]
        assert sorted(contents(tmp_path / "out")) == [".lock", ".partial", *moved]
    else:
        assert_user_error(result, "interrupted")
        assert not contents(tmp_path / "out")
    prepare(source, tmp_path / "out", "--max_size_mb", 60 / MIB)
    assert read_back(tmp_path / "out") == ["ひ" * 15, "ふ" * 15, "み" * 15]
    assert len(contents(tmp_path / "out")) == 4


def test_memory_stays_under_300_mb(tmp_path: Path) -> None:
    """A small process in between counts only its own children, and not the tests before."""
    source = large_jsonl(tmp_path / "a.jsonl")
    assert source.stat().st_size > 38_000_000
    between = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, capture_output=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    arguments = prepare_command(source, tmp_path / "out")
    result = subprocess.run([sys.executable, "-c", between, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    peak_bytes = int(result.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert peak_bytes < 300_000_000
