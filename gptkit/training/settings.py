"""The settings of a training run, and what follows from them alone: peak rate, intervals, length.

The model's settings are in pretraining.py, which knows the model; the tokenizer's in gptkit/text/tokenizer.py.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from gptkit.base.cli import UserError, setting
from gptkit.base.devices import DtypeName
from gptkit.data.batches import TrainingBatches
from gptkit.distributed import fsdp
from gptkit.distributed.process_group import Parallelism
from gptkit.text.tokenizer import Tokenizer
from gptkit.training.characters import SharedCharacters, characters_of
from gptkit.training.optimizers import OPTIMIZERS, Optimizer, build_optimizer
from gptkit.training.recipe import CHARACTER_SHARE, Recipe, RecipeSettings, saved_recipe

MAX_ROLLBACKS = 3  # to a checkpoint, when a run diverges; each halves the rate
BATCH_SIZE = 16  # where neither a flag nor a budget says otherwise


def _by_optimizer(name: str, form: str) -> str:
    """Return each optimizer's value of the field `name` of its spec, for a help text."""
    return ", ".join(f"{optimizer} {getattr(spec, name):{form}}" for optimizer, spec in OPTIMIZERS.items())


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(RecipeSettings):
    """Everything about a run but its tokenizer and its model."""

    data_dir: str = setting(help="folder of text shards (dataset/prepare_aozora_jsonl.py makes it)", group="data")
    output_dir: str = setting(
        "model_checkpoints", "folder for checkpoints, metrics.jsonl and loss_curve.png", group="data"
    )
    use_pretokenized: bool = setting(
        False, "keep token shards in --pretokenized_dir and reuse them while they match", group="data"
    )
    pretokenized_dir: str | None = setting(
        None, "with --use_pretokenized: folder of token shards (default: DATA_DIR_pretok)", group="data"
    )
    val_fraction: float = setting(
        0.01, "share of the text held out for validation: documents by a hash", more_than=0, at_most=0.5, group="data"
    )

    budget_minutes: float | None = setting(
        None,
        "end the run, and its schedule, this long after its start, tokenizing included",
        more_than=0,
        group="length",
    )
    n_epochs: int | None = setting(
        None,
        "passes over the training tokens (default: 1; with a budget as many as it has time for)",
        at_least=1,
        group="length",
    )
    max_tokens: int | None = setting(
        None, "end the run, and its schedule, after at most these training tokens", at_least=1, group="length"
    )
    max_steps: int | None = setting(
        None, "end the run, and its schedule, after at most these optimizer steps", at_least=1, group="length"
    )
    max_minutes: float | None = setting(
        None,
        "save and stop after these minutes of training; run the same command to resume",
        more_than=0,
        group="length",
    )

    batch_size: int | None = setting(
        None,
        f"sequences per process per micro-step (default: {BATCH_SIZE}; with a budget what suits its length)",
        at_least=1,
        group="batch",
    )
    grad_accum_steps: int | None = setting(
        None,
        "micro-steps whose gradients are summed for one optimizer step (default: 1; with a budget as --batch_size)",
        at_least=1,
        group="batch",
    )
    auto_batch: bool = setting(
        False,
        "where memory runs out, restart with half of the batch and twice the micro-steps, as often as needed",
        group="batch",
    )

    optimizer: str = setting(
        "muon",
        "muon: Muon for the blocks' matrices beside AdamW for the rest; galore_adamw needs galore-torch",
        choices=OPTIMIZERS,
        group="optimizer",
    )
    lr: float | None = setting(
        None,
        "peak learning rate, with muon that of the matrices (default: " + _by_optimizer("default_lr", "g") + ")",
        more_than=0,
        group="optimizer",
    )
    min_lr: float | None = setting(
        None,
        "learning rate at the end of the run (default: a twentieth of --lr)",
        at_least=0,
        group="optimizer",
    )
    warmup_steps: int | None = setting(
        None,
        "steps of linear warmup (default: of the run " + _by_optimizer("warmup_share", ".0%") + "; at most 1000)",
        at_least=0,
        group="optimizer",
    )
    grad_clip: float = setting(1.0, "scale gradients down to at most this norm", more_than=0, group="optimizer")
    max_bad_steps: int = setting(
        5,
        "steps in a row with a loss or gradient that is not finite (each is skipped) before --on_divergence",
        at_least=1,
        group="optimizer",
    )
    on_divergence: Literal["go_back", "stop"] = setting(
        "go_back",
        f"go_back: to the last good checkpoint with half of the rate, at most {MAX_ROLLBACKS} times; or stop",
        group="optimizer",
    )
    bigram_steps: int | None = setting(
        None,
        "modern: steps that fit embedding and head to counts of token pairs before the run (default: 50; none where"
        " there is little text)",
        at_least=0,
        group="optimizer",
    )

    distill_from: str | None = setting(
        None,
        "learn from the predictions of the model in this experiment folder too (a teacher, of the same tokenizer)",
        group="distillation",
    )
    distill_weight: float = setting(
        0.5, "share of the loss by which the model imitates its teacher", at_least=0, at_most=1, group="distillation"
    )
    chain: int | None = setting(
        None,
        "train so many models one after the other, each with the one before as teacher: OUTPUT_DIR/link_1, …, and the"
        " last in OUTPUT_DIR; they share --budget_minutes",
        at_least=2,
        group="distillation",
    )

    eval_freq: int | None = setting(
        None,
        "steps between two reports of the losses (default: 100; with a budget a twentieth of the run, or up to a fifth where"
        " reports would take over 2 % of it)",
        at_least=1,
        group="reports",
    )
    eval_iter: int = setting(20, "batches of validation text for each report", at_least=1, group="reports")
    print_sample_iter: int | None = setting(
        None,
        "steps between two printed samples (default: 100; with a budget each fifth report)",
        at_least=1,
        group="reports",
    )
    start_context: str = setting("吾輩は", "how the samples begin", group="reports", is_text=True)
    logger: Literal["none", "tensorboard", "wandb", "trackio"] = setting(
        "none", "send reports and samples there too (each needs its package)", group="reports"
    )

    save_ckpt_freq: int | None = setting(
        None,
        "steps between two checkpoints; the last step has one too (default: 500; with a budget each fifth report)",
        at_least=1,
        group="checkpoints",
    )
    save_every_minutes: float = setting(10.0, "longest time between two checkpoints", more_than=0, group="checkpoints")
    keep_checkpoints: int = setting(
        2, "keep this many of the newest checkpoints, and the best one", at_least=1, group="checkpoints"
    )
    resume: Literal["auto", "none"] = setting(
        "auto", "auto: resume from the newest checkpoint; none: refuse if there is one", group="checkpoints"
    )

    seed: int = setting(
        123,
        "seed of the weights, the order of the data, dropout and samples",
        at_least=0,
        at_most=2**63 - 1,
        group="device",
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", group="device")
    dtype: DtypeName = setting(
        "auto",
        "type of matrix products (auto: bfloat16 where the device itself multiplies it, else float16 on GPUs, or float32)",
        group="device",
    )
    compile: bool | None = setting(
        None,
        "torch.compile the model (default: on CUDA, and on a CPU with 6 minutes of --budget_minutes left, or 1 if it was"
        " compiled there before); where that fails, continue without",
        group="device",
    )
    activation_checkpointing: bool = setting(
        False,
        "keep less for the backward pass and compute it again: less memory, a third more arithmetic",
        group="device",
    )
    parallel: Parallelism = setting(
        "ddp",
        "of several processes (torchrun): ddp, each has the full model; fsdp, each has a shard of it",
        group="device",
    )
    hang_timeout_s: float = setting(
        600.0,
        "of several processes: seconds one may wait for another before the run ends",
        at_least=1,
        group="device",
    )


def check_training_settings(settings: TrainingSettings, n_processes: int) -> None:
    """Raise UserError where training settings conflict, or a package is missing."""
    spec = OPTIMIZERS[settings.optimizer]
    spec.require_package()
    for name, other in ((flag, key) for key, each in OPTIMIZERS.items() for flag in each.recipe_flags):
        if name not in spec.recipe_flags and getattr(settings, name) not in (None, getattr(Recipe, name)):
            raise UserError(f"--{name} needs --optimizer {other}, and this is {settings.optimizer}; leave it out")
    if settings.pretokenized_dir and not settings.use_pretokenized:
        raise UserError(
            f"--pretokenized_dir {settings.pretokenized_dir} is given without --use_pretokenized; add that flag"
        )
    if spec.needs_full_matrices and settings.parallel == "fsdp":
        raise UserError(f"--optimizer {settings.optimizer} needs full matrices; give --parallel ddp, or muon or adamw")
    if settings.parallel == "fsdp" and not fsdp.is_correct():
        raise UserError(
            f"--parallel fsdp needs torch {fsdp.FIRST_CORRECT_TORCH} or newer: {torch.__version__} may add gradients"
            " up instead of averaging them; give --parallel ddp, or install a newer torch"
        )
    if settings.auto_batch and n_processes > 1:
        raise UserError("--auto_batch is for one process; give --batch_size and --grad_accum_steps that fit")
    if settings.max_minutes and settings.budget_minutes:
        raise UserError("--max_minutes stops a run that --budget_minutes ends; give one of them")
    if settings.min_lr is not None and settings.min_lr > peak_lr(settings):
        raise UserError(f"--min_lr {settings.min_lr} is above the peak, --lr {peak_lr(settings)}; give a smaller one")
    try:
        settings.start_context.encode()
    except UnicodeEncodeError:
        raise UserError(f"--start_context {settings.start_context!a} is not valid text; give it in UTF-8")


def peak_lr(settings: TrainingSettings) -> float:
    """Return the peak learning rate, by default the optimizer's."""
    return settings.lr or OPTIMIZERS[settings.optimizer].default_lr


def characters_for(
    settings: TrainingSettings,
    tokenizer: Tokenizer,
    sizes: Mapping[str, Any],
    device: torch.device,
    state: Mapping[str, Any],
    is_pretrained: bool,
) -> SharedCharacters | None:
    """Return which rows of the embedding share characters, where the optimizer can use that and is to.

    `sizes` are the models to choose from, all with the same rows; `state` is that of a run that resumes; is_pretrained tells
    whether the weights are those of --init_from.
    """
    share = settings.share_characters
    if state:
        share = saved_recipe(settings, state).share_characters
    elif share is None:
        share = 0.0 if is_pretrained else CHARACTER_SHARE
    if not share or "share_characters" not in OPTIMIZERS[settings.optimizer].recipe_flags:
        return None
    return characters_of(tokenizer, next(iter(sizes.values())).padded_vocab_size, device)


def configure_optimizer(
    settings: TrainingSettings,
    recipe: Recipe,
    model: nn.Module,
    dtype: torch.dtype,
    further: nn.Parameter | None = None,
    characters: SharedCharacters | None = None,
) -> Optimizer:
    """Build the optimizer of a run for a model, and for a matrix beside it; dtype is that of the run's matrix products.

    `characters` are needed where the recipe shares them.
    """
    rates = peak_lr(settings), recipe.adam_lr
    names = ("embedding_decay", "cautious_decay", "muon_scaling", "share_characters")
    variants = {name: getattr(recipe, name) for name in names} | {"characters": characters}
    return build_optimizer(model, settings.optimizer, *rates, recipe.weight_decay, dtype, further, **variants)


def most_epochs(settings: TrainingSettings) -> int:
    """Return the most passes over the text that a run may make: --n_epochs, else as many as another limit allows, else 1."""
    return settings.n_epochs or (sys.maxsize if settings.budget_minutes or settings.max_tokens else 1)


def max_total_steps(settings: TrainingSettings, batches: TrainingBatches) -> int:
    """Return the number of steps after which a run ends, whatever time it has."""
    limits = [most_epochs(settings) * batches.steps_per_epoch, settings.max_steps or sys.maxsize]
    return min(*limits, max((settings.max_tokens or sys.maxsize) // batches.tokens_per_step, 1))


def budget_s(settings: TrainingSettings) -> float:
    """Return the seconds of --budget_minutes, or infinity without it."""
    return 60 * (settings.budget_minutes or math.inf)
