"""gptkit/data/executors.py, and pretokenize.py on it: bytes do not depend on the executor, and a kill loses no shard."""

import functools
import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import SAMPLE, SAMPLE_TOKENS, assert_user_error, call_command, command, environment, run_command
from executor_tasks import be_killed, fail_at, process_of, square

from gptkit.data.executors import ExecutorError, available_cores, open_executor


def run_tasks(task: Callable[[int], Any], numbers: Sequence[int], num_workers: int) -> list[tuple[int, Any]]:
    with open_executor("local", num_workers) as run:
        return list(run(task, numbers))


@pytest.mark.parametrize("num_workers", [1, 2, 99])
def test_every_task_is_done_once(num_workers: int) -> None:
    numbers = [7, 3, 5, 4, 0, 9, 12, 20]
    done = run_tasks(square, numbers, num_workers)
    assert sorted(done) == sorted((number, number * number) for number in numbers)
    assert run_tasks(square, [], num_workers) == []


def test_tasks_are_spread_over_processes() -> None:
    processes = {process for _, process in run_tasks(process_of, range(6), 2)}
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert {process for _, process in run_tasks(process_of, range(2), 1)} == {os.getpid()}
    assert available_cores() >= 1


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_of_a_task_is_raised(num_workers: int) -> None:
    with pytest.raises(KeyError, match="task 3"):
        run_tasks(functools.partial(fail_at, 3), range(50), num_workers)


def test_a_killed_worker_is_reported() -> None:
    with pytest.raises(ExecutorError, match="fewer --num_workers"):
        run_tasks(be_killed, range(4), 2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen text shards; documents continue from one shard in the next."""
    folder = tmp_path_factory.mktemp("text") / "001"
    result = call_command(
        "dataset/prepare_aozora_jsonl.py",
        *("--jsonl_path", SAMPLE, "--output_dir", folder, "--max_size_mb", 0.02),
    )
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def by_one_process(shards: Path) -> Path:
    """The token shards of `shards` as one process makes them."""
    output = shards.parent / "001_pretok"
    result = tokenize(shards, output)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("tokenized (new)") == len(list(shards.glob("*.txt"))) >= 9
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tokenize(shards: Path, output: Path, *more: object) -> subprocess.CompletedProcess:
    workers = () if "--num_workers" in more else ("--num_workers", 1)
    return call_command("pretokenize.py", *SAMPLE_TOKENS, "--data_dir", shards, "--output_dir", output, *workers, *more)


def test_the_same_bytes_whatever_the_number_of_workers(tmp_path: Path, shards: Path, by_one_process: Path) -> None:
    arguments = (*SAMPLE_TOKENS, "--data_dir", shards, "--output_dir", tmp_path / "3", "--num_workers", 3)
    result = run_command("pretokenize.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("tokenized (new)") == len(list(shards.glob("*.txt"))) >= 9
    assert contents(by_one_process) == contents(tmp_path / "3")


@pytest.mark.slow
def test_killed_at_random_moments_the_same_command_ends_the_same(
    tmp_path: Path, shards: Path, by_one_process: Path
) -> None:
    """SIGKILL to the parent alone: its workers end by themselves, and no finished shard is made again."""
    output = tmp_path / "killed"
    arguments = (*SAMPLE_TOKENS, "--data_dir", shards, "--output_dir", output, "--num_workers", 2)
    draw = random.Random(5)
    for _ in range(6):
        finished = {path: path.stat().st_mtime_ns for path in output.glob("combined_*.json")}
        process = subprocess.Popen(command("pretokenize.py", *arguments), env=environment(), stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.2, 1.6))
        process.kill()
        process.wait()
        assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert run_command("pretokenize.py", *arguments).returncode == 0
    assert contents(output) == contents(by_one_process)


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    """The tasks print the pids of their workers; soon after the parent's end none of them is left."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, sys, time\n"
        "from gptkit.data.executors import open_executor\n"
        "def task(number):\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    with open_executor('local', 2) as run:\n"
        "        list(run(task, range(2)))\n"
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


def test_parts_of_a_job_array_add_up(tmp_path: Path, shards: Path, by_one_process: Path) -> None:
    for part in ("2/3", "1/3", "3/3"):
        result = tokenize(shards, tmp_path / "parts", "--part", part)
        assert result.returncode == 0, result.stderr
        assert not (tmp_path / "parts" / "manifest.json").exists()
    last = tokenize(shards, tmp_path / "parts")
    assert "tokenized" not in last.stderr
    assert contents(tmp_path / "parts") == contents(by_one_process)
    for wrong in ("0/3", "4/3", "x", "1/0"):
        assert_user_error(tokenize(shards, tmp_path / "parts", "--part", wrong), f"--part {wrong}", "3/8")


@pytest.fixture(scope="module")
def foreign_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer for another language: letters, no kana, no kanji, no bytes."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("foreign")
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(400)]
    lines = [" ".join(draw.choices(words, k=9)) for _ in range(400)]
    prefix = str(folder / "spiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=prefix, vocab_size=200, minloglevel=2
    )
    return folder / "spiece.model"


def test_a_tokenizer_that_damages_the_text_is_refused(tmp_path: Path, shards: Path, foreign_model: Path) -> None:
    foreign = ("--tokenizer", "sentencepiece", "--tokenizer_path", foreign_model, "--data_dir", shards)
    for script in ("pretokenize.py", "pretraining.py"):
        refused = call_command(script, *foreign, "--output_dir", tmp_path / "out")
        assert_user_error(refused, "does not know", "of 10,000 characters", "--accept_problems")
    assert not (tmp_path / "out").exists()
    accepted = call_command(
        "pretokenize.py", *foreign, "--output_dir", tmp_path / "out", "--accept_problems", "--num_workers", 1
    )
    assert accepted.returncode == 0
    assert "warning" in accepted.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert manifest["unknown_tokens"] > 0


def test_describe(shards: Path) -> None:
    alone = call_command("pretokenize.py", *SAMPLE_TOKENS, "--describe")
    assert alone.returncode == 0, alone.stderr
    assert "3,000" in alone.stdout
    assert "lossless" not in alone.stdout
    on_text = call_command("pretokenize.py", *SAMPLE_TOKENS, "--describe", "--data_dir", shards)
    assert on_text.stdout.startswith(alone.stdout.rstrip())
    assert "lossless:             yes" in on_text.stdout
    assert_user_error(call_command("pretokenize.py", *SAMPLE_TOKENS, "--data_dir", shards), "--output_dir")
