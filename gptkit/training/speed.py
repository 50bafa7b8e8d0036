"""Measure how fast this machine trains a model, before a run with a time budget chooses one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gptkit.base import devices
from gptkit.training.characters import SharedCharacters
from gptkit.training.compilation import compile_and_time, time_optimizer_step
from gptkit.training.cpu_layers import quicken
from gptkit.training.distillation import Teacher
from gptkit.training.recipe import CHARACTER_SHARE, Recipe
from gptkit.training.settings import TrainingSettings, configure_optimizer

CPU_TOKENS, GPU_TOKENS = 2048, 16_384  # of a micro-step that is timed, about those of the shorter runs


@dataclass(frozen=True)
class Speed:
    """What training costs a process, in seconds: each of its tokens, and each step of the optimizer."""

    token_s: float
    optimizer_s: float

    def compiled(self, times_as_fast: float) -> "Speed":
        """Return the speed where a model's forward and backward are so many times as fast."""
        return replace(self, token_s=self.token_s / times_as_fast)

    def total_tokens(self, left_s: float, n_processes: int, plan_for: Callable[[float], Any]) -> float:
        """Return the tokens that n_processes read together in left_s seconds.

        plan_for returns the plan of a run of so many tokens: the more a step of it has, the less the optimizer costs.
        """
        total = left_s * n_processes / self.token_s
        for _ in range(3):  # steps are powers of two of sequences, and soon stay the same
            total = left_s / (self.token_s / n_processes + self.optimizer_s / plan_for(total).tokens_per_step)
        return total


def measure_speed(
    settings: TrainingSettings,
    dimensions: Any,
    build: Callable[[Any], nn.Module],
    device: torch.device,
    dtype: torch.dtype,
    teacher: Teacher | None,
    characters: SharedCharacters | None,
) -> Speed:
    """Measure the speed of training on this machine, by a few steps of a new model, not compiled, on random tokens.

    Of the recipe, shared characters are counted where there are any. It changes no random stream.
    """
    states = devices.get_rng_states(device)
    model = quicken(build(dimensions).to(device))
    n_sequences = max((CPU_TOKENS if device.type == "cpu" else GPU_TOKENS) // dimensions.context_length, 1)
    ids = torch.randint(dimensions.vocab_size, (n_sequences, dimensions.context_length + 1))
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    _, parts_s = compile_and_time(model, dimensions.vocab_size, False, batch, device, dtype, teacher)
    recipe = Recipe(share_characters=CHARACTER_SHARE if characters else 0.0)
    optimizer_s = time_optimizer_step(
        model, lambda: configure_optimizer(settings, recipe, model, dtype, characters=characters), device
    )
    devices.set_rng_states(states, device)
    return Speed(sum(parts_s.values()) / batch[0].numel(), optimizer_s)
