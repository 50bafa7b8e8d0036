"""The settings of a training run, and what follows from them: rates, intervals, length.

The model's settings are pretraining.py's, which knows the model; the tokenizer's are tokenization.py's.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from gptkit.base.cli import setting
from gptkit.distributed.process_group import Kind
from gptkit.training import planning
from gptkit.training.schedules import DEFAULT_LR, OptimizerName, learning_rate

MAX_ROLLBACKS = 3  # to a checkpoint, in a run that diverges: an eighth of the rate


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Everything about a run but its tokenizer and its model."""

    data_dir: str = setting(help="folder of text shards (dataset/prepare_aozora_jsonl.py makes it)")
    output_dir: str = setting("model_checkpoints", "folder for checkpoints, metrics.jsonl and loss_curve.png")
    use_pretokenized: bool = setting(False, "keep token shards in --pretokenized_dir and reuse them while they match")
    pretokenized_dir: str | None = setting(
        None, "with --use_pretokenized: folder of token shards (default: DATA_DIR_pretok)"
    )
    val_fraction: float = setting(
        0.01, "share of the works kept for validation, chosen by a hash", more_than=0, at_most=0.5
    )

    budget_minutes: float | None = setting(
        None, "end the run, and its schedule, this long after its start, tokenizing included", more_than=0
    )
    n_epochs: int | None = setting(
        None, "passes over the training tokens (default: 1; with a budget as many as it has time for)", at_least=1
    )
    max_tokens: int | None = setting(
        None, "end the run, and its schedule, after at most these training tokens", at_least=1
    )
    max_steps: int | None = setting(
        None, "end the run, and its schedule, after at most these optimizer steps", at_least=1
    )
    max_minutes: float | None = setting(
        None, "save and stop after these minutes of training; the same command goes on", more_than=0
    )
    batch_size: int | None = setting(
        None, "sequences a process a micro-step (default: 16; with a budget what suits its length)", at_least=1
    )
    grad_accum_steps: int | None = setting(
        None, "micro-steps whose gradients are summed for one optimizer step (default: 1, as --batch_size)", at_least=1
    )

    auto_batch: bool = setting(
        False, "where memory runs out, go on with half of the batch and twice the micro-steps, as often as needed"
    )

    optimizer: OptimizerName = setting(
        "muon", "Muon for the blocks' matrices beside AdamW for the rest; AdamW; GaLore (which needs galore-torch)"
    )
    lr: float | None = setting(
        None,
        "peak learning rate, with muon that of the matrices (default: 0.02; adamw 6e-4; galore_adamw 5e-3)",
        more_than=0,
    )
    adam_lr: float = setting(
        0.02, "with muon: peak learning rate of the embedding; head and norms take shares of it", more_than=0
    )
    min_lr: float | None = setting(
        None, "learning rate at the end of the cosine (default: a twentieth of --lr)", at_least=0
    )
    warmup_steps: int | None = setting(
        None, "steps of linear warmup (default: 2 % of the run with muon, else 5 %; at most 1000)", at_least=0
    )
    weight_decay: float = setting(
        0.1, "decay of matrices (with muon those of the blocks; galore_adamw has none)", at_least=0
    )
    grad_clip: float = setting(1.0, "gradients are scaled down to at most this norm", more_than=0)
    max_bad_steps: int = setting(
        5,
        "steps in a row with a loss or gradient that is not finite (each is skipped) before --on_divergence",
        at_least=1,
    )
    on_divergence: Literal["go_back", "stop"] = setting(
        "go_back", f"go_back: to the last good checkpoint with half of the rate, at most {MAX_ROLLBACKS} times; or stop"
    )
    bigram_steps: int | None = setting(
        None,
        "modern: steps that fit embedding and head to counts of token pairs before the run (default: 50; of a small text none)",
        at_least=0,
    )

    eval_freq: int | None = setting(
        None, "report losses every so many steps (default: 100; with a budget 20 times)", at_least=1
    )
    eval_iter: int = setting(20, "batches of validation text at each report", at_least=1)
    print_sample_iter: int | None = setting(
        None, "print a sample every so many steps (default: 100; with a budget 4 times)", at_least=1
    )
    start_context: str = setting("吾輩は", "how the samples begin")
    logger: Literal["none", "tensorboard", "wandb", "trackio"] = setting(
        "none", "show reports and samples there too (each needs its package)"
    )
    save_ckpt_freq: int | None = setting(
        None, "save a checkpoint every so many steps, and at the end (default: 500; with a budget 4 times)", at_least=1
    )
    save_every_minutes: float = setting(10.0, "and at least every so many minutes", more_than=0)
    keep_checkpoints: int = setting(2, "keep this many of the newest checkpoints, and the best one", at_least=1)
    resume: Literal["auto", "none"] = setting(
        "auto", "auto: go on from the newest checkpoint; none: refuse if there is one"
    )

    seed: int = setting(
        123, "of the weights, the order of the data, dropout and samples", at_least=0, at_most=2**63 - 1
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "of matrix products (auto: bfloat16 where the device itself multiplies it)"
    )
    compile: bool | None = setting(None, "torch.compile the model (default: on CUDA); where that fails, go on without")
    activation_checkpointing: bool = setting(
        False, "keep less for the backward pass and compute it again: less memory, a third more arithmetic"
    )
    parallel: Kind = setting(
        "ddp", "of several processes (torchrun): ddp, each has the whole model; fsdp, each has a part of it"
    )
    hang_timeout_s: float = setting(
        600.0, "of several processes: seconds one may wait for another before the run ends", at_least=1
    )


