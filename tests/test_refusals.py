"""File systems that refuse something, as network drives, mounted buckets and shared folders do: one warning, and on."""

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
from conftest import (
    SAMPLE,
    SAMPLE_TOKENS,
    TINY_MODEL,
    assert_user_error,
    call_command,
    command,
    curve,
    environment,
    is_folder,
    newest,
    refuse,
    run_of,
)
from torch import distributed

from gptkit.base.cli import UserError
from gptkit.base.files import free_bytes, move_folder, replace_folder, sync, sync_folder
from gptkit.distributed import process_group
from gptkit.training import checkpoints
from gptkit.training.checkpoints import find_checkpoints

LOCKS, SYNC, LINKS, COPIES = "has no locks", "cannot sync", "cannot be made", "refused to rename a folder"


def all_commands(folder: Path, shards: Path) -> Iterator[subprocess.CompletedProcess]:
    """Run what writes something, to its end."""
    text = ("--data_dir", shards)
    yield call_command("dataset/prepare_aozora_jsonl.py", "--jsonl_path", SAMPLE, "--output_dir", folder / "001")
    yield call_command("dataset/train_tokenizer.py", *text, "--output_dir", folder / "tokenizer", "--vocab_size", 400)
    tokens = (*SAMPLE_TOKENS, *text, "--output_dir", folder / "tokens", "--num_workers", 1)
    yield call_command("pretokenize.py", *tokens)
    run = ("--output_dir", folder / "exp", "--max_steps", 4, "--save_ckpt_freq", 2, "--eval_freq", 1)
    shared = ("--use_pretokenized", "--pretokenized_dir", folder / "tokens", "--device", "cpu")
    yield call_command("pretraining.py", *SAMPLE_TOKENS, *text, *shared, *TINY_MODEL, *run)
    yield call_command("export_hf.py", "--exp_dir", folder / "exp", "--output_dir", folder / "hf")
    yield call_command("report.py", "--exp_dir", folder / "exp", "--output", folder / "report.html")


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_sync_and_links_every_command_works(
    number: int, tmp_path: Path, sample_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, fcntl, "flock", number)
    refuse(monkeypatch, os, "fsync", number)
    refuse(monkeypatch, os, "symlink", number)
    for result in all_commands(tmp_path, sample_shards):
        assert result.returncode == 0, result.stderr
        for kind in (LOCKS, SYNC, LINKS):
            assert result.stderr.count(kind) <= 1
        assert result.stderr.count(SYNC) == 1, result.args
        assert result.stderr.count(LOCKS) == ("report.py" not in result.args[0]), result.args
        assert result.stderr.count(LINKS) == ("pretraining.py" in result.args[0]), result.args
    assert [path.name for path in find_checkpoints(tmp_path / "exp")] == ["step_00000002", "step_00000004"]
    assert [report["step"] for report in curve(tmp_path / "exp")] == [1, 2, 3, 4]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_folder_that_cannot_be_synced(
    number: int, tmp_path: Path, sample_shards: Path, sample_tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, os, "fsync", number, is_folder)
    result = run_of(tmp_path, sample_shards)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count(SYNC) == 1
    assert newest(tmp_path / "exp").name == "step_00000002"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_is_an_error_all_the_same(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, os, "fsync", number)
    with pytest.raises(OSError, match=os.strerror(number)):
        sync_folder(tmp_path)
    with open(tmp_path / "file", "wb") as file, pytest.raises(OSError, match=os.strerror(number)):
        sync(file.fileno())
    output = tmp_path / "out"
    result = call_command("dataset/prepare_aozora_jsonl.py", "--jsonl_path", SAMPLE, "--output_dir", output)
    assert_user_error(result, str(output), os.strerror(number).lower())
    assert not output.exists()


def test_a_folder_that_may_not_be_listed_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, os, "open", errno.EACCES)
    sync_folder(tmp_path)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOSYS, errno.EMFILE, errno.EIO, errno.EACCES])
