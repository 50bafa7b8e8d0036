"""Predict the token after the next as well, as a training aid: Gloeckle et al. 2024, "Better & Faster Large Language Models
via Multi-token Prediction" (arXiv 2404.19737), with a single matrix in place of a transformer block for the further token.

The matrix belongs to the state of a run and not to its model: what is exported, evaluated and averaged never has it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gptkit.base.cli import UserError
from gptkit.distributed.process_group import Parallelism, all_reduce_mean
from gptkit.training.loss import linear_cross_entropy
from gptkit.training.optimizers import FURTHER


class FurtherTokens:
    """A projection from the last hidden states to those that predict the token after the next by the same head."""

    def __init__(self, model: Any, peak_weight: float) -> None:
        head = model.head_weight  # (V, C)
        self.projection = nn.Parameter(torch.eye(head.size(1), dtype=head.dtype, device=head.device))  # (C, C)
        self.peak_weight = self.weight = peak_weight

    def set_weight(self, share_done: float) -> None:
        """Weigh its loss by what is left of the run: all at its start, nothing at its end."""
        self.weight = self.peak_weight * (1 - share_done)

    def add_gradient(
        self, loss: torch.Tensor, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, vocab_size: int
    ) -> torch.Tensor:
        """Return the loss of hidden (B, T, C) and targets (B, T) with its value, and the gradient of both losses.

        So what is reported, and what is skipped as not finite, are judged by the model's own loss; head is (V, C).
        """
        projected = nn.functional.linear(hidden[:, :-1], self.projection)  # (B, T - 1, C)
        further = self.weight * linear_cross_entropy(projected, head, targets[:, 1:], vocab_size)
        return loss + (further - further.detach())

    def average_gradient(self) -> None:
        """Average the projection's gradient over the processes: once, after the backward passes of a step."""
        if self.projection.grad is not None:
            self.projection.grad = all_reduce_mean(self.projection.grad)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the projection by its name in a checkpoint."""
        return {FURTHER: self.projection.detach()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load what `tensors` returned; without it, as where it was turned on later, start from the identity."""
        if FURTHER in tensors:
            self.projection.copy_(tensors[FURTHER])
        else:
            nn.init.eye_(self.projection)


def make_further_tokens(model: Any, weight: float, context_length: int, parallel: Parallelism) -> FurtherTokens | None:
    """Return the projection of a run, or None with a weight of 0. Raises UserError where it cannot be."""
    if not weight:
        return None
    if parallel == "fsdp":
        raise UserError(f"--further_tokens {weight} needs the full matrices; give --parallel ddp, or leave it out")
    if context_length < 2:
        raise UserError(f"--further_tokens {weight} needs a --context_length of 2 or more; this is {context_length}")
    return FurtherTokens(model, weight)
