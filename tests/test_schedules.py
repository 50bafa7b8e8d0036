"""gptkit/training/schedules.py: values worked out by hand."""

import math
from typing import Any

import numpy as np
import pytest

from gptkit.training.schedules import decay_multiplier, learning_rate, muon_momentum


def rates(n: int, **changes: Any) -> list[float]:
    settings = {"peak": 1.0, "final": 0.2, "warmup_steps": 4, "total_steps": 12} | changes
    return [learning_rate(step, **settings) for step in range(n)]


def test_warmup_then_half_a_cosine() -> None:
    """Four steps up to 1 at step 3; eight more down to 0.2 at step 11; halfway, at step 7, their mean."""
    expected = [0.25, 0.5, 0.75, 1.0]
    expected += [0.2 + 0.4 * (1 + math.cos(math.pi * eighths / 8)) for eighths in range(1, 9)]
    assert rates(12) == pytest.approx(expected)
    assert rates(12)[7] == pytest.approx(0.6)
    assert rates(12)[5] == pytest.approx(0.2 + 0.4 * (1 + math.sqrt(0.5)))
    assert rates(12)[11] == pytest.approx(0.2)


def test_stays_at_the_final_rate() -> None:
    assert rates(40)[11:] == pytest.approx([0.2] * 29)


def test_without_warmup_it_begins_at_the_peak() -> None:
    assert rates(5, warmup_steps=0, total_steps=5) == pytest.approx(
        [1.0, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5)), 0.2]
    )


def test_one_step_of_warmup_is_as_good_as_none() -> None:
    assert rates(9, warmup_steps=1) == rates(9, warmup_steps=0)


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_a_run_of_one_step_is_at_the_peak(warmup_steps: int) -> None:
    assert rates(1, warmup_steps=warmup_steps, total_steps=1) == [1.0]


def test_two_steps() -> None:
    assert rates(2, warmup_steps=0, total_steps=2) == pytest.approx([1.0, 0.2])


def test_a_run_shorter_than_its_warmup_climbs_to_its_end() -> None:
    assert rates(6, warmup_steps=10, total_steps=6) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def test_a_final_rate_of_zero_and_one_equal_to_the_peak() -> None:
    assert rates(12, final=0.0)[-1] == pytest.approx(0.0, abs=1e-15)
    assert rates(20, final=1.0, warmup_steps=0) == [1.0] * 20


def test_never_leaves_its_bounds_and_never_climbs_after_the_warmup() -> None:
    for warmup_steps in range(8):
        for total_steps in range(max(warmup_steps, 1), 20):
            series = rates(25, warmup_steps=warmup_steps, total_steps=total_steps)
            falling = series[max(warmup_steps - 1, 0) :]
            assert falling == sorted(falling, reverse=True)
            assert max(series) == 1.0
            assert min(falling) >= 0.2 - 1e-12


def test_linear_stays_at_the_peak_and_falls_in_the_cooldown() -> None:
    """Four steps up; half of the twelve steps go down: from 1 at step 5 to 0.2 at step 11."""
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, *(0.2 + 0.8 * sixths / 6 for sixths in (5, 4, 3, 2, 1, 0))]
    assert rates(12, schedule="linear", cooldown_share=0.5) == pytest.approx(expected)
    assert rates(15, schedule="linear", cooldown_share=0.5)[12:] == pytest.approx([0.2] * 3)


def test_a_linear_cooldown_begins_after_the_warmup_and_takes_a_step_at_least() -> None:
    assert rates(12, schedule="linear", cooldown_share=1.0)[3:] == pytest.approx(np.linspace(1.0, 0.2, 9))
    assert rates(12, schedule="linear", cooldown_share=0.001)[3:] == pytest.approx([1.0] * 8 + [0.2])
    assert rates(1, schedule="linear", cooldown_share=0.5, warmup_steps=0, total_steps=1) == [1.0]


def test_decay_multipliers() -> None:
    shares = np.linspace(0, 1, 201)
    assert {decay_multiplier("constant", x) for x in shares} == {1.0}
    rising = [decay_multiplier("rising", x) for x in shares]
    assert rising == pytest.approx(2 * shares)
    assert np.mean(rising) == pytest.approx(1.0)
    slowrun = np.interp(shares, [0, 0.15, 0.55, 1], [0.8, 0.8, 0.1, 0.93]) / 0.8  # as its authors write it
    assert [decay_multiplier("dip", x) for x in shares] == pytest.approx(slowrun)
    assert decay_multiplier("dip", 1.0) == pytest.approx(1.16, abs=0.005)


def test_the_momentum_rises_over_its_warmup() -> None:
    assert [muon_momentum(step, 4) for step in range(6)] == pytest.approx([0.85, 0.875, 0.9, 0.925, 0.95, 0.95])
    assert muon_momentum(0, 0) == 0.95
