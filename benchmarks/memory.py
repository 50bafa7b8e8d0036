"""Measure peak memory of a training step: ours (GPT-2 with AdamW, and the default recipe) against transformers.

A step is forward, loss, backward, clipping and the optimizer's step. Each contender (contenders.py) takes two, since
only the second holds the optimizer's state from its beginning, and runs in its own process, since a peak never falls.
The figure is the peak less what was resident before the model was built, with libraries loaded and warmed up by a step
of a tiny model. On CUDA it is what PyTorch's allocator gave out. On a CPU all multiply in float32, even where ours would
train in bfloat16, and on CUDA in bfloat16.

    python benchmarks/memory.py
"""

import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contenders import MODERN, OURS, TRANSFORMERS, allocate_as, build, random_batch, train_step
from machine import log, versions, write_result
from models import make_config

from gpt_model import GPTConfig
from gptkit.base import devices
from gptkit.base.cli import UserError, run_command, setting

N_STEPS = 2
TINY = GPTConfig(64, context_length=8, emb_dim=16, n_layers=1, n_heads=2)


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Measure peak memory of a training step, against transformers'."""

    n_layers: int = setting(12, "blocks")
    emb_dim: int = setting(768, "width")
    n_heads: int = setting(12, "attention heads")
    vocab_size: int = setting(32_000, "tokens of the vocabulary")
    context_length: int = setting(1024, "tokens of a sequence")
    batch_size: int = setting(4, "sequences in a step", at_least=1)
    device: str = setting("cpu", "auto, cpu, cuda or cuda:N")
    one: str | None = setting(
        None,
        "measure this contender in this process; the benchmark itself gives it",
        choices=(OURS, MODERN, TRANSFORMERS),
    )


def main(config: MemoryConfig) -> None:
    device = devices.choose_device(config.device)
    dimensions = make_config(
        vocab_size=config.vocab_size,
        context_length=config.context_length,
        emb_dim=config.emb_dim,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
    )
    if device.type != "cuda" and not Path("/proc/self/statm").exists():
        raise UserError("memory is read from /proc; run this on Linux")
    if config.one:
        print(json.dumps(measure_one(config.one, dimensions, config.batch_size, device)))
    else:
        write_result("memory", measure(dimensions, config.batch_size, device))


def measure(config: GPTConfig, batch_size: int, device: torch.device) -> dict[str, Any]:
    """Measure each contender in a process of its own."""
    found: dict[str, dict[str, float]] = {}
    for name in (OURS, MODERN, TRANSFORMERS):
        process = subprocess.run([sys.executable, *sys.argv, "--one", name], stdout=subprocess.PIPE)
        if process.returncode:
            sys.exit(f"error: {name} ended with exit code {process.returncode}; its own message stands above")
        found[name] = {key: round(value, 1) for key, value in json.loads(process.stdout).items()}
        log(f"{name}: {found[name]}")
    share = {name: found[name]["step_mib"] / found[TRANSFORMERS]["step_mib"] for name in (OURS, MODERN)}
    return {
        "size": f"{config.n_layers}x{config.emb_dim}",
        "vocab_size": config.vocab_size,
        "batch": f"{batch_size} x {config.context_length}",
        "device": devices.describe_device(device),
        "versions": versions("torch", "transformers"),
        "memory": found,
        "share_of_transformers": {name: round(value, 3) for name, value in share.items()},
        "goals": {"ours at most 70 % of transformers'": share[OURS] <= 0.7},
    }


def measure_one(name: str, config: GPTConfig, batch_size: int, device: torch.device) -> dict[str, float]:
    """Train a contender in this process, and return the memory of it, in MiB."""
    allocate_as(name, device)
    train(name, TINY, 1, device, 1)
    before = resident_bytes(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    train(name, config, batch_size, device, N_STEPS)
    peak = devices.peak_memory_bytes(device)
    return {"before_mib": before / 2**20, "peak_mib": peak / 2**20, "step_mib": (peak - before) / 2**20}


def train(name: str, config: GPTConfig, batch_size: int, device: torch.device, n_steps: int) -> None:
    """Take some steps with a new contender."""
    dtype = devices.choose_dtype("auto", device)  # on a CPU float32 for each of them
    contender = build(name, config, device, dtype, compile=False, checkouts={})
    batch = random_batch(config, batch_size, device)
    for _ in range(n_steps):
        train_step(contender, *batch, device, dtype)


def resident_bytes(device: torch.device) -> int:
    """Return the memory that is in use now: that of tensors on CUDA, elsewhere that of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    run_command(MemoryConfig, main)
