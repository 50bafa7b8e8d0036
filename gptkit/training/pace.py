"""Decide how long a run is, and what is due after a step."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from gptkit.data.batches import TrainingBatches
from gptkit.distributed.process_group import main_process, sync_flags
from gptkit.training.optimizers import OPTIMIZERS
from gptkit.training.planning import CLOSING_S, steps_within
from gptkit.training.recipe import Recipe
from gptkit.training.schedules import decay_multiplier, learning_rate, muon_momentum
from gptkit.training.settings import TrainingSettings, budget_s, max_total_steps, peak_lr
from gptkit.training.signals import StopSignals

MAX_WARMUP_STEPS = 1000
FINAL_SHARE = 0.05  # of the peak learning rate, at the end of a run
# Reports in a run with a budget: as many, or down to as few where more would take over this share of its time.
MAX_REPORTS, MIN_REPORTS, REPORTS_SHARE = 20, 5, 0.02


@dataclass(frozen=True)
class Due:
    """What is due after a step, the same in all processes."""

    evaluate: bool
    sample: bool
    save: bool
    stop: bool  # the run is finished, or has to stop early
    is_finished: bool
    is_signalled: bool  # a signal asked to stop


class Pace:
    """How long a run is (epochs, tokens, steps or a budget of time), and what is due after each of its steps.

    Its clock starts when it is created, and again with `start_clock`.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        recipe: Recipe,
        batches: TrainingBatches,
        stop: StopSignals,
        *,
        first_step: int,
        elapsed_s: float,  # of earlier sessions
        started_at: float,  # time.monotonic() of the command
        step_s: float,  # a first guess at the seconds per step
        report_s: float,  # likewise, per report
    ) -> None:
        self._settings, self._recipe, self._stop = settings, recipe, stop
        self._make_total_steps = partial(make_total_steps, settings, batches, elapsed_s, started_at)
        self._total_steps = self._make_total_steps(first_step, step_s)
        self.n_steps = main_process(self._total_steps)(first_step)  # may change with the machine's speed
        is_timed = settings.budget_minutes is not None
        # With a budget reports follow the time that has passed, and each fifth has a sample and a checkpoint.
        fifth = 5 * settings.eval_freq if settings.eval_freq else None
        self._report_every = settings.eval_freq or (None if is_timed else 100)
        self._sample_every = settings.print_sample_iter or (fifth if is_timed else 100)
        self._save_every = settings.save_ckpt_freq or (fifth if is_timed else 500)
        n_reports = number_of_reports(self.n_steps, report_s / step_s)
        self._reports_due = make_reports_due(settings, batches, elapsed_s, started_at, n_reports)
        self._n_reported = main_process(self._reports_due)(first_step)
        self._n_timed = 0  # steps since the clock was started
        self.start_clock()
        # Seconds of training until now; with a budget also those before a session's first step.
        self.elapsed_before_s = elapsed_s + (self._start - started_at if is_timed else 0.0)

    def start_clock(self) -> None:
        """Start the clock of --max_minutes and --save_every_minutes: at the first step of a session."""
        self._start = self._saved_at = time.monotonic()

    def lr_multiplier(self, step: int) -> float:
        """Return the learning rate of a step (from 0) as a share of the peak."""
        settings, recipe = self._settings, self._recipe
        final = FINAL_SHARE if settings.min_lr is None else settings.min_lr / peak_lr(settings)
        warmup_steps = settings.warmup_steps
        if warmup_steps is None:
            share = OPTIMIZERS[settings.optimizer].warmup_share
            warmup_steps = min(int(self.n_steps * share + 1e-9), MAX_WARMUP_STEPS)
        warmup_steps = min(warmup_steps, self.n_steps)
        return learning_rate(
            step,
            peak=1.0,
            final=final,
            warmup_steps=warmup_steps,
            total_steps=self.n_steps,
            schedule=recipe.lr_schedule,
            cooldown_share=recipe.cooldown_share,
        )

    def share_done(self, step: int) -> float:
        """Return the share of the run that is done before a step (from 0)."""
        return min(step / max(self.n_steps, 1), 1.0)

    def decay_multiplier(self, step: int) -> float:
        """Return the weight decay of a step (from 0) as a multiple of the recipe's."""
        return decay_multiplier(self._recipe.decay_schedule, self.share_done(step))

    def momentum(self, step: int) -> float:
        """Return Muon's momentum for a step (from 0)."""
        return muon_momentum(step, self._recipe.momentum_warmup)

    def after_step(self, step: int) -> Due:
        """Return what is due after `step` steps; all processes agree on it, by one collective."""
        now, settings = time.monotonic(), self._settings
        self._n_timed += 1
        is_signalled, (n_steps, n_reported, is_over, is_late) = sync_flags(
            self._stop.received is not None,
            self._total_steps(step),
            self._reports_due(step),
            now - self._start > 60 * (settings.max_minutes or math.inf),
            now - self._saved_at > 60 * settings.save_every_minutes,
        )
        self.n_steps = int(n_steps)
        n_before, self._n_reported = self._n_reported, max(self._n_reported, int(n_reported))
        is_report, is_fifth = self._n_reported > n_before, self._n_reported // 5 > n_before // 5
        is_finished = step >= self.n_steps
        is_stopped = is_signalled or bool(is_over)
        is_scheduled_save = is_finished or is_due(step, self._save_every, is_fifth)
        return Due(
            evaluate=is_scheduled_save or is_due(step, self._report_every, is_report),
            sample=is_finished or (is_due(step, self._sample_every, is_fifth) and not is_stopped),
            save=is_scheduled_save or bool(is_late),
            stop=is_finished or is_stopped,
            is_finished=is_finished,
            is_signalled=is_signalled,
        )

    def roll_back(self, step: int) -> None:
        """Go on from an earlier step: with a budget, for the time that is left, at the speed of the session so far."""
        self._total_steps = self._make_total_steps(step, (time.monotonic() - self._start) / max(self._n_timed, 1))
        self.n_steps = main_process(self._total_steps)(step)

    def mark_saved(self) -> None:
        """Restart the clock of --save_every_minutes."""
        self._saved_at = time.monotonic()


