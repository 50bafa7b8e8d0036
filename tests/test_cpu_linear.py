"""gptkit/generation/cpu_linear.py: its layers against torch's own."""

import pytest
import torch
from test_gpt_model import CONTEXT, VOCAB, both_archs, random_ids, random_model
from torch import nn

from gptkit.base.cli import UserError
from gptkit.generation import cpu_linear
from gptkit.generation.cpu_linear import (
    Int8Linear,
    PackedLinear,
    prepare_for_generation,
    quantized_copy,
    replace_linear_layers,
)


@pytest.mark.parametrize("n_rows", [1, 3, 4, 8, 50])
@pytest.mark.parametrize("n_outputs", [64, 96, 7, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_product_equals_torch(n_rows: int, n_outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(40, n_outputs, bias=bias), torch.randn(n_rows, 1, 40)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(layer.weight, layer.bias)(x), layer(x))


def exact_int8_product(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:  # (M, K) -> (M, N) float64
    """Return the exact product of the rounded weights and inputs, each row of them by 127 levels around 0."""
    scales, largest = layer.weight.double().abs().amax(1) / 127, x.double().abs().amax(1).clamp_min(1e-12)
    weight = (layer.weight.double() / scales[:, None]).round() * scales[:, None]
    rounded = (x.double() / largest[:, None] * 63).round() * largest[:, None] / 63
    return rounded @ weight.T + (layer.bias.double() if layer.bias is not None else 0)


@pytest.mark.parametrize("bias", [True, False])
def test_int8_product_is_nearly_the_same(bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48, bias=bias), torch.randn(5, 64) * torch.tensor([1e-3, 1.0, 30.0, 1.0, 1e4])[:, None]
    x[3] = 0
    with torch.inference_mode():
        quantized, exact, expected = Int8Linear(layer.weight, layer.bias), layer(x), exact_int8_product(x, layer)
        batched, one_by_one = quantized(x), torch.cat([quantized(row[None]) for row in x])
    for row in range(5):
        error = (batched[row] - expected[row]).abs().max() / expected[row].abs().max().clamp_min(1e-9)
        assert error < 0.01, row  # a value halfway between two levels may go either way
        for found in (batched[row], one_by_one[row]):
            assert (found - exact[row]).norm() < 0.03 * exact[row].norm() + 1e-6


def test_int8_rounds_a_single_row_of_one_sign_more_finely() -> None:
    """Such rows come after GELU: the 128 levels lie where the values do."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 48)
    with torch.inference_mode():
        quantized = Int8Linear(layer.weight, layer.bias)
        single_error, batch_error = 0.0, 0.0
        for _ in range(20):
            x = torch.rand(1, 256)
            single_error += float((quantized(x) - layer(x)).norm())
            batch_error += float((quantized(x.repeat(2, 1))[:1] - layer(x)).norm())
    assert single_error < batch_error


def test_int8_row_does_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48), torch.randn(6, 64) * torch.arange(1, 7)[:, None]
    quantized = Int8Linear(layer.weight, layer.bias)
    with torch.inference_mode():
        batched = quantized(x)
        for first in range(0, 6, 2):
            assert torch.equal(quantized(x[first : first + 2]), batched[first : first + 2])


@both_archs
@pytest.mark.parametrize(("kind", "most"), [(PackedLinear, 1e-5), (Int8Linear, 0.1)])
def test_a_model_with_replaced_layers_has_nearly_the_same_logits(arch: str, kind: type, most: float) -> None:
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


@both_archs
def test_a_quantized_copy_shares_all_but_its_layers(arch: str) -> None:
    model, ids = random_model(arch=arch, drop_rate=0.5).train(), random_ids(1, CONTEXT)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copied = quantized_copy(model)
    assert copied.tok_emb.weight is model.tok_emb.weight
    assert copied.final_norm.weight is model.final_norm.weight
    assert copied.padding_bias is model.padding_bias
    with torch.inference_mode():
        found = copied(ids)  # without dropout: it is for inference only
        assert torch.equal(found, copied(ids))
        exact = model.eval()(ids)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(module, Int8Linear) for module in model.modules())
    assert 1e-4 < (found - exact)[..., :VOCAB].norm() / exact[..., :VOCAB].norm() < 0.1


def test_a_draft_is_made_where_it_pays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepare_for_generation(random_model(), with_draft=True) is None  # too small
    monkeypatch.setattr(cpu_linear, "MIN_DRAFT_ENTRIES", 0)
    assert prepare_for_generation(random_model(), with_draft=False) is None
    model = random_model()
    draft = prepare_for_generation(model, with_draft=True)
    for prepared, kind in ((model, PackedLinear), (draft, Int8Linear)):
        assert sum(isinstance(module, kind) for module in prepared.modules()) == 4 * model.config.n_layers + 1

    def fail(*_: object) -> None:
        raise UserError("no int8 product")

    monkeypatch.setattr(cpu_linear, "Int8Linear", fail)
    assert prepare_for_generation(random_model(), with_draft=True) is None
