"""Muon beside AdamW: the optimizer of the matrices of a model's blocks, and of all else.

Muon: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon).
Which parameters it takes, and their hyperparameters, are chosen in optimizers.py.
"""

from collections import defaultdict
from typing import Any

import torch

from gptkit.distributed.fsdp import full_tensor, local_shard, shard_like

Group = dict[str, Any]  # one of Optimizer.param_groups

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
    """Muon for the groups with muon=True, AdamW for the others.

    Muon's step is the orthogonal matrix nearest to the momentum, so that each direction moves as far as any other. Its
    size is sqrt(max(1, rows / columns)), as in the authors' code: the same change of each output's root mean square.
    torch.optim.Muon is not used because it iterates in bfloat16, also where the hardware only emulates it; here it is
    `dtype`. Of a sharded matrix each process keeps its shard of the momentum, and computes the step of the full matrix.
    """

    def __init__(self, groups: list[Group], dtype: torch.dtype, **options: Any) -> None:
        super().__init__(groups, **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters; those of Muon's groups lose their gradient."""
        for group in self.param_groups:
            if group["muon"]:
                self._muon_step(group)
        super().step()  # skips parameters without a gradient

    def _muon_step(self, group: Group) -> None:
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
                momentum.lerp_(grad, 1 - group["momentum"])
                updates.append(full_tensor(grad.lerp(momentum, group["momentum"]), like=parameter))  # Nesterov's
                parameter.grad = None
            size = max(1.0, n_rows / n_columns) ** 0.5
            steps = orthogonalize(torch.stack(updates), self.dtype)
            for parameter, update in zip(parameters, steps, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(shard_like(update, like=parameter), alpha=-group["lr"] * size)


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
