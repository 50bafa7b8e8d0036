"""gptkit/generation.py: against loops and probabilities worked out by hand, and transformers' generate."""

from collections.abc import Iterator

import pytest
import torch
from test_gpt_model import CONTEXT, VOCAB, hugging_face_twin, random_model
from torch import nn

from gptkit.generation import generate, sample

END = 0


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def write(model: nn.Module, ids: list[int], seed: int = 0, **changes: object) -> Iterator[int]:
    settings = {"max_new_tokens": 20, "context_length": CONTEXT, "temperature": 1.0, "top_k": None}
    settings |= {"end_of_text_id": -1, "banned_ids": ()}
    return generate(model, ids, generator=generator(seed), **(settings | changes))


class Bigrams(nn.Module):
    """A model whose logits depend on the last id alone; it remembers what it was shown."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)  # (V, V)
        self.shown: list[list[int]] = []

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        assert not self.training
        self.shown.append(ids[0].tolist())
        return self.table[ids]


def counting(n: int = 10) -> Bigrams:
    """After i comes i + 1 without a doubt; after the last, 0."""
    return Bigrams(torch.eye(n).roll(1, dims=1) * 100)


def random_bigrams(n: int = 12, seed: int = 3) -> Bigrams:
    return Bigrams(torch.randn(n, n, generator=generator(seed)) * 2)


def test_temperature_zero_takes_the_likeliest() -> None:
    model, expected = random_model(), [5, 60, 33]
    with torch.no_grad():
        for _ in range(15):
            expected.append(int(model(torch.tensor([expected]))[0, -1, :VOCAB].argmax()))
    assert list(write(model, [5, 60, 33], temperature=0.0, max_new_tokens=15)) == expected[3:]
    assert len(set(expected[3:])) > 3  # or it would say little


@pytest.mark.parametrize("seed", range(3))
def test_one_candidate_is_the_likeliest(seed: int) -> None:
    greedy = list(write(random_model(), [5], temperature=0.0))
    assert list(write(random_model(), [5], seed, temperature=1.7, top_k=1)) == greedy


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 5e-324])
def test_the_smallest_temperatures_are_nearly_zero(temperature: float) -> None:
    greedy = list(write(random_model(), [5], temperature=0.0))
    assert list(write(random_model(), [5], temperature=temperature)) == greedy


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.7, None), (1.5, 4), (1.0, 100)])
def test_draws_follow_the_probabilities(temperature: float, top_k: int | None) -> None:
    """Chi-squared: counts as far from the expected ones as these come up less than once in 10,000 by chance."""
    logits, n_draws = torch.randn(12, generator=generator(1)), 20_000
    allowed = logits >= logits.sort(descending=True).values[min(top_k or 12, 12) - 1]
    weights = (logits.double() / temperature).exp() * allowed
    expected = n_draws * weights / weights.sum()
    draws = generator(2)
    counts = torch.bincount(
        torch.tensor([sample(logits, temperature, top_k, draws) for _ in range(n_draws)]), minlength=12
    )
    assert (counts[~allowed] == 0).all()
    assert expected[allowed].min() > 5  # the test's own condition
    distance = ((counts - expected)[allowed] ** 2 / expected[allowed]).sum()
    freedom = torch.tensor(int(allowed.sum()) - 1.0, dtype=torch.float64)
    assert torch.special.gammaincc(freedom / 2, distance / 2) > 1e-4


def test_banned_ids_are_never_written() -> None:
    model, banned = random_bigrams(), {0, 3, 7, 11}
    drawn = list(write(model, [1], temperature=3.0, banned_ids=banned, max_new_tokens=500))
    assert set(drawn) == set(range(12)) - banned
    assert list(write(counting(), [1], temperature=0.0, banned_ids={2, *range(4, 10)}, max_new_tokens=1)) == [0]


def test_ends_at_end_of_text_without_yielding_it() -> None:
    assert list(write(counting(), [6], end_of_text_id=END)) == [7, 8, 9]
    assert list(write(counting(), [9], end_of_text_id=END)) == []
    assert list(write(counting(), [END, 6], end_of_text_id=END)) == [7, 8, 9]  # one in the prompt ends nothing


@pytest.mark.parametrize("n", [0, 1, 25])
def test_writes_as_many_as_asked(n: int) -> None:
    assert list(write(counting(), [6], max_new_tokens=n)) == [(7 + i) % 10 for i in range(n)]


def test_the_window_slides() -> None:
    model = counting()
    assert list(write(model, [1, 2, 3], context_length=4, max_new_tokens=4)) == [4, 5, 6, 7]
    assert model.shown == [[1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]]
    model.shown.clear()
    assert list(write(model, [1, 2, 3, 4, 5, 6], context_length=4, max_new_tokens=1)) == [7]
    assert model.shown == [[3, 4, 5, 6]]


def test_goes_on_past_the_context_of_a_real_model() -> None:
    assert len(list(write(random_model(), [5], max_new_tokens=CONTEXT + 10))) == CONTEXT + 10


def test_the_same_seed_writes_the_same() -> None:
    texts = [list(write(random_model(), [5], seed, temperature=2.0)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_draws_from_its_generator_alone() -> None:
    before = torch.get_rng_state()
    list(write(random_bigrams(), [5]))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_model_in_the_mode_it_found(training: bool) -> None:
    model = counting()
    model.train(training)
    list(write(model, [1]))
    assert model.training is training
    begun = write(model, [1])
    next(begun)
    assert torch.is_grad_enabled()  # the reader of a half-written text may train in between
    begun.close()
    assert model.training is training
    with pytest.raises(IndexError):
        list(write(model, [99]))
    assert model.training is training


@pytest.mark.parametrize("banned", [[], list(range(40))], ids=["all", "some banned"])
def test_equals_transformers(banned: list[int]) -> None:
    model, prompt = random_model(), [5, 60, 33]
    theirs = hugging_face_twin(model).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 3, dtype=torch.int64),
        do_sample=False,
        max_new_tokens=CONTEXT - 3,
        suppress_tokens=banned or None,
    )
    ours = list(write(model, prompt, temperature=0.0, end_of_text_id=END, banned_ids=banned))
    expected = theirs[0, 3:].tolist()
    assert len(ours) == 20 or expected[len(ours)] == END
    assert ours == expected[: len(ours)]
    assert len(ours) > 5
