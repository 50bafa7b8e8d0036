"""What a run trains: its model and its batch, as asked for or, with a budget of time, as this machine allows."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gptkit import budget
from gptkit.run_log import format_duration

MICRO_STEP_TOKENS = {"cpu": 4096, "cuda": 32_768}  # with a budget: the most tokens in one pass through the model
# What a checkpoint's run must share with the one that goes on from it, and how a person says it.
IDENTITY = {
    "model": "model (--model_size and the dimensions)",
    "tokenizer": "tokenizer (--tokenizer and its name or path)",
    "tokens": "text (--data_dir)",
    "sequences_per_step": "number of sequences a step (--batch_size times --grad_accum_steps)",
    "optimizer": "--optimizer",
    "seed": "--seed",
    "val_fraction": "--val_fraction",
}
TOLD = ("model", "tokenizer", "tokens")  # too long to print
# What may change within a run, and changes what comes out of it.
RECIPE = ("lr", "adam_lr", "min_lr", "warmup_steps", "weight_decay", "grad_clip", "dtype")
LENGTH = ("n_epochs", "max_tokens", "max_steps", "budget_minutes")


@dataclass(frozen=True)
class Plan:
    """The model of a run, by its dimensions (a dataclass), and its batch."""

    model: Any
    batch_size: int  # sequences a micro-step
    grad_accum_steps: int

    @property
    def batch(self) -> dict[str, int]:
        return {"batch_size": self.batch_size, "grad_accum_steps": self.grad_accum_steps}

    def identity(self) -> dict[str, Any]:
        """How the sequences of a step are split into micro-steps may change; their number may not."""
        return {"model": asdict(self.model), "sequences_per_step": self.batch_size * self.grad_accum_steps}


def plan_for_budget(
    left_s: float,
    ladder: Mapping[str, Any],
    tokens_per_s: Callable[[Any], float],
    n_training_tokens: int,
    device_type: str,
    batch_size: int | None,
    grad_accum_steps: int | None,
) -> Plan:
    """The largest model of the ladder that still sees enough tokens in left_s, and a batch that suits so many tokens.

    The ladder leads from small to large by name; one model alone is taken as it is. Says what was measured and chosen.
    """
    chosen = None
    for size, model in ladder.items():
        speed = tokens_per_s(model)
        total_tokens = left_s * speed
        n_passes, per_parameter = total_tokens / n_training_tokens, total_tokens / model.n_block_parameters
        print(
            f"{size}: {speed:,.0f} tokens/s, so {total_tokens:,.0f} tokens in {format_duration(left_s)}:"
            f" {n_passes:.2f} passes over the text, {per_parameter:.1f} for each parameter of the blocks",
            flush=True,
        )
        if chosen and per_parameter < budget.TOKENS_PER_PARAMETER:
            break  # larger ones see still less
        chosen = size, model, total_tokens
    assert chosen
    size, model, total_tokens = chosen
    n_sequences = budget.sequences_per_step(total_tokens, model.context_length)
    at_once = max(MICRO_STEP_TOKENS["cuda" if device_type == "cuda" else "cpu"] // model.context_length, 1)
    batch_size = batch_size or min(n_sequences, at_once)
    plan = Plan(model, batch_size, grad_accum_steps or max(n_sequences // batch_size, 1))
    n_steps = total_tokens / (plan.batch_size * plan.grad_accum_steps * model.context_length)
    why = "as asked for"
    if len(ladder) > 1:
        why = f"the largest with {budget.TOKENS_PER_PARAMETER:g} tokens a parameter"
    print(
        f"chosen: {size}, {why}; {plan.batch_size} x {plan.grad_accum_steps} sequences a step, for about"
        f" {n_steps:,.0f} steps",
        flush=True,
    )
    return plan


def difference(before: Any, identity: Mapping[str, Any]) -> str | None:
    """What of a run's identity is not what a checkpoint's says, for a person; None where all is equal."""
    for name, value in identity.items():
        known = before.get(name) if isinstance(before, dict) else None
        if known != value:
            return IDENTITY[name] + ("" if name in TOLD else f" ({known}, now {value})")
    return None


def tell_changes(before: Any, settings: Mapping[str, Any], step: int) -> None:
    """Say on standard error which settings that may change have changed since a checkpoint, and what that means."""
    before = before if isinstance(before, dict) else {}
    changed = [name for name in (*RECIPE, *LENGTH) if name in before and before[name] != settings[name]]
    for name in changed:
        means = "the schedule stretches to the new length" if name in LENGTH else f"it holds from step {step} on"
        print(f"note: --{name} was {before[name]} and is {settings[name]}: {means}", file=sys.stderr)
