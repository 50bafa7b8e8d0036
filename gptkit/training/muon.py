"""Muon beside AdamW: the optimizer of the matrices of a model's blocks, and of all else.

Muon: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon).
Its variants: Chen et al. 2025, "Cautious Weight Decay" (arXiv 2510.12402); Chang et al. 2026, "MuonEq" (arXiv 2603.28254),
whose variant R is the scaling "rows"; Li et al. 2025, "NorMuon" (arXiv 2510.05491), the scaling "neurons". Which parameters
it takes, and their hyperparameters, are chosen in optimizers.py.
"""

from collections import defaultdict
from typing import Any, Literal

import torch
from torch.optim.adamw import adamw

from gptkit.distributed.fsdp import full_tensor, local_shard, shard_like
from gptkit.training.characters import SharedCharacters

Group = dict[str, Any]  # one of Optimizer.param_groups
MuonScaling = Literal["none", "rows", "neurons"]

CHARACTER_STATE = ("character_avg", "character_avg_sq")  # the moments of the vectors that tokens share
ROW_DECAY = 0.95  # of the row moments of "neurons", as in NorMuon's code

# The factors p + q s^2 + r s^4 by which Muon's steps multiply a singular value s, step by step: Amsel et al. 2025, "The Polar
# Express" (arXiv 2505.16932), algorithm 1's table for singular values from 1e-3 to 1.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
SAFETY = 1.01


class MuonAdamW(torch.optim.AdamW):
    """Muon for the groups with muon=True, which have a "momentum" and a "scaling", and AdamW for the others.

    Muon's step is the orthogonal matrix nearest to the momentum, so that each direction moves as far as any other. Its
    size is sqrt(max(1, rows / columns)), as in the authors' code: the same change of each output's root mean square.
    torch.optim.Muon is not used because it iterates in bfloat16, also where the hardware only emulates it; here it is
    `dtype`. Of a sharded matrix each process keeps its shard of the momentum, and computes the step of the full matrix.

    The scaling "rows" divides each row of the momentum by its norm before that; "neurons" divides each row of the step by
    the running root mean square of that row's steps, and keeps the norm of the matrix. With cautious_decay only those
    entries decay that the step does not move away from zero. Groups of AdamW with a "character_share" above 0 make a
    second step, of the vectors that tokens have in common (characters.py), at that share of their rate; cautious_decay
    does not look at it.
    """

    def __init__(
        self,
        groups: list[Group],
        dtype: torch.dtype,
        cautious_decay: bool = False,
        characters: SharedCharacters | None = None,
        **options: Any,
    ) -> None:
        super().__init__(groups, **options)
        self.dtype, self.cautious_decay, self.characters = dtype, cautious_decay, characters

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters; those of Muon's groups lose their gradient."""
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            if group["muon"]:
                self._muon_step(group)
            elif self.cautious_decay:
                self._decay_before_adamw(group)
                group["weight_decay"] = 0.0  # for the step below
        super().step()  # skips parameters without a gradient
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay
            if group.get("character_share"):
                self._character_step(group)

    def _decay_before_adamw(self, group: Group) -> None:
        """Decay what AdamW's step will not move away from zero: the step has the sign of the first moment that it updates."""
        for parameter in group["params"]:
            if parameter.grad is None or not group["weight_decay"]:
                continue
            state, update = self.state[parameter], (1 - group["betas"][0]) * local_shard(parameter.grad)
            if state:
                update.add_(local_shard(state["exp_avg"]), alpha=group["betas"][0])
            decay_cautiously(local_shard(parameter), update, group["lr"] * group["weight_decay"])

    def _character_step(self, group: Group) -> None:
        """Add AdamW's steps of the shared vectors to the rows that have them; after the rows' own steps."""
        assert self.characters
        beta1, beta2 = group["betas"]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            gradient = self.characters.of_shared.sum(full_tensor(local_shard(parameter.grad), like=parameter))  # (F, C)
            if CHARACTER_STATE[0] not in state or state[CHARACTER_STATE[0]].shape != gradient.shape:  # of other tokens
                state |= {key: torch.zeros_like(gradient) for key in CHARACTER_STATE}
            mean, mean_square = (state[key] for key in CHARACTER_STATE)
            shared = torch.zeros_like(gradient)  # they move from here, and the rows as far as they
            adamw(
                [shared], [gradient], [mean], [mean_square], [], [state["step"] - 1],
                fused=group["fused"], amsgrad=False, beta1=beta1, beta2=beta2, eps=group["eps"], maximize=False,
                lr=group["lr"] * group["character_share"], weight_decay=0.0,
            )  # fmt: skip
            parameter.add_(shard_like(self.characters.of_rows.sum(shared), like=parameter))

    def _muon_step(self, group: Group) -> None:
        by_shape = defaultdict(list)
        for parameter in group["params"]:
            by_shape[parameter.shape].append(parameter)
        for (n_rows, n_columns), parameters in by_shape.items():
            updates = []
            for parameter in parameters:
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum, grad = local_shard(state["momentum"]), local_shard(parameter.grad)
                momentum.lerp_(grad, 1 - group["momentum"])
                updates.append(full_tensor(grad.lerp(momentum, group["momentum"]), like=parameter))  # Nesterov's
                parameter.grad = None
            size = max(1.0, n_rows / n_columns) ** 0.5
            matrices = torch.stack(updates)
            if group["scaling"] == "rows":
                matrices = torch.nn.functional.normalize(matrices, dim=-1)
            steps = orthogonalize(matrices, self.dtype)
            for parameter, full_step in zip(parameters, steps, strict=True):
                if group["scaling"] == "neurons":  # on full matrices, so that each process has all row moments
                    state = self.state[parameter]
                    state["row_moment"] = balance_rows(full_step, state.get("row_moment"))
                step, decay = shard_like(full_step, like=parameter), group["lr"] * group["weight_decay"]
                if self.cautious_decay:
                    decay_cautiously(local_shard(parameter), local_shard(step), decay)
                else:
                    parameter.mul_(1 - decay)
                parameter.add_(step, alpha=-group["lr"] * size)


