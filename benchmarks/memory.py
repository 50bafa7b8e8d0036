"""Peak memory of a training step: ours (GPT-2's architecture with AdamW, and the default recipe) against transformers.

Forward, loss, backward, clipping and the optimizer's step, two steps of each contender (contenders.py; the second has
the optimizer's state from its beginning), each in a process of its own, since a peak never falls. What counts is the
peak less what was resident before the model was built, with libraries loaded and warmed up by a step of a tiny model.
On CUDA it is what PyTorch's allocator gave out. On a CPU each multiplies in float32, also where ours would train in
bfloat16, on CUDA in bfloat16.

    python benchmarks/memory.py
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from contenders import MODERN, OURS, TRANSFORMERS, allocate_as, build, random_batch, train_step
from machine import say, versions, write_result

from gpt_model import GPTConfig
from gptkit.base import devices
from gptkit.base.cli import UserError

N_STEPS = 2
TINY = GPTConfig(64, context_length=8, emb_dim=16, n_layers=1, n_heads=2)
DIMENSIONS = {"n_layers": 12, "emb_dim": 768, "n_heads": 12, "vocab_size": 32_000, "context_length": 1024}


def resident_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def train(name: str, config: GPTConfig, batch_size: int, device: torch.device, n_steps: int) -> None:
    dtype = devices.choose_dtype("auto", device)  # on a CPU float32 for each of them
    contender = build(name, config, device, dtype, compile=False, nanogpt_dir=None)
    batch = random_batch(config, batch_size, device)
    for _ in range(n_steps):
        train_step(contender, *batch, device, dtype)


def measure_one(name: str, config: GPTConfig, batch_size: int, device: torch.device) -> dict[str, float]:
    """The memory of this process, in MiB."""
    allocate_as(name, device)
    train(name, TINY, 1, device, 1)
    before = resident_bytes(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    train(name, config, batch_size, device, N_STEPS)
    peak = devices.peak_memory_bytes(device)
    return {"before_mib": before / 2**20, "peak_mib": peak / 2**20, "step_mib": (peak - before) / 2**20}


def measure(config: GPTConfig, batch_size: int, device: torch.device) -> dict[str, Any]:
    found: dict[str, dict[str, float]] = {}
    for name in (OURS, MODERN, TRANSFORMERS):
        process = subprocess.run([sys.executable, *sys.argv, "--one", name], stdout=subprocess.PIPE)
        if process.returncode:
            sys.exit(f"error: {name} ended with exit code {process.returncode}; what it said stands above")
        found[name] = {key: round(value, 1) for key, value in json.loads(process.stdout).items()}
        say(f"{name}: {found[name]}")
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of a training step, against transformers'")
    for name, value in DIMENSIONS.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the contender that this process measures
    options = parser.parse_args()
    try:
        device = devices.choose_device(options.device)
        config = GPTConfig(**{name: getattr(options, name) for name in DIMENSIONS})
    except (ValueError, UserError) as error:
        parser.error(str(error))
    if device.type != "cuda" and not Path("/proc/self/statm").exists():
        sys.exit("error: memory is read from /proc; run this on Linux")
    if options.one:
        print(json.dumps(measure_one(options.one, config, options.batch_size, device)))
    else:
        write_result("memory", measure(config, options.batch_size, device))


if __name__ == "__main__":
    main()
