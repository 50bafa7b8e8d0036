"""Layers that train faster on a CPU than torch's own: causal attention, and the dropout of dropout.py.

Forward and backward of torch's attention for CPUs take 1.7 to 3 times as long as of this one in bfloat16, and 1.1 to 1.4
times in float32 (benchmarks/attention_speed.py). This one keeps the weights of the attention, which are small where a model
and its context are, and multiplies by them as plain matrices. A block of queries meets no keys behind it, so that little is
computed above the diagonal.

Shapes: B batch, H query heads, G heads of keys and values, R = H / G query heads that share one, N = B * G, T time,
D channels of a head. K keys, n queries of a block.
"""

import functools
from typing import Any

import torch
from torch.nn import functional as F

from gptkit.training.dropout import quicken_dropout

# Of a column of scores in a block: 128 queries in 16 bits, and 64 in 32 bits, were the quickest tried.
BLOCK_BYTES = 256
# Of a model's attention weights, which are kept for the backward pass; where there would be more, torch's own keeps less.
MAX_WEIGHT_BYTES = 1 << 29


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # q (N, R, T, D), k and v (N, T, D) -> (N, R, T, D)
        N, R, T, D = q.shape
        output, weights = torch.empty_like(q), []
        for first, last in _blocks(T, q.dtype):
            block = q[:, :, first:last].reshape(N, -1, D)  # (N, R n, D)
            scores = torch.baddbmm(_mask(first, last, R, q.dtype), block, k[:, :last].mT, alpha=D**-0.5)  # (N, R n, K)
            weights.append(torch.softmax(scores, dim=-1))
            output[:, :, first:last] = torch.bmm(weights[-1], v[:, :last]).view(N, R, -1, D)
        ctx.save_for_backward(q, k, v, *weights)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        (grad,) = grad_outputs  # (N, R, T, D)
        q, k, v, *weights = ctx.saved_tensors
        N, R, T, D = q.shape
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (first, last), weight in zip(_blocks(T, q.dtype), weights, strict=True):
            block, grad_block = (x[:, :, first:last].reshape(N, -1, D) for x in (q, grad))  # (N, R n, D)
            grad_v[:, :last] += torch.bmm(weight.mT, grad_block)
            grad_weight = torch.bmm(grad_block, v[:, :last].mT)  # (N, R n, K)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_weight, weight, -1, weight.dtype)
            grad_q[:, :, first:last] = torch.bmm(grad_scores, k[:, :last]).view(N, R, -1, D)
            grad_k[:, :last] += torch.bmm(grad_scores.mT, block)
        return grad_q.mul_(D**-0.5), grad_k.mul_(D**-0.5), grad_v


def causal_attention(
    q: torch.Tensor,  # (B, H, T, D)
    k: torch.Tensor,  # (B, G, T, D)
    v: torch.Tensor,  # (B, G, T, D)
    mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool,
    enable_gqa: bool = False,
    max_weight_bytes: int = MAX_WEIGHT_BYTES,
) -> torch.Tensor:  # (B, H, T, D)
    """Return what F.scaled_dot_product_attention returns; what is not causal, or large, or has dropout, is left to it."""
    (B, H, T, D), G = q.shape, k.shape[1]
    if not is_causal or mask is not None or dropout or B * H * T * T * q.itemsize > max_weight_bytes:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, enable_gqa=enable_gqa)
    output: torch.Tensor = _CausalAttention.apply(
        q.reshape(B * G, H // G, T, D), k.reshape(B * G, T, D), v.reshape(B * G, T, D)
    )
    return output.view(B, H, T, D)


def quicken(model: Any) -> Any:
    """Give a GPT on a CPU attention and dropout that train faster, and return it; its parameters stay."""
    if model.head_weight.device.type != "cpu":
        return model
    attend = functools.partial(causal_attention, max_weight_bytes=MAX_WEIGHT_BYTES // model.config.n_layers)
    for module in model.modules():
        if hasattr(module, "attend"):
            module.attend = attend
    if not model.config.drop_attention:  # a run of version 0.1 goes on with its random numbers
        quicken_dropout(model)
    return model


def _blocks(T: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    n = BLOCK_BYTES // dtype.itemsize
    return [(first, min(first + n, T)) for first in range(0, T, n)]


def _mask(first: int, last: int, R: int, dtype: torch.dtype) -> torch.Tensor:
    """Return what is added to the scores of a block: 0, and -inf above the diagonal, (R n, K)."""
    is_later = torch.ones(last - first, last, dtype=torch.bool).triu(first + 1)  # (n, K)
    return torch.zeros(last - first, last, dtype=dtype).masked_fill_(is_later, -torch.inf).repeat(R, 1)