def decay_cautiously(weights: torch.Tensor, update: torch.Tensor, decay: float) -> None:
    """Multiply those weights by 1 - decay that have the sign of what is subtracted from them, or for which it is zero."""
    weights.mul_(1 - decay * (weights * update >= 0))


def balance_rows(step: torch.Tensor, moment: torch.Tensor | None) -> torch.Tensor:
    """Divide each row of a step (rows, columns) by its running root mean square, in place, keeping the norm of the whole.

    Return the new moment (rows,), the running mean of the mean square of each row; None stands for the first one, zeros.
    """
    moment = step.new_zeros(len(step)) if moment is None else moment
    moment.lerp_(step.square().mean(dim=1), 1 - ROW_DECAY)
    norm = step.norm()
    step.div_(moment.sqrt()[:, None] + 1e-10)
    step.mul_(norm / (step.norm() + 1e-10))
    return moment


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return about U V^T for each matrix U S V^T: (n, rows, columns) -> (n, rows, columns).

    Singular values from 1/1000 of the norm up come near 1, by Newton-Schulz steps with products in `dtype`; in bfloat16
    those below 1/100 are lost in its rounding.
    """
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)  # a little below 1, so that rounding cannot exceed it
    x = x.to(dtype)  # only now: a gradient may be too small for float16
    for i, (p, q, r) in enumerate(POLAR_EXPRESS, 1):
        if i < len(POLAR_EXPRESS):  # the authors' safety factor: in bfloat16 a value above 1 would diverge
            p, q, r = p / SAFETY, q / SAFETY**3, r / SAFETY**5
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=q, alpha=r), x, beta=p)
    return (x.mT if tall else x).to(matrices.dtype)
