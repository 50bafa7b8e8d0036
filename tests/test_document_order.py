"""Documents in a new order each epoch, windows cut anew, and random replacement of input tokens: the batches of both."""

import itertools
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from gptkit.data import document_order
from gptkit.data.batches import TrainingBatches
from gptkit.data.document_order import document_ends
from gptkit.data.token_shards import TokenStream
from gptkit.training.planning import Plan
from gptkit.training.recipe import Recipe
from gptkit.training.run import make_batches
from gptkit.training.settings import TrainingSettings

END = 0
T = 7
TEXTS = {  # lengths of documents, end-of-text included; a negative one has none
    "many": [5, 30, 1, 1, 90, 12, 7, 8, 55, 2, 40, 3],
    "tiny": [2] * 120,
    "one": [200],
    "one without end": [-200],
    "the last without end": [60, 70, -71],
}


def text_of(lengths: list[int]) -> npt.NDArray[np.uint32]:
    """Return tokens that are each their own place in the text, from 1, and END where a document ends."""
    tokens = np.arange(1, sum(map(abs, lengths)) + 1, dtype=np.uint32)
    for end, length in zip(itertools.accumulate(map(abs, lengths)), lengths, strict=True):
        if length > 0:
            tokens[end - 1] = END
    return tokens


def batches(tokens: npt.NDArray[Any], *cuts: int, **changes: Any) -> TrainingBatches:
    settings = {"batch_size": 3, "grad_accum_steps": 2, "seed": 1, "shuffle": "documents", "end_of_text_id": END}
    return TrainingBatches(TokenStream(np.split(tokens, cuts)), **{"context_length": T, **settings, **changes})


def rows_of_step(found: TrainingBatches, step: int) -> npt.NDArray[np.int64]:
    """Return the sequences of a step with the last target: (B, T + 1)."""
    each = [found.micro_batch(step, micro_step) for micro_step in range(found.grad_accum_steps)]
    return np.concatenate([np.concatenate([inputs, targets[:, -1:]], axis=1) for inputs, targets in each])


def rows_of_epoch(found: TrainingBatches, epoch: int) -> npt.NDArray[np.int64]:
    steps = range(epoch * found.steps_per_epoch, (epoch + 1) * found.steps_per_epoch)
    return np.concatenate([rows_of_step(found, step) for step in steps])


