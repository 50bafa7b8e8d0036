"""WordDropout against what dropout is: rate, scale, gradient, and that a model with it remains the same model."""

import pytest
import torch
from random_models import CONTEXT, random_model
from torch import nn

from gptkit.training.compilation import checkpoint_activations
from gptkit.training.dropout import WordDropout, quicken_dropout

VOCAB = 50
IDS = torch.arange(2 * CONTEXT).view(2, CONTEXT) % VOCAB


@pytest.mark.parametrize("p", [0.002, 0.1, 0.5, 0.99999])
def test_it_leaves_out_a_share_of_p_and_keeps_the_expectation(p: float) -> None:
    torch.manual_seed(1)
    found = WordDropout(p)(torch.ones(1001, 999))  # not a multiple of four
    kept = found[found != 0]
    share = 1 - kept.numel() / found.numel()
    deviation = (p * (1 - p) / found.numel()) ** 0.5
    assert share == pytest.approx(p, abs=5 * deviation + 1 / 65536)
    assert kept.unique().numel() == 1
    assert kept[0].item() == pytest.approx(1 / (1 - p), rel=2 / 65536 / (1 - p))


def test_neighbours_are_left_out_independently() -> None:
    """Four elements have their bits from one random number."""
    torch.manual_seed(1)
    left_out = WordDropout(0.5)(torch.ones(1 << 20)).eq(0).view(-1, 8).float()
    correlations = torch.corrcoef(left_out.T) - torch.eye(8)
    assert correlations.abs().max() < 5 * (1 << 17) ** -0.5


def test_the_gradient_goes_where_the_value_went() -> None:
    x = torch.randn(64, 33, requires_grad=True)
    found = WordDropout(0.3)(x)
    found.backward(torch.ones_like(found))
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.where(found == 0, 0.0, found.detach() / x.detach()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_keeps_the_dtype(dtype: torch.dtype) -> None:
    assert WordDropout(0.1)(torch.ones(8, 3, dtype=dtype)).dtype == dtype


def test_it_does_nothing_in_evaluation_and_without_a_rate() -> None:
    x = torch.randn(4, 5)
    assert torch.equal(WordDropout(0.5).eval()(x), x)
    assert torch.equal(WordDropout(0.0)(x), x)


@pytest.mark.parametrize("arch", ["modern", "gpt2"])
def test_a_model_with_it_is_the_same_model(arch: str) -> None:
    plain, model = (random_model(VOCAB, drop_rate=0.5, arch=arch) for _ in range(2))
    quicken_dropout(model)
    assert [type(module) for module in model.modules() if isinstance(module, nn.Dropout)] == [WordDropout] * (1 + 2)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(model(IDS), plain(IDS))
    model.train()
    assert not torch.equal(model(IDS), model(IDS))


def test_a_block_that_is_computed_again_leaves_out_the_same() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = random_model(VOCAB, drop_rate=0.5, drop_attention=False).train()
        quicken_dropout(model)
        if checkpointed:
            checkpoint_activations(model.trf_blocks)
        torch.manual_seed(1)
        model(IDS).logsumexp(-1).sum().backward()
        gradients.append(model.tok_emb.weight.grad)
    torch.testing.assert_close(*gradients)


def test_compiled_it_leaves_out_the_same() -> None:
    """So that a run which is resumed with or without --compile goes on in the same way. This needs no C++ compiler."""
    module, x = WordDropout(0.3), torch.randn(16, 33)
    found = []
    for function in (module, torch.compile(module, backend="aot_eager")):
        torch.manual_seed(1)
        found.append(function(x))
    torch.testing.assert_close(*found)
