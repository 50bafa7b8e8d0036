"""Choose the model and the batch of a run: as asked for or, with a time budget, as this machine allows.

A model is known here by its dimensions (a dataclass) and by a factory that builds it from them.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from gptkit.base.cli import UserError, format_duration
from gptkit.base.files import as_dict
from gptkit.distributed.process_group import main_process, world_size
from gptkit.training.characters import SharedCharacters
from gptkit.training.compiler_gain import CompilerGain, compiles, expected_gain
from gptkit.training.distillation import Teacher
from gptkit.training.optimizers import OPTIMIZERS
from gptkit.training.recipe import MANY_EPOCHS, Reading, Recipe, choose_recipe, describe_recipe, saved_recipe, worth_of
from gptkit.training.settings import BATCH_SIZE, TrainingSettings, budget_s, most_epochs, peak_lr
from gptkit.training.speed import Speed, measure_speed

# Of the models tried on one core of a CPU for 2.5 minutes, the best ones saw 1.5 to 2.7 tokens for each parameter of
# their blocks (benchmarks/README.md). Hoffmann et al. 2022 found 20 where the whole model counts and the
# text is English; a small model pays for its vocabulary besides.
TOKENS_PER_PARAMETER = 2.0
# Where the decays of the recipe hold the weights, a larger model is better: of micro to mini on texts of 350,000 and 1 million
# characters the largest was, where it read its text 5.5 to 8 times, with up to so many parameters of the blocks per token of
# the text. NanoGPT Slowrun's first model has 12 (github.com/qlabs-eng/slowrun, README).
ENOUGH_EPOCHS, PARAMETERS_PER_TOKEN = 5.0, 16.0
# Optimizer steps in a run, growing with the cube root of the tokens, so that batch and steps both grow. For 12 million tokens
# read five times 2,929 steps were better than 1,464. By the recipe for text that is read seldom, whose embedding learns faster,
# half as many are: 900 steps for 3.7 million tokens, of 450 to 3,600, and 1,465 for 12 million (benchmarks/README.md).
STEPS, SELDOM_STEPS, STEPS_TOKENS, STEPS_POWER = 1200, 600, 1e6, 1 / 3
CLOSING_S = 3.0  # of a budget: the last evaluation, sample, checkpoint and curve
MIN_TRAINING_S = 5.0  # of a budget that must be left when training begins
MICRO_STEP_TOKENS = {"cpu": 4096, "cuda": 32_768}  # with a budget: the most tokens in one pass through the model


@dataclass(frozen=True)
class Plan:
    """The model of a run, by its dimensions (a dataclass), its batch and its recipe."""

    model: Any
    batch_size: int  # sequences per process per micro-step
    grad_accum_steps: int
    n_processes: int = 1
    recipe: Recipe = Recipe()

    def __post_init__(self) -> None:
        if not all(type(n) is int and n >= 1 for n in self.batch.values()):
            raise ValueError(f"{self.batch} is not a batch")

    @property
    def batch(self) -> dict[str, int]:
        """Return how a step's sequences are split, as a checkpoint keeps it."""
        names = ("batch_size", "grad_accum_steps", "n_processes")
        return {name: getattr(self, name) for name in names}

    @property
    def sequences_per_step(self) -> int:
        """Return the sequences of one optimizer step."""
        return self.batch_size * self.grad_accum_steps * self.n_processes

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens of one optimizer step."""
        return self.sequences_per_step * int(self.model.context_length)

    def identity(self) -> dict[str, Any]:
        """Return what stays the same within a run: the number of sequences per step, but not how they are split."""
        return {"model": asdict(self.model), "sequences_per_step": self.sequences_per_step}

    def for_processes(self, n_processes: int) -> "Plan":
        """Return the plan for another number of processes: the same sequences per step, micro-steps no larger.

        Raises UserError where that number does not divide them.
        """
        per_process, rest = divmod(self.sequences_per_step, n_processes)
        if rest:
            raise UserError(
                f"the run has {self.sequences_per_step} sequences per step, which {n_processes} processes cannot share"
                " equally; start a number of processes that divides it"
            )
        batch_size = next(n for n in range(min(self.batch_size, per_process), 0, -1) if per_process % n == 0)
        return replace(self, batch_size=batch_size, grad_accum_steps=per_process // batch_size, n_processes=n_processes)

    def with_recipe(self, recipe: Recipe) -> "Plan":
        """Return the plan with a recipe, whose dropout is the model's. Raises UserError where it is out of bounds."""
        try:
            return replace(self, model=replace(self.model, drop_rate=recipe.drop_rate), recipe=recipe)
        except ValueError as error:
            raise UserError(str(error))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the plan beside the model."""
        return self.batch | {"recipe": asdict(self.recipe)}


# Choosing


@main_process
def choose_plan(
    settings: TrainingSettings,
    sizes: Mapping[str, Any],
    build: Callable[[Any], nn.Module],
    state: Mapping[str, Any],
    n_training_tokens: int,
    started_at: float,
    device: torch.device,
    dtype: torch.dtype,
    teacher: Teacher | None = None,
    characters: SharedCharacters | None = None,
    is_pretrained: bool = False,  # whether its weights are those of --init_from
) -> Plan:
    """Return the plan that the settings ask for; what they leave to the budget is chosen by measuring this machine.

    `sizes` are the models to choose from, from small to large; a single one is taken. `build` makes a model from its
    dimensions. A run that resumes, whose `state` is given, keeps what it chose at its start. Raises UserError.
    """
    n_processes, n_training_tokens = world_size(), max(n_training_tokens, 1)
    if state and settings.budget_minutes is not None:
        (model,) = sizes.values()
        before = saved_plan(model, state)
        batch = settings.batch_size or before.batch_size, settings.grad_accum_steps or before.grad_accum_steps
        return resume_plan(Plan(model, *batch, n_processes), settings, state)
    if settings.budget_minutes is None:
        (model,) = sizes.values()
        plan = Plan(model, settings.batch_size or BATCH_SIZE, settings.grad_accum_steps or 1, n_processes)
        if state:
            return resume_plan(plan, settings, state)
        return finish_plan(plan, settings, n_training_tokens, math.inf, is_pretrained)
    left_s = budget_s(settings) - (time.monotonic() - started_at)
    if left_s < MIN_TRAINING_S:
        raise UserError(
            f"--budget_minutes {settings.budget_minutes} are over before training begins; give more, or tokenize the"
            " text first (pretokenize.py)"
        )

    def gain_for(plan: Plan) -> CompilerGain | None:  # on other devices it is not known
        found = expected_gain(plan.model, plan.batch_size, dtype)
        is_compiled = compiles(settings, plan.model, plan.batch_size, device, dtype, left_s)
        return found if is_compiled and device.type == "cpu" else None

    plan, total_tokens = plan_for_budget(
        left_s - CLOSING_S,
        sizes,
        lambda model: measure_speed(settings, model, build, device, dtype, teacher, characters),
        n_training_tokens,
        device.type,
        settings.batch_size,
        settings.grad_accum_steps,
        n_processes,
        limit=most_tokens(settings, n_training_tokens),
        is_regularized=plans_decays(settings, is_pretrained)
        and 0 not in (settings.weight_decay, settings.embedding_decay),
        seldom_steps=SELDOM_STEPS if plans_decays(settings, is_pretrained) else STEPS,
        gain_for=gain_for,
    )
    return finish_plan(plan, settings, n_training_tokens, total_tokens, is_pretrained)


def plans_decays(settings: TrainingSettings, is_pretrained: bool) -> bool:
    """Return whether the planner chooses rates and decays: they were measured with Muon, from new weights."""
    return "embedding_decay" in OPTIMIZERS[settings.optimizer].recipe_flags and not is_pretrained


def most_tokens(settings: TrainingSettings, n_training_tokens: int) -> float:
    """Return the most tokens that a run may read by --n_epochs and --max_tokens."""
    return min(most_epochs(settings) * n_training_tokens, settings.max_tokens or math.inf)


def finish_plan(
    plan: Plan, settings: TrainingSettings, n_training_tokens: int, total_tokens: float, is_pretrained: bool = False
) -> Plan:
    """Return the plan with a recipe that suits how often the text is read, and print both.

    total_tokens is how many a budget has time for, infinite without one.
    """
    most = min(most_tokens(settings, n_training_tokens), plan.tokens_per_step * (settings.max_steps or math.inf))
    n_epochs = min(total_tokens, most) / n_training_tokens
    reading = Reading(n_training_tokens, plan.tokens_per_step, n_epochs, plan.model.emb_dim)
    recipe = choose_recipe(settings, reading, peak_lr(settings) if plans_decays(settings, is_pretrained) else None)
    print(describe_recipe(recipe, reading), flush=True)
    return plan.with_recipe(recipe)


def plan_for_budget(
    left_s: float,
    sizes: Mapping[str, Any],
    measure: Callable[[Any], Speed],
    n_training_tokens: int,
    device_type: str,
    batch_size: int | None,
    grad_accum_steps: int | None,
    n_processes: int = 1,
    limit: float = math.inf,
    is_regularized: bool = True,
    seldom_steps: int = SELDOM_STEPS,
    gain_for: Callable[[Plan], CompilerGain | None] = lambda plan: None,
) -> tuple[Plan, float]:
    """Return the largest model for which left_s seconds are worth enough tokens, its batch, and the tokens that it reads.

    Enough are TOKENS_PER_PARAMETER, or where the recipe regularizes ENOUGH_EPOCHS of the text, with at most
    PARAMETERS_PER_TOKEN of it. `sizes` lead from small to large by name; a single one is taken. `measure` gives the speed of
    one process; n_processes are taken to be as many times as fast; `gain_for` gives what the compiler takes and gives, where
    a run is compiled. The run reads `limit` tokens at most. Prints what was measured and chosen.
    """
    chosen = None
    plan_for = functools.partial(
        plan_batch, n_training_tokens=n_training_tokens, seldom_steps=seldom_steps, device_type=device_type,
        batch_size=batch_size, grad_accum_steps=grad_accum_steps, n_processes=n_processes,
    )  # fmt: skip
    for size, model in sizes.items():
        possible = possible_tokens(measure(model), left_s, n_processes, functools.partial(plan_for, model), gain_for)
        total_tokens = min(possible, limit)
        n_epochs = total_tokens / n_training_tokens
        worth = worth_of(n_training_tokens, n_epochs)
        n_parameters = n_block_parameters(model)
        per_parameter = worth / n_parameters
        is_often = n_epochs >= ENOUGH_EPOCHS and n_parameters <= PARAMETERS_PER_TOKEN * n_training_tokens
        print(
            f"{size}: {possible / left_s:,.0f} tokens/s, so {total_tokens:,.0f} tokens in {format_duration(left_s)}: the text"
            f" {n_epochs:.2f} times, worth {worth:,.0f} new tokens, {per_parameter:.1f} per parameter of the blocks",
            flush=True,
        )
        if chosen and per_parameter < TOKENS_PER_PARAMETER and not (is_regularized and is_often):
            break  # larger ones see still fewer
        chosen = size, model, total_tokens
    assert chosen
    size, model, total_tokens = chosen
    plan = plan_for(model, total_tokens)
    processes, why = f" x {n_processes}" if n_processes > 1 else "", "as asked for"
    if len(sizes) > 1:
        why = f"the largest with {TOKENS_PER_PARAMETER:g} such tokens per parameter"
        if is_regularized:
            why += f", or {ENOUGH_EPOCHS:g} epochs and {PARAMETERS_PER_TOKEN:g} parameters per token of the text"
    print(
        f"chosen: {size}, {why}; {plan.batch_size} x {plan.grad_accum_steps}{processes} sequences per step, for about"
        f" {total_tokens / plan.tokens_per_step:,.0f} steps",
        flush=True,
    )
    return plan, total_tokens


def possible_tokens(
    speed: Speed,
    left_s: float,
    n_processes: int,
    plan_for: Callable[[float], Plan],
    gain_for: Callable[[Plan], CompilerGain | None],
) -> float:
    """Return the tokens that a run may read in left_s seconds, compiled where it will be."""
    total = speed.total_tokens(left_s, n_processes, plan_for)
    gain = gain_for(plan_for(total))
    if gain is None:
        return total
    left_s = max(left_s - gain.seconds, MIN_TRAINING_S)  # --compile may be asked for where there is no time for it
    return speed.compiled(gain.times_as_fast).total_tokens(left_s, n_processes, plan_for)


def plan_batch(
    model: Any,
    total_tokens: float,
    *,
    n_training_tokens: int,
    seldom_steps: int,
    device_type: str,
    batch_size: int | None,
    grad_accum_steps: int | None,
    n_processes: int,
) -> Plan:
    """Return a model's plan for a run of total_tokens, with the batch that suits these; what is given of it stays."""
    steps = seldom_steps if total_tokens < MANY_EPOCHS * n_training_tokens else STEPS
    per_process = max(sequences_per_step(total_tokens, model.context_length, steps) // n_processes, 1)
    most = max(MICRO_STEP_TOKENS["cuda" if device_type == "cuda" else "cpu"] // model.context_length, 1)
    batch_size = batch_size or min(per_process, most)
    return Plan(model, batch_size, grad_accum_steps or max(per_process // batch_size, 1), n_processes)


def n_block_parameters(model: Any) -> int:
    """Count the entries in the matrices of all blocks, without norms and biases; `model` as in flops_per_token."""
    attention = model.emb_dim * model.head_dim * (2 * model.n_heads + 2 * model.kv_heads)
    feed_forward = (2 if model.arch == "gpt2" else 3) * model.emb_dim * model.hidden_dim
    entries: int = model.n_layers * (attention + feed_forward)
    return entries


def flops_per_token(model: Any) -> int:
    """Return the floating-point operations of a training step per token, for a model with these dimensions.

    By PaLM (Chowdhery et al. 2022), appendix B: the embedding, which is looked up, does not count; the output head does,
    and so does attention, as if it were not causal. `model` is a config with the fields and properties of GPTConfig.
    """
    n_matrix_entries = n_block_parameters(model) + model.padded_vocab_size * model.emb_dim
    return 6 * n_matrix_entries + 12 * model.n_layers * model.n_heads * model.head_dim * model.context_length


def sequences_per_step(total_tokens: float, context_length: int, steps: int = STEPS) -> int:
    """Return the sequences per step for a run of total_tokens: a power of two, for `steps` at STEPS_TOKENS."""
    n_steps = steps * (total_tokens / STEPS_TOKENS) ** STEPS_POWER
    return int(2 ** round(math.log2(max(total_tokens / n_steps / context_length, 1))))


def steps_within(seconds: float, first_step: int, step_s: float) -> Callable[[int], int]:
    """Return a function from the steps done to the total steps of a run that is to end `seconds` from now.

    step_s is a first guess at the seconds per step; from then on it is measured, reports included.
    """
    start = time.monotonic()

    def total_steps(n_done: int) -> int:
        elapsed_s = time.monotonic() - start
        mean_s = (elapsed_s + step_s) / (n_done - first_step + 1)
        return n_done + max(round((seconds - elapsed_s) / mean_s), 0)

    return total_steps


# Resuming


def resume_plan(plan: Plan, settings: TrainingSettings, state: Mapping[str, Any]) -> Plan:
    """Return the plan of a command line for the run whose state is given.

    The same command keeps the sequences per step, by whatever number of processes. Raises UserError where these cannot
    share them.
    """
    saved, names = as_dict(state.get("plan")), ("batch_size", "grad_accum_steps")
    is_same_command = all(as_dict(state.get("settings")).get(name) == getattr(settings, name) for name in names)
    if is_same_command and saved.keys() >= set(names):  # other runs have none, or a damaged one
        before = saved_plan(plan.model, state)
        if before.sequences_per_step != plan.sequences_per_step:
            plan = before.for_processes(plan.n_processes)
    return plan.with_recipe(saved_recipe(settings, state))


def saved_plan(model: Any, state: Mapping[str, Any]) -> Plan:
    """Return the plan whose batch a checkpoint's state holds, without its recipe. Raises UserError."""
    try:
        saved = state["plan"]
        return Plan(model, saved["batch_size"], saved["grad_accum_steps"], saved.get("n_processes", 1))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the newest checkpoint is damaged ({error!r}); remove it to resume from an older one")
