"""What to train for how long: the model, the batch and the number of steps that fit a time.

Leaves to others the measuring; what stands here is arithmetic.
"""

import math
import time
from collections.abc import Callable

# Of the models tried on one core of a CPU for 2.5 minutes, the best ones saw 1.5 to 2.7 tokens for each parameter of
# their blocks (benchmarks/README.md). Hoffmann et al. 2022 found 20 where the whole model counts and the
# text is English; a small model pays for its vocabulary besides.
TOKENS_PER_PARAMETER = 2.0
# Optimizer steps in a run: 1,000 for a million tokens, where a batch of 1,024 was the best tried, and as many more as the
# cube root of the tokens grows, so that batch and steps both grow. Only the first was measured (benchmarks/README.md).
STEPS, STEPS_TOKENS, STEPS_POWER = 1000, 1e6, 1 / 3
CLOSING_S = 3.0  # of a budget: the last evaluation, sample, checkpoint and curve


def total_steps_in(seconds: float, first_step: int, step_s: float) -> Callable[[int], int]:
    """A function: steps done -> how many a run will have that is to end `seconds` from now.

    step_s is a first guess at the seconds of a step; from then on it is measured, reports included.
    """
    start = time.monotonic()

    def total_steps(n_done: int) -> int:
        elapsed_s = time.monotonic() - start
        mean_s = (elapsed_s + step_s) / (n_done - first_step + 1)
        return n_done + max(round((seconds - elapsed_s) / mean_s), 0)

    return total_steps


def sequences_per_step(total_tokens: float, context_length: int) -> int:
    """The batch for a run of so many tokens: a power of two of sequences, for about the steps that suit it."""
    n_steps = STEPS * (total_tokens / STEPS_TOKENS) ** STEPS_POWER
    return int(2 ** round(math.log2(max(total_tokens / n_steps / context_length, 1))))
