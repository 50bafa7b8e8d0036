"""The file system of an output folder is tried before hours are spent: what cannot keep a run is refused at once."""

import builtins
import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from conftest import (
    HAS_LINKS,
    ROOT,
    SAMPLE,
    SAMPLE_TOKENS,
    TINY_MODEL,
    assert_user_error,
    call_command,
    command,
    curve,
    environment,
    is_folder,
    refuse,
    run_of,
)
from safetensors import SafetensorError

from gptkit.base import cli
from gptkit.base.cli import UserError
from gptkit.base.probe import probe_files, probe_output
from gptkit.data import token_shards
from gptkit.data.token_shards import TokenStream, UnmappedShard, open_token_shard, token_shard_bytes
from gptkit.training.checkpoints import find_checkpoints, verify_checkpoint

ELSEWHERE = "name a folder on a local disk"


@pytest.mark.parametrize("probe", [probe_files, probe_output])
def test_a_probe_leaves_nothing_and_makes_no_folder(
    probe: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("of a user")
    for folder in (tmp_path / "there", tmp_path / "new" / "er"):
        probe(folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "file"]
    assert (tmp_path / "there" / "file").read_text() == "of a user"
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "" or (not HAS_LINKS and "links" in printed.err)


def in_append_mode(_: Any, mode: str = "r", *__: Any, **___: Any) -> bool:
    return mode == "ab"


def of_the_trial(path: Any, *_: Any, **__: Any) -> bool:
    return Path(path).name == "file"


Refuse = Callable[[pytest.MonkeyPatch], None]
REFUSALS: dict[str, Refuse] = {
    "replace a file by another (Function not implemented)": lambda patch: refuse(patch, os, "replace", errno.ENOSYS),
    "replace a file by another (Operation not permitted)": lambda patch: refuse(patch, os, "replace", errno.EPERM),
    "append to a file (Invalid argument)": lambda patch: refuse(patch, builtins, "open", errno.EINVAL, in_append_mode),
    "remove what it holds (Operation not permitted)": lambda patch: refuse(
        patch, os, "unlink", errno.EPERM, of_the_trial
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_no_run_can_do_without_is_named(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        REFUSALS[what](patch)
        with pytest.raises(UserError) as raised:
            probe_output(tmp_path / "exp")
    assert f"the file system of {tmp_path / 'exp'} cannot {what}, so nothing could be kept there" in str(raised.value)
    assert ELSEWHERE in str(raised.value)
    assert bool(os.listdir(tmp_path)) == what.startswith("remove")


def test_appending_that_overwrites_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rclone mount ignores O_APPEND by default (its documentation, "VFS File Caching")."""
    real = open
    monkeypatch.setattr(
        builtins, "open", lambda path, mode="r", *rest, **more: real(path, mode.replace("a", "w"), *rest, **more)
    )
    with pytest.raises(UserError, match=r"cannot append to a file \(what it held is lost\)"):
        probe_output(tmp_path)
    assert not os.listdir(tmp_path)


def test_safetensors_and_copies_are_tried_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise SafetensorError("I/O error: Operation not permitted (os error 1)")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", fail)
        with pytest.raises(UserError, match=r"cannot write a safetensors file \(I/O error: Operation not permitted"):
            probe_output(tmp_path)
    with monkeypatch.context() as patch:
        refuse(patch, os, "replace", errno.ENOSYS, is_folder)
        refuse(patch, shutil, "copyfile", errno.EPERM)
        with pytest.raises(UserError, match=r"cannot rename a folder, nor copy it \(Operation not permitted\)"):
            probe_output(tmp_path)
    assert not os.listdir(tmp_path)


def test_what_the_folder_and_not_its_file_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="File name too long"):
        probe_files(tmp_path, "長" * 80)
    with monkeypatch.context() as patch:
        refuse(patch, os, "fsync", errno.ENOSPC)
        result = call_command("pretraining.py", "--data_dir", tmp_path, "--output_dir", tmp_path / "exp")
        assert_user_error(result, f"error: {tmp_path / 'exp'}: no space left on device; make room on the disk")
    with monkeypatch.context() as patch:
        refuse(patch, tempfile, "mkdtemp", errno.EROFS)
        result = call_command("pretraining.py", "--data_dir", tmp_path, "--output_dir", tmp_path / "exp")
        assert_user_error(
            result, f"error: {tmp_path / 'exp'}: read-only file system; choose a folder that can be written to"
        )
    assert not os.listdir(tmp_path)


# Commands


def test_a_run_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "exp" / "step_00000002").mkdir(parents=True)
    refuse(monkeypatch, os, "replace", errno.ENOSYS)
    result = call_command("pretraining.py", "--data_dir", tmp_path / "missing", "--output_dir", tmp_path / "exp")
    assert_user_error(
        result, f"{tmp_path / 'exp'} cannot replace a file by another (Function not implemented)", ELSEWHERE
    )
    assert len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["exp", "step_00000002"]


def test_tokens_are_refused_before_the_first_is_made(
    tmp_path: Path, sample_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_tokens = (*SAMPLE_TOKENS, "--output_dir", tmp_path / "tokens", "--num_workers", 1)
    with monkeypatch.context() as patch:
        refuse(patch, os, "replace", errno.ENOSYS)
        result = call_command("pretokenize.py", *to_tokens, "--data_dir", sample_shards)
        assert_user_error(result, f"{tmp_path / 'tokens'} cannot replace a file by another", ELSEWHERE)
        assert "tokenized" not in result.stderr
    text = tmp_path / "text"
    text.mkdir()
    for stem in ("短い", "長" * 75):  # whose token shard's name would have 236 bytes, and its temporary one 260
        (text / f"{stem}.txt").write_text("春は花。")
    result = call_command("pretokenize.py", *to_tokens, "--data_dir", text)
    assert_user_error(result, f"{tmp_path / 'tokens'}/", "長長長", "file name too long; choose a shorter name")
    assert "tokenized" not in result.stderr
    assert not list(tmp_path.glob("tokens/*"))


@pytest.mark.parametrize("script", ["prepare_aozora_jsonl", "train_tokenizer", "download_aozora"])
def test_scripts_refuse_before_they_work(
    script: str, tmp_path: Path, sample_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"prepare_aozora_jsonl": ("--jsonl_path", SAMPLE), "train_tokenizer": ("--data_dir", sample_shards)}
    refuse(monkeypatch, os, "replace", errno.EPERM)
    result = call_command(f"dataset/{script}.py", *source.get(script, ()), "--output_dir", tmp_path / "out")
    assert_user_error(
        result, f"{tmp_path / 'out'} cannot replace a file by another", "Operation not permitted", ELSEWHERE
    )
    assert "training" not in result.stderr
    assert not list(tmp_path.glob("out/*"))


# Mapping into memory


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_shard_that_cannot_be_mapped_reads_alike(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens, path = np.arange(1000, dtype=dtype), tmp_path / "train_a.npy"
    path.write_bytes(token_shard_bytes(tokens))
    mapped = open_token_shard(path, dtype, 1000)
    cli._warned_of.clear()
    refuse(monkeypatch, np, "load", errno.EACCES, lambda *_, mmap_mode=None, **__: mmap_mode is not None)
    unmapped = open_token_shard(path, dtype, 1000)
    assert (type(mapped), type(unmapped)) == (np.memmap, UnmappedShard)
    for start, length in ((0, 1000), (0, 0), (1, 998), (999, 1), (1000, 0)):
        found = TokenStream([unmapped]).read(start, length)
        assert found.dtype == np.int64
        assert found.tolist() == TokenStream([mapped]).read(start, length).tolist() == [*range(start, start + length)]
    monkeypatch.setattr(token_shards, "UNMAPPED_BLOCK", 100)
    places = np.array([[999, 0, 99], [100, 555, 501]])
    assert TokenStream([unmapped]).read_at(places).tolist() == places.tolist()
    assert (
        f"warning: the file system of {tmp_path} cannot map files into memory (Permission denied)"
        in capsys.readouterr().err
    )
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match="shorter than it was"):
        unmapped[900:]
    with pytest.raises(ValueError, match=r"train_a\.npy: not a token shard .*cut short"):
        open_token_shard(path, dtype, 1000)


def test_a_limit_of_the_process_is_not_blamed_on_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train_a.npy"
    path.write_bytes(token_shard_bytes(np.arange(9, dtype=np.uint16)))
    cli._warned_of.clear()
    refuse(monkeypatch, np, "load", errno.ENOMEM)
    assert open_token_shard(path, "uint16", 9)[:].tolist() == [*range(9)]
    assert "may map no more files into memory (Cannot allocate memory)" in capsys.readouterr().err


def test_what_cannot_be_read_is_not_called_a_bad_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or pretokenize.py would make it again."""
    path = tmp_path / "train_a.npy"
    path.write_bytes(token_shard_bytes(np.arange(9, dtype=np.uint16)))
    refuse(monkeypatch, np, "load", errno.EIO)
    refuse(monkeypatch, builtins, "open", errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        open_token_shard(path, "uint16", 9)


# Processes on a mount that refuses


@pytest.fixture(scope="module")
def on_mount(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that runs a command to its end, on whose file system in a folder something is refused."""
    library = tmp_path_factory.mktemp("library") / "refusing.so"
    compiler = shutil.which("cc") or shutil.which("gcc")
    build = ["-shared", "-fPIC", "-o", library, ROOT / "tests" / "refusing_mount.c", "-ldl"]
    if not compiler or subprocess.run([compiler, *build], capture_output=True).returncode:
        pytest.skip("no C compiler for Linux here")

    def run(mount: Path, refusals: dict[str, int], *arguments: object) -> subprocess.CompletedProcess:
        variables = {"LD_PRELOAD": str(library), "MOUNT": str(mount), **{k: str(v) for k, v in refusals.items()}}
        return subprocess.run(
            command("pretraining.py", *SAMPLE_TOKENS, "--device", "cpu", *TINY_MODEL, *arguments),
            env=environment() | variables, capture_output=True, encoding="utf-8", timeout=300,
        )  # fmt: skip

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "refusals", [{"RENAME": errno.ENOSYS, "APPEND": errno.EINVAL, "SYMLINK": errno.EPERM}, {"APPEND": errno.EPERM}]
)
def test_on_a_bucket_that_can_keep_nothing_no_run_begins(
    refusals: dict[str, int], on_mount: Callable[..., subprocess.CompletedProcess], tmp_path: Path, sample_shards: Path
) -> None:
    """Of mountpoint-s3, and of rclone mount without --vfs-cache-mode writes."""
    result = on_mount(tmp_path, refusals, "--data_dir", sample_shards, "--output_dir", tmp_path / "exp")
    assert_user_error(result, "so nothing could be kept there", ELSEWHERE)
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_on_a_bucket_that_copies_a_run_is_kept_and_resumes(
    on_mount: Callable[..., subprocess.CompletedProcess], tmp_path: Path, sample_shards: Path
) -> None:
    """Of gcsfuse, on a bucket without hierarchical namespaces; what is missing is named before tokens are made."""
    refusals = {"RENAME_FOLDER": errno.EMFILE, "FSYNC": errno.EINVAL, "FLOCK": errno.ENOSYS, "SYMLINK": errno.EPERM}
    flags = ("--data_dir", sample_shards, "--output_dir", tmp_path / "exp", "--save_ckpt_freq", 1, "--eval_freq", 1)
    result = on_mount(tmp_path, refusals, *flags, "--max_steps", 2)
    assert result.returncode == 0, result.stderr
    warnings = ["cannot sync", "refused to rename a folder (Too many open files)", "cannot be made", "has no locks"]
    for line, expected in zip(result.stderr.splitlines(), warnings, strict=False):
        assert line.startswith("warning: ")
        assert expected in line
    assert result.stderr.count("warning") == len(warnings)
    log = (tmp_path / "exp" / "run.log").read_text("utf-8")
    assert [log.count(expected) for expected in warnings] == [1] * len(warnings)
    resumed = on_mount(tmp_path, refusals, *flags, "--max_steps", 4)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming from {tmp_path / 'exp' / 'step_00000002'}" in resumed.stdout
    for checkpoint in find_checkpoints(tmp_path / "exp"):
        verify_checkpoint(checkpoint)
    assert find_checkpoints(tmp_path / "exp")[-1].name == "step_00000004"
    assert [report["step"] for report in curve(tmp_path / "exp")] == [1, 2, 3, 4]
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["MAP", "MAP_ANY"])
def test_on_a_drive_that_maps_no_files_a_run_is_the_same(
    kind: str, on_mount: Callable[..., subprocess.CompletedProcess], tmp_path: Path, sample_shards: Path
) -> None:
    flags = ("--data_dir", sample_shards, "--max_steps", 2)
    result = on_mount(tmp_path, {kind: errno.ENODEV}, *flags, "--output_dir", tmp_path / "exp")
    assert result.returncode == 0, result.stderr
    named = f"the file system of {tmp_path / 'exp' / 'tokens'} cannot map files into memory (No such device)"
    assert result.stderr.count("cannot map") == result.stderr.count(named) == (kind == "MAP_ANY")
    resumed = on_mount(tmp_path, {kind: errno.ENODEV}, *flags[:2], "--max_steps", 3, "--output_dir", tmp_path / "exp")
    assert resumed.returncode == 0, resumed.stderr
    assert run_of(tmp_path / "plain", sample_shards).returncode == 0
    weights = [folder / "exp" / "step_00000002" / "model.safetensors" for folder in (tmp_path, tmp_path / "plain")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
