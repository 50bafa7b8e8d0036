"""Optimizers over the parameters of a GPT, and their state as plain tensors.

AdamW: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization". GaLore: Zhao et al. 2024, "GaLore:
Memory-Efficient LLM Training by Gradient Low-Rank Projection" (arXiv 2403.03507), by its authors' galore-torch.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from gptkit.command_line import UserError

OptimizerName = Literal["adamw", "galore_adamw"]
BETAS = (0.9, 0.95)  # GPT-3 (Brown et al. 2020), appendix B
EPS = 1e-8
DEFAULT_LR: dict[OptimizerName, float] = {"adamw": 6e-4, "galore_adamw": 5e-3}
# GaLore's setting for 60M to 130M parameters (table 2 and appendix C; its README's scale).
GALORE = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}


def import_galore() -> Any:
    """The optional package galore_torch. Raises UserError where it is not installed."""
    try:
        import galore_torch
    except ImportError as error:
        raise UserError(f"--optimizer galore_adamw needs galore-torch ({error}); pip install galore-torch")
    return galore_torch


def build_optimizer(model: nn.Module, name: OptimizerName, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """An optimizer that decays matrices only; biases and norms have no decay.

    With galore_adamw, the matrices of the blocks (linear layers) take their steps in a subspace, and nothing decays,
    as in the paper; embeddings, biases and norms take plain AdamW steps. Raises UserError where it is not installed.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    if name == "adamw":
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        fused = matrices[0].device.type in ("cuda", "cpu")
        return torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS, fused=fused)
    GaLoreAdamW = import_galore().GaLoreAdamW
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    projected = [parameter for parameter in matrices if id(parameter) in linear]
    plain = [parameter for parameter in matrices if id(parameter) not in linear] + vectors
    groups = [{"params": projected, **GALORE}, {"params": plain}]
    optimizer = GaLoreAdamW(groups, lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0, no_deprecation_warning=True)
    for parameter in projected:
        optimizer.state[parameter]["projector"] = _projector(optimizer.param_groups[0])
    return optimizer


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
        state: dict[str, Any] = {}
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = tensors[f"{key}.{name}"].to(parameter.device)
        step = tensors[f"step.{name}"]
        state["step"] = int(step) if galore else step.to(parameter.device)
        if "rank" in group:
            state["projector"] = _projector(group)
            state["projector"].ortho_matrix = tensors[f"projector.{name}"].to(parameter.device)
        optimizer.state[parameter] = state
