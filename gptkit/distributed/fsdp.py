"""Shard a model over the processes with FSDP2 (torch.distributed.fsdp.fully_shard); its tensors are DTensors.

Zhao et al. 2023, "PyTorch FSDP" (arXiv 2304.11277). Parameters, gradients and the optimizer's state are sharded along
their first dimension; a block is gathered while it computes. For a model that is not sharded, and its tensors, each
function returns what it was given.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import distributed, nn
from torch.torch_version import TorchVersion

# Before it gloo, the CPUs' backend, adds the gradients of the processes up where FSDP2 asks for their mean
# (pytorch/pytorch#162338). NCCL should not, but sharding on GPUs was not tried with an earlier torch.
FIRST_CORRECT_TORCH = "2.9"


def shard_model(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    """Shard a model's parameters over the processes of the group: block by block, and the rest as one unit.

    Blocks are gathered in `dtype`, which is autocast's, and gradients are averaged in float32. The rest (embedding,
    head, last norm) stays float32, so that the numbers are those of autocast on a full model.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def is_correct() -> bool:
    """Return whether this torch averages the gradients of a sharded run; only its version shows that."""
    return TorchVersion(torch.__version__) >= FIRST_CORRECT_TORCH  # 2.8.0+cu128 is not, nor is 2.9.0a0, before 2.9


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP2 has sharded the model."""
    if not distributed.is_available() or not distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def register_forward(model: nn.Module, loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return `loss`, which calls the model; a sharded model is gathered for it as for its own forward."""
    if not is_sharded(model):
        return loss
    from torch.distributed.fsdp import register_fsdp_forward_method

    model.loss = loss  # type: ignore[assignment]
    register_fsdp_forward_method(model, "loss")
    return model.loss  # type: ignore[return-value]


@contextlib.contextmanager
def unsharded(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Gather a sharded model in each process within the block, so that any of its methods may be called.

    dtype is what it was sharded with: its blocks are in it, and the products must be too.
    """
    if not is_sharded(model):
        yield
        return
    modules = [module for module in model.modules() if is_sharded(module)]
    model.set_reshard_after_forward(False)
    for module in modules:
        module.unshard()
    with torch.autocast(next(model.parameters()).device.type, dtype, enabled=dtype != torch.float32):
        yield
    for module in modules:
        module.reshard()
    model.set_reshard_after_forward(True)


def is_shard(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a DTensor: each process holds a shard of it."""
    if not distributed.is_available() or not distributed.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of a tensor; it shares the tensor's memory."""
    return tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def full_tensor(shard: torch.Tensor, like: Any) -> torch.Tensor:
    """Return the full tensor of the processes' shards, sharded as `like` is. All processes must call this."""
    if not is_shard(like):
        return shard
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(
        shard, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    ).full_tensor()


def full_norm(norm: torch.Tensor) -> torch.Tensor:
    """Return the norm over all shards, which clip_grad_norm_ returned, as a plain tensor."""
    return norm.full_tensor() if is_shard(norm) else norm  # type: ignore[attr-defined]


def shard_like(tensor: torch.Tensor, like: Any) -> torch.Tensor:
    """Return this process's shard of a full tensor, sharded as `like` is, without communication."""
    if not is_shard(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def shard_tensors(tensors: Mapping[str, torch.Tensor], like: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Shard each tensor as its namesake in `like` is; one without a namesake stays full."""
    return {name: shard_like(tensor, like.get(name)) for name, tensor in tensors.items()}


def full_tensors(tensors: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Gather sharded tensors to the CPU and return all; without `keep`, only take part and return {}."""
    found = {}
    for name, tensor in tensors.items():
        if is_shard(tensor):  # one at a time: a device may not hold them all
            tensor = tensor.full_tensor()  # type: ignore[attr-defined]
            tensor = tensor.cpu() if keep else tensor
        if keep:
            found[name] = tensor
    return found
