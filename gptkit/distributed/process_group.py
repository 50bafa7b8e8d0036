"""Run several processes as one, with torch.distributed, without changing the model.

torchrun starts the processes and names each in RANK, LOCAL_RANK and WORLD_SIZE. Rank 0 is the main process: it alone
touches the output folder, reads the clock and prints. "ddp" (Li et al. 2020, arXiv 2006.15704) keeps the full model in
each process; "fsdp" (FSDP2, torch.distributed.fsdp.fully_shard; Zhao et al. 2023, arXiv 2304.11277) a shard of each
matrix (gptkit/distributed/fsdp.py). Control messages go by gloo between the CPUs, gradients and weights by NCCL where
there is CUDA.

Outside of `process_group`, in a single process, and within a function of the main process, each function here returns
what it was given.
"""

import contextlib
import faulthandler
import functools
import gc
import importlib
import itertools
import os
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import distributed, nn

from gptkit.base import drivers
from gptkit.base.cli import SHARED_MEMORY_REMEDY, UserError, first_line
from gptkit.base.streams import without_failures

Parallelism = Literal["ddp", "fsdp"]
P = ParamSpec("P")
T = TypeVar("T")
FAILED = "failed"  # in the store: how many processes met an error
ENDED = 1  # the exit code of a process whose error another one reports
FREEING_S = 0.1  # for gloo's threads, where the group lives on (fsdp): one that frees a tensor while Python ends aborts
STACK_DUMP_SHARE = 0.9  # of the timeout: a process that hangs writes its stack before the others give up on it

_store: Any = None  # for messages outside of collectives; None outside of `process_group`
_timeout_s = 0.0
_turns = itertools.count()  # the calls of main_process functions, numbered alike in every process
_is_in_main_process_call = False


class ProcessLost(Exception):
    """Another process of the run ended without an error message, or did not answer in time."""


# Joining and leaving


def rank() -> int:
    """Return the number of this process, from 0."""
    return distributed.get_rank() if _store is not None else 0


def world_size() -> int:
    """Return the number of processes of the run."""
    return distributed.get_world_size() if _store is not None else 1


def is_main_process() -> bool:
    """Return whether this is rank 0."""
    return rank() == 0


def silence_other_ranks() -> None:
    """Drop what is printed from here on, off rank 0; `process_group` reports errors all the same."""
    if int(os.environ.get("RANK", "0")):
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")


@contextlib.contextmanager
def process_group(kind: Parallelism, timeout_s: float) -> Iterator[None]:
    """Join the processes that torchrun started, and leave them at the end; with fsdp a single process is a group too.

    An error is reported once, by the process that met it first; the others end silently. Raises ProcessLost where one
    ended without an error, or did not answer for timeout_s seconds; such a process
    has written its stack by then, if it still could.
    """
    global _store, _timeout_s
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if n_processes == 1 and kind == "ddp":
        yield
        return
    # DistributedDataParallel imports it, and its functions keep the group of that moment as a default, with gloo's threads.
    importlib.import_module("torch.distributed.nn.functional")
    from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    store: Any
    if n_processes == 1:
        store, own_rank = HashStore(), 0
    else:
        store, own_rank, _ = next(rendezvous("env://"))
        store = PrefixStore(_name_of_start(store, own_rank, n_processes), store)
    backend = "cpu:gloo,cuda:nccl" if drivers.is_cuda_available() else "gloo"
    timeout = timedelta(seconds=timeout_s)
    distributed.init_process_group(backend, store=store, rank=own_rank, world_size=n_processes, timeout=timeout)
    _store, _timeout_s = PrefixStore("gptkit", store), timeout_s
    try:
        yield
        _wait_for_main()  # a connection must not close while a process still uses it
        distributed.destroy_process_group()
        gc.collect()  # the model may be in a cycle; with it goes what holds the group
    except Exception as error:
        _raise_once(error)
    finally:
        faulthandler.cancel_dump_traceback_later()
        _store = None
        time.sleep(FREEING_S)


