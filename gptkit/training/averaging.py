"""Average the weights of a run exponentially over its last epochs, as an average that is saved beside the weights.

    average ← β·average + (1−β)·weights    after each optimizer step, with β = exp(−1 / n), n in steps

At the start of a run β is at most (1 + k) / (4 + k) after k updates, so that the first averages are not the initial
weights: no average reaches further back than about a third of the steps so far. TensorFlow's ExponentialMovingAverage has
10 in place of 4, and so a ninth, which is less than the planner asks for (recipe.py). Why the average predicts better than
the weights: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima" (arXiv 1803.05407). Where nothing is averaged,
an object does nothing.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from gptkit.distributed import fsdp


class WeightAverage:
    """The average of a model's weights over about n_steps steps, on the same device; with 0 steps there is none."""

    def __init__(self, model: nn.Module, n_steps: float) -> None:
        self._decay = math.exp(-1 / n_steps) if n_steps else 0.0
        self._weights = dict(model.named_parameters()) if n_steps else {}
        # Sharded as the weights are.
        self.tensors = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self.n_updates = 0

    @property
    def is_on(self) -> bool:
        """Return whether there is an average."""
        return bool(self.tensors)

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights: once after each optimizer step."""
        if not self.is_on:
            return
        decay = min(self._decay, (1 + self.n_updates) / (4 + self.n_updates))
        averages = [fsdp.local_shard(average) for average in self.tensors.values()]
        weights = [fsdp.local_shard(weight) for weight in self._weights.values()]
        torch._foreach_lerp_(averages, weights, 1 - decay)
        self.n_updates += 1

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the model the averaged weights within the block, and then its own again, to the bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():
            average = self.tensors[name]
            if fsdp.is_shard(weight):  # FSDP gathers from its own view of this memory: what is in it must change
                mine, theirs = fsdp.local_shard(average), fsdp.local_shard(weight)
                kept = theirs.clone()
                theirs.copy_(mine)
                mine.copy_(kept)
            else:
                self.tensors[name], weight.data = weight.data, average

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load full tensors that were saved, with n_updates; without any, start from the model's weights.

        Raises ValueError where they do not fit.
        """
        if not tensors:
            self.n_updates = 0
        elif tensors.keys() != self.tensors.keys():
            raise ValueError("the averaged weights are not those of this model")
        source = fsdp.shard_tensors(tensors, self.tensors) or self._weights
        for name, average in self.tensors.items():
            if source[name].shape != average.shape:
                raise ValueError(f"the average of {name} is {list(source[name].shape)}, not {list(average.shape)}")
            average.copy_(source[name])
