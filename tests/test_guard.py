"""training/guard.py: which steps are skipped, when a run has diverged, what a checkpoint keeps of it."""

import math

import pytest

from gptkit.training.guard import Guard

BAD = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("bad", BAD)
def test_steps_that_are_not_finite_are_skipped_and_counted(bad: float, capsys: pytest.CaptureFixture[str]) -> None:
    guard = Guard(max_bad_steps=3)
    assert guard.accepts(1, 2.0, 1.0)
    assert not guard.accepts(2, bad, 1.0)
    assert not guard.accepts(3, 2.0, bad)
    assert (guard.n_skipped, guard.n_skipped_in_a_row, guard.n_losses) == (2, 2, 1)
    assert not guard.has_diverged(2.0)
    assert capsys.readouterr().out.count("warning: step") == 2
    assert guard.accepts(4, 4.0, 1.0)
    assert (guard.n_skipped, guard.n_skipped_in_a_row) == (2, 0)
    assert guard.take_mean_loss() == 3.0
    assert guard.n_losses == 0


def test_divergence_is_many_bad_steps_in_a_row_or_a_validation_loss_that_is_not_finite() -> None:
    guard = Guard(max_bad_steps=2)
    guard.accepts(1, math.nan, 1.0)
    assert not guard.has_diverged(None)
    guard.accepts(2, math.nan, 1.0)
    assert guard.has_diverged(None)
    guard = Guard(max_bad_steps=2)
    assert not guard.has_diverged(0.0)
    assert all(guard.has_diverged(bad) for bad in BAD)


def test_an_overflow_of_the_loss_scale_is_not_a_bad_step(capsys: pytest.CaptureFixture[str]) -> None:
    """Only where the loss itself is finite."""
    guard = Guard(2, n_skipped_in_a_row=1)
    assert not guard.accepts(1, 2.0, math.inf, overflowed=True)
    assert (guard.n_skipped, guard.n_skipped_in_a_row, guard.n_losses, guard.loss_sum) == (0, 0, 1, 2.0)
    assert capsys.readouterr().out == (
        "step 1 is skipped: its scaled gradient overflowed float16; the loss scale is halved\n"
    )
    assert guard.accepts(2, 2.0, 1.0)
    assert not guard.accepts(3, 2.0, math.nan)
    assert not guard.accepts(4, math.nan, math.inf, overflowed=True)
    assert guard.n_skipped_in_a_row == 2
    assert guard.has_diverged(None)


def test_each_rollback_halves_the_rate() -> None:
    assert [Guard(5, n_rollbacks=n).lr_scale for n in range(4)] == [1, 1 / 2, 1 / 4, 1 / 8]


def test_its_counts_come_back_from_a_checkpoint_and_a_damaged_one_is_refused() -> None:
    guard = Guard(5, loss_sum=7.5, n_losses=3, n_skipped=4, n_skipped_in_a_row=1, n_rollbacks=2)
    loaded = Guard(5)
    loaded.load_state_dict(guard.state_dict() | {"step": 7})
    assert loaded == guard
    assert "max_bad_steps" not in guard.state_dict()  # a setting, which may change
    for damage in (
        {"n_skipped": -1},
        {"n_losses": 1.5},
        {"n_rollbacks": True},
        {"loss_sum": math.nan},
        {"loss_sum": "1.0"},
    ):
        with pytest.raises(ValueError, match=r"is not a count|is not a finite number|rollbacks are more than"):
            loaded.load_state_dict(guard.state_dict() | damage)
    state = guard.state_dict()
    del state["n_rollbacks"]
    with pytest.raises(KeyError):
        loaded.load_state_dict(state)
    assert loaded == guard  # as it was