def test_folders_that_cannot_be_renamed(
    number: int, tmp_path: Path, sample_shards: Path, sample_tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Docker's overlayfs (EXDEV), mountpoint-s3 (ENOSYS), gcsfuse (EMFILE), rclone (EIO) and DrvFs (EACCES) answer."""
    refuse(monkeypatch, os, "replace", number, is_folder)
    result = run_of(tmp_path, sample_shards, "--save_ckpt_freq", 1, "--keep_checkpoints", 1)
    assert result.returncode == 0, result.stderr
    assert (result.stderr + result.stdout).count("warning") == result.stderr.count(COPIES) == 1
    again = run_of(tmp_path, sample_shards, "--max_steps", 4, "--keep_checkpoints", 1)
    assert again.returncode == 0, again.stderr
    assert f"resuming from {tmp_path / 'exp' / 'step_00000002'}" in again.stdout
    assert newest(tmp_path / "exp").name == "step_00000004"
    for content in ("first", "second"):
        with replace_folder(tmp_path / "hf") as partial:
            (partial / "file").write_text(content)
        assert (tmp_path / "hf" / "file").read_text() == content
    assert sorted(os.listdir(tmp_path)) == ["exp", "hf"]


def test_a_folder_whose_copy_fails_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    for name in ("x", "y"):
        (tmp_path / "a" / name).write_text(name)
    refuse(monkeypatch, os, "replace", errno.EXDEV)
    refuse(monkeypatch, shutil, "copyfile", errno.ENOSPC, lambda source, _: source.name == "y")
    with pytest.raises(OSError, match="No space"):
        move_folder(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path) == ["a"]
    assert sorted(os.listdir(tmp_path / "a")) == ["x", "y"]


def test_files_that_cannot_be_mapped_into_memory(
    tmp_path: Path, sample_shards: Path, sample_tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_of(tmp_path / "plain", sample_shards).returncode == 0
    refuse(monkeypatch, np, "load", errno.ENODEV, lambda *_, mmap_mode=None, **__: mmap_mode is not None)
    refuse(monkeypatch, safetensors.torch, "load_file", errno.ENODEV)
    result = run_of(tmp_path, sample_shards)
    assert result.returncode == 0, result.stderr
    weights = [newest(folder / "exp") / "model.safetensors" for folder in (tmp_path, tmp_path / "plain")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    prompt = ("--prompt", "雨", "--max_new_tokens", 2)
    assert call_command("inference.py", "--exp_dir", tmp_path / "exp", *prompt).returncode == 0
    resumed = run_of(tmp_path, sample_shards, "--max_steps", 3)
    assert resumed.returncode == 0, resumed.stderr


def test_checkpoints_that_a_drive_does_not_give_now_are_not_to_be_removed(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As rclone 1.60 answers EIO until it has uploaded the files of a folder that was renamed."""
    shutil.copytree(trained / "model_checkpoints", tmp_path / "exp", symlinks=True)
    refuse(monkeypatch, checkpoints, "sha256_of", errno.EIO)
    result = call_command("inference.py", "--exp_dir", tmp_path / "exp", "--prompt", "雨")
    assert_user_error(result, "Input/output error", "run the same command again when the drive can read them")
    assert "remove" not in result.stderr


def test_a_drive_without_modes(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, os, "chmod", errno.EPERM)
    result = call_command("export_hf.py", "--exp_dir", trained, "--output_dir", tmp_path / "hf")
    assert result.returncode == 0, result.stderr


def test_a_drive_that_does_not_know_its_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FUSE answers zeros where a file system does not say."""
    assert 0 < free_bytes(tmp_path) < 1e18
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=0, used=0, free=0))
    assert free_bytes(tmp_path) == float("inf")
    refuse(monkeypatch, shutil, "disk_usage", errno.ENOSYS)
    assert free_bytes(tmp_path) == float("inf")


# Shared memory


def test_full_shared_memory_is_named(tmp_path: Path, sample_shards: Path) -> None:
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    fill = "mount -t tmpfs -o size=4k none /dev/shm; head -c 9000 /dev/zero >/dev/shm/full || true; "
    if not shutil.which("unshare") or subprocess.run([*namespace, fill], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    flags = (*SAMPLE_TOKENS, "--data_dir", sample_shards, "--output_dir", tmp_path / "tokens")
    start = " ".join(f"'{part}'" for part in command("pretokenize.py", *flags, "--num_workers", 2))
    result = subprocess.run([*namespace, fill + start], env=environment(), capture_output=True, encoding="utf-8")
    assert_user_error(result, "/dev/shm", "--shm-size", "--num_workers 1")
    assert "disk" not in result.stderr.splitlines()[-1]
    one = " ".join(f"'{part}'" for part in command("pretokenize.py", *flags, "--num_workers", 1))
    again = subprocess.run([*namespace, fill + one], env=environment(), capture_output=True, encoding="utf-8")
    assert again.returncode == 0, again.stderr


def test_nccl_without_shared_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    error = distributed.DistBackendError(
        "NCCL error in: NCCLUtils.cpp:94, unhandled system error\nLast error:\n"
        "Error while creating shared memory segment /dev/shm/nccl-8QpOgL (size 33030528), error: No space left on device (28)"
    )
    store = SimpleNamespace(set=lambda *_: None, add=lambda *_: 1, check=lambda _: True)
    monkeypatch.setattr(process_group, "_store", store)
    monkeypatch.setattr(process_group, "rank", lambda: 0)
    monkeypatch.setattr(process_group, "world_size", lambda: 2)
    monkeypatch.setattr(process_group.time, "sleep", lambda _: None)
    streams = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: (setattr(sys, "stdout", streams[0]), setattr(sys, "stderr", streams[1])))
        with pytest.raises(UserError, match=r"shared memory .*/dev/shm/nccl-8QpOgL.*--shm-size"):
            process_group._raise_once(error)
