"""Measure tokens per second of a full training step: ours against transformers, llms-from-scratch, nanoGPT and nanochat.

A step is forward, loss, backward, clipping to norm 1, the optimizer's step and dropping the gradients, on random tokens.
All contenders (contenders.py) live in one process and take turns, a few steps each, in an order that rotates, because
the machines are shared and their speed changes. ours_modern_muon, the default recipe, and nanochat, with its own optimizer,
are other models: their rows show what these cost. A peer that is not installed, or fails, is reported as missing.

Each multiplies in the type that its project chooses for the device (contenders.dtype_as): on a CPU that multiplies
bfloat16, ours does and the peers do not. --dtype gives all of them the same type.

    python benchmarks/train_speed.py --nanogpt_dir CHECKOUT --nanochat_dir CHECKOUT
    python benchmarks/train_speed.py --nanogpt_dir CHECKOUT --vocab_size 4096
    python benchmarks/train_speed.py --nanogpt_dir CHECKOUT --dtype float32
    python benchmarks/train_speed.py --size 12x768 --context_length 1024 --batch_size 16 --dtype bfloat16 --compile
"""

import gc
import re
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import contenders
import torch
from contenders import LLMS_FROM_SCRATCH, MODERN, NANOCHAT, NANOGPT, OURS, TRANSFORMERS, Contender, build, train_step
from machine import log, versions, write_result
from models import make_config
from peers import compilation
from side_by_side import CHECKOUTS, check_checkout

from gpt_model import GPTConfig
from gptkit.base import devices
from gptkit.base.cli import UserError, first_line, run_command, setting
from gptkit.training.planning import flops_per_token

N_WARM_UP = 2  # steps of each before the first round; the first one compiles
CONTENDERS = OURS, TRANSFORMERS, MODERN, NANOGPT, NANOCHAT, LLMS_FROM_SCRATCH
HEAD_WIDTH = 64  # GPT-2's, unless --n_heads is given
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class TrainSpeedConfig:
    """Measure tokens per second of a training step, against the peers."""

    size: str = setting("4x256", "layers x width", group="model")
    n_heads: int | None = setting(None, f"attention heads (default: width / {HEAD_WIDTH})", at_least=1, group="model")
    vocab_size: int = setting(32_000, "tokens of the vocabulary", group="model")
    context_length: int = setting(256, "tokens of a sequence", group="model")
    batch_size: int = setting(8, "sequences in a step", at_least=1, group="measurement")
    n_rounds: int = setting(7, "rounds, of which the median counts", at_least=1, group="measurement")
    steps_a_round: int = setting(2, "steps of each contender in a round", at_least=1, group="measurement")
    nanogpt_dir: str | None = setting(None, "a checkout of nanoGPT", group="measurement")
    nanochat_dir: str | None = setting(None, "a checkout of nanochat", group="measurement")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", group="device")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "type of matrix products (auto: as each project)", group="device"
    )
    compile: bool = setting(False, "torch.compile every contender", group="device")


def main(config: TrainSpeedConfig) -> None:
    device = devices.choose_device(config.device)
    dimensions = model_dimensions(config)
    given = {NANOGPT: config.nanogpt_dir, NANOCHAT: config.nanochat_dir}
    checkouts = {name: Path(folder).resolve() for name, folder in given.items() if folder}
    for name in checkouts:
        check_checkout(name, given[name], *CHECKOUTS[name])
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as pretraining.py, and as nanoGPT's train.py
    suffix = "" if config.dtype == "auto" else f"_{config.dtype}"
    with compilation(config.compile):
        result = measure(dimensions, config, checkouts, device)
    write_result(f"train_speed_{config.vocab_size}{suffix}", result)