def slow_epoch(tokens: npt.NDArray[Any], seed: int, epoch: int) -> Iterator[list[int]]:
    """Yield the windows of an epoch by joining its documents, with the random numbers that it is to have."""
    documents: list[list[int]] = [[]]
    for token in tokens.tolist():
        documents[-1].append(token)
        if token == END:
            documents.append([])
    documents = [document for document in documents if document]
    rng = np.random.default_rng([seed, epoch, 1])
    joined = [token for document in rng.permutation(len(documents)) for token in documents[document]]
    offset = rng.integers(T)
    joined = joined[offset:] + joined[:offset]
    for window in np.random.default_rng([seed, epoch]).permutation((len(joined) - 1) // T):
        yield joined[window * T : window * T + T + 1]


@pytest.mark.parametrize("name", TEXTS)
def test_batches_are_those_of_documents_joined_in_the_order_of_the_epoch(name: str) -> None:
    tokens = text_of(TEXTS[name])
    found = batches(tokens, 1, 2, 50, 50, 130)
    assert found.steps_per_epoch == batches(tokens, shuffle="windows").steps_per_epoch > 3
    for epoch in range(4):
        rows = rows_of_epoch(found, epoch)
        expected = itertools.islice(slow_epoch(tokens, 1, epoch), len(rows))
        assert rows.tolist() == list(expected)


@pytest.mark.parametrize("name", ["many", "tiny", "one"])
def test_an_epoch_reads_each_token_once_and_leaves_documents_as_they_are(name: str) -> None:
    lengths = [
        *TEXTS[name],
        (1 - sum(TEXTS[name])) % (6 * T) or 6 * T,
    ]  # windows that fill their last step, and one token
    tokens = text_of(lengths)
    following = dict(itertools.pairwise(tokens.tolist()))  # of each token but END
    first = {END} | {1 + end for end in itertools.accumulate([0, *lengths[:-1]])}  # one that is empty has END alone
    assert (len(tokens) - 1) % (6 * T) == 0
    for epoch in range(3):
        rows = rows_of_epoch(batches(tokens, 20), epoch)
        read = Counter(rows[:, :-1].ravel().tolist())
        assert (Counter(tokens.tolist()) - read).total() == 1  # the last token is only a target
        assert read.total() == len(tokens) - 1
        for row in rows.tolist():
            for token, target in itertools.pairwise(row):
                assert target in first if token == END else target == following[token]


@pytest.mark.parametrize("name", TEXTS)
def test_epochs_are_cut_differently(name: str) -> None:
    found = batches(text_of(TEXTS[name]))
    cuts = [{tuple(row) for row in rows_of_epoch(found, epoch).tolist()} for epoch in range(6)]
    assert len({frozenset(each) for each in cuts}) >= 4  # of one document there are T ways to cut it
    others = {tuple(row) for row in rows_of_epoch(batches(text_of(TEXTS[name]), seed=2), 0).tolist()}
    assert others != cuts[0]


@pytest.mark.parametrize("shuffle", ["windows", "documents"])
def test_a_step_has_the_same_sequences_for_any_split_into_micro_steps_and_processes(shuffle: str) -> None:
    tokens, more = text_of(TEXTS["many"]), {"shuffle": shuffle, "replace_rate": 0.3}
    for step in (0, 3, 8, 13):
        expected = rows_of_step(batches(tokens, batch_size=8, grad_accum_steps=1, **more), step)
        for batch_size, grad_accum_steps, n_processes in ((2, 4, 1), (2, 2, 2), (2, 1, 4), (4, 2, 1), (1, 4, 2)):
            split = {"batch_size": batch_size, "grad_accum_steps": grad_accum_steps, "n_processes": n_processes}
            ranks = [batches(tokens, 99, rank=rank, **split, **more) for rank in range(n_processes)]
            rows = [rows_of_step(found, step).reshape(grad_accum_steps, batch_size, T + 1) for found in ranks]
            assert np.array_equal(np.concatenate(rows, axis=1).reshape(-1, T + 1), expected)


def test_a_step_is_the_same_whatever_was_read_before() -> None:
    tokens, cpu = text_of(TEXTS["many"]), torch.device("cpu")
    forward = list(itertools.islice(batches(tokens, replace_rate=0.2).iterate_from(0, cpu), 60))
    for step in (29, 7, 20):
        again = batches(tokens, replace_rate=0.2).iterate_from(step, cpu)
        for batch, expected in zip(again, forward[2 * step :], strict=False):
            assert all(map(torch.equal, batch, expected))


def test_ends_are_found_in_blocks_over_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = text_of(TEXTS["many"])
    expected = np.cumsum(TEXTS["many"]).tolist()
    for block in (1, 3, 127, 1000):
        monkeypatch.setattr(document_order, "SCAN_TOKENS", block)
        assert document_ends(TokenStream(np.split(tokens, [2, 40, 41])), END).tolist() == expected
        assert document_ends(TokenStream([tokens[:-1]]), END).tolist() == [*expected[:-1], expected[-1] - 1]
        assert document_ends(TokenStream([tokens]), -1).tolist() == [len(tokens)]
    assert document_ends(TokenStream([]), END).tolist() == []


def test_a_large_corpus_has_the_order_of_its_windows_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptkit.data.batches.MAX_SHUFFLED", 5)
    tokens = text_of([60, 70, 6 * 5 * T + 1 - 130])
    read = Counter(rows_of_epoch(batches(tokens), 1)[:, :-1].ravel().tolist())
    assert (Counter(tokens.tolist()) - read).total() == 1
    assert read.total() == len(tokens) - 1


# Replacement of input tokens


@pytest.mark.parametrize("shuffle", ["windows", "documents"])
@pytest.mark.parametrize(("batch_size", "context_length"), [(1, 7), (1, 1), (5, 1), (5, 16)])
def test_replacement_leaves_targets_and_end_of_text(shuffle: str, batch_size: int, context_length: int) -> None:
    tokens = text_of([4, 2, 9, 1] * 20)
    how = {"batch_size": batch_size, "context_length": context_length, "shuffle": shuffle}
    plain, replaced = batches(tokens, **how), batches(tokens, **how, replace_rate=0.9)
    n_replaced = 0
    for step, micro_step in itertools.product(range(2 * plain.steps_per_epoch), range(2)):
        (inputs, targets), (found, same) = plain.micro_batch(step, micro_step), replaced.micro_batch(step, micro_step)
        assert torch.equal(same, targets)
        assert torch.equal(found == END, inputs == END)
        assert (found.dtype, found.shape, found.is_contiguous()) == (torch.int64, inputs.shape, True)
        n_replaced += int((found != inputs).sum())
    assert n_replaced > 0.3 * 2 * plain.steps_per_epoch * plain.tokens_per_step  # a fourth of all are END


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_tokens_are_replaced_at_the_rate_asked_for_by_tokens_as_frequent_as_in_the_text(rate: float) -> None:
    frequencies = np.array([0.0, 0.5, 0.3, 0.15, 0.05])  # of 0 … 4
    tokens = np.random.default_rng(0).choice(5, 200_001, p=frequencies).astype(np.uint16)
    how: dict[str, Any] = {"batch_size": 50, "context_length": 100, "shuffle": "windows"}
    plain, replaced = batches(tokens, **how), batches(tokens, 77_777, **how, replace_rate=rate)
    before, after = (np.concatenate([rows_of_epoch(each, e)[:, :-1] for e in (0, 1)]) for each in (plain, replaced))
    assert before.size == 400_000
    for token in range(1, 5):  # one that is replaced may be so by its like
        expected = rate * frequencies + np.where(np.arange(5) == token, 1 - rate, 0)
        n = (before == token).sum()
        found = np.bincount(after[before == token], minlength=5) / n
        assert (abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / n)).all()
    changed = after != before
    assert abs(np.corrcoef(changed[:, 1:].ravel(), changed[:, :-1].ravel())[0, 1]) < 0.01
    by_epoch = changed.reshape(2, -1)
    assert abs(np.corrcoef(*by_epoch)[0, 1]) < 0.02  # other ones in each epoch
    plain, replaced = (batches(tokens, **how, replace_rate=each, seed=2) for each in (0.0, rate))
    of_other_seed = (rows_of_epoch(plain, 0) != rows_of_epoch(replaced, 0))[:, :-1]
    assert of_other_seed.mean() == pytest.approx(changed.mean(), abs=0.01)
    assert abs(np.corrcoef(of_other_seed.ravel(), by_epoch[0])[0, 1]) < 0.02