def _name_of_start(store: Any, own_rank: int, n_processes: int) -> str:
    """Return a name that rank 0 chooses, for the processes of this start and no others.

    torchrun keeps its store when it restarts processes: entries of the earlier ones would mislead the new ones.
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
            if store.check([f"asked_by_{other}"]):  # perhaps by one that has ended, and later by its successor
                store.set(f"answer_to_{store.get(f'asked_by_{other}').decode()}", name)
        time.sleep(0.01)
    return name


def _raise_once(error: Exception) -> None:
    """Raise what the error means if no other process reported one before; else exit silently."""
    texts = ("gloo", "Connection", "Timed out")  # of gloo's errors, which have no class of their own
    is_lost = isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )
    try:
        if is_lost:
            _store.set(f"lost_by_{rank()}", "")
        is_first = _store.add(FAILED, 1) == 1
        if is_lost and is_first:
            time.sleep(1)  # by then the others that are alive have set their key
            gone = [str(r) for r in range(world_size()) if not _store.check([f"lost_by_{r}"])]
    except distributed.DistError:  # the store is gone with the process that hosted it
        is_first = False
    if not is_first:
        raise SystemExit(ENDED)
    sys.stdout, sys.stderr = without_failures(sys.__stdout__), without_failures(sys.__stderr__)
    if is_lost and "/dev/shm" in str(error):  # NCCL's buffers
        reason = next(line for line in str(error).splitlines() if "/dev/shm" in line)
        raise UserError(f"no shared memory for the processes of the run ({reason.strip()}); {SHARED_MEMORY_REMEDY}")
    if is_lost:
        named = f"rank {', '.join(gone)}" if gone else "unknown rank"
        raise ProcessLost(f"another process of the run ended or hangs ({named} of {world_size()}): {first_line(error)}")
    raise error


def device_of_rank(name: str) -> str:
    """Return what --device means in this process: each of several on a machine has a GPU of its own.

    Raises UserError where they cannot share the device that is named.
    """
    if world_size() == 1:
        return name
    if ":" in name or name == "mps":
        raise UserError(f"--device {name} is one device for {world_size()} processes; give auto, cuda or cpu")
    has_cuda = drivers.is_cuda_available()
    if name == "auto" and not has_cuda and not drivers.gpu_problem():  # a problem is for choose_device to report
        name = "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if has_cuda and name in ("auto", "cuda") else name


# Control: what one process decides and all must know


def main_process(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that the main process alone runs: every process calls it and gets its result.

    It may take any time. Such functions nest: inside one, the functions of this module do not communicate, since the
    other processes only wait for the result.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if _is_alone():
            return function(*args, **kwargs)
        return _run_on_main(functools.partial(function, *args, **kwargs))

    return call


@main_process
def _wait_for_main() -> None:
    """Wait until the main process has called this too."""


def _is_alone() -> bool:
    """Return whether this process must not communicate: it is the only one, or the others wait for its result."""
    return world_size() == 1 or _is_in_main_process_call


def _run_on_main(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and return its result, which must be picklable, on all."""
    global _is_in_main_process_call
    turn = f"turn_{next(_turns)}"
    result: list[Any] = [None]
    if is_main_process():
        _is_in_main_process_call = True
        try:
            result[0] = function()
        finally:
            _is_in_main_process_call = False
        _store.set(turn, "")
    while not _store.check([turn]):  # a collective would time out, and handle no signal
        if _store.check([FAILED]):
            raise SystemExit(ENDED)
        time.sleep(0.02)
    distributed.broadcast_object_list(result, src=0, device=torch.device("cpu"))
    return result[0]


