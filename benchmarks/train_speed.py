"""Tokens a second of a whole training step: ours against transformers, llms-from-scratch and nanoGPT.

A step is forward, loss, backward, clipping to norm 1, the optimizer's step and the gradients' end, on random tokens.
All contenders (contenders.py) live in one process and take turns, a few steps each, in an order that turns too,
because the machines are shared and slow down and speed up. ours_modern_muon, the default recipe, is another model: its
row is there to see what it costs. A peer that is not installed, or fails, is told as missing.

Each multiplies in the type that its project chooses for the device (contenders.dtype_as): on a CPU that multiplies
bfloat16, ours does and the peers do not. --dtype gives all of them the same one.

    python benchmarks/train_speed.py --nanogpt_dir CHECKOUT
    python benchmarks/train_speed.py --nanogpt_dir CHECKOUT --vocab_size 4096
    python benchmarks/train_speed.py --nanogpt_dir CHECKOUT --dtype float32
    python benchmarks/train_speed.py --size 12x768 --context_length 1024 --batch_size 16 --dtype bfloat16 --compile
"""

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import contenders
import torch
from contenders import LLMS_FROM_SCRATCH, MODERN, NANOGPT, OURS, TRANSFORMERS, Contender, build, train_step
from machine import say, versions, write_result

from gpt_model import GPTConfig
from gptkit.base import devices
from gptkit.base.cli import UserError
from gptkit.training.planning import flops_per_token

N_WARM_UP = 2  # steps of each before the first round; the first one compiles
CONTENDERS = OURS, TRANSFORMERS, MODERN, NANOGPT, LLMS_FROM_SCRATCH
HEAD_WIDTH = 64  # GPT-2's, where --n_heads does not say otherwise
Batch = tuple[torch.Tensor, torch.Tensor]


