"""The commands on Windows, as tests/windows/sitecustomize.py simulates it on Linux, and on a console in cp932.

What it cannot show is left to .github/workflows/test.yml, which runs the tests on real Windows and macOS.
"""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    POSIX_ONLY,
    ROOT,
    SAMPLE,
    SAMPLE_TOKENS,
    TINY_MODEL,
    assert_user_error,
    command,
    environment,
    newest,
)

from gptkit.base.devices import is_out_of_memory
from gptkit.base.files import replace

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the simulation reads /proc")
WINDOWS = ROOT / "tests" / "windows"


def on_windows(*arguments: object, input: str = "") -> subprocess.CompletedProcess[str]:
    """Run a Python command line there; what it prints is cp932."""
    variables = environment() | {"PYTHONPATH": str(WINDOWS), "PYTHONUTF8": "0", "PYTHONIOENCODING": "cp932"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=variables | {"PYTHONWARNDEFAULTENCODING": "1"},
        input=input, capture_output=True, encoding="cp932", timeout=300,
    )  # fmt: skip


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    result = on_windows(*command(script, *arguments)[1:])
    assert "Traceback" not in result.stderr, result.stderr
    return result


def ok(script: str, *arguments: object) -> str:
    """Run a script, assert that it ends well, and return all that it prints."""
    result = run(script, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


REFUSED = """
import os, shutil, sys
from pathlib import Path
folder = Path(sys.argv[1])
(folder / "a").mkdir()
for name in "xyz":
    (folder / "a" / name).write_bytes(b"12")
def refuses(call, winerror):
    try:
        call()
    except OSError as error:
        assert error.winerror == winerror, error
    else:
        raise AssertionError(call)
with open(folder / "a" / "x", "rb") as file:
    refuses(lambda: os.replace(folder / "a" / "y", folder / "a" / "x"), 32)
    refuses((folder / "a" / "x").unlink, 32)
    refuses(lambda: os.rename(folder / "a", folder / "b"), 5)
    refuses(lambda: shutil.rmtree(folder / "a"), 32)
    refuses(lambda: os.fsync(file), 6)
import mmap
with open(folder / "a" / "x", "r+b") as file:
    os.fsync(file)
    mapped = mmap.mmap(file.fileno(), 0)
refuses((folder / "a" / "x").unlink, 32)
mapped.close()
refuses(lambda: os.symlink("x", folder / "link"), 1314)
refuses(lambda: (folder / "a:b").write_bytes(b""), 123)
refuses(lambda: (folder / "aux.json").mkdir(), 123)
refuses(lambda: os.open(folder, os.O_RDONLY), 5)
refuses(lambda: os.rename(folder / "a" / "x", folder / "a" / "z"), 183)
shutil.rmtree(folder / "a")
from gptkit.base import devices, locks
assert locks.fcntl is None and locks.os.name == "nt" and not hasattr(locks.os, "pread")
assert devices.peak_memory_bytes(devices.torch.device("cpu")) == 123 << 20
from gptkit.data.executors import signal
assert not hasattr(signal, "pthread_sigmask") and not hasattr(signal, "SIGHUP")
try:
    exec(compile("open(sys.argv[0])", locks.__file__, "exec"))
except AssertionError:
    print("done")
"""


def test_the_simulation_refuses_what_windows_refuses(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{REFUSED}")
    result = on_windows(tmp_path / "script.py", tmp_path)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


RESTARTED = """
import sys
if "--batch_size" in sys.argv:
    raise SystemExit(75)
from gptkit.training.compilation import BatchTooLarge, restart
restart(BatchTooLarge(2, 1, 1))
"""


@pytest.mark.parametrize("run_there", [on_windows, lambda *line: subprocess.run([sys.executable, *line], cwd=ROOT)])
def test_a_restart_ends_with_the_code_of_the_new_run(run_there: Callable[..., Any]) -> None:
    assert run_there("-c", RESTARTED).returncode == 75


LIMITED = """
import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
from gpt_model import GPTModel
hidden_states = GPTModel.hidden_states
def limited(self, ids, *cache):
    if len(ids) > 1:
        raise MemoryError
    return hidden_states(self, ids, *cache)
GPTModel.hidden_states = limited
sys.argv[0] = sys.path[0] + "/pretraining.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_the_road_on_windows(tmp_path: Path) -> None:
    """Prepare, pretokenize in workers, both again with another result, train, resume, and use the model in each way."""
    text, tokens, run_folder = tmp_path / "001", tmp_path / "001_pretok", tmp_path / "run"
    for size in (0.06, 0.05):
        ok("dataset/prepare_aozora_jsonl.py", *("--jsonl_path", SAMPLE, "--output_dir", text, "--max_size_mb", size))
    make = ("pretokenize.py", "--data_dir", text, "--output_dir", tokens, *SAMPLE_TOKENS, "--num_workers", 2)
    for share in (0.1, 0.2):
        ok(*make, "--val_fraction", share)
    train = ("--data_dir", text, "--use_pretokenized", *SAMPLE_TOKENS, "--val_fraction", 0.2, "--device", "cpu")
    train = (*train, *TINY_MODEL, "--eval_freq", 4, "--save_ckpt_freq", 2, "--print_sample_iter", 5)
    first = ok("pretraining.py", *train, "--output_dir", run_folder, "--max_steps", 6)
    assert "the links latest and best cannot be made" in first
    assert "cannot sync" not in first
    assert "memory: about 0.12 GiB" in first
    resumed = ok("pretraining.py", *train, "--output_dir", run_folder, "--max_steps", 10)
    assert f"resuming from {run_folder / 'step_00000006'}" in resumed
    left = {path.name for path in run_folder.iterdir()}
    steps = {name for name in left if "step_" in name}
    assert {"step_00000008", "step_00000010"} <= steps  # and perhaps the best; the one that was read is gone, whole
    assert "step_00000006" not in steps
    assert left - steps == {
        *("config.json", "loss_curve.png", "metrics.jsonl", "run.log", "samples.jsonl", "sessions.jsonl")
    }
    assert b"\r" not in (run_folder / "run.log").read_bytes()

    (tmp_path / "limited.py").write_text(LIMITED)
    auto = (*train, "--output_dir", tmp_path / "auto", "--max_steps", 2, "--auto_batch")
    restarted = on_windows(tmp_path / "limited.py", ROOT, *auto)
    assert restarted.returncode == 0, restarted.stderr
    assert json.loads((newest(tmp_path / "auto") / "state.json").read_bytes())["plan"]["batch_size"] == 1

    written = ok("inference.py", "--exp_dir", run_folder, "--prompt", "雨の匂いが\u4e37", "--max_new_tokens", 20)
    assert written.startswith("雨の匂いが\\u4e37")
    assert "bits_per_char" in ok("evaluate_model.py", "--exp_dir", run_folder, "--text_path", SAMPLE)
    for _ in range(2):  # the second replaces the first
        ok("export_hf.py", "--exp_dir", run_folder, "--output_dir", tmp_path / "hf")
    ok("report.py", "--exp_dir", run_folder, "--output", tmp_path / "report.html")
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.slow
def test_what_is_refused_on_windows(tmp_path: Path, sample_shards: Path, sample_tokens: Path) -> None:
    """A refused run leaves nothing, and a tokenizer may be trained into the same folder twice."""
    train = ("--data_dir", sample_shards, "--use_pretokenized", *SAMPLE_TOKENS, "--device", "cpu")
    output = ("--output_dir", tmp_path / "a" / "run")
    refused = run("pretraining.py", *train, *TINY_MODEL, *output, "--context_length", 100_000)
    assert_user_error(refused, "fewer than a context of 100000")
    assert not (tmp_path / "a").exists()
    for size in (400, 420):
        ok(
            "dataset/train_tokenizer.py",
            *("--data_dir", sample_shards, "--output_dir", tmp_path / "t", "--vocab_size", size),
        )
    shards = tmp_path / "text"
    prepare = ("dataset/prepare_aozora_jsonl.py", "--jsonl_path", SAMPLE, "--output_dir", shards, "--max_size_mb")
    ok(*prepare, 1)
    with open(shards / "combined_0001.txt", "rb"):
        held = run(*prepare, 0.05)
    assert_user_error(held, "combined_0001.txt", "close")


@pytest.mark.slow
@pytest.mark.parametrize(
    "files",
    [("test_locks.py",), ("test_checkpoints.py", "test_files.py", "test_saver.py"), ("test_pairs.py", "test_probe.py")],
    ids=str,
)
def test_tests_pass_on_windows(files: tuple[str, ...], tmp_path: Path) -> None:
    """Those that are about files run in the simulation too."""
    tests = [ROOT / "tests" / name for name in files]
    plugins = ("-p", "no:cacheprovider", "-p", "no:xdist")
    result = on_windows("-m", "pytest", "-q", "-m", "not slow", *plugins, f"--basetemp={tmp_path / 'base'}", *tests)
    assert result.returncode == 0, result.stdout


COLLECT = """
import sys, pytest, sitecustomize
root = sitecustomize.ROOT
sitecustomize.is_ours = lambda file: file.startswith(f"{root}/") and not file.startswith(f"{root}/.venv/")  # tests too
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_the_tests_are_collected_on_windows() -> None:
    """A file that needs POSIX and is not in POSIX_ONLY would end them all."""
    plugins = ("-p", "no:cacheprovider", "-p", "no:xdist")
    result = on_windows("-c", COLLECT, "--collect-only", "-qq", *plugins, ROOT / "tests")
    assert result.returncode == 0, result.stdout
    collected = {Path(line.partition(":")[0]).name for line in result.stdout.splitlines() if line}
    assert collected == {path.name for path in (ROOT / "tests").glob("test_*.py")} - set(POSIX_ONLY)
    assert all((ROOT / "tests" / name).is_file() for name in POSIX_ONLY)


def test_a_file_that_somebody_reads_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("new")
    refusals, real = [32, 5], os.replace

    def refuse(source: Path, target: Path) -> None:
        if refusals:
            error = PermissionError(errno.EACCES, "in use")
            error.winerror = refusals.pop()  # type: ignore[attr-defined]
            raise error
        real(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    replace(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "new"
    refusals.append(13)  # another error is not waited for
    with pytest.raises(PermissionError):
        replace(tmp_path / "b", tmp_path / "a")
    monkeypatch.setattr("gptkit.base.files.PATIENCE_S", 0.1)
    refusals[:] = [32] * 1000
    with pytest.raises(PermissionError):
        replace(tmp_path / "b", tmp_path / "a")
    assert len(refusals) > 900


def test_out_of_memory_of_other_devices() -> None:
    words = (
        "MPS backend out of memory (MPS allocated: 17.95 GB, other allocations: 1.2 GB, max allowed: 18.13 GB).",
        "[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
    )
    assert all(is_out_of_memory(RuntimeError(text)) for text in words)
    assert not is_out_of_memory(RuntimeError("MPS backend is not available"))
    assert is_out_of_memory(torch.OutOfMemoryError())
