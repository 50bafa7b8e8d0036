"""Locks that name their holder, in gptkit/base/locks.py and in the dataset scripts, which stand alone."""

import errno
import inspect
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from gptkit.base import cli, files, locks, startup
from gptkit.base.locks import file_lock, lock_holder
from gptkit.text.backends import SCORE_STEPS_PER_UNIT

sys.path.insert(0, str(ROOT / "dataset"))  # as for `python dataset/prepare_aozora_jsonl.py`

import _locks
import _script
import _startup
from _unigram import STEPS_PER_UNIT

needs_flock = pytest.mark.skipif(locks.fcntl is None, reason="Windows has other locks")
MINE = f"process {os.getpid()} on "
Take = Callable[[Path], AbstractContextManager[None]]
TAKE = {"gptkit": lambda path: file_lock(path, "writes there"), "dataset": _locks.file_lock}
WARNED = {"gptkit": cli._warned_of, "dataset": _script._warned_of}


@pytest.fixture(params=TAKE)
def take(request: pytest.FixtureRequest) -> Iterator[Take]:
    WARNED[request.param].clear()  # as a new command does
    yield TAKE[request.param]
    WARNED[request.param].clear()


def in_a_process(path: Path, then: str = "time.sleep(60)") -> subprocess.Popen[str]:
    """Start a process that holds a lock; return when it does."""
    code = (
        "import sys, time; from pathlib import Path; from gptkit.base.locks import file_lock\n"
        f"with file_lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    {then}\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_names_its_holder_and_leaves_nothing(tmp_path: Path, take: Take) -> None:
    path = tmp_path / "new" / "er" / ".lock"
    with take(path):
        assert path.read_text().startswith(MINE)
        assert (lock_holder(path) or "").startswith(MINE)
        assert (_locks.lock_holder(path) or "").startswith(MINE)
    assert lock_holder(path) is None
    assert not list(tmp_path.iterdir())
    with take(path):
        (path.parent / "result").touch()
    assert [found.name for found in path.parent.iterdir()] == ["result"]


def test_the_second_waits_for_the_first_and_names_it(
    tmp_path: Path, take: Take, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / ".lock"
    process = in_a_process(path, "time.sleep(0.5)")
    began = time.monotonic()
    with take(path):
        assert time.monotonic() - began > 0.3
        assert path.read_text().startswith(MINE)  # the name of the one before is gone
    assert process.wait() == 0
    assert capsys.readouterr().err.startswith(f"waiting for process {process.pid} on ")
    assert not path.exists()


def test_a_killed_holder_holds_no_more(tmp_path: Path, take: Take) -> None:
    path = tmp_path / ".lock"
    process = in_a_process(path)
    process.kill()
    assert process.wait() != 0
    assert path.exists()
    assert lock_holder(path) is None
    with take(path):
        pass
    assert not path.exists()


def test_who_does_not_wait_is_told_the_holder(tmp_path: Path) -> None:
    with file_lock(tmp_path / ".lock"), pytest.raises(BlockingIOError, match=MINE), file_lock(tmp_path / ".lock"):
        pass
    assert not list(tmp_path.iterdir())


def test_shared_locks_keep_out_only_who_wants_it_alone(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    process = in_a_process(path)
    process.kill()
    process.wait()
    with file_lock(path, shared=True), file_lock(path, shared=True):
        assert path.read_text().count(MINE) == 2  # and not the killed one's
        with pytest.raises(BlockingIOError, match=f"{MINE}.*, {MINE}"), file_lock(path):
            pass
    assert not path.exists()


def test_one_at_a_time_although_the_file_goes_each_time(tmp_path: Path, take: Take) -> None:
    """Each round removes the file that others are about to lock."""
    inside, most, n_done = 0, 0, 0

    def work() -> None:
        nonlocal inside, most, n_done
        for _ in range(15):
            with take(tmp_path / "folder" / ".lock"):
                inside += 1
                most = max(most, inside)
                time.sleep(0.001)
                inside -= 1
                n_done += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (most, n_done) == (1, 4 * 15)
    assert not [path for path in tmp_path.rglob("*") if path.name != "folder"]


REFUSALS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EACCES, errno.EIO)


@needs_flock
@pytest.mark.parametrize("number", REFUSALS, ids=errno.errorcode.get)
def test_a_file_system_without_locks_costs_one_warning(
    number: int, tmp_path: Path, take: Take, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    for name in ("a", "b"):
        with take(tmp_path / name / ".lock"):
            assert not list((tmp_path / name).iterdir())
            assert lock_holder(tmp_path / name / ".lock") is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: the file system of {tmp_path / 'a'} has no locks ({os.strerror(number)})")
    assert not list(tmp_path.iterdir())


@needs_flock
def test_cifs_answers_eacces_where_another_holds_the_lock(
    tmp_path: Path, take: Take, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, real = tmp_path / ".lock", locks.fcntl.flock

    def flock(descriptor: int, how: int) -> None:
        try:
            real(descriptor, how)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied")

    process = in_a_process(path, "time.sleep(0.3)")
    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with take(path):
        assert process.wait() == 0
    assert capsys.readouterr().err.startswith(f"waiting for process {process.pid} on ")


def test_mounts_that_number_files_anew_are_not_asked_forever(
    tmp_path: Path, take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    with take(tmp_path / ".lock"):
        pass


@pytest.mark.parametrize("take", TAKE.values(), ids=TAKE)
def test_a_folder_that_may_not_be_written_to(take: Take, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is that of the folder, and not that the lock file is missing."""

    def refuse(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        raise FileNotFoundError(errno.ENOENT, "No such file", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError), take(tmp_path / ".lock"):
        pass


@pytest.mark.parametrize("take", TAKE.values(), ids=TAKE)
def test_a_mount_that_opens_nothing_for_reading_and_writing_costs_a_warning(
    take: Take, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, flags: int, mode: int = 0o777) -> int:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported", str(path))

    for warned in WARNED.values():
        warned.clear()
    monkeypatch.setattr(os, "open", refuse)
    with take(tmp_path / ".lock"):
        pass
    assert "no locks" in capsys.readouterr().err


def test_what_the_scripts_repeat_is_equal() -> None:
    """The scripts in dataset/ stand alone, so they have their own copy of some things."""
    copies: list[tuple[Any, Any]] = [
        (_startup.prepare_process, startup.prepare_process),
        *(
            (getattr(_locks, name), getattr(locks, name))
            for name in ("_open", "_lock", "_read", "_warn_of_no_lock", "_is_still_there")
        ),
    ]
    for ours, theirs in copies:
        assert inspect.getsource(ours) == inspect.getsource(theirs)
    assert (_locks.FIRST_LOCKED, _locks.N_LOCKED) == (locks.FIRST_LOCKED, locks.N_LOCKED)
    assert (_script.NO_SYNC, _locks.NO_OPEN, _locks.LOCK_FILE) == (files.NO_SYNC, locks.NO_OPEN, locks.LOCK_FILE)
    assert (_script.SYSTEM_FILES, _script.SYSTEM_FOLDERS) == (files.SYSTEM_FILES, files.SYSTEM_FOLDERS)
    strays = (
        "._a.txt",
        "a.txt~",
        "~$a.txt",
        "#a.txt#",
        "Thumbs.db",
        "__MACOSX",
        "System Volume Information",
        "a.txt",
        "#1",
    )
    assert [_script.is_stray(name) for name in strays] == [files.is_stray(name) for name in strays]
    assert STEPS_PER_UNIT == SCORE_STEPS_PER_UNIT
