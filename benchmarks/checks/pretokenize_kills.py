"""Kill a parallel pretokenize.py by SIGKILL at random moments and run it again: finished shards must not be made again.

python benchmarks/checks/pretokenize_kills.py --data_dir dataset/001 --hf_name rinna/japanese-gpt2-small
"""

import hashlib
import random
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _path  # noqa: F401  it lets the modules of benchmarks/ be imported
from machine import script, write_result

from gptkit.base.cli import run_command, setting
from gptkit.base.paths import existing_path


@dataclass(frozen=True, kw_only=True)
class PretokenizeKillsConfig:
    """Kill pretokenize.py at random moments, and compare the bytes at the end."""

    data_dir: str = setting(help="text shards of prepare_aozora_jsonl.py")
    hf_name: str = setting(help="a tokenizer: a folder, or a repository of the hub")
    kills: int = setting(20, "how many kills", at_least=1)


def main(config: PretokenizeKillsConfig) -> None:
    data_dir = existing_path(config.data_dir, "--data_dir")
    command = script("pretokenize.py", data_dir=data_dir, hf_name=config.hf_name, num_workers=2)
    with tempfile.TemporaryDirectory() as scratch:
        unkilled, killed = Path(scratch, "whole"), Path(scratch, "killed")
        start = time.monotonic()
        tokenize(command, unkilled)
        found = kill_again_and_again(command, killed, len(records(unkilled)), time.monotonic() - start, config.kills)
        tokenize(command, killed)
        result = found | {"byte_identical": hashes(unkilled) == hashes(killed)}
    write_result("pretokenize_kills", result)


def kill_again_and_again(
    command: list[str], output: Path, n_shards: int, full_run_s: float, n_kills: int
) -> dict[str, Any]:
    """Kill the command at moments within the time of a full run, and count the shards that it made again."""
    draw, n_redone = random.Random(20), 0
    moments_s: list[float] = []
    finished_after: list[int] = []
    while len(moments_s) < n_kills:
        finished = {path: path.stat().st_mtime_ns for path in records(output)}
        if len(finished) == n_shards:
            for path in output.iterdir():  # all are finished: begin anew, so that each kill interrupts something
                path.unlink()
            finished = {}
        process = subprocess.Popen([*command, "--output_dir", str(output)], stderr=subprocess.DEVNULL)
        moment_s = draw.uniform(0, full_run_s)
        time.sleep(moment_s)
        if process.poll() is not None:  # it ended before the kill
            continue
        process.kill()
        process.wait()
        n_redone += sum(path.stat().st_mtime_ns != before for path, before in finished.items())
        moments_s.append(round(moment_s, 2))
        finished_after.append(len(records(output)))
    return {
        "kills": n_kills,
        "moments_s": moments_s,
        "shards": n_shards,
        "finished_shards_after_each_kill": finished_after,
        "finished_shards_redone": n_redone,
    }


def tokenize(command: list[str], output: Path) -> None:
    """Run pretokenize.py to its end."""
    subprocess.run([*command, "--output_dir", str(output)], check=True, capture_output=True)


def records(folder: Path) -> list[Path]:
    """Return the records of the finished shards of a folder."""
    return list(folder.glob("combined_*.json"))


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


if __name__ == "__main__":
    run_command(PretokenizeKillsConfig, main)
