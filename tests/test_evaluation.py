"""gptkit/evaluation.py: the mean by hand, and that nothing is left behind."""

import pytest
import torch
from test_gpt_model import random_ids, random_model
from torch import nn
from torch.nn import functional as F

from gptkit.evaluation import mean_loss

CPU = torch.device("cpu")


def uneven_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Four sequences and one, of other lengths: a mean over batches is not the mean over tokens."""
    long, short = random_ids(4, 21, seed=1), random_ids(1, 8, seed=2)
    return [(ids[:, :-1], ids[:, 1:]) for ids in (long, short)]


def test_each_token_counts_the_same() -> None:
    model, batches = random_model(), uneven_batches()
    with torch.no_grad():
        nats = [
            F.cross_entropy(model(inputs).double().flatten(0, 1), targets.flatten(), reduction="none")
            for inputs, targets in batches
        ]
    expected = torch.cat(nats).mean().item()
    assert abs(expected - (nats[0].mean() + nats[1].mean()).item() / 2) > 1e-2
    assert mean_loss(model, model, batches, CPU, torch.float32) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_without_dropout_random_numbers_or_gradients(training: bool) -> None:
    model, dropping = random_model(), random_model(drop_rate=0.5)
    dropping.train(training)
    before = torch.get_rng_state()
    expected = mean_loss(model, model, uneven_batches(), CPU, torch.float32)
    assert mean_loss(dropping, dropping, uneven_batches(), CPU, torch.float32) == expected
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training is training for module in dropping.modules())
    assert all(parameter.grad is None for parameter in dropping.parameters())
    assert torch.is_grad_enabled()


def test_bfloat16_products_through_the_forward_it_is_given() -> None:
    model = random_model()
    seen = []

    def forward(ids: torch.Tensor) -> torch.Tensor:  # a compiled model stands here
        logits = model(ids)
        seen.append((logits.dtype, logits.requires_grad))
        return logits

    exact = mean_loss(model, forward, uneven_batches(), CPU, torch.float32)
    rough = mean_loss(model, forward, uneven_batches(), CPU, torch.bfloat16)
    assert seen == [(torch.float32, False)] * 2 + [(torch.bfloat16, False)] * 2
    assert rough != exact
    assert rough == pytest.approx(exact, rel=0.02)


def test_a_model_that_knows_nothing() -> None:
    class Uniform(nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*ids.shape, 128)

    model = Uniform()
    batches = [(ids[:, :-1], ids[:, 1:]) for ids in (random_ids(3, 9), random_ids(2, 5))]
    assert mean_loss(model, model, batches, CPU, torch.float32) == pytest.approx(4.852030263919617)  # ln 128
