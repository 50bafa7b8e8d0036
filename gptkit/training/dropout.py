"""Dropout on a CPU, with one random number for four elements.

torch draws one for each, in a single thread: with two threads a compiled micro-step of `mini` took 1.18 times as long with
it as without, and 1.06 times as long with this (benchmarks/dropout_cost.py, dropout 0.1).
"""

import torch
from torch import nn

STEPS = 1 << 16  # of the probability: 16 bits are compared with it
PER_WORD = 4  # of these in a random number of 64 bits


class WordDropout(nn.Dropout):
    """Zero elements with probability p, to the nearest 1/STEPS, and scale the others so that the expectation stays."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the tensor with elements left out, or as it is where the module does not train."""
        n_dropped = min(round(self.p * STEPS), STEPS - 1)
        if not self.training or not n_dropped:
            return input
        n_words = -(-input.numel() // PER_WORD)
        words = torch.empty(n_words, dtype=torch.int64).random_(-(1 << 63), None)  # all 64 bits
        numbers = words.view(torch.int16)[: input.numel()].view(input.shape)  # from -STEPS / 2
        return input.masked_fill(numbers < n_dropped - STEPS // 2, 0.0) * (STEPS / (STEPS - n_dropped))


def quicken_dropout(model: nn.Module) -> None:
    """Replace the dropout modules of a model on a CPU by WordDropout; its parameters stay."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, WordDropout(child.p).train(child.training))
