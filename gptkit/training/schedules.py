"""The learning rate of each step: linear warmup, then half a cosine down to the final rate.

Source: Loshchilov & Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts", equation 5, with one
cycle and no restart; the warmup is that of Goyal et al. 2017, section 2.2.
"""

import math


def learning_rate(step: int, *, peak: float, final: float, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate for optimizer step `step`, counted from 0.

    It is peak / warmup_steps at step 0, `peak` at step warmup_steps - 1 (without warmup: at step 0), and `final`
    at the last step, total_steps - 1, and after it.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    first = max(warmup_steps - 1, 0)  # the step at the peak
    progress = min((step - first) / max(total_steps - 1 - first, 1), 1.0)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))
