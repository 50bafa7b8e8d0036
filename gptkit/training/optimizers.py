"""Optimizers over the parameters of a GPT, in a registry, and their state as plain tensors.

AdamW: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization". Muon: Jordan et al. 2024, "Muon: An optimizer
for hidden layers in neural networks" (kellerjordan.github.io/posts/muon), in muon.py. GaLore: Zhao et al. 2024, "GaLore:
Memory-Efficient LLM Training by Gradient Low-Rank Projection" (arXiv 2403.03507), by its authors' galore-torch.

To add one, add an entry to OPTIMIZERS: nothing else names an optimizer. A model is a module with the property
head_weight, the matrix of its output head, and the embedding tok_emb. Its block matrices are the weights of its other
linear layers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from gptkit.base.cli import UserError
from gptkit.distributed.fsdp import shard_like
from gptkit.training.characters import SharedCharacters
from gptkit.training.muon import CHARACTER_STATE, Group, MuonAdamW, MuonScaling
from gptkit.training.schedules import MOMENTUM

Optimizer = torch.optim.Optimizer

BETAS = (0.9, 0.95)  # GPT-3 (Brown et al. 2020), appendix B
EPS = 1e-8
HEAD_SHARE, VECTOR_SHARE = 0.2, 0.25  # of --adam_lr: the best tried (benchmarks/README.md)
# GaLore's setting for 60M to 130M parameters (table 2 and appendix C; its README's scale).
GALORE = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
FURTHER = "further_tokens.projection"  # the name of the one matrix that is trained and not the model's
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OptimizerSpec:
    """What a run has to know about an optimizer."""

    # The dtype is that of the matrix products of its step.
    build: Callable[["ParameterGroups", "Hyperparameters", torch.dtype], Optimizer]
    default_lr: float  # peak learning rate
    warmup_share: float  # of the steps of a run
    n_moments: int  # tensors of a parameter's size in its state, at least: for the estimate of memory
    state_keys: Callable[[Group], tuple[str, ...]]  # the names of a parameter's state tensors, by its group
    late_keys: tuple[str, ...] = ()  # those of the state_keys that a run may turn on later, and that are never sharded
    recipe_flags: tuple[str, ...] = ()  # of a run's recipe, what other optimizers do not have
    is_slow_to_start: bool = False  # its first step costs far more than others: it is not timed before a run
    needs_full_matrices: bool = False  # its step cannot be computed on shards of them
    require_package: Callable[[], object] = lambda: None  # raises UserError where its package is missing
    to_tensor: Callable[[str, Any], torch.Tensor] = lambda key, value: torch.as_tensor(value)
    from_tensor: Callable[[str, torch.Tensor, Group], Any] = lambda key, tensor, group: tensor


@dataclass(frozen=True)
class ParameterGroups:
    """A model's parameters by their role; each is in exactly one of these."""

    blocks: list[nn.Parameter]  # the matrices of the blocks
    embeddings: list[nn.Parameter]  # embeddings and head
    head: nn.Parameter  # also an embedding where the two are tied
    tokens: nn.Parameter  # the embedding of tokens
    vectors: list[nn.Parameter]  # biases and norms

    @classmethod
    def of(cls, model: nn.Module) -> "ParameterGroups":
        """Sort the parameters of a model by role."""
        head = cast(nn.Parameter, model.head_weight)
        linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - {id(head)}
        blocks = [parameter for parameter in model.parameters() if id(parameter) in linear]
        embeddings = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in linear]
        tokens = cast(nn.Parameter, cast(nn.Embedding, model.tok_emb).weight)
        return cls(blocks, embeddings, head, tokens, [p for p in model.parameters() if p.dim() < 2])

    @property
    def can_fuse(self) -> bool:
        """Return whether torch has a fused AdamW for their device."""
        return self.blocks[0].device.type in ("cuda", "cpu")


@dataclass(frozen=True)
class Hyperparameters:
    """The hyperparameters of a run's optimizer."""

    lr: float  # peak
    adam_lr: float  # peak of the embedding, for an optimizer of matrices alone
    weight_decay: float
    embedding_decay: float = 0.0  # of embedding and head, for an optimizer of matrices alone
    cautious_decay: bool = False
    muon_scaling: MuonScaling = "none"
    share_characters: float = 0.0  # of the rates of embedding and head, for the vectors that their rows have in common
    characters: SharedCharacters | None = None  # needed for that