def test_tokens_from_all_of_the_text_replace_others() -> None:
    tokens = np.arange(1, 100_002, dtype=np.uint32)
    plain, replaced = (batches(tokens, 1000, context_length=99, replace_rate=rate) for rate in (0.0, 0.1))
    before, after = (rows_of_epoch(each, 0)[:, :-1] for each in (plain, replaced))
    drawn = after[before != after]
    assert len(drawn) == pytest.approx(0.1 * before.size, rel=0.05)
    counts, _ = np.histogram(drawn, 10, (1, 100_001))
    assert counts == pytest.approx(len(drawn) / 10, rel=0.15)
    assert abs(np.corrcoef(drawn, before[before != after])[0, 1]) < 0.05


def test_a_run_reads_as_its_recipe_says() -> None:
    tokens = text_of(TEXTS["many"])
    streams = {"train": TokenStream([tokens]), "val": TokenStream([tokens[:50]])}
    settings = TrainingSettings(data_dir="", seed=1, batch_size=3)
    plan = Plan(SimpleNamespace(context_length=T), 3, 2)
    for recipe in (Recipe(), Recipe(shuffle="documents"), Recipe(shuffle="documents", replace_rate=0.5)):
        found, validation = make_batches(settings, Plan(plan.model, 3, 2, recipe=recipe), streams, END)
        how = {"shuffle": recipe.shuffle, "replace_rate": recipe.replace_rate}
        assert np.array_equal(rows_of_epoch(found, 1), rows_of_epoch(batches(tokens, **how), 1))
        assert torch.equal(validation[0][0][0], torch.arange(1, 8) * torch.tensor([1, 1, 1, 1, 0, 1, 1]))
