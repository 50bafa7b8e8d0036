"""training/planning.py: sharing the sequences of a step, runs of a known length by a fake clock, batches by hand."""

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Clock

from gpt_model import GPTConfig, GPTModel
from gptkit.base.cli import UserError
from gptkit.training import optimizers, planning, speed
from gptkit.training.characters import share_characters
from gptkit.training.compiler_gain import CompilerGain
from gptkit.training.cpu_layers import causal_attention
from gptkit.training.muon import MuonAdamW
from gptkit.training.planning import Plan, resume_plan, sequences_per_step, steps_within
from gptkit.training.recipe import CHARACTER_SHARE
from gptkit.training.settings import TrainingSettings
from gptkit.training.speed import Speed

MODEL_128 = GPTConfig(vocab_size=8, context_length=128, emb_dim=4, n_layers=1, n_heads=1)
MODEL = GPTConfig(vocab_size=8, context_length=4, emb_dim=4, n_layers=1, n_heads=1)


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
    found = Plan(MODEL, *before).for_processes(n_processes)
    assert (found.batch_size, found.grad_accum_steps, found.n_processes) == (*expected, n_processes)
    assert found.sequences_per_step == before[0] * before[1] * before[2]


def test_what_cannot_be_shared_equally_is_refused() -> None:
    with pytest.raises(UserError, match=r"32 sequences per step, which 3 processes cannot share"):
        Plan(MODEL, 8, 4, 1).for_processes(3)


