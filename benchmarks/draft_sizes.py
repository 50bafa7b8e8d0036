"""From which size of a model on a draft pays, and how many guesses at a time: tokens a second on a CPU, batch 1.

As generation_speed.py: random weights, top-k 40. Each size is written without a draft and with some numbers of guesses,
in turns, whose order turns too.

    python benchmarks/draft_sizes.py
"""

import argparse
import statistics

from generation_speed import measure, ours, random_model
from machine import say, versions, write_result

from gpt_model import GPTConfig
from gptkit.generation import cpu_linear
from gptkit.training.planning import n_block_parameters

SIZES = ((4, 256), (6, 384), (8, 512), (12, 768))  # layers, width
VOCAB, CONTEXT = 32_000, 512
N_GUESSES = (3, 4, 5, 6, 7)


def main() -> None:
    parser = argparse.ArgumentParser(description="From which size on a draft pays")
    parser.add_argument("--n_rounds", type=int, default=9)
    parser.add_argument("--n_new", type=int, default=64)
    parser.set_defaults(vocab_size=VOCAB, n_prompt=32)
    options = parser.parse_args()
    cpu_linear.MIN_DRAFT_ENTRIES = 0
    result = {}
    for n_layers, emb_dim in SIZES:
        model = random_model(GPTConfig(VOCAB, CONTEXT, emb_dim, n_layers, emb_dim // 64))
        draft = cpu_linear.prepare_for_generation(model, with_draft=True)
        contenders = {"none": ours(model, None)} | {f"{n} guesses": ours(model, draft, n) for n in N_GUESSES}
        found = measure(contenders, options, batch_size=1)
        n_matrix = n_block_parameters(model.config) + model.head_weight.numel()
        medians = {name: round(statistics.median(values), 1) for name, values in found.items()}
        result[f"{n_layers}x{emb_dim}"] = {
            "matrix_entries": n_matrix,
            "median_tokens_per_s": medians,
            "to_none": {name: round(value / medians["none"], 2) for name, value in medians.items()},
            "rounds": {name: [round(value, 1) for value in values] for name, values in found.items()},
        }
        say(f"{n_layers}x{emb_dim}, {n_matrix / 1e6:.0f} M: " + ", ".join(f"{n} {v}" for n, v in medians.items()))
    write_result("draft_sizes", {"vocab_size": VOCAB, "versions": versions("torch"), "sizes": result})


if __name__ == "__main__":
    main()
