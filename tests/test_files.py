"""gptkit/base/files.py: a file is the old one or the new one, never a part of one."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from gptkit.base import files
from gptkit.base.files import read_json, sha256_of, sync_folder, write_atomically, write_json


@pytest.mark.parametrize("content", [b"", "名\n".encode(), bytes(range(256)) * 5000], ids=["empty", "short", "long"])
def test_writes_and_replaces(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for old in (None, b"an older file, longer than some"):
        if old is not None:
            path.write_bytes(old)
        write_atomically(path, content)
        assert path.read_bytes() == content
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["disk full", "Ctrl-C"])
@pytest.mark.parametrize("old", [b"old", None])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    function: str, error: BaseException, old: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)

    def failing(*_: Any) -> None:
        (partial,) = path.parent.glob(".file.*.partial")
        assert partial.read_bytes() == b"new"  # it fails in the middle, not before
        raise error

    monkeypatch.setattr(os, function, failing)
    with pytest.raises(type(error)):
        write_atomically(path, b"new")
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == ({} if old is None else {"file": old})


@pytest.mark.skipif(files.os.name != "posix", reason="folders are not synced")
def test_a_file_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a power cut could leave the new name on an empty file."""
    done = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    for name in real:
        monkeypatch.setattr(os, name, lambda *arguments, name=name: (done.append(name), real[name](*arguments)))
    write_atomically(tmp_path / "file", b"new")
    assert done == ["fsync", "replace", "fsync"]  # the file, its name, the folder


@pytest.mark.skipif(files.os.name != "posix", reason="folders are not synced")
def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "no" / "file", b"new")
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "no")


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    value = {"名": ["吾輩", 1, 0.1, None, True, "\u2028\n"]}
    write_json(tmp_path / "a.json", value)
    raw = (tmp_path / "a.json").read_bytes()
    assert raw.endswith(b"}\n")
    assert "吾輩".encode() in raw
    assert read_json(tmp_path / "a.json") == json.loads(raw) == value


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[" * 100_000], ids=["empty", "cut", "not UTF-8", "too deep"])
def test_invalid_json_is_a_value_error(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(raw)
    with pytest.raises(ValueError):  # noqa: PT011  (the kinds have no message in common)
        read_json(tmp_path / "a.json")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    (tmp_path / "a").write_bytes(b"a" * 1_000_000)
    (tmp_path / "blocks").write_bytes(b"a" * 3_000_000)
    assert (
        sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )  # FIPS 180-2
    assert sha256_of(tmp_path / "a") == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"
    assert sha256_of(tmp_path / "blocks") == hashlib.sha256(b"a" * 3_000_000).hexdigest()
