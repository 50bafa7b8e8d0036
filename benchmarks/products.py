"""Measure what a token's matrix products cost on a CPU: the matrices of a GPT-2 of 110M parameters times one row.

Generating reads all weights once per token, so that a plain sum over the same memory is about the least time.
"F.linear" is torch's own product, "packed" oneDNN's with the weights laid out for it, "int8" FBGEMM's
(gptkit/generation/cpu_linear.py). A pass over a draft's tokens has several rows. They take turns.

    python benchmarks/products.py
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from machine import log, versions, write_result
from torch.nn import functional as F

from gptkit.base.cli import run_command, setting
from gptkit.generation.cpu_linear import PACKED_FOR_ROWS, Int8Linear, PackedLinear
from gptkit.generation.generate import N_DRAFT_TOKENS

WIDTH, N_LAYERS, VOCAB_SIZE = 768, 12, 32_000
BLOCK_SHAPES = ((3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH))


@dataclass(frozen=True, kw_only=True)
class ProductsConfig:
    """Measure what the matrix products of one token cost."""

    n_rounds: int = setting(21, "rounds, of which the median counts", at_least=1)


def main(config: ProductsConfig) -> None:
    weights = [torch.randn(shape) for shape in (*BLOCK_SHAPES * N_LAYERS, (VOCAB_SIZE, WIDTH))]
    rows = [torch.randn(1, weight.shape[1]) for weight in weights]
    several = [row.repeat(N_DRAFT_TOKENS + 1, 1) for row in rows]
    packed, int8 = ([kind(weight, None) for weight in weights] for kind in (PackedLinear, Int8Linear))

    def for_each(product: Callable[[int], object]) -> Callable[[], object]:
        return lambda: [product(i) for i in range(len(weights))]

    contenders = {
        "sum": for_each(lambda i: weights[i].sum()),
        "F.linear": for_each(lambda i: F.linear(rows[i], weights[i])),
        "packed": for_each(lambda i: packed[i](rows[i])),
        f"packed, {N_DRAFT_TOKENS + 1} rows": for_each(lambda i: packed[i](several[i])),
        "int8": for_each(lambda i: int8[i](rows[i])),
    }
    times_ms = measure(contenders, config.n_rounds)
    n_bytes = sum(weight.nbytes for weight in weights)
    medians = {name: statistics.median(times) for name, times in times_ms.items()}
    log(f"{n_bytes / 1e6:.0f} MB of weights: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in medians.items()))
    write_result("products", {
        "weights_mb": round(n_bytes / 1e6), "packed_for_rows": PACKED_FOR_ROWS, "threads": torch.get_num_threads(),
        "versions": versions("torch"), "median_ms": medians,
        "times_ms": times_ms,
    })  # fmt: skip


def measure(contenders: dict[str, Callable[[], object]], n_rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of each contender, round by round."""
    times_ms: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.inference_mode():
        for i in range(n_rounds + 1):
            for name, compute in contenders.items():
                start = time.perf_counter()
                compute()
                if i:  # the first round warms up
                    times_ms[name].append(round(1e3 * (time.perf_counter() - start), 2))
    return times_ms


if __name__ == "__main__":
    run_command(ProductsConfig, main)
