"""Compile a model where that is asked for and possible, and measure what a step costs before a run starts.

Shapes: B batch, T time, C channels.
"""

import contextlib
import functools
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gptkit.base import devices
from gptkit.base.cli import UserError, first_line
from gptkit.base.processes import run_child
from gptkit.distributed import fsdp
from gptkit.distributed.process_group import main_process, world_size
from gptkit.training.compiler_gain import record_gain
from gptkit.training.distillation import HiddenStates, Teacher
from gptkit.training.further_tokens import FurtherTokens
from gptkit.training.loss import linear_cross_entropy

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # inputs and targets, each (B, T) -> mean, nats per token
PARTS = ("forward", "backward")


class BatchTooLarge(UserError):
    """Memory ran out. smaller_batch is the --batch_size to try, None where there is none; `flags` ask for it."""

    def __init__(self, batch_size: int, grad_accum_steps: int, smaller_batch: int | None, fits: bool = False) -> None:
        self.smaller_batch, self.flags = smaller_batch, list[str]()
        remedy = "give a smaller --model_size or --context_length"
        if smaller_batch:
            accum = batch_size * grad_accum_steps // smaller_batch  # the same tokens per step
            self.flags = ["--batch_size", f"{smaller_batch}", "--grad_accum_steps", f"{accum}"]
            remedy = (
                f"{' '.join(self.flags)} {'fits' if fits else 'takes less'}, at the same"
                f" tokens per step (--auto_batch does that by itself); or {remedy}"
            )
        super().__init__(f"out of memory with --batch_size {batch_size}: {remedy}")


def restart(error: BatchTooLarge) -> NoReturn:
    """Run this command again with the flags of the error in place of this process, or, on Windows, until it has ended.

    Windows has no exec: its own starts another process, and the shell takes the end of this one for that of the run.
    """
    command = [sys.executable, *sys.orig_argv[1:], *error.flags]
    if os.name == "posix":
        os.execv(sys.executable, command)
    seen: BaseException | None = error
    while seen:  # the frames of the errors hold the model, and the other process needs its memory
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    gc.collect()
    torch.cuda.empty_cache()
    raise SystemExit(run_child(command))


