"""Time causal attention on this CPU, forward and backward: torch's own against gptkit/training/cpu_layers.py, in turns.

The shapes are those of micro-steps of about 2,048 tokens of the smaller models.

    python benchmarks/attention_speed.py
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from machine import log, versions, write_result
from torch.nn import functional as F

from gptkit.base import devices
from gptkit.base.cli import run_command, setting
from gptkit.training.cpu_layers import causal_attention

SHAPES = ((16, 2, 128, 64), (8, 4, 256, 64), (4, 6, 512, 64), (2, 12, 1024, 64))  # batch, heads, time, width of a head
ATTENTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "torch's": F.scaled_dot_product_attention,
    "ours": causal_attention,
}


@dataclass(frozen=True, kw_only=True)
class AttentionSpeedConfig:
    """Time causal attention on this CPU, forward and backward."""

    threads: int = setting(2, "threads that compute", at_least=1)
    n_rounds: int = setting(15, "passes of each, of which the median counts", at_least=1)


def main(config: AttentionSpeedConfig) -> None:
    torch.set_num_threads(config.threads)
    devices.keep_freed_memory(torch.device("cpu"))
    found = {}
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            name = f"{' x '.join(map(str, shape))}, {devices.dtype_name(dtype)}"
            found[name] = measure(shape, dtype, config.n_rounds)
            log(f"{name}: {found[name]}")
    write_result("attention_speed", {"threads": config.threads, "ms": found, **versions("torch")})


def measure(shape: tuple[int, int, int, int], dtype: torch.dtype, n_rounds: int) -> dict[str, float]:
    """Return the median milliseconds of forward and backward of each, and how many times as fast ours is."""
    B, H, T, D = shape
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, T, H, D).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    grad = torch.randn(B, T, H, D).to(dtype).transpose(1, 2)
    times_s: dict[str, list[float]] = {name: [] for name in ATTENTIONS}
    for i in range(n_rounds + 1):
        for name in list(ATTENTIONS)[:: 1 if i % 2 else -1]:
            began = time.perf_counter()
            ATTENTIONS[name](q, k, v, None, 0.0, True).backward(grad)
            times_s[name].append(time.perf_counter() - began)
    medians = {name: 1000 * statistics.median(each[1:]) for name, each in times_s.items()}  # the first one warms up
    return {name: round(value, 3) for name, value in medians.items()} | {
        "times as fast": round(medians["torch's"] / medians["ours"], 2)
    }


if __name__ == "__main__":
    run_command(AttentionSpeedConfig, main)