def test_the_same_command_keeps_the_sequences_of_a_step_and_another_one_is_taken_at_its_word() -> None:
    config = TrainingSettings(data_dir="text", batch_size=8)
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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(planning, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def run(total_steps: Callable[[int], int], clock: Clock, first_step: int, step_s: Callable[[int], float]) -> list[int]:
    """Return what total_steps returns at the start and after each step (step n takes step_s(n)), until they are done."""
    totals = [total_steps(first_step)]
    while first_step + len(totals) - 1 < totals[-1]:
        clock.now += step_s(first_step + len(totals))
        totals.append(total_steps(first_step + len(totals)))
        assert len(totals) < 10_000
    return totals


@pytest.mark.parametrize("first_step", [0, 700])
def test_even_steps_are_counted_once(first_step: int, clock: Clock) -> None:
    totals = run(steps_within(100.0, first_step, 0.5), clock, first_step, lambda n: 0.5)
    assert totals == [first_step + 200] * 201
    assert clock.now == 1100.0


@pytest.mark.parametrize("first_step", [0, 700])
@pytest.mark.parametrize("guess_s", [0.05, 0.5, 5.0])
def test_a_wrong_guess_is_soon_corrected(guess_s: float, first_step: int, clock: Clock) -> None:
    totals = run(steps_within(100.0, first_step, guess_s), clock, first_step, lambda n: 0.5)
    assert totals[0] == first_step + round(100 / guess_s)
    errors = [abs(total - first_step - 200) for total in totals]
    assert errors[50] <= 0.2 * errors[0]
    assert errors[150] <= 4
    assert errors[-1] <= 1
    assert abs(clock.now - 1100) <= 0.5


@pytest.mark.parametrize("slow", [0.25, 1.0, 2.0])
def test_a_change_of_pace_on_the_way(slow: float, clock: Clock) -> None:
    """After 100 of 200 steps others take half of the machine, or leave it: the run ends in time all the same."""
    totals = run(steps_within(100.0, 0, 0.5), clock, 0, lambda n: 0.5 if n <= 100 else slow)
    assert totals[100] == 200
    assert abs(totals[-1] - (100 + 50 / slow)) <= 1
    assert abs(clock.now - 1100) <= slow
    assert totals[-1] == len(totals) - 1  # the last step knows that it is the last


def test_twice_as_slow_is_half_of_what_was_left(clock: Clock) -> None:
    """Time counts that passed between two steps, as in a report."""
    total_steps = steps_within(100.0, 40, 1.0)
    assert total_steps(40) == 140
    clock.now += 19
    assert total_steps(49) == 49 + round(81 / 2)  # 19 and the guess of 1 for ten steps
    clock.now += 61
    assert total_steps(79) == 79 + round(20 / (81 / 40))


@pytest.mark.parametrize("seconds", [-5.0, 0.0, 0.4])
def test_without_time_no_step_is_left(seconds: float, clock: Clock) -> None:
    assert steps_within(seconds, 30, 1.0)(30) == 30


def test_after_the_end_no_step_is_taken_back(clock: Clock) -> None:
    total_steps = steps_within(10.0, 0, 1.0)
    clock.now += 50
    assert total_steps(3) == 3


@pytest.mark.parametrize(
    (
        "total_tokens",
        "often",
        "seldom",
    ),  # 1,200 or 600 steps for a million tokens, twice as many for eight times the tokens
    [
        (100, 1, 1),
        (4e4, 1, 2),
        (1e6, 8, 16),
        (8e6, 32, 64),
        (15e6, 32, 64),
        (64e6, 128, 256),
        (1e9, 512, 1024),
    ],
)
@pytest.mark.parametrize("n_epochs", [3.1, 2.9])
def test_a_batch_is_the_nearest_power_of_two(total_tokens: float, n_epochs: float, often: int, seldom: int) -> None:
    plan = functools.partial(
        planning.plan_batch, MODEL_128, total_tokens, n_training_tokens=int(total_tokens / n_epochs), device_type="cpu",
        batch_size=None, grad_accum_steps=None, n_processes=1,
    )  # fmt: skip
    n = plan(seldom_steps=planning.SELDOM_STEPS).sequences_per_step
    assert plan(seldom_steps=planning.STEPS).sequences_per_step == often  # another optimizer, or pretrained weights
    expected = often if n_epochs >= 3 else seldom
    assert n == expected
    assert isinstance(n, int)


def sizes_for(*widths: int) -> dict[str, GPTConfig]:
    base = {"vocab_size": 64, "context_length": 128, "n_layers": 2, "n_heads": 1, "arch": "modern"}
    return {str(width): GPTConfig(emb_dim=width, **base) for width in widths}  # type: ignore[arg-type]


def speed_of(model: GPTConfig) -> Speed:
    return Speed(planning.flops_per_token(model) / 1e11, 0.0)


def plan_for(n_training_tokens: int, left_s: float = 1000.0, is_regularized: bool = False) -> tuple[Plan, float]:
    return planning.plan_for_budget(
        left_s,
        sizes_for(64, 128, 256, 512),
        speed_of,
        n_training_tokens,
        "cpu",
        None,
        None,
        1,
        math.inf,
        is_regularized,
    )


def test_little_text_gets_a_smaller_model_than_new_text_in_the_same_time(capsys: pytest.CaptureFixture[str]) -> None:
    new_text, total_tokens = plan_for(10**9)
    assert f"{total_tokens:,.0f} new tokens" in capsys.readouterr().out  # each of them is new
    little_text, _ = plan_for(100_000)
    assert little_text.model.emb_dim < new_text.model.emb_dim
    output = capsys.readouterr().out
    assert "chosen: " + str(little_text.model.emb_dim) in output
    # However long it is read, a text is worth 16.4 times its tokens, and the model stays in proportion to that.
    forever, _ = plan_for(100_000, left_s=1e6)
    n_parameters = planning.n_block_parameters(forever.model)
    assert 16.4 * 100_000 / n_parameters >= planning.TOKENS_PER_PARAMETER
    larger = planning.n_block_parameters(sizes_for(2 * forever.model.emb_dim).popitem()[1])
    assert 16.4 * 100_000 / larger < planning.TOKENS_PER_PARAMETER


@pytest.mark.parametrize("left_s", [50.0, 300.0, 1000.0, 1e6])
def test_a_regularized_model_may_be_larger_if_it_reads_its_text_often(left_s: float) -> None:
    n_tokens = 110_000
    plain, _ = plan_for(n_tokens, left_s)
    regularized, total_tokens = plan_for(n_tokens, left_s, is_regularized=True)
    n_parameters = planning.n_block_parameters(regularized.model)
    assert n_parameters >= planning.n_block_parameters(plain.model)
    if n_parameters > planning.n_block_parameters(plain.model):
        assert total_tokens >= planning.ENOUGH_EPOCHS * n_tokens
        assert n_parameters <= planning.PARAMETERS_PER_TOKEN * n_tokens
    assert (regularized != plain) == (left_s >= 300)


def test_what_a_run_may_not_read_does_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    """As with --n_epochs 1 beside a budget: a larger model would not read the text more often."""
    sizes, n_tokens = sizes_for(64, 128, 256, 512), 110_000

    def choose(most_tokens: float) -> tuple[Plan, float]:
        return planning.plan_for_budget(1000.0, sizes, speed_of, n_tokens, "cpu", None, None, 1, most_tokens)

    once, total_tokens = choose(n_tokens)
    assert total_tokens == n_tokens
    assert "the text 1.00 times" in capsys.readouterr().out
    often, _ = choose(math.inf)
    assert planning.n_block_parameters(once.model) < planning.n_block_parameters(often.model)


@pytest.mark.parametrize(
    ("limits", "total_tokens", "n_epochs"),
    [
        ({}, math.inf, 1.0),
        ({"n_epochs": 16}, math.inf, 16.0),
        ({"max_tokens": 5000}, math.inf, 5.0),
        ({"max_steps": 100, "n_epochs": 2}, math.inf, 2.0),
        ({"max_steps": 100}, math.inf, 1.0),
        ({"max_steps": 500, "n_epochs": 30}, math.inf, 500 * 8 * 4 / 1000),
        ({"max_steps": 50, "max_tokens": 9000}, math.inf, 50 * 8 * 4 / 1000),
        ({}, 20_000.0, 20.0),
        ({"n_epochs": 2}, 20_000.0, 2.0),
        ({"n_epochs": 30}, 20_000.0, 20.0),
    ],
)
def test_how_often_the_text_will_be_read(
    limits: dict[str, int], total_tokens: float, n_epochs: float, capsys: pytest.CaptureFixture[str]
) -> None:
    budget_minutes = None if math.isinf(total_tokens) else 1.0
    settings = TrainingSettings(data_dir="text", budget_minutes=budget_minutes, **limits)
    plan = planning.finish_plan(Plan(MODEL, 8, 1), settings, 1000, total_tokens)
    assert f"is read {n_epochs:.1f} times" in capsys.readouterr().out
    assert (plan.recipe.shuffle == "documents") == (n_epochs >= 3)
    assert plan.model.drop_rate == plan.recipe.drop_rate


@pytest.mark.parametrize(("optimizer", "is_pretrained"), [("adamw", False), ("muon", True)])
def test_other_optimizers_and_pretrained_weights_keep_the_plain_decay(optimizer: str, is_pretrained: bool) -> None:
    settings = TrainingSettings(data_dir="text", n_epochs=16, optimizer=optimizer)
    recipe = planning.finish_plan(Plan(MODEL, 8, 1), settings, 1000, math.inf, is_pretrained).recipe
    assert (recipe.weight_decay, recipe.embedding_decay, recipe.shuffle) == (0.1, 0.0, "documents")


def test_the_speed_is_that_of_micro_steps_and_of_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    models = []

    def compile_and_time(model: GPTModel, *arguments: Any) -> tuple[None, dict[str, float]]:
        models.append(model)
        return None, {"forward": 1.0, "backward": 1.4}

    monkeypatch.setattr(speed, "compile_and_time", compile_and_time)
    monkeypatch.setattr(speed, "time_optimizer_step", lambda *arguments: 0.5)
    settings, cpu = TrainingSettings(data_dir="text", budget_minutes=30), torch.device("cpu")
    measured = speed.measure_speed(settings, MODEL, GPTModel, cpu, torch.float32, None, None)
    assert measured.token_s == pytest.approx(2.4 / 2048)  # 512 sequences of 4 tokens
    assert measured.optimizer_s == 0.5
    assert measured.compiled(1.2) == Speed(pytest.approx(2.0 / 2048), 0.5)
    (model,) = models
    assert model.trf_blocks[0].att.attend.func is causal_attention  # as in the run


def test_shared_characters_are_part_of_the_optimizers_step() -> None:
    settings, cpu = TrainingSettings(data_dir="text", budget_minutes=30), torch.device("cpu")
    shared = share_characters(["の", "のは", "は", "", "", "", "", ""], 64)
    steps = []

    class Watched(MuonAdamW):
        def _character_step(self, group: Any) -> None:
            steps.append(group["character_share"])
            super()._character_step(group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizers, "MuonAdamW", Watched)
        speed.measure_speed(settings, MODEL, GPTModel, cpu, torch.float32, None, shared)
    assert set(steps) == {CHARACTER_SHARE}


def test_the_compiler_takes_its_time_and_gives_its_speed() -> None:
    gain, asked = CompilerGain(40.0, 1.25), []

    def gain_for(plan: Plan) -> CompilerGain:
        asked.append(plan)
        return gain

    measured = Speed(1e-4, 0.0)
    plain, compiled = (
        planning.plan_for_budget(1000.0, sizes_for(64), lambda model: measured, 10**9, "cpu", None, None, **gains)[1]
        for gains in ({}, {"gain_for": gain_for})
    )
    assert plain == pytest.approx(1000 / 1e-4)
    assert compiled == pytest.approx(960 * 1.25 / 1e-4)
    assert all(
        plan.sequences_per_step == sequences_per_step(plain, plan.model.context_length, planning.SELDOM_STEPS)
        for plan in asked
    )


@pytest.mark.parametrize(("n_processes", "tokens"), [(1, 2e6), (2, 3e6)])
def test_the_optimizer_costs_once_per_step(n_processes: int, tokens: float) -> None:
    """With 4,000 tokens per step, 100 steps take 100 x 2 s of each process's optimizer, and 4 s / n of micro-steps each."""
    measured = Speed(token_s=0.001, optimizer_s=2.0)
    total = measured.total_tokens(
        tokens / 1000 * (1 / n_processes + 0.5), n_processes, lambda total: SimpleNamespace(tokens_per_step=4000)
    )
    assert total == pytest.approx(tokens)


def test_a_larger_batch_is_known_before_the_tokens_are_counted() -> None:
    steps = []

    def plan_for(total: float) -> SimpleNamespace:
        steps.append(2.0 ** round(math.log2(total / 100)))
        return SimpleNamespace(tokens_per_step=steps[-1])

    total = Speed(token_s=0.01, optimizer_s=1.0).total_tokens(1000.0, 1, plan_for)
    assert total == pytest.approx(1000.0 / (0.01 + 1 / steps[-1]))
    assert plan_for(total).tokens_per_step == steps[-2]


def test_the_plan_has_the_batch_that_was_counted_with(capsys: pytest.CaptureFixture[str]) -> None:
    plan, total_tokens = planning.plan_for_budget(
        1000.0, sizes_for(64), lambda model: Speed(1e-4, 0.1), 10**9, "cpu", None, None
    )
    assert total_tokens == pytest.approx(1000.0 / (1e-4 + 0.1 / plan.tokens_per_step))
    assert f"{total_tokens / 1000:,.0f} tokens/s" in capsys.readouterr().out