def next_smaller_batch(batch_size: int) -> int | None:
    """Return the largest divisor of batch_size that is at most half of it, or None."""
    return next((n for n in range(batch_size // 2, 0, -1) if batch_size % n == 0), None)


@contextlib.contextmanager
def oom_as_user_error(batch_size: int, grad_accum_steps: int) -> Iterator[None]:
    """Turn an out-of-memory error of device or host into BatchTooLarge."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not devices.is_out_of_memory(error):
            raise
        raise BatchTooLarge(batch_size, grad_accum_steps, next_smaller_batch(batch_size))


def find_batch_size(try_rows: Callable[[int], object], batch_size: int) -> int | None:
    """Return the first smaller batch size with which try_rows does not run out of memory; None where there is none."""
    smaller = next_smaller_batch(batch_size)
    while smaller:
        try:
            try_rows(smaller)
            return smaller
        except (RuntimeError, MemoryError) as error:
            if not devices.is_out_of_memory(error):
                raise
        smaller = next_smaller_batch(smaller)
    return None


def make_loss(
    model: Any,
    hidden_states: HiddenStates,
    vocab_size: int,
    teacher: Teacher | None = None,
    further: FurtherTokens | None = None,
) -> Loss:
    """Return the loss of a model; its `hidden_states`, (B, T) -> (B, T, C), may be compiled.

    Where no gradients are computed, as in validation, it is the plain cross-entropy, without the teacher and further tokens.
    """

    def loss_of_batch(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        soft_targets = teacher.soft_targets(inputs) if teacher and torch.is_grad_enabled() else None
        hidden = hidden_states(inputs)
        loss = linear_cross_entropy(hidden, model.head_weight, targets, vocab_size, soft_targets)
        if further and torch.is_grad_enabled():
            return further.add_gradient(loss, hidden, model.head_weight, targets, vocab_size)
        return loss

    return fsdp.register_forward(model, loss_of_batch)


def checkpoint_activations(blocks: Iterable[nn.Module]) -> None:
    """Make each block keep only its input, and compute the rest again in the backward pass (Chen et al. 2016).

    It costs a third more arithmetic per step. Dropout draws the same random numbers again.
    """
    for block in blocks:
        block.forward = functools.partial(_checkpointed, block.forward)  # type: ignore[method-assign]


def _checkpointed(forward: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False)


def compile_and_time(
    model: Any,
    vocab_size: int,
    compile: bool,
    batch: tuple[torch.Tensor, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    teacher: Teacher | None = None,
    further: FurtherTokens | None = None,
    is_asked_for: bool = True,
) -> tuple[Loss, dict[str, float]]:
    """Return the model's loss, compiled or not, and the seconds of each of PARTS of a micro-step, the teacher's included.

    A failure to compile is a warning. On a CPU what the compiler gives is recorded, and it is left out where it gives
    nothing and was not asked for. Changes neither weights nor random streams.
    """
    states = devices.get_rng_states(device)
    inputs, targets = (ids.to(device) for ids in batch)  # each (B, T)
    measure = functools.partial(_micro_step_s, model, (inputs, targets), device, dtype, further)
    eager = chosen = make_loss(model, model.hidden_states, vocab_size, teacher, further)
    if compile:
        try:
            compiled_teacher = teacher.compiled() if teacher else None
            compiled = make_loss(model, torch.compile(model.hidden_states), vocab_size, compiled_teacher, further)
            measure(compiled)
            chosen = compiled
        except Exception as error:  # the compiler's errors have no common class
            if devices.is_out_of_memory(error):
                raise
            print(
                f"warning: --compile failed ({type(error).__name__}: {first_line(error)}); continuing without it",
                file=sys.stderr,
            )
    parts_s = _typical_s(measure, chosen)
    is_plain = device.type == "cpu" and world_size() == 1 and teacher is None and further is None
    if chosen is not eager and is_plain and sum(parts_s) < 1:  # longer steps would take too much of a run
        eager_s = _typical_s(measure, eager)
        record_gain(model.config, len(inputs), dtype, sum(eager_s) / sum(parts_s))
        if sum(eager_s) < sum(parts_s) and not is_asked_for:
            print(
                "the compiled model is no faster on this machine; training as it is (--compile compiles all the same)"
            )
            chosen, parts_s = eager, eager_s
    devices.set_rng_states(states, device)
    return chosen, dict(zip(PARTS, parts_s, strict=True))


def _micro_step_s(
    model: Any,
    batch: tuple[torch.Tensor, torch.Tensor],  # each (B, T)
    device: torch.device,
    dtype: torch.dtype,
    further: FurtherTokens | None,
    loss_of_batch: Loss,
) -> tuple[float, float]:
    """Return the seconds of a forward and of a backward pass; no gradient stays."""
    start = time.monotonic()
    with devices.autocast(device, dtype):
        loss = loss_of_batch(*batch)
    devices.synchronize(device)
    middle = time.monotonic()
    loss.backward()
    model.zero_grad(set_to_none=True)
    if further:
        further.projection.grad = None
    devices.synchronize(device)
    return middle - start, time.monotonic() - middle


def _typical_s(measure: Callable[[Loss], tuple[float, float]], loss: Loss) -> tuple[float, float]:
    """Return the median of three measurements; of a long one, the first."""
    parts_s = measure(loss)  # it also warms up
    return sorted((measure(loss) for _ in range(3)), key=sum)[1] if _is_short(sum(parts_s)) else parts_s


@main_process
def _is_short(seconds: float) -> bool:
    """Decide for all processes, whose clocks differ, whether a micro-step is quick enough to be timed again."""
    return seconds < 5


def time_optimizer_step(model: nn.Module, build: Callable[[], torch.optim.Optimizer], device: torch.device) -> float:
    """Return the seconds of one step of a new optimizer, which is discarded; the weights are restored."""
    optimizer = build()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(2):  # the first step also allocates the state
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        devices.synchronize(device)
        start = time.monotonic()
        optimizer.step()
        devices.synchronize(device)
        seconds = time.monotonic() - start
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.copy_(weight)
    return seconds
