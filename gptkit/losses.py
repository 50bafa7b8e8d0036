"""The loss of a language model.

Shapes: B batch, T time, V vocabulary.
"""

import torch
from torch.nn import functional as F


def next_token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats a token: logits (B, T, V), targets (B, T) int64 -> scalar float32.

    Computed in float32 also where the logits are bfloat16, under autocast and outside of it.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
