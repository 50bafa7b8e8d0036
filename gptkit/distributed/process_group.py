"""Several processes as one run: torch.distributed's parts, applied to a model and its loop from outside.

torchrun starts the processes and names each in RANK, LOCAL_RANK and WORLD_SIZE. Rank 0 is the main process: it alone
touches the output folder, looks at the clock and speaks. "ddp" (Li et al. 2020, arXiv 2006.15704) keeps the whole model
in each process; "fsdp" (FSDP2, torch.distributed.fsdp.fully_shard; Zhao et al. 2023, arXiv 2304.11277) a part of each
matrix (gptkit/sharding.py). What steers the run goes by gloo between the CPUs, gradients and weights by NCCL where there is CUDA.

Outside of `together`, and in a single process, each function here hands back what it was given.
"""

import contextlib
import faulthandler
import itertools
import os
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from torch import distributed, nn

from gptkit.base.cli import UserError, first_line

Kind = Literal["ddp", "fsdp"]
T = TypeVar("T")
FAILED = "failed"  # in the store: how many processes met an error
ENDED = 1  # the exit code of a process whose error another one tells
STACK_DUMP_SHARE = 0.9  # of the timeout: a process that hangs writes its stack before the others give up on it

_store: Any = None  # what the processes tell each other outside of collectives; None outside of `together`
_timeout_s = 0.0
_turns = itertools.count()  # in which the main process acts alone


class ProcessLost(Exception):
    """Another process of the run ended without a word, or did not answer in time."""


# Being together


def rank() -> int:
    return distributed.get_rank() if _store is not None else 0


def world_size() -> int:
    return distributed.get_world_size() if _store is not None else 1


def is_main_process() -> bool:
    return rank() == 0


def silence_other_ranks() -> None:
    """Off rank 0, nothing that is printed from here on comes out; errors are told by `together`."""
    if int(os.environ.get("RANK", "0")):
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")


@contextlib.contextmanager
def process_group(kind: Kind, timeout_s: float) -> Iterator[None]:
    """Join the processes that torchrun started, and leave them at the end; for fsdp also a process alone is a group.

    An error is told once, by the process that met it first; the others end in silence. Raises LostProcess where one
    ended without a word, or did not answer for timeout_s; by then it has written its stack, if it still could.
    """
    global _store, _timeout_s
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if n_processes == 1 and kind == "ddp":
        yield
        return
    from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    store: Any
    if n_processes == 1:
        store, own_rank = HashStore(), 0
    else:
        store, own_rank, _ = next(rendezvous("env://"))
        store = PrefixStore(_name_of_start(store, own_rank, n_processes), store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=timeout_s)
    distributed.init_process_group(backend, store=store, rank=own_rank, world_size=n_processes, timeout=timeout)
    _store, _timeout_s = PrefixStore("gptkit", store), timeout_s
    try:
        yield
        on_main(lambda: None)  # a connection must not close under a process that is still at work
        distributed.destroy_process_group()
    except Exception as error:
        _raise_once(error)
    finally:
        faulthandler.cancel_dump_traceback_later()
        _store = None


def _name_of_start(store: Any, own_rank: int, n_processes: int) -> str:
    """A name that rank 0 makes up, for all processes of this start and no others.

    torchrun keeps its store when it starts processes again: what those before left there would lead the new ones astray.
    """
    name = uuid.uuid4().hex
    if own_rank:
        store.set(f"asked_by_{own_rank}", name)
        while not store.check([f"answer_to_{name}"]):
            time.sleep(0.01)
        answer = store.get(f"answer_to_{name}").decode()
        store.add(f"here_{answer}", 1)
        return answer
    while store.add(f"here_{name}", 0) < n_processes - 1:
        for other in range(1, n_processes):
            if store.check([f"asked_by_{other}"]):  # perhaps by one that is no more, and later by its successor
                store.set(f"answer_to_{store.get(f'asked_by_{other}').decode()}", name)
        time.sleep(0.01)
    return name


def _raise_once(error: Exception) -> None:
    """Raise what the error means if no other process told one before; else end in silence."""
    texts = ("gloo", "Connection", "Timed out")  # of gloo's errors, which have no class of their own
    is_lost = isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )
    try:
        if is_lost:
            _store.set(f"lost_by_{rank()}", "")
        is_first = _store.add(FAILED, 1) == 1
        if is_lost and is_first:
            time.sleep(1)  # the others that are alive say so by now
            gone = [str(r) for r in range(world_size()) if not _store.check([f"lost_by_{r}"])]
    except distributed.DistError:  # the store went with the process that kept it
        is_first = False
    if not is_first:
        raise SystemExit(ENDED)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    if is_lost:
        named = f"rank {', '.join(gone)}" if gone else "one that could not be told"
        raise ProcessLost(f"another process of the run ended or hangs ({named} of {world_size()}): {first_line(error)}")
    raise error


