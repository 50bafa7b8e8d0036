"""What to train for how long: the model, the batch and the number of steps that fit a time.

Leaves to others the measuring; what stands here is arithmetic.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gptkit.base.cli import UserError, format_duration

# Of the models tried on one core of a CPU for 2.5 minutes, the best ones saw 1.5 to 2.7 tokens for each parameter of
# their blocks (benchmarks/README.md). Hoffmann et al. 2022 found 20 where the whole model counts and the
# text is English; a small model pays for its vocabulary besides.
TOKENS_PER_PARAMETER = 2.0
# Optimizer steps in a run: 1,000 for a million tokens, where a batch of 1,024 was the best tried, and as many more as the
# cube root of the tokens grows, so that batch and steps both grow. Only the first was measured (benchmarks/README.md).
STEPS, STEPS_TOKENS, STEPS_POWER = 1000, 1e6, 1 / 3
CLOSING_S = 3.0  # of a budget: the last evaluation, sample, checkpoint and curve


def steps_within(seconds: float, first_step: int, step_s: float) -> Callable[[int], int]:
    """A function: steps done -> how many a run will have that is to end `seconds` from now.

    step_s is a first guess at the seconds of a step; from then on it is measured, reports included.
    """
    start = time.monotonic()

    def total_steps(n_done: int) -> int:
        elapsed_s = time.monotonic() - start
        mean_s = (elapsed_s + step_s) / (n_done - first_step + 1)
        return n_done + max(round((seconds - elapsed_s) / mean_s), 0)

    return total_steps


def n_block_parameters(model: Any) -> int:
    """Return the number of entries in the matrices of all blocks, without norms and biases. `model` as below."""
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


def sequences_per_step(total_tokens: float, context_length: int) -> int:
    """The batch for a run of so many tokens: a power of two of sequences, for about the steps that suit it."""
    n_steps = STEPS * (total_tokens / STEPS_TOKENS) ** STEPS_POWER
    return int(2 ** round(math.log2(max(total_tokens / n_steps / context_length, 1))))


MICRO_STEP_TOKENS = {"cpu": 4096, "cuda": 32_768}  # with a budget: the most tokens in one pass through the model
# What a checkpoint's run must share with the one that goes on from it, and how a person says it.
IDENTITY = {
    "model": "model (--model_size and the dimensions)",
    "tokenizer": "tokenizer (--tokenizer and its name or path)",
    "tokens": "text (--data_dir)",
    "sequences_per_step": "number of sequences a step (--batch_size times --grad_accum_steps times processes)",
    "optimizer": "--optimizer",
    "seed": "--seed",
    "val_fraction": "--val_fraction",
    "init_from": "--init_from",
}
UNPRINTED = ("model", "tokenizer", "tokens")  # too long to print
# What may change within a run, and changes what comes out of it.
RECIPE = ("lr", "adam_lr", "min_lr", "warmup_steps", "weight_decay", "grad_clip", "dtype")
LENGTH = ("n_epochs", "max_tokens", "max_steps", "budget_minutes")


@dataclass(frozen=True)
class Plan:
    """The model of a run, by its dimensions (a dataclass), and its batch."""

    model: Any
    batch_size: int  # sequences a process a micro-step
    grad_accum_steps: int
    n_processes: int = 1

    @property
    def batch(self) -> dict[str, int]:
        names = ("batch_size", "grad_accum_steps", "n_processes")
        return {name: getattr(self, name) for name in names}

    @property
    def sequences_per_step(self) -> int:
        return self.batch_size * self.grad_accum_steps * self.n_processes

    def identity(self) -> dict[str, Any]:
        """How the sequences of a step are split into micro-steps and processes may change; their number may not."""
        return {"model": asdict(self.model), "sequences_per_step": self.sequences_per_step}

    def shared_by(self, n_processes: int) -> "Plan":
        """The same sequences a step by another number of processes, in micro-steps of at most the same size.

        Raises UserError where that number does not divide them.
        """
        each, rest = divmod(self.sequences_per_step, n_processes)
        if rest:
            raise UserError(
                f"the run has {self.sequences_per_step} sequences a step, which {n_processes} processes cannot share"
                " equally; start a number of processes that divides it"
            )
        batch_size = next(n for n in range(min(self.batch_size, each), 0, -1) if each % n == 0)
        return Plan(self.model, batch_size, each // batch_size, n_processes)


def plan_for_budget(
    left_s: float,
    ladder: Mapping[str, Any],
    tokens_per_s: Callable[[Any], float],
    n_training_tokens: int,
    device_type: str,
    batch_size: int | None,
    grad_accum_steps: int | None,
    n_processes: int = 1,
) -> Plan:
    """The largest model of the ladder that still sees enough tokens in left_s, and a batch that suits so many tokens.

    The ladder leads from small to large by name; one model alone is taken as it is. tokens_per_s is that of one process,
    of which n_processes are taken to be as many times as fast. Says what was measured and chosen.
    """
    chosen = None
    for size, model in ladder.items():
        speed = n_processes * tokens_per_s(model)
        total_tokens = left_s * speed
        n_passes, per_parameter = total_tokens / n_training_tokens, total_tokens / n_block_parameters(model)
        print(
            f"{size}: {speed:,.0f} tokens/s, so {total_tokens:,.0f} tokens in {format_duration(left_s)}:"
            f" {n_passes:.2f} passes over the text, {per_parameter:.1f} for each parameter of the blocks",
            flush=True,
        )
        if chosen and per_parameter < TOKENS_PER_PARAMETER:
            break  # larger ones see still less
        chosen = size, model, total_tokens
    assert chosen
    size, model, total_tokens = chosen
    n_sequences = sequences_per_step(total_tokens, model.context_length)
    at_once = max(MICRO_STEP_TOKENS["cuda" if device_type == "cuda" else "cpu"] // model.context_length, 1)
    each = max(n_sequences // n_processes, 1)
    batch_size = batch_size or min(each, at_once)
    plan = Plan(model, batch_size, grad_accum_steps or max(each // batch_size, 1), n_processes)
    n_steps = total_tokens / (plan.sequences_per_step * model.context_length)
    processes = f" x {n_processes}" if n_processes > 1 else ""
    why = "as asked for"
    if len(ladder) > 1:
        why = f"the largest with {TOKENS_PER_PARAMETER:g} tokens a parameter"
    print(
        f"chosen: {size}, {why}; {plan.batch_size} x {plan.grad_accum_steps}{processes} sequences a step, for about"
        f" {n_steps:,.0f} steps",
        flush=True,
    )
    return plan


def resume_plan(plan: Plan, config: Any, state: Mapping[str, Any]) -> Plan:
    """The plan of a command line for the run whose state is given, if there is one.

    The same command keeps the sequences a step, by whatever number of processes. Raises UserError where these cannot
    share them.
    """
    try:
        before = Plan(plan.model, **state["plan"])
        same_command = all(
            state["settings"][name] == getattr(config, name) for name in ("batch_size", "grad_accum_steps")
        )
        if before.sequences_per_step == plan.sequences_per_step or not same_command:
            return plan
        return before.shared_by(plan.n_processes)
    except (KeyError, TypeError, ValueError):  # no run before, or a state that is damaged
        return plan


def find_difference(before: Any, identity: Mapping[str, Any]) -> str | None:
    """What of a run's identity is not what a checkpoint's says, for a person; None where all is equal."""
    for name, value in identity.items():
        known = before.get(name) if isinstance(before, dict) else None
        if known != value:
            return IDENTITY[name] + ("" if name in UNPRINTED else f" ({known}, now {value})")
    return None


def warn_changed_settings(before: Any, settings: Mapping[str, Any], step: int) -> None:
    """Say on standard error which settings that may change have changed since a checkpoint, and what that means."""
    before = before if isinstance(before, dict) else {}
    changed = [name for name in (*RECIPE, *LENGTH) if name in before and before[name] != settings[name]]
    for name in changed:
        means = "the schedule stretches to the new length" if name in LENGTH else f"it holds from step {step} on"
        print(f"note: --{name} was {before[name]} and is {settings[name]}: {means}", file=sys.stderr)
