"""Optimizers over the parameters of a GPT, and their state as plain tensors.

AdamW: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization". Muon: Jordan et al. 2024, "Muon: An optimizer
for hidden layers in neural networks" (kellerjordan.github.io/posts/muon). GaLore: Zhao et al. 2024, "GaLore:
Memory-Efficient LLM Training by Gradient Low-Rank Projection" (arXiv 2403.03507), by its authors' galore-torch.

A model is a module with the property head_weight, the matrix of its last product. Its block matrices are the weights
of its other linear layers.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gptkit.base.cli import UserError
from gptkit.distributed.fsdp import full_tensor, local_shard, shard_like
from gptkit.training.schedules import OptimizerName

BETAS = (0.9, 0.95)  # GPT-3 (Brown et al. 2020), appendix B
EPS = 1e-8
MUON_MOMENTUM = 0.95
HEAD_SHARE, VECTOR_SHARE = 0.2, 0.25  # of --adam_lr: the best tried (benchmarks/README.md)
# What each of Muon's steps multiplies singular values by, p + q s^2 + r s^4, step by step: Amsel et al. 2025, "The Polar
# Express" (arXiv 2505.16932), algorithm 1's table for singular values from 1e-3 to 1.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
SAFETY = 1.01
# GaLore's setting for 60M to 130M parameters (table 2 and appendix C; its README's scale).
GALORE = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}


def import_galore() -> Any:
    """The optional package galore_torch. Raises UserError where it is not installed."""
    try:
        import galore_torch
    except ImportError as error:
        raise UserError(f"--optimizer galore_adamw needs galore-torch ({error}); pip install galore-torch")
    return galore_torch


def build_optimizer(
    model: nn.Module,
    name: OptimizerName,
    lr: float,
    adam_lr: float,
    weight_decay: float,
    dtype: torch.dtype = torch.float32,
) -> torch.optim.Optimizer:
    """An optimizer each of whose groups has its "peak_lr"; every parameter is in exactly one of them.

    adamw: all parameters at `lr`; matrices decay, biases and norms do not. muon: block matrices take Muon's steps at
    `lr`, by matrix products in `dtype`, and decay; the rest takes AdamW's, embeddings at `adam_lr`, head, biases and
    norms at shares of it, and does not decay. galore_adamw: block matrices take their steps in a subspace, the rest
    plain AdamW steps, all at `lr`, and nothing decays, as in the paper. Raises UserError where galore-torch is not
    installed.
    """
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - {id(model.head_weight)}
    blocks = [parameter for parameter in model.parameters() if id(parameter) in linear]
    embeddings = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in linear]
    head, other = model.head_weight, [p for p in embeddings if p is not model.head_weight]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    decayed, plain = {"weight_decay": weight_decay, "peak_lr": lr}, {"weight_decay": 0.0, "peak_lr": lr}
    fused = blocks[0].device.type in ("cuda", "cpu")
    optimizer: torch.optim.Optimizer
    if name == "adamw":
        groups: list[dict[str, Any]] = [{"params": blocks + embeddings, **decayed}, {"params": vectors, **plain}]
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS, fused=fused)
    elif name == "muon":
        groups = [{"params": blocks, **decayed, "muon": True}]
        for share, parameters in ((HEAD_SHARE, [head]), (1.0, other), (VECTOR_SHARE, vectors)):
            groups += [{"params": parameters, **plain, "peak_lr": share * adam_lr, "muon": False}]
        optimizer = MuonAdamW(groups, dtype, lr=lr, betas=BETAS, eps=EPS, fused=fused)
    else:
        groups = [{"params": blocks, **plain, **GALORE}, {"params": embeddings + vectors, **plain}]
        optimizer = import_galore().GaLoreAdamW(groups, lr=lr, betas=BETAS, eps=EPS, no_deprecation_warning=True)
        for parameter in blocks:
            optimizer.state[parameter]["projector"] = _projector(optimizer.param_groups[0])
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set each group's rate to `share` (0 … 1) of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = share * group["peak_lr"]


class MuonAdamW(torch.optim.AdamW):
    """Muon for the groups with muon=True, AdamW for the others.

    Muon's step is the momentum's nearest orthogonal matrix, so that each direction moves as far as any other. Its size
    is sqrt(max(1, rows / columns)), as in the authors' code: the same change of each output's root mean square.
    torch.optim.Muon is not used because it iterates in bfloat16, also where the hardware only emulates it; here it is
    `dtype`. Of a sharded matrix each process keeps its part of the momentum, and computes the step of the whole matrix.
    """

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype, **options: Any) -> None:
        super().__init__(groups, **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group["muon"]:
                self._muon_step(group)
        super().step()  # passes over parameters without a gradient

    def _muon_step(self, group: dict[str, Any]) -> None:
        by_shape = defaultdict(list)
        for parameter in group["params"]:
            by_shape[parameter.shape].append(parameter)
        for (n_rows, n_columns), parameters in by_shape.items():
            updates = []
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum, grad = local_shard(state["momentum"]), local_shard(parameter.grad)
                momentum.lerp_(grad, 1 - MUON_MOMENTUM)
                updates.append(full_tensor(grad.lerp(momentum, MUON_MOMENTUM), like=parameter))  # Nesterov's
                parameter.grad = None
            size = max(1.0, n_rows / n_columns) ** 0.5
            steps = orthogonalize(torch.stack(updates), self.dtype)
            for parameter, update in zip(parameters, steps, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(shard_like(update, like=parameter), alpha=-group["lr"] * size)


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """For each matrix U S V^T of (n, rows, columns) about U V^T: singular values from 1/1000 of the norm up come near 1.

    Newton-Schulz steps, their products in `dtype`; in bfloat16 values below 1/100 drown in its rounding.
    """
    x = matrices.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)  # a little below 1: rounding must not lead above it
    for i, (p, q, r) in enumerate(POLAR_EXPRESS, 1):
        if i < len(POLAR_EXPRESS):  # the authors' safety factor: in bfloat16 a value above 1 would run away
            p, q, r = p / SAFETY, q / SAFETY**3, r / SAFETY**5
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=q, alpha=r), x, beta=p)
    return (x.mT if tall else x).to(matrices.dtype)


def _projector(group: Mapping[str, Any]) -> Any:
    """GaLore's projector with its basis laid out row by row, as a file gives it back.

    The SVD's result is laid out by columns, and a product over another layout rounds otherwise: a resumed run would
    drift from one that was never stopped.
    """
    from galore_torch.galore_projector import GaLoreProjector

    class RowMajorProjector(GaLoreProjector):  # type: ignore[misc]
        def get_orthogonal_matrix(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            try:
                return super().get_orthogonal_matrix(*args, **kwargs).contiguous()
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                raise UserError("GaLore met a gradient that is not finite; run again with a lower --lr")

    return RowMajorProjector(**{key: group[key] for key in GALORE})


def _parameters_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[nn.Parameter, dict]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: (p, group) for group in optimizer.param_groups for p in group["params"]}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as tensors named `exp_avg.<parameter>` and the like; its settings are not part of it."""
    tensors = {}
    for name, (parameter, _) in _parameters_by_name(model, optimizer).items():
        for key, value in optimizer.state[parameter].items():
            if key == "projector":  # a GaLoreProjector: its settings stand in the group, its basis is the state
                value = value.ortho_matrix
            tensors[f"{key}.{name}"] = value.contiguous() if isinstance(value, torch.Tensor) else torch.tensor(value)
    return tensors


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Put back what optimizer_tensors returned, onto the devices of the parameters. Raises KeyError."""
    galore = "rank" in optimizer.param_groups[0]
    for name, (parameter, group) in _parameters_by_name(model, optimizer).items():
        keys = ("momentum",) if group.get("muon") else ("exp_avg", "exp_avg_sq")
        state: dict[str, Any] = {
            key: shard_like(tensors[f"{key}.{name}"].to(parameter.device), like=parameter) for key in keys
        }
        if not group.get("muon"):
            step = tensors[f"step.{name}"]
            state["step"] = int(step) if galore else step.to(parameter.device)
        if "rank" in group:
            state["projector"] = _projector(group)
            state["projector"].ortho_matrix = tensors[f"projector.{name}"].to(parameter.device)
        optimizer.state[parameter] = state