def sync_flags(is_set: bool, *values_of_main: float) -> tuple[bool, tuple[float, ...]]:
    """Return whether `is_set` holds in any process, and the main process's values (not negative), by one collective.

    Call it once per step: it restarts the timer after which a process that hangs prints its stack.
    """
    if _is_alone():
        return is_set, values_of_main
    faulthandler.dump_traceback_later(STACK_DUMP_SHARE * _timeout_s, file=2)
    values = values_of_main if is_main_process() else [0.0] * len(values_of_main)
    highest = torch.tensor([is_set, *values], dtype=torch.float64)
    distributed.all_reduce(highest, distributed.ReduceOp.MAX)
    return bool(highest[0]), tuple(highest[1:].tolist())


# Tensors


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Return the sum over the processes, in each of them."""
    if not _is_alone():
        distributed.all_reduce(values)
    return values


def all_reduce_mean(values: torch.Tensor) -> torch.Tensor:
    """Return the mean over the processes, in each of them."""
    return values if _is_alone() else all_reduce_sum(values) / world_size()


def broadcast_tensors(read: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the tensors that `read` returns in the main process, on the CPU of each process."""
    if _is_alone():
        return read()
    tensors: dict[str, torch.Tensor] = {}

    @main_process
    def read_and_describe() -> dict[str, tuple[torch.Size, torch.dtype]]:
        tensors.update(read())
        return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

    for name, (shape, dtype) in read_and_describe().items():
        tensor = tensors.setdefault(name, torch.empty(0) if is_main_process() else torch.empty(shape, dtype=dtype))
        distributed.broadcast(tensor, src=0)
    return tensors


def broadcast_parameters(parameters: Iterable[torch.Tensor]) -> None:
    """Overwrite parameters, of which each process has the full tensors, by those of the main process."""
    if not _is_alone():
        for parameter in parameters:
            distributed.broadcast(parameter.detach(), src=0)


# Random streams: rank 0 has the one that a single process would have, each other rank its own


def seed_rank(seed: int, step: int) -> None:
    """Seed torch's random stream of a rank other than 0, for a run that begins or resumes at `step`."""
    if rank():
        torch.manual_seed(hash((seed, step, rank())) % 2**63)


def gather_rng_states(states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return, in the main process, its own states and those of each rank r as NAME.r; elsewhere the process's own."""
    if _is_alone():
        return states
    found = dict(states)
    for name, state in states.items():
        of_ranks = [torch.empty_like(state) for _ in range(world_size())] if is_main_process() else None
        distributed.gather(state, of_ranks)
        found |= {f"{name}.{r}": each for r, each in enumerate(of_ranks or [])}
    return found


def select_rng_states(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Select this process's states from what gather_rng_states returned; {} where there were fewer processes."""
    names = ("random.cpu", "random.cuda", "random.mps")
    suffix = f".{rank()}" if rank() else ""
    return {name: tensors[name + suffix] for name in names if name + suffix in tensors}


# The model


def wrap_ddp(model: nn.Module, loss: Callable[..., torch.Tensor], device: torch.device) -> Callable[..., torch.Tensor]:
    """Wrap a loss in DistributedDataParallel, which averages gradients over the processes; each has the full model."""
    if world_size() == 1:
        return loss
    from torch.nn.parallel import DistributedDataParallel

    device_ids = [device] if device.type == "cuda" else None
    module = _LossModule(model, loss)
    with warnings.catch_warnings():
        # torch 2.13 renames broadcast_buffers; older ones do not have the new name.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            module, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )


class _LossModule(nn.Module):
    """A loss as the forward of a module, which DistributedDataParallel needs."""

    def __init__(self, model: nn.Module, loss: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.loss(inputs, targets)


def set_gradient_sync(loss: Callable[..., torch.Tensor], is_last: bool) -> None:
    """Exchange gradients in the next backward pass, with ddp, only where it is the last micro-step of a step.

    With fsdp each backward pass does: a sum of full gradients would take the memory that sharding saves.
    """
    if world_size() > 1 and isinstance(loss, nn.parallel.DistributedDataParallel):
        loss.require_backward_grad_sync = is_last
