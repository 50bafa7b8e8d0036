"""Measure what torch.compile gives a micro-step of training on this CPU: eager and compiled in turns, in one process.

Each size and number of threads has a process of its own, since what an earlier one compiled would be found again; the
compiler's cache is a new, empty one. Behind COMPILED_SPEEDUP and COMPILING_S of gptkit/training/compiler_gain.py.

    python benchmarks/compile_gain.py
"""

import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from contenders import median_micro_step_s, random_batch
from machine import log, versions, write_result

from gpt_model import PRESETS, GPTConfig, GPTModel
from gptkit.base import devices
from gptkit.base.cli import run_command, setting
from gptkit.training.compilation import compile_and_time
from gptkit.training.cpu_layers import quicken


@dataclass(frozen=True, kw_only=True)
class CompileGainConfig:
    """Measure how long torch.compile takes on this CPU, and how much faster training is then."""

    sizes: tuple[str, ...] = setting(("micro", "mini"), "models: names of --model_size")
    threads: tuple[str, ...] = setting(("1", "2"), "threads that compute")
    vocab_size: int = setting(4096, "tokens of the vocabulary", at_least=1)
    batch_tokens: int = setting(4096, "tokens of a micro-step", at_least=1)
    n_rounds: int = setting(10, "micro-steps of each", at_least=1)


def main(config: CompileGainConfig) -> None:
    found = {}
    for size in config.sizes:
        for threads in config.threads:
            name = f"{size}, {threads} threads"
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found[name] = pool.submit(measure, config, size, int(threads)).result()
            log(f"{name}: {found[name]}")
    write_result("compile_gain", {"batch_tokens": config.batch_tokens, "runs": found, **versions("torch")})


def measure(config: CompileGainConfig, size: str, threads: int) -> dict[str, Any]:
    """Return the seconds that compiling takes, and those of a micro-step, forward and backward, eager and compiled."""
    torch.set_num_threads(threads)
    cache = tempfile.TemporaryDirectory()  # removed when the process ends
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name
    device = torch.device("cpu")
    devices.keep_freed_memory(device)
    dtype = devices.choose_dtype("auto", device, training=True)
    preset: dict[str, Any] = PRESETS[size]
    dimensions = GPTConfig(config.vocab_size, arch="modern", **preset)
    n_sequences = max(config.batch_tokens // dimensions.context_length, 1)
    batch = random_batch(dimensions, n_sequences, device)
    model = quicken(GPTModel(dimensions))
    runs, seconds = {}, []
    for name, compiled in (("eager", False), ("compiled", True)):
        began = time.perf_counter()
        loss, _ = compile_and_time(model, config.vocab_size, compiled, batch, device, dtype)
        runs[name] = model, loss
        seconds.append(time.perf_counter() - began)
    compile_s = seconds[1] - 2 * seconds[0]  # it has timed both
    medians = median_micro_step_s(runs, batch, device, dtype, config.n_rounds)
    return {
        "dtype": devices.dtype_name(dtype),
        "compile_s": round(compile_s, 1),
        "micro_step_s": {name: round(median, 4) for name, median in medians.items()},
        "times_as_fast": round(medians["eager"] / medians["compiled"], 3),
    }


if __name__ == "__main__":
    run_command(CompileGainConfig, main)
