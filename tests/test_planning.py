"""gptkit/planning.py: how the sequences of a step are shared by another number of processes."""

from types import SimpleNamespace
from typing import Any

import pytest

from gptkit.base.cli import UserError
from gptkit.training.planning import Plan, resume_plan

MODEL = object()


@pytest.mark.parametrize(
    ("before", "n_processes", "expected"),
    [
        ((8, 4, 1), 2, (8, 2)),
        ((8, 4, 1), 4, (8, 1)),
        ((8, 4, 1), 8, (4, 1)),
        ((8, 1, 4), 1, (8, 4)),
        ((6, 2, 2), 3, (4, 2)),
        ((5, 1, 3), 1, (5, 3)),
        ((4, 3, 1), 1, (4, 3)),
    ],
)
def test_the_sequences_of_a_step_stay(
    before: tuple[int, int, int], n_processes: int, expected: tuple[int, int]
) -> None:
    found = Plan(MODEL, *before).shared_by(n_processes)
    assert (found.batch_size, found.grad_accum_steps, found.n_processes) == (*expected, n_processes)
    assert found.sequences_per_step == before[0] * before[1] * before[2]


def test_what_cannot_be_shared_equally_is_refused() -> None:
    with pytest.raises(UserError, match=r"32 sequences a step, which 3 processes cannot share"):
        Plan(MODEL, 8, 4, 1).shared_by(3)


def test_the_same_command_keeps_the_sequences_of_a_step_and_another_one_is_taken_at_its_word() -> None:
    config = SimpleNamespace(batch_size=8, grad_accum_steps=None)
    settings = {"batch_size": 8, "grad_accum_steps": None}
    state: dict[str, Any] = {"plan": {"batch_size": 8, "grad_accum_steps": 1, "n_processes": 4}, "settings": settings}
    now = Plan(MODEL, 8, 1, 2)
    assert resume_plan(now, config, state) == Plan(MODEL, 8, 2, 2)
    again = {"plan": {"batch_size": 8, "grad_accum_steps": 2, "n_processes": 2}, "settings": settings}
    assert resume_plan(now, config, again) == Plan(MODEL, 8, 2, 2)
    assert resume_plan(now, config, state | {"settings": settings | {"batch_size": 4}}) == now
    old = {"plan": {"batch_size": 8, "grad_accum_steps": 4}, "settings": settings}  # of one process
    assert resume_plan(now, config, old) == Plan(MODEL, 8, 2, 2)
    for damaged in (
        {},
        {"plan": None, "settings": settings},
        {"plan": {"x": 1}, "settings": settings},
        {"plan": old["plan"]},
    ):
        assert resume_plan(now, config, damaged) == now
