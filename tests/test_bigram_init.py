"""gptkit/training/bigram_init.py: the fitted model against a smoothed table counted by hand."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch

from gpt_model import GPTConfig, GPTModel
from gptkit.data.token_shards import TokenStream
from gptkit.training import bigram_init
from gptkit.training.bigram_init import fit_to_bigrams

VOCAB, NEVER, LAST = 12, 10, 11  # of the ids one never occurs, and one ends the text, followed by nothing


def text_ids(n: int = 3000) -> list[int]:
    """Return n ids 0 … 9, each followed by some of the others far more often than by the rest, and LAST."""
    draw = np.random.default_rng(0)
    following = draw.dirichlet([0.2] * 10, size=10)
    ids = [0]
    while len(ids) < n:
        ids.append(int(draw.choice(10, p=following[ids[-1]])))
    return [*ids, LAST]


def stream(ids: list[int], dtype: str = "uint16") -> TokenStream:
    """Return a stream of the ids in two shards."""
    tokens = np.array(ids, dtype)
    return TokenStream([tokens[: len(ids) // 3], tokens[len(ids) // 3 :]])


def tiny_model(vocab_size: int = VOCAB, emb_dim: int = 16) -> GPTModel:
    torch.manual_seed(0)
    size = {"context_length": 8, "emb_dim": emb_dim, "n_layers": 1, "n_heads": 1, "vocab_multiple": 8}
    return GPTModel(GPTConfig(vocab_size, **size, arch="modern"))


def fit(model: GPTModel, tokens: TokenStream, n_steps: int, seed: int = 1) -> float:
    return fit_to_bigrams(tokens, model.tok_emb.weight, model.head_weight, model.config.vocab_size, n_steps, seed)


def smoothed(ids: list[int]) -> dict[int, list[float]]:
    """Map each token that is followed by something to the probabilities of its followers, by Witten and Bell's method C."""
    pairs, alone = Counter(itertools.pairwise(ids)), Counter(ids[:-1])
    table = {}
    for token, n_times in alone.items():
        n_kinds = sum(first == token for first, _ in pairs)
        share = [alone[follower] / (len(ids) - 1) for follower in range(VOCAB)]
        table[token] = [(pairs[token, f] + n_kinds * share[f]) / (n_times + n_kinds) for f in range(VOCAB)]
    return table


def divergence(model: GPTModel, table: dict[int, list[float]], tokens: list[int]) -> float:
    """Return the nats per token by which the model's cross-entropy over `tokens` exceeds the table's entropy."""
    with torch.no_grad():
        log_q = model(torch.tensor(tokens)[:, None])[:, 0].log_softmax(dim=-1).double()  # (N, V)
    p = torch.tensor([table[token] for token in tokens], dtype=torch.float64)
    return (torch.xlogy(p, p) - torch.where(p > 0, p * log_q[:, :VOCAB], 0)).sum(dim=-1).mean().item()


def test_the_model_starts_at_the_smoothed_table() -> None:
    ids = text_ids()
    table = smoothed(ids)
    assert all(sum(row) == pytest.approx(1) for row in table.values())
    model = tiny_model()
    before = divergence(model, table, ids[:-1])
    loss = fit(model, stream(ids), 200)
    assert divergence(model, table, ids[:-1]) < 0.003 < 0.3 < before
    entropy = -np.mean([sum(p * np.log(p) for p in table[token] if p) for token in ids[:-1]])
    assert loss == pytest.approx(entropy, rel=0.05)  # of 1024 tokens drawn


def test_a_pair_never_seen_is_not_impossible() -> None:
    """In a short text: what each token was followed by is far from all that may follow it."""
    ids = text_ids(100)
    model = tiny_model()
    fit(model, stream(ids), 200)
    table, pairs, alone = smoothed(ids), Counter(itertools.pairwise(ids)), Counter(ids[:-1])
    counted = {token: [pairs[token, follower] / n for follower in range(VOCAB)] for token, n in alone.items()}
    assert divergence(model, table, ids[:-1]) < 0.01
    assert divergence(model, counted, ids[:-1]) > 0.05  # as it would be if what was counted were all


def test_rows_without_counts_do_not_change() -> None:
    """These are rows that pad the vocabulary, and embeddings of tokens that nothing follows; the head avoids those."""
    ids, model = text_ids(), tiny_model()
    torch.nn.init.normal_(model.head_weight)
    embedding, head = model.tok_emb.weight.detach().clone(), model.head_weight.detach().clone()
    fit(model, stream(ids), 200)
    assert torch.equal(model.tok_emb.weight[NEVER:], embedding[NEVER:])
    assert torch.equal(model.head_weight[VOCAB:], head[VOCAB:])
    assert (model.tok_emb.weight[:NEVER] != embedding[:NEVER]).all()
    assert (model.head_weight[:VOCAB] != head[:VOCAB]).all()
    with torch.no_grad():
        p = model(torch.arange(VOCAB)[:, None])[:, 0].softmax(dim=-1)
    assert (p[:NEVER, NEVER] < 0.005).all()
    assert torch.isfinite(p).all()
    assert model.tok_emb.weight.grad is None
    assert model.head_weight.grad is None


def test_the_fit_is_reproducible_and_leaves_the_random_streams_alone() -> None:
    tokens = stream(text_ids())
    models = [tiny_model() for _ in range(3)]
    torch.manual_seed(3)
    np.random.seed(4)
    random.seed(5)
    states = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    losses = [fit(models[0], tokens, 20)]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (str(np.random.get_state()), random.getstate()) == states[1:]
    torch.manual_seed(6)
    np.random.seed(7)
    losses += [fit(models[1], tokens, 20), fit(models[2], tokens, 20, seed=2)]
    assert losses[0] == losses[1] != losses[2]
    for name in ("tok_emb.weight", "out_head.weight"):
        first, second, other = (model.get_parameter(name) for model in models)
        assert torch.equal(first, second)
        assert not torch.equal(first, other)


def test_only_the_beginning_of_a_long_text_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = text_ids()
    monkeypatch.setattr(bigram_init, "MAX_TOKENS", 500)
    model, twin = tiny_model(), tiny_model()
    assert fit(model, stream(ids), 20) == fit(twin, stream(ids[:500]), 20)
    assert torch.equal(model.head_weight, twin.head_weight)


def test_the_followers_of_a_frequent_token_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = text_ids()
    monkeypatch.setattr(bigram_init, "MAX_PER_ROW", 200)
    assert max(Counter(ids).values()) > 400
    model = tiny_model()
    fit(model, stream(ids), 200)
    assert 0.0005 < divergence(model, smoothed(ids), ids[:-1]) < 0.01  # without a limit 0.0002


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_the_last_of_many_ids_does_not_overflow(vocab_size: int, dtype: str) -> None:
    """In too small a type it would become 0; rows of tokens that do not occur stay as they are."""
    last, model = vocab_size - 1, tiny_model(vocab_size, emb_dim=4)
    before = model.tok_emb.weight.detach().clone()
    fit(model, stream([last, 0, 1] * 20, dtype), 5)
    changed = (model.tok_emb.weight != before).any(dim=1).nonzero().flatten()
    assert changed.tolist() == [0, 1, last]
