"""Do several processes, and a sharded model, give this machine's run of one process? A true or false for each way.

One process is started plainly; then by torchrun as many as there are GPUs (on a machine with one GPU, or none, just one)
with FSDP2, FSDP2 compiled and with activation checkpointing, and, where there are several, DDP. All take the same
sequences a step. The validation losses of all reports are compared: in bfloat16 they differ by the order of sums.

    python benchmarks/parallel_check.py
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import ROOT, say, script, torchrun, versions, write_result

from gptkit.base import devices
from gptkit.base.cli import UserError

SAMPLE = ROOT / "dataset" / "sample"
TINY = {"n_layers": 1, "emb_dim": 32, "n_heads": 2, "context_length": 32}
SMALL = {"n_layers": 4, "emb_dim": 256, "n_heads": 4, "context_length": 256}
MOST_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 0.02}  # nats a token


def run(command: list[str], output: Path) -> list[float]:
    """The validation losses of a run. Raises RuntimeError with what it said last where it fails."""
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=variables, capture_output=True, encoding="utf-8")
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {process.stderr[-1500:]}")
    return [json.loads(line)["val_loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def check_all(device: torch.device, tiny: bool, work: Path) -> dict[str, Any]:
    n = max(torch.cuda.device_count(), 1) if device.type == "cuda" else 1
    prepared = {"jsonl_path": SAMPLE / "sample.jsonl", "output_dir": work / "001"}
    subprocess.run(script("dataset/prepare_aozora_jsonl.py", **prepared), check=True, stdout=subprocess.DEVNULL)
    flags: dict[str, object] = {
        "tokenizer": "sentencepiece", "tokenizer_path": SAMPLE / "tokenizer", "data_dir": work / "001",
        "pretokenized_dir": work / "tokens", "max_steps": 8, "eval_freq": 4, "eval_iter": 2, "batch_size": 4,
        "bigram_steps": 2, "device": device.type, **(TINY if tiny else SMALL),
    }  # fmt: skip

    def command(output: Path, accum: int, *more: str) -> list[str]:
        more = ("--use_pretokenized", *more)
        return [*script("pretraining.py", **flags, output_dir=output, grad_accum_steps=accum), *more]

    ways: dict[str, tuple[str, ...]] = {"fsdp": ("--parallel", "fsdp", "--no-compile")}
    if not tiny:
        compiled = ("--compile", "--activation_checkpointing")
        ways["fsdp, compiled, activation checkpointing"] = ("--parallel", "fsdp", *compiled)
    if n > 1:
        ways["ddp"] = ("--parallel", "ddp", "--no-compile")
    alone = run(command(work / "alone", n, "--no-compile"), work / "alone")
    dtype = devices.choose_dtype("auto", device, training=True)
    checks: dict[str, bool] = {}
    differences: dict[str, float] = {}
    problems: dict[str, str] = {}
    for name, more in ways.items():
        try:
            output = work / name.replace(", ", "_").replace(" ", "_")
            found = run(torchrun(n, command(output, 1, *more)), output)
            differences[name] = max(abs(one - other) for one, other in zip(found, alone, strict=True))
            checks[name] = differences[name] <= MOST_DIFFERENCE[dtype]
        except (RuntimeError, ValueError, OSError) as error:  # the other ways are worth knowing
            checks[name], problems[name] = False, f"{type(error).__name__}: {error}"
        say(f"{'ok    ' if checks[name] else 'FAILED'} {name}: {differences.get(name, problems.get(name))}")
    return {
        "device": devices.describe_device(device),
        "processes": n,
        "versions": versions("torch"),
        "checks": checks,
        "problems": problems,
        "val_losses_of_one_process": alone,
        "largest_difference": differences,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Several processes and a sharded model against one process")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand parameters, one way")
    options = parser.parse_args()
    try:
        device = devices.choose_device(options.device)
    except (ValueError, UserError) as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder:
        write_result("parallel_check", check_all(device, options.tiny, Path(folder)))


if __name__ == "__main__":
    main()
