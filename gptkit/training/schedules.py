"""What changes from step to step: the learning rate, the weight decay and Muon's momentum, as functions of the step.

The cosine is that of Loshchilov & Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts", equation 5, with
one cycle and no restart; the warmup that of Goyal et al. 2017, section 2.2; a constant rate with a linear cooldown that of
Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations" (arXiv 2405.18392).
"""

import itertools
import math
from typing import Literal

LRSchedule = Literal["cosine", "linear"]
DecaySchedule = Literal["constant", "rising", "dip"]
FIRST_MOMENTUM, MOMENTUM = 0.85, 0.95  # Muon's, at the start and at the end of its warmup, as in modded-nanogpt
# Of github.com/qlabs-eng/slowrun, tiny/train.py: decays of 0.8, 0.8, 0.1 and 0.93 at these shares of the run.
DIP = ((0.0, 1.0), (0.15, 1.0), (0.55, 0.125), (1.0, 1.1625))


def learning_rate(
    step: int,
    *,
    peak: float,
    final: float,
    warmup_steps: int,
    total_steps: int,
    schedule: LRSchedule = "cosine",
    cooldown_share: float = 1.0,
) -> float:
    """Return the learning rate for optimizer step `step`, counted from 0.

    It is peak / warmup_steps at step 0, `peak` at step warmup_steps - 1 (without warmup: at step 0), and `final`
    at the last step, total_steps - 1, and after it. Between, it falls along half a cosine; or it stays, and falls
    linearly over the last steps, cooldown_share of all (fewer where the warmup leaves fewer).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    first = max(warmup_steps - 1, 0)  # the step at the peak
    last = total_steps - 1
    if schedule == "linear":
        first = max(first, last - max(round(cooldown_share * total_steps), 1))
    progress = min(max(step - first, 0) / max(last - first, 1), 1.0)
    falling = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return final + (peak - final) * falling


def decay_multiplier(schedule: DecaySchedule, share_done: float) -> float:
    """Return the factor of all weight decays where share_done (0 … 1) of a run is done.

    rising: from 0 to 2, so that its mean is that of a constant decay; dip: 1, then down to an eighth, and up again.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "rising":
        return 2 * share_done
    for (left, before), (right, after) in itertools.pairwise(DIP):
        if share_done <= right:
            return before + (after - before) * (share_done - left) / (right - left)
    return DIP[-1][1]


def muon_momentum(step: int, warmup_steps: int) -> float:
    """Return Muon's momentum for optimizer step `step`, counted from 0; it rises linearly over warmup_steps."""
    if step >= warmup_steps:
        return MOMENTUM
    return FIRST_MOMENTUM + (MOMENTUM - FIRST_MOMENTUM) * step / warmup_steps
