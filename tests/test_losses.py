"""gptkit/losses.py: against a calculation by hand and torch's float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from gptkit.losses import next_token_loss


def random_logits(*shape: int, scale: float = 5.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * scale


def test_by_hand() -> None:
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0]]])  # probabilities 1/4, 3/4 and 1/2, 1/2
    loss = next_token_loss(logits, torch.tensor([[1, 0]]))
    assert loss.shape == ()
    assert loss.item() == pytest.approx((-math.log(3 / 4) - math.log(1 / 2)) / 2, rel=1e-6)


def test_equals_float64() -> None:
    logits, targets = random_logits(3, 7, 1000), torch.randint(1000, (3, 7))
    expected = F.cross_entropy(logits.double().reshape(21, 1000), targets.reshape(21))
    assert next_token_loss(logits, targets).item() == pytest.approx(expected.item(), rel=1e-6)


def test_gradient_is_softmax_less_one_at_the_target() -> None:
    logits, targets = random_logits(2, 3, 11).requires_grad_(), torch.randint(11, (2, 3))
    next_token_loss(logits, targets).backward()
    expected = (logits.detach().double().softmax(dim=-1) - F.one_hot(targets, 11)) / 6
    torch.testing.assert_close(logits.grad.double(), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_logits_are_summed_in_float32(autocast: bool) -> None:
    logits, targets = random_logits(2, 64, 4096, scale=1.0).bfloat16(), torch.randint(4096, (2, 64))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = next_token_loss(logits, targets)
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_impossible_ids_do_not_count() -> None:
    logits, targets = random_logits(2, 5, 8), torch.randint(6, (2, 5))
    logits[..., 6:] = -torch.inf
    assert torch.equal(next_token_loss(logits, targets), next_token_loss(logits[..., :6], targets))
