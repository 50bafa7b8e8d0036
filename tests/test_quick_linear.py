"""gptkit/quick_linear.py: the products of torch's own layers."""

import pytest
import torch
from test_gpt_model import CONTEXT, VOCAB, both_archs, random_ids, random_model
from torch import nn

from gptkit.quick_linear import Int8Linear, PackedLinear, replace_linear_layers


@pytest.mark.parametrize("n_rows", [1, 3, 4, 8, 50])
@pytest.mark.parametrize("n_outputs", [64, 96, 7, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_the_product_is_the_same(n_rows: int, n_outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(40, n_outputs, bias=bias), torch.randn(n_rows, 1, 40)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(layer.weight, layer.bias)(x), layer(x))


@pytest.mark.parametrize("bias", [True, False])
def test_in_eight_bits_it_is_nearly_the_same(bias: bool) -> None:
    """Exactly what the rounded weights and inputs give, worked out in float64."""
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48, bias=bias), torch.randn(5, 64) * torch.tensor([1e-3, 1.0, 30.0, 1.0, 1e4])[:, None]
    x[3] = 0
    with torch.inference_mode():
        found = Int8Linear(layer.weight, layer.bias)(x)
        exact = layer(x)
        scales, largest = layer.weight.double().abs().amax(1) / 127, x.double().abs().amax(1).clamp_min(1e-12)
        weight = (layer.weight.double() / scales[:, None]).round() * scales[:, None]
        rounded = (x.double() / largest[:, None] * 63).round() * largest[:, None] / 63
        expected = rounded @ weight.T + (layer.bias.double() if bias else 0)
    for row in range(5):
        error = (found[row] - expected[row]).abs().max() / expected[row].abs().max().clamp_min(1e-9)
        assert error < 0.01, row  # a value halfway between two levels may go either way
        assert (found[row] - exact[row]).norm() < 0.03 * exact[row].norm() + 1e-6


def test_in_eight_bits_a_row_does_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48), torch.randn(6, 64) * torch.arange(1, 7)[:, None]
    quantized = Int8Linear(layer.weight, layer.bias)
    with torch.inference_mode():
        together = quantized(x)
        for row in range(6):
            assert torch.equal(quantized(x[row : row + 1])[0], together[row])


@both_archs
@pytest.mark.parametrize(("kind", "most"), [(PackedLinear, 1e-5), (Int8Linear, 0.1)])
def test_a_model_with_its_layers_replaced(arch: str, kind: type, most: float) -> None:
    model, ids = random_model(arch=arch), random_ids(1, CONTEXT)
    with torch.inference_mode():
        before = model(ids)
        replace_linear_layers(model, kind)
        after = model(ids)
    assert [module for name, module in model.named_modules() if type(module) is nn.Linear] == (
        [model.out_head] if arch == "modern" else []
    )
    assert sum(isinstance(module, kind) for module in model.modules()) == 4 * model.config.n_layers + 1
    assert (after[..., VOCAB:] == -torch.inf).all()
    difference = (after - before)[..., :VOCAB].norm() / before[..., :VOCAB].norm()
    assert difference < most
    assert kind is PackedLinear or difference > 1e-4  # the layers are really in use
