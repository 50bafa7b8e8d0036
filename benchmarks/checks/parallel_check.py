"""Check on this machine that several processes, and a sharded model, give the losses of one process.

One process is started plainly; then torchrun starts as many as there are GPUs (just one on a machine with one GPU or
none) with FSDP2, with FSDP2 compiled and with activation checkpointing, and, where there are several, with DDP. All
read the same sequences in a step. The validation losses of all reports are compared: in 16 bits they differ by the
order of sums. The result holds a true or false for each way.

    python benchmarks/checks/parallel_check.py
"""

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _path  # noqa: F401  it lets the modules of benchmarks/ be imported
import torch
from machine import SAMPLE, log, output_of, read_metrics, script, torchrun, versions, write_result

from gptkit.base import devices
from gptkit.base.cli import run_command, setting

TINY = {"n_layers": 1, "emb_dim": 32, "n_heads": 2, "context_length": 32}
SMALL = {"n_layers": 4, "emb_dim": 256, "n_heads": 4, "context_length": 256}
MOST_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.02}  # nats per token


@dataclass(frozen=True, kw_only=True)
class ParallelCheckConfig:
    """Check several processes and a sharded model against one process."""

    device: str = setting("auto", "auto, cpu or cuda")
    tiny: bool = setting(False, "a model of a few thousand parameters, and FSDP2 alone")


def main(config: ParallelCheckConfig) -> None:
    device = devices.choose_device(config.device)
    with tempfile.TemporaryDirectory() as folder:
        write_result("parallel_check", check_all(device, config.tiny, Path(folder)))


def check_all(device: torch.device, tiny: bool, work_dir: Path) -> dict[str, Any]:
    """Run all ways of this machine, and compare their losses with those of one process."""
    n = max(torch.cuda.device_count(), 1) if device.type == "cuda" else 1
    source = {"jsonl_path": SAMPLE / "sample.jsonl", "output_dir": work_dir / "001"}
    subprocess.run(script("dataset/prepare_aozora_jsonl.py", **source), check=True, stdout=subprocess.DEVNULL)
    flags: dict[str, object] = {
        "tokenizer": "sentencepiece", "tokenizer_path": SAMPLE / "tokenizer", "data_dir": work_dir / "001",
        "pretokenized_dir": work_dir / "tokens", "max_steps": 8, "eval_freq": 4, "eval_iter": 2, "batch_size": 4,
        "bigram_steps": 2, "device": device.type, **(TINY if tiny else SMALL),
    }  # fmt: skip

    def command(output: Path, accum: int, *more: str) -> list[str]:
        more = ("--use_pretokenized", *more)
        return [*script("pretraining.py", **flags, output_dir=output, grad_accum_steps=accum), *more]

    alone = val_losses(command(work_dir / "alone", n, "--no-compile"), work_dir / "alone")
    most_difference = MOST_DIFFERENCE[devices.choose_dtype("auto", device, training=True)]
    checks: dict[str, bool] = {}
    differences: dict[str, float] = {}
    problems: dict[str, str] = {}
    for name, more in ways(n, tiny).items():
        try:
            output = work_dir / name.replace(", ", "_").replace(" ", "_")
            found = val_losses(torchrun(n, command(output, 1, *more)), output)
            differences[name] = max(abs(one - other) for one, other in zip(found, alone, strict=True))
            checks[name] = differences[name] <= most_difference
        except (RuntimeError, ValueError, OSError) as error:  # the other ways are worth knowing
            checks[name], problems[name] = False, f"{type(error).__name__}: {error}"
        log(f"{'ok    ' if checks[name] else 'FAILED'} {name}: {differences.get(name, problems.get(name))}")
    return {
        "device": devices.describe_device(device),
        "processes": n,
        "versions": versions("torch"),
        "checks": checks,
        "problems": problems,
        "val_losses_of_one_process": alone,
        "largest_difference": differences,
    }


def ways(n_processes: int, tiny: bool) -> dict[str, tuple[str, ...]]:
    """Return the flags of each way to run on this machine."""
    found: dict[str, tuple[str, ...]] = {"fsdp": ("--parallel", "fsdp", "--no-compile")}
    if not tiny:
        compiled = ("--compile", "--activation_checkpointing")
        found["fsdp, compiled, activation checkpointing"] = ("--parallel", "fsdp", *compiled)
    if n_processes > 1:
        found["ddp"] = ("--parallel", "ddp", "--no-compile")
    return found


def val_losses(command: list[str], output: Path) -> list[float]:
    """Run a command and return the validation losses of its reports. Raises RuntimeError where it fails."""
    output_of(command, OMP_NUM_THREADS="1")
    return [report["val_loss"] for report in read_metrics(output)]


if __name__ == "__main__":
    run_command(ParallelCheckConfig, main)