def device_of_rank(name: str) -> str:
    """What --device means here: each of several processes on a machine has a GPU of its own.

    Raises UserError where they cannot share the device that is named.
    """
    if world_size() == 1:
        return name
    if ":" in name or name == "mps":
        raise UserError(f"--device {name} is one device for {world_size()} processes; give auto, cuda or cpu")
    has_cuda = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if has_cuda else "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and has_cuda else name


# What all must know


def on_main(function: Callable[[], T]) -> T:
    """The result of `function`, which the main process alone calls, in every process. It may take any time."""
    if world_size() == 1:
        return function()
    turn = f"turn_{next(_turns)}"
    result: list[Any] = [None]
    if is_main_process():
        result[0] = function()
        _store.set(turn, "")
    while not _store.check([turn]):  # a collective would give up, and hear no signal
        if _store.check([FAILED]):
            raise SystemExit(ENDED)
        time.sleep(0.02)
    distributed.broadcast_object_list(result, src=0, device=torch.device("cpu"))
    return result[0]


def sync_flags(is_signalled: bool, n_steps: int, is_over: bool, is_late: bool) -> tuple[bool, int, bool, bool]:
    """Once a step: whether any process was told to stop, and what else the main process says, by its clock.

    From here on a process has the timeout for its next step.
    """
    if world_size() == 1:
        return is_signalled, n_steps, is_over, is_late
    faulthandler.dump_traceback_later(STACK_DUMP_SHARE * _timeout_s, file=2)
    of_main = (n_steps, is_over, is_late) if is_main_process() else (0, 0, 0)
    most = torch.tensor([is_signalled, *of_main], dtype=torch.float64)
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    return bool(most[0]), int(most[1]), bool(most[2]), bool(most[3])


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over the processes, in each of them."""
    if world_size() > 1:
        distributed.all_reduce(values)
    return values


def all_reduce_mean(values: torch.Tensor) -> torch.Tensor:
    """The mean over the processes, in each of them."""
    return all_reduce_sum(values) / world_size() if world_size() > 1 else values


def broadcast_tensors(read: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors that the main process reads, on the CPU of each process."""
    if world_size() == 1:
        return read()
    tensors: dict[str, torch.Tensor] = {}

    def read_and_describe() -> dict[str, tuple[torch.Size, torch.dtype]]:
        tensors.update(read())
        return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

    for name, (shape, dtype) in on_main(read_and_describe).items():
        tensor = tensors.setdefault(name, torch.empty(0) if is_main_process() else torch.empty(shape, dtype=dtype))
        distributed.broadcast(tensor, src=0)
    return tensors


def broadcast_parameters(parameters: Iterable[torch.Tensor]) -> None:
    """Overwrite parameters, which are whole in each process, by those of the main process."""
    if world_size() > 1:
        for parameter in parameters:
            distributed.broadcast(parameter.detach(), src=0)


# Random streams: rank 0 has the one of a single process, each other its own


def seed_rank(seed: int, step: int) -> None:
    if rank():
        torch.manual_seed(hash((seed, step, rank())) % 2**63)


def gather_rng_states(states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In the main process its own, and those of each rank r as NAME.r; elsewhere the process's own."""
    if world_size() == 1:
        return states
    found = dict(states)
    for name, state in states.items():
        of_ranks = [torch.empty_like(state) for _ in range(world_size())] if is_main_process() else None
        distributed.gather(state, of_ranks)
        found |= {f"{name}.{r}": each for r, each in enumerate(of_ranks or [])}
    return found


def select_rng_states(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of tensors that hold gathered_random_states those of this process; none where there were fewer processes."""
    names = ("random.cpu", "random.cuda", "random.mps")
    suffix = f".{rank()}" if rank() else ""
    return {name: tensors[name + suffix] for name in names if name + suffix in tensors}


# The model


def wrap_ddp(model: nn.Module, loss: Callable[..., torch.Tensor], device: torch.device) -> Callable[..., torch.Tensor]:
    """ddp: the loss by a model that is whole in each process, with gradients that are means over the processes."""
    if world_size() == 1:
        return loss
    from torch.nn.parallel import DistributedDataParallel

    device_ids = [device] if device.type == "cuda" else None
    module = _LossModule(model, loss)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # torch 2.13 has another name for broadcast_buffers, 2.11 has not
        return DistributedDataParallel(
            module, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )


class _LossModule(nn.Module):
    """A loss as DistributedDataParallel wants it: a module's forward."""

    def __init__(self, model: nn.Module, loss: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.loss(inputs, targets)


def set_gradient_sync(loss: Callable[..., torch.Tensor], is_last: bool) -> None:
    """Whether the next backward pass exchanges gradients. ddp's do with the last micro-step of a step only.

    fsdp's always do: a sum of whole gradients would take the memory that sharding saves.
    """
    if world_size() > 1 and isinstance(loss, nn.parallel.DistributedDataParallel):
        loss.require_backward_grad_sync = is_last