def build_optimizer(
    model: nn.Module,
    name: str,
    lr: float,
    adam_lr: float,
    weight_decay: float,
    dtype: torch.dtype = torch.float32,
    further: nn.Parameter | None = None,
    **variants: Any,
) -> Optimizer:
    """Build the optimizer called `name` for a model; each of its groups has a "peak_lr" and a "peak_decay".

    lr and adam_lr are peak rates; `further` is a matrix beside the model's, trained like those of its blocks; `variants`
    are further fields of Hyperparameters. Raises UserError where its package is not installed.
    """
    spec, parameters = OPTIMIZERS[name], ParameterGroups.of(model)
    more = [] if further is None else [further]
    parameters.blocks.extend(more)
    optimizer = spec.build(parameters, Hyperparameters(lr, adam_lr, weight_decay, **variants), dtype)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in (*model.parameters(), *more))
    for group in optimizer.param_groups:
        group["peak_decay"] = group["weight_decay"]
    cast(Any, optimizer).spec = spec
    return optimizer


def state_bytes(optimizer: Optimizer) -> int:
    """Estimate the bytes of an optimizer's state: n_moments for each parameter, and those of what its rows share."""
    spec: OptimizerSpec = cast(Any, optimizer).spec
    characters: SharedCharacters | None = getattr(optimizer, "characters", None)
    total = 0
    for group in optimizer.param_groups:
        total += sum(spec.n_moments * p.numel() * p.element_size() for p in group["params"])
        if characters and group.get("character_share"):
            n_moments = len(CHARACTER_STATE) * characters.n_shared
            total += sum(n_moments * p.size(1) * p.element_size() for p in group["params"])
    return total


def set_schedules(optimizer: Optimizer, lr: float, decay: float = 1.0, momentum: float = MOMENTUM) -> None:
    """Set each group's learning rate to `lr` times its peak, its weight decay to `decay` times its own, and Muon's momentum."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["peak_lr"]
        group["weight_decay"] = decay * group["peak_decay"]
        if group.get("muon"):
            group["momentum"] = momentum


# AdamW


def _build_adamw(parameters: ParameterGroups, settings: Hyperparameters, dtype: torch.dtype) -> Optimizer:
    """Build AdamW for all parameters: matrices decay, biases and norms do not."""
    groups = [
        {
            "params": parameters.blocks + parameters.embeddings,
            "weight_decay": settings.weight_decay,
            "peak_lr": settings.lr,
        },
        {"params": parameters.vectors, "weight_decay": 0.0, "peak_lr": settings.lr},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=BETAS, eps=EPS, fused=parameters.can_fuse)


# Muon


def _build_muon(parameters: ParameterGroups, settings: Hyperparameters, dtype: torch.dtype) -> Optimizer:
    """Build Muon for the block matrices beside AdamW for the rest; biases and norms do not decay.

    Embeddings have the peak rate adam_lr; head, biases and norms have shares of it. Embedding and head shrink equally: the
    decay of each is divided by its share.
    """
    groups: list[Group] = [
        {"params": parameters.blocks, "weight_decay": settings.weight_decay, "peak_lr": settings.lr, "muon": True}
    ]
    groups[0] |= {"momentum": MOMENTUM, "scaling": settings.muon_scaling}
    embeddings = [p for p in parameters.embeddings if p is not parameters.head]
    for share, decay, character_share, members in (
        (HEAD_SHARE, settings.embedding_decay / HEAD_SHARE, settings.share_characters, [parameters.head]),
        (1.0, settings.embedding_decay, settings.share_characters, [p for p in embeddings if p is parameters.tokens]),
        (1.0, settings.embedding_decay, 0.0, [p for p in embeddings if p is not parameters.tokens]),  # of positions
        (VECTOR_SHARE, 0.0, 0.0, parameters.vectors),
    ):
        if members:
            rates = {"peak_lr": share * settings.adam_lr, "character_share": character_share}
            groups.append({"params": members, "weight_decay": decay, "muon": False, **rates})
    options = {"lr": settings.lr, "betas": BETAS, "eps": EPS, "fused": parameters.can_fuse}
    return MuonAdamW(groups, dtype, settings.cautious_decay, settings.characters, **options)


def _muon_state(group: Group) -> tuple[str, ...]:
    """Return the names of a parameter's state tensors."""
    if not group["muon"]:
        return (*ADAM_STATE, *CHARACTER_STATE) if group.get("character_share") else ADAM_STATE
    return ("momentum", "row_moment") if group["scaling"] == "neurons" else ("momentum",)


# GaLore


def import_galore() -> Any:
    """Import the optional package galore_torch. Raises UserError where it is not installed."""
    try:
        import galore_torch
    except ImportError as error:
        raise UserError(f"--optimizer galore_adamw needs galore-torch ({error}); pip install galore-torch")
    return galore_torch


