"""The loss of a language model.

Shapes: N tokens, C channels, V vocabulary (padded).
"""

from typing import Any

import torch

# The logits in memory at a time, so that they fit into a cache, or a GPU. More tokens than CHUNK_ROWS gain nothing, and
# with a small vocabulary fewer of them fit into a faster cache.
CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**31, "mps": 2**29}
CHUNK_ROWS = {"cpu": 512}
# float16 ends at 65,504. A chunk's gradient of the head is a sum over its rows, each a probability less 0 or 1 times a
# normalized state (at most sqrt(C), mostly below 5), before the loss scale is applied: with these it stays below.
FLOAT16_ROWS = 2048


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """Return the mean cross-entropy, in nats per token, of the logits hidden @ weight.T, computed in chunks of tokens.

    hidden (…, C), weight (V, C), targets (…) int64 -> scalar float32. Columns from vocab_size on are padding. The
    gradients are computed on the way forward, while a chunk's probabilities are at hand (as in Liger Kernel's fused
    linear cross-entropy, Hsu et al. 2024, arXiv 2410.10989, section 3.2). Under autocast the products are in its dtype.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        loss: torch.Tensor = _LinearCrossEntropy.apply(
            hidden.flatten(0, -2), weight, targets.flatten(), vocab_size, dtype, torch.is_grad_enabled()
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
        for first in range(0, n_tokens, n_rows):
            chunk, chunk_targets = x[first : first + n_rows], targets[first : first + n_rows, None]
            n = len(chunk)
            torch.mm(chunk, w.T, out=logits[:n])
            logits[:n, vocab_size:] = -torch.inf
            torch.log_softmax(logits[:n], dim=-1, dtype=torch.float32, out=log_p[:n])
            total -= log_p[:n].gather(1, chunk_targets).sum()
            if not with_gradients:
                continue
            grad = log_p[:n].exp_()  # of the summed loss by the logits: the probabilities, less 1 at the target
            grad.scatter_add_(1, chunk_targets, grad.new_full((n, 1), -1.0))
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
        return grad_hidden.mul_(grad_outputs[0]), grad_weight.mul_(grad_outputs[0]), None, None, None, None
