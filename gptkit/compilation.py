"""Compile a model where that is asked for and possible, and find out what a micro-step costs before a run starts.

Shapes: B batch, T time, V vocabulary.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from gptkit import devices
from gptkit.command_line import UserError
from gptkit.losses import next_token_loss

Forward = Callable[[torch.Tensor], torch.Tensor]  # ids (B, T) -> logits (B, T, V)


@contextlib.contextmanager
def memory_told(batch_size: int) -> Iterator[None]:
    """Turn an out-of-memory error of device or host into a UserError that names what to try."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not devices.is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory with --batch_size {batch_size}: give {max(batch_size // 2, 1)} and twice the"
            " --grad_accum_steps for the same tokens a step, or a smaller --model_size or --context_length"
        )


def compile_and_try(
    model: nn.Module,
    compile: bool,
    batch: tuple[torch.Tensor, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Forward, float]:
    """The model, compiled by torch.compile or as it is, and the seconds one micro-step on `batch` takes.

    A failure to compile is a warning. Changes neither weights nor random streams.
    """
    inputs, targets = (ids.to(device) for ids in batch)  # each (B, T)
    states = devices.random_states(device)

    def micro_step_s(forward: Forward) -> float:
        start = time.monotonic()
        with devices.autocast(device, dtype):
            loss = next_token_loss(forward(inputs), targets)
        loss.backward()
        model.zero_grad(set_to_none=True)
        devices.synchronize(device)
        return time.monotonic() - start

    forward: Forward = model
    if compile:
        try:
            compiled: Forward = torch.compile(model)
            micro_step_s(compiled)
            forward = compiled
        except Exception as error:  # the compiler's errors have no common class
            if devices.is_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            print(f"warning: --compile failed ({type(error).__name__}: {reason}); going on without", file=sys.stderr)
    seconds = micro_step_s(forward)
    if seconds < 5:  # the first one also warms up; a long one is measure enough
        seconds = min(micro_step_s(forward) for _ in range(3))
    devices.set_random_states(states, device)
    return forward, seconds
