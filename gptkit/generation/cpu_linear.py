"""Replace linear layers for generation on a CPU, where a token takes as long as reading the weights from memory.

For few rows, torch's float32 product reads the weights with one core or, for some numbers of rows, several times.
`PackedLinear` has oneDNN do the product, with the weights laid out for it; `Int8Linear` reads a quarter of the bytes.
Both are for inference only: they have no parameters of their own. `prepare_for_generation` puts PackedLinear layers
into a model, and makes a draft model of Int8Linear layers for speculative decoding (generate.py).

Shapes: M rows (all dimensions but the last), K inputs, N outputs.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gptkit.base.cli import UserError, first_line

PACKED_FOR_ROWS = 8  # the number of rows for which oneDNN chooses the layout of the weights
MIN_DRAFT_ENTRIES = 20_000_000  # entries of a model's matrices from which a draft pays off: benchmarks/draft_sizes.py
INPUT_LEVELS = 63  # AVX2 adds products of inputs and weights in pairs, in 16 bits: 2 x 127 x 127 is the most that fits


class PackedLinear(nn.Module):
    """A linear layer, x W^T + b, in float32, by the product that torch.compile would choose."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.bias = None if bias is None else bias.detach()
        self.packed: Any = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_FOR_ROWS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (…, K) -> (…, N)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """A linear layer, x W^T + b, with weights in 8 bits (one scale per output) and inputs in 7 bits (one scale per row).

    As in LLM.int8 (Dettmers et al. 2022, section 2.1, row-wise and vector-wise scales), without its outliers. A row's
    result does not depend on the other rows. A single row has a faster kernel, whose 128 levels span the least input,
    the largest one and 0: they are no further apart, unless all inputs are below 0.004. torch's FBGEMM kernels compute
    the product. Raises UserError where torch has none for this processor.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.bias = None if bias is None else bias.detach().float()
        scales = (weight.detach().float().abs().amax(1) / 127).clamp_min(1e-12)
        levels = (weight.detach() / scales[:, None]).round_().to(torch.int8)
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch plans to move these tensors to another library
                quantized = torch._make_per_channel_quantized_tensor(levels, scales.double(), zeros, 0)
            self.packed: Any = torch.ops.quantized.linear_prepack(quantized, None)
            self(torch.zeros(2, weight.shape[1]))  # some of torch's engines can pack the weights but not multiply them
        except (RuntimeError, AttributeError) as error:
            raise UserError(
                f"--quantize int8: this torch has no int8 product for this processor ({first_line(error)}); leave it out"
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (…, M, K) -> (…, M, N)
        if x.numel() == x.shape[-1]:  # a single row
            product = torch.ops.quantized.linear_dynamic(x, self.packed, reduce_range=True)  # 7 bits
            return product if self.bias is None else product.add_(self.bias)
        largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).clamp_min(1e-12)  # (…, 1)
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / largest, 1 / INPUT_LEVELS, INPUT_LEVELS + 1, self.packed
        )
        return product * largest if self.bias is None else torch.addcmul(self.bias, product, largest)


def replace_linear_layers(model: Any, layer: Callable[[torch.Tensor, torch.Tensor | None], nn.Module]) -> None:
    """Replace a model's linear layers and its output head, for good, by layers made from (weight, bias).

    The model has the weight of its output head as head_weight, its bias as padding_bias, and uses a layer assigned to
    inference_head in its place.
    """
    head: Any = model.head_weight
    for module in [module for module in model.modules() if not isinstance(module, nn.Linear)]:  # a list: they change
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and child.weight is not head:
                setattr(module, name, layer(child.weight, child.bias))
    model.inference_head = layer(head, model.padding_bias if model.padding_bias.any() else None)


def quantized_copy(model: Any) -> Any:
    """Return a model in evaluation mode with Int8Linear layers that shares everything else with the one given.

    Raises UserError where torch has no int8 product for this processor.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)
    replace_linear_layers(copied, Int8Linear)
    return copied.eval()


def n_matrix_entries(model: Any) -> int:
    """Count the entries of a model's linear layers, its output head included."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    blocks = sum(layer.weight.numel() for layer in layers if layer.weight is not model.head_weight)
    entries: int = blocks + model.head_weight.numel()
    return entries


def prepare_for_generation(model: Any, *, with_draft: bool) -> Any | None:
    """Put PackedLinear layers into a float32 model on the CPU, for good; return its draft.

    Returns None without with_draft, and where the model is too small for a draft to pay off or torch has no int8
    product for this processor.
    """
    draft = None
    if with_draft and n_matrix_entries(model) >= MIN_DRAFT_ENTRIES:
        with contextlib.suppress(UserError):
            draft = quantized_copy(model)
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        replace_linear_layers(model, PackedLinear)  # elsewhere torch's own layers stay
    return draft
