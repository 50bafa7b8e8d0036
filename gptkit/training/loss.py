"""The loss of a language model, alone or with a teacher.

Shapes: N tokens, C channels, V vocabulary (padded). A teacher may have other channels and another padding.
"""

from dataclasses import dataclass
from typing import Any

import torch

# The logits in memory at a time, so that they fit into a cache, or a GPU. More tokens than CHUNK_ROWS gain nothing, and
# with a small vocabulary fewer of them fit into a faster cache.
CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**31, "mps": 2**29}
CHUNK_ROWS = {"cpu": 512}
# float16 ends at 65,504. A chunk's gradient of the head is a sum over its rows, each a probability less 0 or 1 times a
# normalized state (at most sqrt(C), mostly below 5), before the loss scale is applied: with these it stays below.
FLOAT16_ROWS = 2048


@dataclass(frozen=True)
class SoftTargets:
    """What a teacher predicts for the same tokens: its logits are hidden @ weight.T."""

    hidden: torch.Tensor  # (…, C)
    weight: torch.Tensor  # (V, C)
    share: float  # of the loss, from 0 to 1


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    vocab_size: int,
    teacher: SoftTargets | None = None,
) -> torch.Tensor:
    """Return the mean cross-entropy, in nats per token, of the logits hidden @ weight.T, computed in chunks of tokens.

    hidden (…, C), weight (V, C), targets (…) int64 -> scalar float32. Columns from vocab_size on are padding. The
    gradients are computed on the way forward, while a chunk's probabilities are at hand (as in Liger Kernel's fused
    linear cross-entropy, Hsu et al. 2024, arXiv 2410.10989, section 3.2). Under autocast the products are in its dtype.

    With a teacher of share a, returns (1 - a) cross-entropy + a KL(teacher || model): knowledge distillation (Hinton et
    al. 2015, arXiv 1503.02531, section 2) at temperature 1, whose gradient by the logits is p - (1 - a) onehot - a q,
    with the probabilities p of the model and q of the teacher. No gradient reaches the teacher.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        loss: torch.Tensor = _LinearCrossEntropy.apply(
            hidden.flatten(0, -2), weight, targets.flatten(), vocab_size, dtype, torch.is_grad_enabled(), teacher
        )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # (N, C)
        weight: torch.Tensor,  # (V, C)
        targets: torch.Tensor,  # (N,)
        vocab_size: int,
        dtype: torch.dtype,
        with_gradients: bool,
        teacher: SoftTargets | None,
    ) -> torch.Tensor:
        n_tokens, n_logits = len(targets), len(weight)
        kind = hidden.device.type
        max_rows = min(CHUNK_ROWS.get(kind, n_tokens), n_tokens)
        if dtype == torch.float16:
            max_rows = min(max_rows, FLOAT16_ROWS)
        n_rows = min(max(CHUNK_BYTES.get(kind, 2**29) // (4 * n_logits), 64), max_rows)
        x, w = hidden.to(dtype), weight.to(dtype)  # (N, C), (V, C)
        grad_hidden = torch.empty_like(hidden) if with_gradients else hidden.new_empty(0)
        grad_weight = torch.zeros_like(weight) if with_gradients else weight.new_empty(0)
        total = torch.zeros((), device=hidden.device)
        logits = torch.empty(n_rows, n_logits, dtype=dtype, device=hidden.device)
        log_p = torch.empty(n_rows, n_logits, device=hidden.device)
        share = 0.0
        if teacher:
            share, teacher_x, teacher_w = (
                teacher.share,
                teacher.hidden.flatten(0, -2).to(dtype),
                teacher.weight.to(dtype),
            )
        for first in range(0, n_tokens, n_rows):
            chunk, chunk_targets = x[first : first + n_rows], targets[first : first + n_rows, None]
            n = len(chunk)
            torch.mm(chunk, w.T, out=logits[:n])
            logits[:n, vocab_size:] = -torch.inf
            if kind == "cpu" and not teacher:
                log_p_target, grad = _softmax(logits[:n], chunk_targets, out=log_p[:n])
            else:
                torch.log_softmax(logits[:n], dim=-1, dtype=torch.float32, out=log_p[:n])
                log_p_target, grad = log_p[:n].gather(1, chunk_targets), None
            total.sub_(log_p_target.sum(), alpha=1 - share)
            if teacher:
                teacher_logits = teacher_x[first : first + n_rows] @ teacher_w.T
                q, divergence = _soft_targets(teacher_logits[:, :vocab_size], log_p[:n, :vocab_size])
                total.add_(divergence, alpha=share)
            if not with_gradients:
                continue
            if grad is None:
                grad = log_p[:n].exp_()
            # Of the summed loss by the logits: the probabilities, less 1 at the target.
            grad.scatter_add_(1, chunk_targets, grad.new_full((n, 1), share - 1.0))
            if teacher:
                grad[:, :vocab_size].sub_(q, alpha=share)
            grad = grad.to(dtype)
            grad_hidden[first : first + n_rows] = grad @ w
            if dtype == weight.dtype:
                grad_weight.addmm_(grad.T, chunk)
            else:
                grad_weight += grad.T @ chunk
        ctx.save_for_backward(grad_hidden.div_(n_tokens), grad_weight.div_(n_tokens))
        return total / n_tokens

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad_outputs[0]), grad_weight.mul_(grad_outputs[0]), *[None] * 5


def _softmax(logits: torch.Tensor, targets: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities of the targets, (n, 1), and all probabilities in `out`, (n, V), of logits (n, V).

    That is a pass less than by log_softmax, unless a target is too improbable for the logarithm of its probability.
    """
    p = torch.softmax(logits, dim=-1, dtype=torch.float32, out=out)
    p_target = p.gather(1, targets)
    if p_target.min() > torch.finfo(torch.float32).tiny:
        return p_target.log(), p
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32, out=out)
    return log_p.gather(1, targets), log_p.exp_()


def _soft_targets(logits: torch.Tensor, log_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the probabilities q of a teacher's logits (n, V), and KL(q || p) in nats, summed over the rows."""
    log_q = torch.log_softmax(logits, dim=-1, dtype=torch.float32)  # (n, V)
    q = log_q.exp()
    return q, log_q.sub_(log_p).mul_(q).sum()
