"""training/pace.py: the length of a run, its learning rate, and what is due after a step, by a fake clock."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Clock

from gptkit.data.batches import TrainingBatches
from gptkit.data.token_shards import TokenStream
from gptkit.training import pace, planning
from gptkit.training.optimizers import OPTIMIZERS
from gptkit.training.pace import Due, Pace, is_finished
from gptkit.training.recipe import Recipe
from gptkit.training.settings import TrainingSettings

BATCHES = TrainingBatches(TokenStream([np.zeros(1001, np.uint16)]), 10, 2, 1, seed=0)  # 50 steps per epoch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (pace, planning):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def make_pace(
    clock: Clock,
    first_step: int = 0,
    elapsed_s: float = 0.0,
    recipe: dict[str, Any] | None = None,
    report_s: float = 0.0,
    step_s: float = 1.0,
    **settings: Any,
) -> Pace:
    stop: Any = SimpleNamespace(received=None)
    made = Pace(
        TrainingSettings(data_dir="", **settings), Recipe(**recipe or {}), BATCHES, stop,
        first_step=first_step, elapsed_s=elapsed_s, started_at=clock.now, step_s=step_s,
        report_s=report_s,
    )  # fmt: skip
    made.stop = stop  # type: ignore[attr-defined]
    return made


def steps_due(made: Pace, n_steps: int, what: str) -> list[int]:
    return [step for step in range(1, n_steps + 1) if getattr(made.after_step(step), what)]


@pytest.mark.parametrize(
    ("settings", "n_steps"),
    [({}, 50), ({"n_epochs": 3}, 150), ({"max_steps": 7}, 7), ({"max_tokens": 139}, 6), ({"max_tokens": 5000}, 250)],
)
def test_the_length_of_a_run(settings: dict[str, Any], n_steps: int, clock: Clock) -> None:
    assert make_pace(clock, **settings).n_steps == n_steps


def test_what_is_due_when(clock: Clock) -> None:
    made = make_pace(clock, eval_freq=10, print_sample_iter=25, save_ckpt_freq=20)
    assert steps_due(made, 50, "evaluate") == [10, 20, 30, 40, 50]
    assert steps_due(made, 50, "sample") == [25, 50]
    assert steps_due(made, 50, "save") == [20, 40, 50]
    assert steps_due(made, 50, "stop") == [50]
    assert made.after_step(50).is_finished


def test_a_save_is_due_by_the_clock_too(clock: Clock) -> None:
    made = make_pace(clock, save_every_minutes=1.0)
    clock.now += 61
    assert made.after_step(3) == Due(False, False, save=True, stop=False, is_finished=False, is_signalled=False)
    made.mark_saved()
    clock.now += 59
    assert not made.after_step(4).save


def test_a_signal_and_max_minutes_stop_without_a_sample(clock: Clock) -> None:
    made = make_pace(clock, max_minutes=1.0, print_sample_iter=1)
    assert made.after_step(1).sample
    clock.now += 61
    assert made.after_step(2) == Due(False, sample=False, save=False, stop=True, is_finished=False, is_signalled=False)
    made = make_pace(clock, print_sample_iter=1)
    made.stop.received = "SIGTERM"  # type: ignore[attr-defined]
    assert made.after_step(1) == Due(False, sample=False, save=False, stop=True, is_finished=False, is_signalled=True)


def test_a_budget_ends_on_time_and_reports_twenty_times(clock: Clock) -> None:
    made = make_pace(clock, budget_minutes=1.05)  # 63 s, of which 3 are for the end
    assert made.n_steps == 60
    step, evaluated = 0, 0
    while True:
        step += 1
        clock.now += 0.5  # twice as quick as the first guess
        due = made.after_step(step)
        evaluated += due.evaluate
        if due.stop:
            break
    assert due.is_finished
    assert 59 <= clock.now - 1000 <= 61
    assert evaluated == 20


def reports_of(made: Pace, clock: Clock, step_s: float, first_step: int = 0) -> list[int]:
    """Return the steps after which a run reports, until its end."""
    reports, step = [], first_step
    while True:
        step += 1
        clock.now += step_s
        due = made.after_step(step)
        reports += [step] * due.evaluate
        if due.is_finished:
            return reports


def steps_taken(made: Pace, clock: Clock, steps: range) -> None:
    """Let a run take these steps, of one second each."""
    for step in steps:
        clock.now += 1.0
        made.after_step(step)


@pytest.mark.parametrize(
    ("report_s", "interval"), [(0.0, 60), (1.2, 60), (2.4, 120), (3.6, 200), (9.0, 240), (1000.0, 240)]
)
def test_reports_take_two_percent_of_a_budget_but_there_are_five(report_s: float, interval: int, clock: Clock) -> None:
    made = make_pace(clock, budget_minutes=20.05, n_epochs=1000, report_s=report_s)  # of steps of one second
    assert made.n_steps == 1200
    assert reports_of(made, clock, step_s=1.0) == list(range(interval, 1201, interval))


@pytest.mark.parametrize("step_s", [0.5, 2.0, 3.0])
def test_there_are_five_reports_though_the_machine_is_quicker_or_slower(step_s: float, clock: Clock) -> None:
    made = make_pace(clock, budget_minutes=20.05, n_epochs=1000, report_s=1000.0)
    reports = reports_of(made, clock, step_s)
    assert reports[-1] == pytest.approx(1200 / step_s, abs=1)
    assert len(reports) == 5


def test_reports_of_a_set_interval_may_take_any_time(clock: Clock) -> None:
    made = make_pace(clock, budget_minutes=20.05, n_epochs=1000, report_s=1000.0, eval_freq=10)
    assert steps_due(made, 30, "evaluate") == [10, 20, 30]


def test_a_run_with_a_budget_samples_and_saves_at_each_fifth_report(clock: Clock) -> None:
    made = make_pace(clock, budget_minutes=20.05, n_epochs=1000, save_every_minutes=60.0)
    saved, sampled = [], []
    for step in range(1, 1201):
        clock.now += 1
        due = made.after_step(step)
        saved += [step] * due.save
        sampled += [step] * due.sample
    assert sampled == [300, 600, 900, 1200]
    assert saved == sampled


@pytest.mark.parametrize("guess", [0.9, 1.0, 2.0])  # at the seconds of a step
def test_a_resumed_run_reports_when_it_would_have(guess: float, clock: Clock) -> None:
    settings = {"budget_minutes": 20.05, "n_epochs": 1000}
    for first_step in (130, 300, 420):  # between two reports, and at once after one
        made = make_pace(clock, first_step=first_step, elapsed_s=float(first_step), step_s=guess, **settings)
        reports = reports_of(made, clock, step_s=1.0, first_step=first_step)
        assert reports == [step for step in range(60, 1201, 60) if step > first_step]
    made = make_pace(clock, first_step=600, elapsed_s=600.0, step_s=guess, **settings)
    reports = reports_of(made, clock, step_s=2.0, first_step=600)  # on a machine that is slower now
    assert reports == list(range(630, 901, 30))


def test_a_run_of_few_steps_reports_by_these_not_by_its_budget(clock: Clock) -> None:
    made = make_pace(clock, budget_minutes=20.05, max_steps=100)
    assert reports_of(made, clock, step_s=1.0) == list(range(5, 101, 5))


def test_a_run_with_a_budget_that_goes_back_uses_the_time_that_is_left(clock: Clock) -> None:
    made = make_pace(clock, budget_minutes=20.05, n_epochs=1000)
    steps_taken(made, clock, range(1, 801))
    made.roll_back(500)
    assert made.n_steps == 500 + 400
    steps_taken(made, clock, range(501, 601))
    assert made.n_steps == 900
    assert made.lr_multiplier(600) > 0.2

    resumed = make_pace(clock, budget_minutes=20.05, n_epochs=1000, first_step=500, elapsed_s=500.0)
    steps_taken(resumed, clock, range(501, 601))
    resumed.roll_back(400)  # to a checkpoint of an earlier session
    steps_taken(resumed, clock, range(401, 501))
    assert resumed.n_steps == 400 + 600


def test_a_budget_that_start_up_has_used_ends_with_one_report(clock: Clock) -> None:
    made = make_pace(clock, budget_minutes=0.01)
    assert made.n_steps == 0
    assert made.decay_multiplier(0) > 0
    assert made.share_done(0) == 0
    due = made.after_step(1)
    assert due.is_finished
    assert due.evaluate


def test_the_time_of_earlier_sessions_counts(clock: Clock) -> None:
    assert make_pace(clock, first_step=30, elapsed_s=40.0, budget_minutes=1.05).n_steps == 30 + 20
    settings = TrainingSettings(data_dir="", budget_minutes=1.0)
    assert not is_finished(settings, BATCHES, 0, 30.0, clock.now)
    assert is_finished(settings, BATCHES, 0, 58.0, clock.now)
    assert is_finished(TrainingSettings(data_dir=""), BATCHES, 50, 0.0, clock.now)
    assert not is_finished(TrainingSettings(data_dir=""), BATCHES, 49, 0.0, clock.now)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_rate_rises_for_the_optimizers_share_of_the_run_and_ends_at_a_twentieth(
    optimizer: str, clock: Clock
) -> None:
    made = make_pace(clock, n_epochs=20, optimizer=optimizer)  # 1,000 steps
    n_warmup = round(1000 * OPTIMIZERS[optimizer].warmup_share)
    rates = [made.lr_multiplier(step) for step in range(1000)]
    assert max(rates) == rates[n_warmup - 1] == 1.0
    assert rates[0] == pytest.approx(1 / n_warmup)
    assert rates[-1] == pytest.approx(0.05)
    assert sorted(rates[n_warmup:], reverse=True) == rates[n_warmup:]


def test_flags_change_the_rate(clock: Clock) -> None:
    made = make_pace(clock, warmup_steps=10, lr=0.4, min_lr=0.1, optimizer="adamw")
    assert made.lr_multiplier(9) == 1.0
    assert made.lr_multiplier(49) == pytest.approx(0.25)
    assert make_pace(clock, warmup_steps=1000).lr_multiplier(49) == 1.0  # no longer than the run


def test_the_recipe_shapes_the_schedules(clock: Clock) -> None:
    made = make_pace(clock, warmup_steps=10, min_lr=0.0)
    assert [made.decay_multiplier(step) for step in (0, 25, 49, 60)] == [1.0] * 4
    assert made.momentum(0) == 0.95
    recipe = {"lr_schedule": "linear", "cooldown_share": 0.2, "decay_schedule": "rising", "momentum_warmup": 20}
    made = make_pace(clock, warmup_steps=10, min_lr=0.0, recipe=recipe)
    assert [made.lr_multiplier(step) for step in (4, 9, 39, 44, 49)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])
    assert [made.decay_multiplier(step) for step in (0, 25, 49, 60)] == pytest.approx([0.0, 1.0, 1.96, 2.0])
    assert [made.momentum(step) for step in (0, 10, 20)] == pytest.approx([0.85, 0.9, 0.95])