def warm_up(
    config: GPTConfig, options: argparse.Namespace, batch: Batch, device: torch.device, dtypes: dict[str, torch.dtype]
) -> tuple[dict[str, Contender], dict[str, list[float]], dict[str, str]]:
    """The contenders that can run, the losses of each so far, and why the others cannot."""
    ready: dict[str, Contender] = {}
    losses: dict[str, list[float]] = {}
    missing: dict[str, str] = {}
    for name, dtype in dtypes.items():
        if name == NANOGPT and options.nanogpt_dir is None:
            missing[name] = "no --nanogpt_dir"
            continue
        start = time.monotonic()
        try:
            torch.manual_seed(0)
            contenders.allocate_as(name, device)
            contender = build(name, config, device, dtype, options.compile, options.nanogpt_dir)
            losses[name] = [train_step(contender, *batch, device, dtype).item() for _ in range(N_WARM_UP)]
            ready[name] = contender
            say(f"{name}: ready in {time.monotonic() - start:.1f} s")
        except Exception as error:  # an error of others' code has any class
            if name in (OURS, MODERN):
                raise
            missing[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            say(f"{name}: missing, {missing[name]}")
    return ready, losses, missing


def measure_rounds(
    ready: dict[str, Contender],
    losses: dict[str, list[float]],
    options: argparse.Namespace,
    batch: Batch,
    device: torch.device,
    dtypes: dict[str, torch.dtype],
) -> dict[str, list[float]]:
    """The seconds of a step of each contender, round by round.

    The first step of a turn is not counted: in it memory that another contender kept is given back, or what another
    gave back is taken anew, which happens in no run of its own.
    """
    times_s: dict[str, list[float]] = {name: [] for name in ready}
    names = list(ready)
    for i in range(options.n_rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            gc.collect()  # so that nobody pays for another's leavings
            contenders.allocate_as(name, device)
            train_step(ready[name], *batch, device, dtypes[name])
            devices.synchronize(device)
            start = time.perf_counter()
            for _ in range(options.steps_a_round):
                loss = train_step(ready[name], *batch, device, dtypes[name])
            devices.synchronize(device)
            times_s[name].append((time.perf_counter() - start) / options.steps_a_round)
            losses[name].append(loss.item())
        say(f"round {i + 1}/{options.n_rounds}: " + ", ".join(f"{n} {t[-1]:.3f} s" for n, t in times_s.items()))
    return times_s


def goals(speed: dict[str, float], mfu: dict[str, str], vocab_size: int, device: torch.device) -> dict[str, bool]:
    found = {}
    if NANOGPT in speed:
        least = 1.25 if vocab_size >= 32_000 else 1.1
        found[f"at least {least} times nanoGPT"] = speed[OURS] >= least * speed[NANOGPT]
    if device.type == "cuda" and TRANSFORMERS in speed:
        found["at least 1.5 times transformers"] = speed[OURS] >= 1.5 * speed[TRANSFORMERS]
    if mfu[OURS].endswith("%"):
        found["MFU of at least 45 %"] = float(mfu[OURS].rstrip("%")) >= 45
    return found


def measure(config: GPTConfig, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    batch = contenders.random_batch(config, options.batch_size, device)
    dtypes = {name: contenders.dtype_as(name, options.dtype, device) for name in CONTENDERS}
    ready, losses, missing = warm_up(config, options, batch, device, dtypes)
    times_s = measure_rounds(ready, losses, options, batch, device, dtypes)
    speed = {name: batch[0].numel() / statistics.median(values) for name, values in times_s.items()}
    # Of the architecture, whoever runs it: each GPT-2 has the same matrices.
    per_token = {name: flops_per_token(ready[MODERN if name == MODERN else OURS][0].config) for name in ready}
    flops = {name: value * per_token[name] for name, value in speed.items()}
    mfu = {name: devices.format_mfu(value, device, dtypes[name]) for name, value in flops.items()}
    return {
        "size": f"{config.n_layers}x{config.emb_dim}",
        "n_heads": config.n_heads,
        "vocab_size": config.vocab_size,
        "batch": f"{options.batch_size} x {config.context_length}",
        "device": devices.describe_device(device),
        "dtype": {name: devices.dtype_name(dtypes[name]) for name in ready},
        "compile": options.compile,
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
        "goals": goals(speed, mfu, config.vocab_size, device),
        "losses_first_and_last": {name: [round(v[0], 3), round(v[-1], 3)] for name, v in losses.items()},
        "times_s": {name: [round(value, 6) for value in values] for name, values in times_s.items()},
    }


def size(text: str) -> tuple[int, int]:
    n_layers, _, emb_dim = text.partition("x")
    return int(n_layers), int(emb_dim)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens a second of a training step, against the peers")
    parser.add_argument("--size", type=size, default=(4, 256), help="layers x width (default: 4x256)")
    parser.add_argument("--n_heads", type=int, help=f"attention heads (default: width / {HEAD_WIDTH})")
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--context_length", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--n_rounds", type=int, default=7)
    parser.add_argument("--steps_a_round", type=int, default=2)
    parser.add_argument("--nanogpt_dir", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--dtype", choices=["auto", *devices.DTYPES], default="auto", help="of matrix products (auto: as each project)"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile every contender")
    options = parser.parse_args()
    n_layers, emb_dim = options.size
    try:
        device = devices.choose_device(options.device)
        n_heads = options.n_heads or max(emb_dim // HEAD_WIDTH, 1)
        config = GPTConfig(options.vocab_size, options.context_length, emb_dim, n_layers, n_heads)
    except (ValueError, UserError) as error:
        parser.error(str(error))
    if options.nanogpt_dir and not (options.nanogpt_dir / "model.py").is_file():
        sys.exit(f"error: --nanogpt_dir {options.nanogpt_dir} holds no model.py; name a checkout of nanoGPT")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as pretraining.py, and as nanoGPT's train.py
    alike = "" if options.dtype == "auto" else f"_{options.dtype}"
    write_result(f"train_speed_{config.vocab_size}{alike}", measure(config, options, device))


if __name__ == "__main__":
    main()
