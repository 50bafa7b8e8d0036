"""Linear layers for writing on a CPU, where a token costs as long as the weights take to come out of memory.

For few rows torch hands a product to a routine that reads the weights with one core, or, for some rows, again and
again; `ChunkedLinear` gives each core a part of them. `Int8Linear` has a quarter of the bytes to read. Both are for
inference alone: they have no parameters of their own.

Shapes: M rows (of all dimensions but the last), K inputs, N outputs.
"""

import math
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gptkit.command_line import UserError

MOST_ROWS = 16  # above, torch's own product is the quicker one
N_CHUNKS = 32
INPUT_LEVELS = 63  # AVX2 adds products of inputs and weights in pairs, in 16 bits: 2 x 127 x 127 is the most that fits


class ChunkedLinear(nn.Module):
    """x W^T + b in the weights' own type."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight.detach(), bias if bias is None else bias.detach()
        self.n_chunks = math.gcd(N_CHUNKS, len(weight))
        self.chunks = self.weight.view(self.n_chunks, -1, weight.shape[1]).transpose(1, 2)  # (chunks, K, N / chunks)
        self.bias_chunks = None if self.bias is None else self.bias.view(self.n_chunks, 1, -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (…, K) -> (…, N)
        n_outputs, n_inputs = self.weight.shape
        rows = x.reshape(-1, n_inputs)  # (M, K)
        if len(rows) > MOST_ROWS:
            return F.linear(x, self.weight, self.bias)
        rows = rows.expand(self.n_chunks, *rows.shape)
        if self.bias_chunks is None:
            out = torch.bmm(rows, self.chunks)  # (chunks, M, N / chunks)
        else:
            out = torch.baddbmm(self.bias_chunks, rows, self.chunks)
        return out.transpose(0, 1).reshape(*x.shape[:-1], n_outputs)


class Int8Linear(nn.Module):
    """x W^T + b with weights in 8 bits, one scale an output, and inputs in 7 bits, one scale a row.

    As LLM.int8 (Dettmers et al. 2022, section 2.1, "row-wise" and vector-wise scales), without its outliers. A row's
    result does not depend on the rows beside it. torch's FBGEMM kernels do the product. Raises UserError where torch
    has none for this processor.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.bias = None if bias is None else bias.detach().float()
        scales = (weight.detach().float().abs().amax(1) / 127).clamp_min(1e-12).double()
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch means to move these tensors to another library
                quantized = torch.quantize_per_channel(weight.detach().float(), scales, zeros, 0, torch.qint8)
            self.packed: Any = torch.ops.quantized.linear_prepack(quantized, None)
        except (RuntimeError, AttributeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"--quantize int8: this torch has no such product for this processor ({reason}); leave it out"
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (…, K) -> (…, N)
        largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).clamp_min(1e-12)  # (…, 1)
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / largest, 1 / INPUT_LEVELS, INPUT_LEVELS + 1, self.packed
        )
        return product * largest if self.bias is None else torch.addcmul(self.bias, product, largest)


def replace_linear_layers(model: Any, kind: type[ChunkedLinear] | type[Int8Linear]) -> None:
    """Put layers of that kind in place of a model's nn.Linear ones and of its last product. It cannot be trained then.

    The model has the matrix of its last product as head_weight, a bias of it as padding_bias, and takes another layer
    for it as quick_head.
    """
    head: Any = model.head_weight
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and child.weight is not head:
                setattr(module, name, kind(child.weight, child.bias))
    model.quick_head = kind(head, model.padding_bias if model.padding_bias.any() else None)
