"""Measure from which model size on a draft pays, and with how many draft tokens: tokens/s on a CPU, batch 1.

Models and sampling are those of generation_speed.py: random weights, top-k 40. Each size generates without a draft and
with several numbers of draft tokens, in turns whose order rotates.

    python benchmarks/draft_sizes.py
"""

import statistics
from dataclasses import dataclass
from typing import Any

from generation_speed import measure, ours, random_model
from machine import log, versions, write_result

from gpt_model import GPTConfig
from gptkit.base.cli import run_command, setting
from gptkit.generation import cpu_linear
from gptkit.training.planning import n_block_parameters

SIZES = ((4, 256), (6, 384), (8, 512), (12, 768))  # layers, width
VOCAB_SIZE, CONTEXT_LENGTH, N_PROMPT = 32_000, 512, 32
N_DRAFT_TOKENS = (3, 4, 5, 6, 7)


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """Measure from which model size on a draft pays."""

    n_rounds: int = setting(9, "rounds, of which the median counts", at_least=1)
    n_new: int = setting(64, "new tokens in each round", at_least=1)


def main(config: DraftConfig) -> None:
    cpu_linear.MIN_DRAFT_ENTRIES = 0
    result = {f"{n_layers}x{emb_dim}": measure_size(n_layers, emb_dim, config) for n_layers, emb_dim in SIZES}
    write_result("draft_sizes", {"vocab_size": VOCAB_SIZE, "versions": versions("torch"), "sizes": result})


def measure_size(n_layers: int, emb_dim: int, config: DraftConfig) -> dict[str, Any]:
    """Return the tokens/s of one size of model, without a draft and with each number of draft tokens."""
    model = random_model(GPTConfig(VOCAB_SIZE, CONTEXT_LENGTH, emb_dim, n_layers, emb_dim // 64))
    draft = cpu_linear.prepare_for_generation(model, with_draft=True)
    contenders = {"none": ours(model, None)} | {f"{n} guesses": ours(model, draft, n) for n in N_DRAFT_TOKENS}
    found = measure(contenders, 1, N_PROMPT, config.n_new, VOCAB_SIZE, config.n_rounds)
    n_entries = n_block_parameters(model.config) + model.head_weight.numel()
    medians = {name: round(statistics.median(values), 1) for name, values in found.items()}
    log(f"{n_layers}x{emb_dim}, {n_entries / 1e6:.0f} M: " + ", ".join(f"{n} {v}" for n, v in medians.items()))
    return {
        "matrix_entries": n_entries,
        "median_tokens_per_s": medians,
        "to_none": {name: round(value / medians["none"], 2) for name, value in medians.items()},
        "rounds": {name: [round(value, 1) for value in values] for name, values in found.items()},
    }


if __name__ == "__main__":
    run_command(DraftConfig, main)