def number_of_reports(n_steps: int, report_steps: float) -> int:
    """Return how often a run with a budget reports; a report takes as long as report_steps steps."""
    affordable = REPORTS_SHARE * n_steps / max(report_steps, 1e-9)
    return int(min(max(affordable, MIN_REPORTS), MAX_REPORTS))


def is_due(step: int, every: int | None, by_budget: bool) -> bool:
    """Return whether something is due after a step: each `every` steps, or by the budget where that is None."""
    return step % every == 0 if every else by_budget


def make_reports_due(
    settings: TrainingSettings, batches: TrainingBatches, elapsed_s: float, started_at: float, n_reports: int
) -> Callable[[int], int]:
    """Return a function from the steps done to how many of a budget's reports are due: by its time, or by its most steps.

    The start of a session takes no share of the time.
    """
    if settings.budget_minutes is None:
        return lambda n_done: 0
    most = max_total_steps(settings, batches)
    share_before = min(elapsed_s / max(budget_s(settings) - CLOSING_S, 1e-9), 1.0)
    began, left_s = time.monotonic(), max(time_left_s(settings, elapsed_s, started_at) - CLOSING_S, 1e-9)

    def reports_due(n_done: int) -> int:
        passed = min((time.monotonic() - began) / left_s, 1.0)
        share = max(share_before + (1 - share_before) * passed, n_done / most)
        return int(n_reports * share + 1e-9)

    return reports_due


def time_left_s(settings: TrainingSettings, elapsed_s: float, started_at: float) -> float:
    """Return the seconds of the budget that remain now; elapsed_s are those of earlier sessions."""
    return budget_s(settings) - elapsed_s - (time.monotonic() - started_at)


def make_total_steps(
    settings: TrainingSettings,
    batches: TrainingBatches,
    elapsed_s: float,
    started_at: float,
    first_step: int,
    step_s: float,
) -> Callable[[int], int]:
    """Return a function from the steps done to the total steps of the run."""
    most = max_total_steps(settings, batches)
    if settings.budget_minutes is None:
        return lambda n_done: most
    timed = steps_within(time_left_s(settings, elapsed_s, started_at) - CLOSING_S, first_step, step_s)
    return lambda n_done: min(timed(n_done), most)


@main_process
def is_finished(
    settings: TrainingSettings, batches: TrainingBatches, step: int, elapsed_s: float, started_at: float
) -> bool:
    """Return whether a run has done all its steps, or used up its budget."""
    is_late = time_left_s(settings, elapsed_s, started_at) < CLOSING_S
    return step >= max_total_steps(settings, batches) or is_late
