"""Train in folders of mounted file systems: each keeps a run that resumes, or refuses it before anything is tokenized.

In each folder, which is to be a mount or to lie in one, pretraining.py makes its tokens, trains, is started again and
resumes; then its checkpoints are verified.

    python benchmarks/checks/mounts.py --folders /mnt/rclone /mnt/s3fs --data_dir dataset/sample_001 --tokenizer_path dataset/sample/tokenizer
"""

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _path  # noqa: F401  it lets the modules of benchmarks/ be imported
from machine import log, script, versions, write_result

from gptkit.base.cli import UserError, run_command, setting
from gptkit.base.probe import probe_output
from gptkit.training.checkpoints import find_checkpoints, verify_checkpoint
from gptkit.training.run_log import read_jsonl

N_STEPS = (4, 6)
RUN = {
    "tokenizer": "sentencepiece", "device": "cpu", "n_layers": 1, "emb_dim": 32, "n_heads": 2, "context_length": 32,
    "batch_size": 4, "eval_freq": 1, "eval_iter": 2, "save_ckpt_freq": 2,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MountsConfig:
    """Train in folders of mounted file systems."""

    folders: tuple[str, ...] = setting(help="folders, each on another mount")
    data_dir: str = setting(help="small text shards")
    tokenizer_path: str = setting(help="a SentencePiece model")
    pause_s: int = setting(15, "seconds after each run: some mounts upload in the background", at_least=0)


def file_system(folder: Path) -> str:
    """Return the type of the file system of a folder, such as fuse.rclone (Linux)."""
    mounts = [line.split(" ")[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    place = str(folder.resolve())
    return max((len(at), kind) for at, kind in mounts if f"{place}/".startswith(f"{at.rstrip('/')}/"))[1]


def probe_s(folder: Path) -> float:
    """Return how long a probe takes, in seconds, whatever it finds."""
    began = time.perf_counter()
    try:
        probe_output(folder)
    except UserError:
        pass
    return round(time.perf_counter() - began, 3)


def train(folder: Path, config: MountsConfig) -> dict[str, Any]:
    """Train and resume in a folder, and return what became of it."""
    output = folder / "run_of_mounts_check"
    result: dict[str, Any] = {"probe_s": probe_s(output)}
    flags = RUN | {"data_dir": config.data_dir, "tokenizer_path": config.tokenizer_path, "output_dir": output}
    for n_steps in N_STEPS:
        done = subprocess.run(script("pretraining.py", **flags, max_steps=n_steps), capture_output=True, text=True)
        lines = done.stderr.replace(str(folder), folder.name).splitlines()
        result["exit_code"] = done.returncode
        result["warnings"] = [line for line in lines if line.startswith("warning: ")]
        if done.returncode:
            result |= {"error": lines[-1], "is_refused_first": lines[:-1] == result["warnings"] and not output.exists()}
            return result
        time.sleep(config.pause_s)
    checkpoints = find_checkpoints(output)
    for checkpoint in checkpoints:
        verify_checkpoint(checkpoint)
    steps = [record["step"] for record in read_jsonl(output / "metrics.jsonl")]
    result["is_kept"] = steps == [*range(1, N_STEPS[-1] + 1)] and checkpoints[-1].name.endswith(f"{N_STEPS[-1]}")
    return result


def main(config: MountsConfig) -> int:
    found = {}
    for folder in map(Path, config.folders):
        found[folder.name] = {"file_system": file_system(folder), **train(folder, config)}
        log(f"{folder}: {found[folder.name]}")
    goals = {
        "each keeps a run or refuses it first": all(
            result.get("is_kept") or result.get("is_refused_first") for result in found.values()
        )
    }
    write_result("mounts", {"versions": versions("torch", "safetensors"), "mounts": found, "goals": goals})
    return 0 if all(goals.values()) else 1


if __name__ == "__main__":
    run_command(MountsConfig, main)