class Progress(Protocol):
    """How far a run has come."""

    step: int
    elapsed_s: float


class Steps(Protocol):
    """How long the training text is."""

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def tokens_per_step(self) -> int: ...


def peak_lr(settings: TrainingSettings) -> float:
    return settings.lr or DEFAULT_LR[settings.optimizer]


def lr_multiplier(settings: TrainingSettings, step: int, n_steps: int) -> float:
    """The learning rate of a step (from 0), as a share of the peak."""
    final = 0.05 if settings.min_lr is None else settings.min_lr / peak_lr(settings)
    share = 50 if settings.optimizer == "muon" else 20
    wanted = min(n_steps // share, 1000) if settings.warmup_steps is None else settings.warmup_steps
    return learning_rate(step, peak=1.0, final=final, warmup_steps=min(wanted, n_steps), total_steps=n_steps)


def choose_intervals(settings: TrainingSettings, n_steps: int) -> dict[str, int]:
    """How many steps lie between two reports, samples and checkpoints."""
    report = settings.eval_freq or (100 if settings.budget_minutes is None else max(n_steps // 20, 1))
    sample = settings.print_sample_iter or (100 if settings.budget_minutes is None else 5 * report)
    save = settings.save_ckpt_freq or (500 if settings.budget_minutes is None else 5 * report)
    return {"report": report, "sample": sample, "save": save}


def max_total_steps(settings: TrainingSettings, batches: Steps) -> int:
    """The steps after which a run ends, whatever time it has."""
    n_epochs = settings.n_epochs or (sys.maxsize if settings.budget_minutes or settings.max_tokens else 1)
    limits = [n_epochs * batches.steps_per_epoch, settings.max_steps or sys.maxsize]
    return min(*limits, max((settings.max_tokens or sys.maxsize) // batches.tokens_per_step, 1))


def time_left_s(settings: TrainingSettings, progress: Progress, began: float) -> float:
    """Of the budget, at the start of this session; its end takes a little too."""
    return 60 * (settings.budget_minutes or math.inf) - progress.elapsed_s - (time.monotonic() - began)


def choose_length(
    settings: TrainingSettings, batches: Steps, progress: Progress, began: float, step_s: float
) -> Callable[[int], int]:
    """A function: steps done -> steps that the run will have."""
    most = max_total_steps(settings, batches)
    if settings.budget_minutes is None:
        return lambda n_done: most
    timed = planning.steps_within(time_left_s(settings, progress, began) - planning.CLOSING_S, progress.step, step_s)
    return lambda n_done: min(timed(n_done), most)