def model_dimensions(config: TrainSpeedConfig) -> GPTConfig:
    """Return the dimensions that the flags describe. Raises UserError."""
    match = re.fullmatch(r"(\d+)x(\d+)", config.size)
    if not match:
        raise UserError(f"--size {config.size} is not layers x width; give something like 4x256")
    n_layers, emb_dim = map(int, match.groups())
    n_heads = config.n_heads or max(emb_dim // HEAD_WIDTH, 1)
    return make_config(
        vocab_size=config.vocab_size,
        context_length=config.context_length,
        emb_dim=emb_dim,
        n_layers=n_layers,
        n_heads=n_heads,
    )


def measure(
    dimensions: GPTConfig, config: TrainSpeedConfig, checkouts: Mapping[str, Path], device: torch.device
) -> dict[str, Any]:
    """Warm up all contenders, measure them in turns, and return the figures."""
    torch.manual_seed(0)
    batch = contenders.random_batch(dimensions, config.batch_size, device)
    dtypes = {name: contenders.dtype_as(name, config.dtype, device) for name in CONTENDERS}
    ready, losses, missing = warm_up(dimensions, config.compile, checkouts, batch, device, dtypes)
    times_s = measure_rounds(ready, losses, config, batch, device, dtypes)
    speed = {name: batch[0].numel() / statistics.median(values) for name, values in times_s.items()}
    # These are the architecture's, whoever runs it: each GPT-2 has the same matrices.
    counted = {name: flops_per_token(ready[MODERN if name == MODERN else OURS][0].config) for name in ready}
    counted.pop(NANOCHAT, None)
    flops = {name: speed[name] * per_token for name, per_token in counted.items()}
    mfu = {name: devices.format_mfu(value, device, dtypes[name]) for name, value in flops.items()}
    return {
        "size": f"{dimensions.n_layers}x{dimensions.emb_dim}",
        "n_heads": dimensions.n_heads,
        "vocab_size": dimensions.vocab_size,
        "batch": f"{config.batch_size} x {dimensions.context_length}",
        "device": devices.describe_device(device),
        "dtype": {name: devices.dtype_name(dtypes[name]) for name in ready},
        "compile": config.compile,
        "versions": versions("torch", "transformers", "llms-from-scratch"),
        "n_parameters": {name: sum(p.numel() for p in model.parameters()) for name, (model, _, _) in ready.items()},
        "median_tokens_per_s": {name: round(value, 1) for name, value in speed.items()},
        "ours_to_by_round": {
            name: round(statistics.median(t / mine for t, mine in zip(times, times_s[OURS], strict=True)), 3)
            for name, times in times_s.items()
            if name != OURS
        },
        "ours_to": {name: round(speed[OURS] / value, 3) for name, value in speed.items() if name != OURS},
        "gflop_per_s": {name: round(value / 1e9, 1) for name, value in flops.items()},
        "mfu": mfu,
        "missing": missing,
        "goals": goals(speed, mfu, dimensions.vocab_size, device),
        "losses_first_and_last": {name: [round(v[0], 3), round(v[-1], 3)] for name, v in losses.items()},
        "times_s": {name: [round(value, 6) for value in values] for name, values in times_s.items()},
    }


def warm_up(
    dimensions: GPTConfig,
    compile: bool,
    checkouts: Mapping[str, Path],
    batch: Batch,
    device: torch.device,
    dtypes: dict[str, torch.dtype],
) -> tuple[dict[str, Contender], dict[str, list[float]], dict[str, str]]:
    """Return the contenders that can run, the losses of each so far, and why the others cannot."""
    ready: dict[str, Contender] = {}
    losses: dict[str, list[float]] = {}
    missing: dict[str, str] = {}
    for name, dtype in dtypes.items():
        if name in CHECKOUTS and name not in checkouts:
            missing[name] = f"no --{name}_dir"
            continue
        start = time.monotonic()
        try:
            torch.manual_seed(0)
            contenders.allocate_as(name, device)
            contender = build(name, dimensions, device, dtype, compile, checkouts)
            losses[name] = [train_step(contender, *batch, device, dtype).item() for _ in range(N_WARM_UP)]
            ready[name] = contender
            log(f"{name}: ready in {time.monotonic() - start:.1f} s")
        except Exception as error:  # an error of others' code has any class
            if name in (OURS, MODERN):
                raise
            missing[name] = f"{type(error).__name__}: {first_line(error)}"
            log(f"{name}: missing, {missing[name]}")
    return ready, losses, missing


def measure_rounds(
    ready: dict[str, Contender],
    losses: dict[str, list[float]],
    config: TrainSpeedConfig,
    batch: Batch,
    device: torch.device,
    dtypes: dict[str, torch.dtype],
) -> dict[str, list[float]]:
    """Return the seconds of a step of each contender, round by round.

    The first step of a turn is not counted: in it memory that another contender kept is returned to the system, or
    memory that another returned is taken again, which happens in no run that trains alone.
    """
    times_s: dict[str, list[float]] = {name: [] for name in ready}
    names = list(ready)
    for i in range(config.n_rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            gc.collect()  # so that nobody pays for another's garbage
            contenders.allocate_as(name, device)
            train_step(ready[name], *batch, device, dtypes[name])
            devices.synchronize(device)
            start = time.perf_counter()
            for _ in range(config.steps_a_round):
                loss = train_step(ready[name], *batch, device, dtypes[name])
            devices.synchronize(device)
            times_s[name].append((time.perf_counter() - start) / config.steps_a_round)
            losses[name].append(loss.item())
        log(f"round {i + 1}/{config.n_rounds}: " + ", ".join(f"{n} {t[-1]:.3f} s" for n, t in times_s.items()))
    return times_s


def goals(speed: dict[str, float], mfu: dict[str, str], vocab_size: int, device: torch.device) -> dict[str, bool]:
    """Return which goals were met, of those that this measurement can judge."""
    found = {}
    if NANOGPT in speed:
        least = 1.25 if vocab_size >= 32_000 else 1.1
        found[f"at least {least} times nanoGPT"] = speed[OURS] >= least * speed[NANOGPT]
    if device.type == "cuda" and TRANSFORMERS in speed:
        found["at least 1.5 times transformers"] = speed[OURS] >= 1.5 * speed[TRANSFORMERS]
    if mfu[OURS].endswith("%"):
        found["MFU of at least 45 %"] = float(mfu[OURS].rstrip("%")) >= 45
    return found


if __name__ == "__main__":
    run_command(TrainSpeedConfig, main)
