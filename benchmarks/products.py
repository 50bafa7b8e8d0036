"""What a token's products cost on a CPU: the matrices of a GPT-2 of 110M parameters times one row, by several products.

Writing reads all weights once a token, so a plain sum over the same memory is about the least. torch's own product is
F.linear; "packed" is oneDNN's with the weights laid out for it, "int8" FBGEMM's (gptkit/quick_linear.py). Several rows
at once are what reads a draft's guesses. They take turns.

    python benchmarks/products.py
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from machine import say, versions, write_result
from torch.nn import functional as F

from gptkit.generation.cpu_linear import PACKED_FOR_ROWS, Int8Linear, PackedLinear
from gptkit.generation.generate import N_DRAFT_TOKENS

WIDTH, N_LAYERS, VOCAB = 768, 12, 32_000
OF_A_BLOCK = ((3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH))


def main() -> None:
    parser = argparse.ArgumentParser(description="What the products of one token cost")
    parser.add_argument("--n_rounds", type=int, default=21)
    options = parser.parse_args()
    weights = [torch.randn(shape) for shape in (*OF_A_BLOCK * N_LAYERS, (VOCAB, WIDTH))]
    rows = [torch.randn(1, weight.shape[1]) for weight in weights]
    several = [row.repeat(N_DRAFT_TOKENS + 1, 1) for row in rows]
    packed, int8 = ([kind(weight, None) for weight in weights] for kind in (PackedLinear, Int8Linear))

    def each(work: Callable[[int], object]) -> Callable[[], object]:
        return lambda: [work(i) for i in range(len(weights))]

    contenders = {
        "sum": each(lambda i: weights[i].sum()),
        "F.linear": each(lambda i: F.linear(rows[i], weights[i])),
        "packed": each(lambda i: packed[i](rows[i])),
        f"packed, {N_DRAFT_TOKENS + 1} rows": each(lambda i: packed[i](several[i])),
        "int8": each(lambda i: int8[i](rows[i])),
    }
    times_ms: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.inference_mode():
        for i in range(options.n_rounds + 1):
            for name, work in contenders.items():
                start = time.perf_counter()
                work()
                if i:  # the first round warms up
                    times_ms[name].append(round(1e3 * (time.perf_counter() - start), 2))
    n_bytes = sum(weight.nbytes for weight in weights)
    medians = {name: statistics.median(times) for name, times in times_ms.items()}
    say(f"{n_bytes / 1e6:.0f} MB of weights: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in medians.items()))
    write_result("products", {
        "weights_mb": round(n_bytes / 1e6), "packed_for_rows": PACKED_FOR_ROWS, "threads": torch.get_num_threads(),
        "versions": versions("torch"), "median_ms": medians,
        "times_ms": times_ms,
    })  # fmt: skip


if __name__ == "__main__":
    main()
