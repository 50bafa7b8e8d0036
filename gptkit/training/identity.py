"""What stays the same within a run: a checkpoint of another one is refused, and a changed setting is reported."""

import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from gptkit.base.cli import UserError
from gptkit.base.files import as_dict
from gptkit.text.tokenizer import Tokenizer
from gptkit.training.planning import Plan
from gptkit.training.recipe import Recipe

# What a checkpoint's run must share with the one that resumes it, and what a message calls it.
IDENTITY = {
    "model": "model (--model_size, the dimensions or --drop_rate)",
    "tokenizer": "tokenizer (--tokenizer and its name or path)",
    "tokens": "text (--data_dir)",
    "sequences_per_step": "number of sequences per step (--batch_size times --grad_accum_steps times processes)",
    "optimizer": "--optimizer",
    "seed": "--seed",
    "val_fraction": "--val_fraction",
    "init_from": "--init_from",
    "teacher": "teacher (--distill_from)",
}
NOT_PRINTED = ("model", "tokenizer", "tokens")  # too long to print
# What may change within a run, and changes its result.
RECIPE = (
    "lr", "min_lr", "warmup_steps", "grad_clip", "dtype", "distill_weight",
    *(field.name for field in fields(Recipe) if field.name != "drop_rate"),  # that is the model's
)  # fmt: skip
LENGTH = ("n_epochs", "max_tokens", "max_steps", "budget_minutes")


def run_identity(settings: Any, tokenizer: Tokenizer, teacher: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return what must stay the same within a run; the caller adds the plan's and the tokens' fingerprint.

    A teacher is known by the SHA-256 of its weights; a message names it.
    """
    named = ("optimizer", "seed", "val_fraction", "init_from")
    identity = {"tokenizer": tokenizer.fingerprint} | {name: getattr(settings, name) for name in named}
    return identity | {"teacher": dict(teacher) if teacher else None}


def require_same_run(
    checkpoint: Path | None, state: Mapping[str, Any], identity: Mapping[str, Any], plan: Plan | None = None
) -> None:
    """Raise UserError where the checkpoint to resume from belongs to a run of another identity."""
    known = as_dict(state.get("identity"))
    if plan and isinstance(known.get("model"), dict):  # an older version had fewer dimensions
        defaults = {field.name: field.default for field in fields(plan.model) if field.default is not MISSING}
        known = known | {"model": defaults | known["model"]}
    difference = find_difference(known, identity) if checkpoint else None
    if difference:
        raise UserError(
            f"{checkpoint} is from a run with another {difference}; give the settings of that run, or another --output_dir"
        )


def find_difference(before: Mapping[str, Any], identity: Mapping[str, Any]) -> str | None:
    """Describe the first thing in which a run's identity differs from a checkpoint's; None where all is equal."""
    for name, value in identity.items():
        known = before.get(name)
        if name == "teacher" and as_dict(known).get("weights") == as_dict(value).get("weights"):
            continue  # the same weights, wherever they lie now
        if known != value:
            known, value = (as_dict(each).get("name", each) for each in (known, value))  # a teacher has a name
            return IDENTITY[name] + ("" if name in NOT_PRINTED else f" ({known}, now {value})")
    return None


def warn_changed_settings(before: Any, settings: Mapping[str, Any], step: int) -> None:
    """Print a note on standard error for each setting that has changed since a checkpoint, and what that means."""
    before = asdict(Recipe()) | as_dict(before)  # an older version had fewer settings
    changed = [name for name in (*RECIPE, *LENGTH) if name in before and before[name] != settings[name]]
    for name in changed:
        means = "the schedule stretches to the new length" if name in LENGTH else f"it holds from step {step} on"
        print(f"note: --{name} was {before[name]} and is {settings[name]}: {means}", file=sys.stderr)
