"""gptkit/engines.py, and pretokenize.py on it: the bytes do not depend on the engine, and a kill costs nothing done."""

import functools
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import SAMPLE, SAMPLE_TOKENIZER, command, environment, run_command

from gptkit.engines import EngineError, available_cores, run_tasks

TOKENIZER = ("--tokenizer", "sentencepiece", "--tokenizer_path", SAMPLE_TOKENIZER)


def square(number: int) -> int:
    time.sleep(0.02 if number % 2 else 0)
    return number * number


def fail_at(bad: int, number: int) -> int:
    if number == bad:
        raise KeyError(f"task {number}")
    return number


def be_killed(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def process_of(number: int) -> int:
    time.sleep(0.1)
    return os.getpid()


@pytest.mark.parametrize("num_workers", [1, 2, 99])
def test_every_task_is_done_once(num_workers: int) -> None:
    numbers = [7, 3, 5, 4, 0, 9, 12, 20]
    done = list(run_tasks(square, numbers, "local", num_workers))
    assert sorted(done) == sorted((number, number * number) for number in numbers)
    assert list(run_tasks(square, [], "local", num_workers)) == []


def test_work_is_spread_over_processes() -> None:
    processes = {process for _, process in run_tasks(process_of, range(6), "local", 2)}
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert {process for _, process in run_tasks(process_of, range(2), "local", 1)} == {os.getpid()}
    assert available_cores() >= 1


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_of_a_task_comes_through(num_workers: int) -> None:
    with pytest.raises(KeyError, match="task 3"):
        list(run_tasks(functools.partial(fail_at, 3), range(50), "local", num_workers))


def test_a_killed_worker_is_told() -> None:
    with pytest.raises(EngineError, match="fewer --num_workers"):
        list(run_tasks(be_killed, range(4), "local", 2))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A dozen text shards, works going on from one into the next."""
    result = run_command(
        "dataset/prepare_aozora_jsonl.py",
        *("--jsonl_path", SAMPLE, "--output_dir", tmp_path / "001", "--max_size_mb", 0.02),
    )
    assert result.returncode == 0, result.stderr
    return tmp_path / "001"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tokenize(shards: Path, output: Path, *more: object) -> subprocess.CompletedProcess:
    return run_command("pretokenize.py", *TOKENIZER, "--data_dir", shards, "--output_dir", output, *more)


def test_the_same_bytes_whatever_the_number_of_workers(tmp_path: Path, shards: Path) -> None:
    for n in (1, 3):
        result = tokenize(shards, tmp_path / str(n), "--num_workers", n)
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("tokenized (new)") == len(list(shards.glob("*.txt"))) >= 9
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_killed_at_random_moments_the_same_command_ends_the_same(tmp_path: Path, shards: Path) -> None:
    """SIGKILL to the parent alone: its workers end by themselves, and no finished shard is made again."""
    assert tokenize(shards, tmp_path / "whole").returncode == 0
    output = tmp_path / "killed"
    arguments = command("pretokenize.py", *TOKENIZER, "--data_dir", shards, "--output_dir", output, "--num_workers", 2)
    draw = random.Random(5)
    for _ in range(6):
        finished = {path: path.stat().st_mtime_ns for path in output.glob("combined_*.json")}
        process = subprocess.Popen(arguments, env=environment(), stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.2, 1.6))
        process.kill()
        process.wait()
        assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert tokenize(shards, output, "--num_workers", 2).returncode == 0
    assert contents(output) == contents(tmp_path / "whole")


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    """Their pids are written by the tasks; soon after the parent's end none of them is left."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, sys, time\n"
        "from gptkit.engines import run_tasks\n"
        "def task(number):\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    list(run_tasks(task, range(2), 'local', 2))\n"
    )
    root = str(Path(__file__).resolve().parent.parent)
    process = subprocess.Popen(
        [*command("")[:1], script], env=environment() | {"PYTHONPATH": root}, stdout=subprocess.PIPE, encoding="utf-8"
    )
    assert process.stdout
    workers = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
