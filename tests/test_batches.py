"""gptkit/data/batches.py: the tokens of each step."""

from collections import Counter

import numpy as np
import pytest
import torch

from gptkit.data.batches import N_ROUNDS, TrainingBatches, n_windows, permute, validation_batches
from gptkit.data.token_shards import TokenStream


def stream(n_tokens: int, *cuts: int) -> TokenStream:
    """Return tokens 0 … n_tokens - 1, each its own position, in shards that end at `cuts`."""
    return TokenStream(np.split(np.arange(n_tokens, dtype=np.uint16), cuts))


def batches(tokens: TokenStream, **changes: int) -> TrainingBatches:
    settings = {"context_length": 5, "batch_size": 3, "grad_accum_steps": 2, "seed": 1} | changes
    return TrainingBatches(tokens, **settings)


def windows_of_step(found: TrainingBatches, step: int) -> list[int]:
    """Return the window that each sequence of a step is."""
    inputs = torch.cat([found.micro_batch(step, micro)[0] for micro in range(found.grad_accum_steps)])
    return [int(row[0]) // found.context_length for row in inputs]


def windows_of_epoch(found: TrainingBatches, epoch: int) -> list[int]:
    first = epoch * found.steps_per_epoch
    return [w for step in range(first, first + found.steps_per_epoch) for w in windows_of_step(found, step)]


@pytest.mark.parametrize(("n_tokens", "expected"), [(0, 0), (1, 0), (5, 0), (6, 1), (10, 1), (11, 2), (15, 2), (16, 3)])
def test_a_window_needs_a_target_for_each_token(n_tokens: int, expected: int) -> None:
    assert n_windows(stream(n_tokens), 5) == expected


def test_targets_are_the_inputs_shifted_by_one_also_over_the_ends_of_shards() -> None:
    found = batches(stream(301, 1, 2, 3, 44, 44, 100, 101, 299))
    for step in range(found.steps_per_epoch):
        for micro_step in range(2):
            inputs, targets = found.micro_batch(step, micro_step)
            assert inputs.shape == targets.shape == (3, 5)
            assert inputs.dtype == targets.dtype == torch.int64
            assert inputs.is_contiguous()
            assert targets.is_contiguous()
            assert torch.equal(targets, inputs + 1)
            assert torch.equal(inputs, inputs[:, :1] + torch.arange(5))
            assert (inputs[:, 0] % 5 == 0).all()


def test_an_epoch_takes_each_window_once_in_an_order_of_its_own() -> None:
    found = batches(stream(5 * 60 + 1))
    assert (found.sequences_per_step, found.tokens_per_step, found.steps_per_epoch) == (6, 30, 10)
    orders = [windows_of_epoch(found, epoch) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(60))
        assert order != sorted(order)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_windows_that_do_not_fill_a_step_are_left_to_other_epochs() -> None:
    found = batches(stream(5 * 64 + 3))  # 64 windows, 10 steps of 6
    seen = Counter(w for epoch in range(40) for w in windows_of_epoch(found, epoch))
    assert found.steps_per_epoch == 10
    assert set(seen) == set(range(64))
    assert max(seen.values()) <= 40
    assert max(Counter(windows_of_epoch(found, 0)).values()) == 1


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    tokens = stream(5 * 60 + 1, 7, 130)
    forward = [batches(tokens).micro_batch(step, micro) for step in range(25) for micro in range(2)]
    torch.manual_seed(3)
    np.random.seed(3)  # changes nothing
    validation_batches(tokens, 5, 3, 4)
    again = batches(tokens)
    backward = [again.micro_batch(step, micro) for step in reversed(range(25)) for micro in (1, 0)]
    for (inputs, targets), (same_inputs, same_targets) in zip(forward, reversed(backward), strict=True):
        assert torch.equal(inputs, same_inputs)
        assert torch.equal(targets, same_targets)
    assert windows_of_epoch(batches(tokens, seed=2), 0) != windows_of_epoch(batches(tokens), 0)


def test_accumulation_takes_what_one_larger_batch_takes() -> None:
    tokens = stream(5 * 60 + 1)
    large = batches(tokens, batch_size=6, grad_accum_steps=1)
    for step in range(20):
        assert windows_of_step(batches(tokens, batch_size=2, grad_accum_steps=3), step) == windows_of_step(large, step)


def test_validation_takes_the_same_windows_spread_evenly_over_the_stream() -> None:
    tokens = stream(5 * 100 + 1, 13, 14, 250)
    found = validation_batches(tokens, 5, 4, 3)
    assert [inputs.shape for inputs, _ in found] == [(4, 5)] * 3
    starts = [int(row[0]) // 5 for inputs, _ in found for row in inputs]
    assert starts == sorted(set(starts))
    assert starts[0] == 0
    assert all(8 <= later - earlier <= 9 for earlier, later in zip(starts, [*starts[1:], 100], strict=True))
    for (inputs, targets), (same_inputs, same_targets) in zip(found, validation_batches(tokens, 5, 4, 3), strict=True):
        assert torch.equal(inputs, same_inputs)
        assert torch.equal(targets, same_targets)
        assert torch.equal(targets, inputs + 1)


def test_validation_takes_all_windows_where_there_are_few() -> None:
    found = validation_batches(stream(5 * 7 + 1), 5, 4, 100)
    assert [inputs.shape for inputs, _ in found] == [(4, 5), (3, 5)]
    assert [int(row[0]) for inputs, _ in found for row in inputs] == [0, 5, 10, 15, 20, 25, 30]


@pytest.mark.parametrize("n_tokens", [2, 3, 5])
def test_validation_shorter_than_a_window_gives_one_shorter_sequence(n_tokens: int) -> None:
    [(inputs, targets)] = validation_batches(stream(n_tokens, 1), 5, 4, 3)
    assert inputs.tolist() == [list(range(n_tokens - 1))]
    assert targets.tolist() == [list(range(1, n_tokens))]


def test_processes_take_slices_of_the_same_step() -> None:
    """Whatever their number, a step has the same sequences; those of a micro-step follow each other."""
    tokens = stream(5 * 60 + 1)
    for step in (0, 3, 11):
        windows_of_one = windows_of_step(batches(tokens, batch_size=2, grad_accum_steps=6), step)
        for n_processes, grad_accum_steps in ((2, 3), (3, 2), (6, 1)):
            settings = dict(batch_size=2, grad_accum_steps=grad_accum_steps, n_processes=n_processes)
            each = [batches(tokens, rank=rank, **settings) for rank in range(n_processes)]
            assert {found.sequences_per_step for found in each} == {12}
            assert {found.steps_per_epoch for found in each} == {5}
            of_ranks = [windows_of_step(found, step) for found in each]
            assert sorted(w for windows in of_ranks for w in windows) == sorted(windows_of_one)
            assert [w for windows in of_ranks for w in windows[:2]] == windows_of_one[: 2 * n_processes]


@pytest.mark.parametrize("n", [1, 2, 3, 64, 1000, 65_537])
def test_a_computed_order_takes_each_window_once(n: int) -> None:
    keys = [np.random.default_rng([0, epoch]).integers(1 << 63, size=N_ROUNDS, dtype=np.uint64) for epoch in range(2)]
    orders = [permute(np.arange(n), n, each) for each in keys]
    for order in orders:
        assert sorted(order.tolist()) == list(range(n))
    if n >= 1000:
        assert orders[0].tolist() != orders[1].tolist()
        for order in orders:  # as far from sorted as a random order: positions against windows, and neighbours
            place = np.arange(n)
            assert abs(np.corrcoef(place, order.astype(float))[0, 1]) < 4 / n**0.5
            assert abs(np.corrcoef(order[1:].astype(float), order[:-1].astype(float))[0, 1]) < 4 / n**0.5
    assert permute(np.array([n - 1]), n, keys[0]).tolist() == orders[0][-1:].tolist()


def test_a_large_corpus_has_its_order_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptkit.data.batches.MAX_SHUFFLED", 50)
    found = batches(stream(5 * 60 + 1))
    orders = [windows_of_epoch(found, epoch) for epoch in range(2)]
    for order in orders:
        assert sorted(order) == list(range(60))
    assert orders[0] != orders[1]