def _build_galore(parameters: ParameterGroups, settings: Hyperparameters, dtype: torch.dtype) -> Optimizer:
    """Build GaLore for the block matrices beside plain AdamW for the rest; nothing decays, as in the paper."""
    plain = {"weight_decay": 0.0, "peak_lr": settings.lr}
    groups = [
        {"params": parameters.blocks, **plain, **GALORE},
        {"params": parameters.embeddings + parameters.vectors, **plain},
    ]
    optimizer: Optimizer = import_galore().GaLoreAdamW(
        groups, lr=settings.lr, betas=BETAS, eps=EPS, no_deprecation_warning=True
    )
    for parameter in parameters.blocks:
        optimizer.state[parameter]["projector"] = _projector(optimizer.param_groups[0])
    return optimizer


def _projector(group: Group) -> Any:
    """Return GaLore's projector, but with a row-major basis, like one loaded from a file.

    The SVD's result is column-major, and a product over another layout rounds differently: a resumed run would drift
    from one that was never stopped.
    """
    from galore_torch.galore_projector import GaLoreProjector

    class RowMajorProjector(GaLoreProjector):  # type: ignore[misc]
        def get_orthogonal_matrix(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            try:
                return super().get_orthogonal_matrix(*args, **kwargs).contiguous()
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                raise UserError("GaLore met a gradient that is not finite; run again with a lower --lr")

    return RowMajorProjector(**{key: group[key] for key in GALORE})


def _galore_to_tensor(key: str, value: Any) -> torch.Tensor:
    """Return an entry of GaLore's state as a tensor: of a projector its basis, since the group holds its settings."""
    return value.ortho_matrix.contiguous() if key == "projector" else torch.as_tensor(value)


def _galore_from_tensor(key: str, tensor: torch.Tensor, group: Group) -> Any:
    """Return the entry of GaLore's state that _galore_to_tensor turned into this tensor."""
    if key == "step":
        return int(tensor)
    if key != "projector":
        return tensor
    projector = _projector(group)
    projector.ortho_matrix = tensor
    return projector


# The registry, by the name that --optimizer takes

OPTIMIZERS: dict[str, OptimizerSpec] = {
    "muon": OptimizerSpec(
        _build_muon,
        default_lr=0.02,
        warmup_share=0.02,
        n_moments=1,
        state_keys=_muon_state,
        late_keys=("row_moment", *CHARACTER_STATE),
        recipe_flags=("embedding_decay", "cautious_decay", "muon_scaling", "momentum_warmup", "share_characters"),
    ),
    "adamw": OptimizerSpec(
        _build_adamw, default_lr=6e-4, warmup_share=0.05, n_moments=2, state_keys=lambda group: ADAM_STATE
    ),
    "galore_adamw": OptimizerSpec(
        _build_galore,
        default_lr=5e-3,
        warmup_share=0.05,
        n_moments=2,
        state_keys=lambda group: (*ADAM_STATE, "projector") if "rank" in group else ADAM_STATE,
        is_slow_to_start=True,  # an SVD of each matrix
        needs_full_matrices=True,
        require_package=import_galore,
        to_tensor=_galore_to_tensor,
        from_tensor=_galore_from_tensor,
    ),
}


# State as tensors


def _named_parameters(model: nn.Module, optimizer: Optimizer) -> dict[str, tuple[nn.Parameter, Group]]:
    """Return each parameter of the optimizer, with its group, by its name in the model, or FURTHER."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names.get(id(p), FURTHER): (p, group) for group in optimizer.param_groups for p in group["params"]}


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as tensors named `exp_avg.<parameter>` and the like, without its settings."""
    spec: OptimizerSpec = cast(Any, optimizer).spec
    tensors: dict[str, torch.Tensor] = {}
    for name, (parameter, group) in _named_parameters(model, optimizer).items():
        state = optimizer.state[parameter]
        assert state.keys() <= set(spec.state_keys(group)), f"{sorted(state)} are not the optimizer's state_keys"
        tensors |= {f"{key}.{name}": spec.to_tensor(key, value).contiguous() for key, value in state.items()}
    return tensors


def load_optimizer_tensors(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load what optimizer_tensors returned, onto the devices of the parameters. Raises KeyError where one is missing."""
    spec: OptimizerSpec = cast(Any, optimizer).spec
    for name, (parameter, group) in _named_parameters(model, optimizer).items():
        state = {}
        for key in spec.state_keys(group):
            if (key in spec.late_keys or name == FURTHER) and f"{key}.{name}" not in tensors:
                continue  # it was turned on later
            # A copy: the state is kept, and what is read is mapped into memory, which keeps the file open.
            tensor = tensors[f"{key}.{name}"].to(parameter.device, copy=True)
            if tensor.shape == parameter.shape and key not in spec.late_keys:
                tensor = shard_like(tensor, like=parameter)
            state[key] = spec.from_tensor(key, tensor, group)
        if state:
            optimizer.state[parameter] = state
