"""The state of a training run, and what it does in a step.

How long it is, what is skipped and what is saved is left to Pace, Guard and Saver.

Shapes: B sequences per micro-step, T time (context_length).
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from gptkit.base import devices
from gptkit.base.cli import UserError, format_duration
from gptkit.base.files import free_bytes, write_json
from gptkit.data.batches import Batch, TrainingBatches, check_data_size, validation_batches
from gptkit.data.text_shards import source_name
from gptkit.data.token_folder import TokenFolder, describe_tokens
from gptkit.data.token_shards import TokenStream
from gptkit.distributed import fsdp, process_group
from gptkit.distributed.process_group import main_process
from gptkit.evaluation.scoring import mean_loss
from gptkit.generation.generate import TextStream, stream_text
from gptkit.generation.sampling import SamplingSettings
from gptkit.text.tokenizer import Tokenizer
from gptkit.training.averaging import WeightAverage
from gptkit.training.compilation import (
    BatchTooLarge,
    Loss,
    compile_and_time,
    find_batch_size,
    make_loss,
    time_optimizer_step,
)
from gptkit.training.distillation import Teacher
from gptkit.training.further_tokens import FurtherTokens
from gptkit.training.guard import as_count, as_scaler_state, as_sum
from gptkit.training.optimizers import OPTIMIZERS, Optimizer, load_optimizer_tensors, optimizer_tensors, state_bytes
from gptkit.training.planning import Plan, flops_per_token
from gptkit.training.run_log import CURVE_FILE, RUN_FILE, RUN_FORMAT
from gptkit.training.settings import BATCH_SIZE, TrainingSettings, configure_optimizer

Tensors = dict[str, torch.Tensor]
SAMPLING, SAMPLE_TOKENS = SamplingSettings(temperature=0.8, top_k=40), 50


@dataclasses.dataclass
class Run:
    """Model, optimizer, batches and device of a run, and how far it has come."""

    settings: TrainingSettings
    tokenizer: Tokenizer
    tokens: TokenFolder
    plan: Plan
    identity: dict[str, Any]  # what stays the same from session to session
    batches: TrainingBatches
    validation: list[Batch]
    model: Any  # a GPT: hidden_states (B, T) -> (B, T, C), head_weight (V, C), what generate needs
    optimizer: Optimizer
    device: torch.device
    dtype: torch.dtype  # of matrix products
    teacher: Teacher | None = None  # of --distill_from
    further: FurtherTokens | None = None  # of --further_tokens
    step: int = 0  # optimizer steps done
    elapsed_s: float = 0.0  # of training, when the newest checkpoint was written
    best_val_loss: float | None = None  # nats per token, of the checkpoints saved, as Saver.save takes it
    loss: Loss = dataclasses.field(init=False)  # inputs, targets: (B, T) -> mean; compile() sets it
    validation_loss: Loss = dataclasses.field(init=False)  # the same, without gradients
    average: WeightAverage = dataclasses.field(init=False)  # does nothing unless the recipe averages
    scaler: torch.amp.GradScaler = dataclasses.field(init=False)  # does nothing unless dtype is float16
    loss_scale: float = dataclasses.field(init=False)  # the scaler's after the last step

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.loss_scale = self.scaler.get_scale()
        self.average = WeightAverage(self.model, self.plan.recipe.average_epochs * self.batches.steps_per_epoch)

    @property
    def output_dir(self) -> Path:
        """Return the folder of all that the run writes."""
        return Path(self.settings.output_dir)

    @property
    def grad_accum_steps(self) -> int:
        """Return the micro-steps of an optimizer step."""
        return self.plan.grad_accum_steps

    # Training

    def compile(self, compiled: bool) -> dict[str, float]:
        """Make the loss, compiled or not, and return the seconds of each part of an optimizer step.

        Raises BatchTooLarge, with a batch that was seen to fit, where memory runs out.
        """
        if compiled and process_group.is_main_process():
            print("compiling the model (up to half a minute or so; --no-compile leaves it as it is)", flush=True)
        self.batches.micro_batch(self.step, 0)  # the first one takes longer: it draws the order of the epoch
        start = time.monotonic()
        batch = self.batches.micro_batch(self.step, 0)
        reading_s = time.monotonic() - start
        measure = functools.partial(
            compile_and_time, self.model, self.model.config.vocab_size,
            device=self.device, dtype=self.dtype, teacher=self.teacher, further=self.further,
            is_asked_for=self.settings.compile is not None,
        )  # fmt: skip
        loss = None
        try:
            loss, parts_s = measure(compile=compiled, batch=batch)
        except (RuntimeError, MemoryError) as error:
            if not devices.is_out_of_memory(error) or process_group.world_size() > 1:
                raise
        if loss is None:  # outside the handler, which would keep what did not fit in memory
            size = find_batch_size(
                lambda n: measure(compile=False, batch=(batch[0][:n], batch[1][:n])), self.plan.batch_size
            )
            raise BatchTooLarge(self.plan.batch_size, self.grad_accum_steps, size, fits=True)
        self.loss = self.validation_loss = loss
        if compiled and self.device.type != "cuda":  # without gradients it would be compiled once more, for as long
            self.validation_loss = make_loss(self.model, self.model.hidden_states, self.model.config.vocab_size)
        if self.settings.parallel == "ddp":
            self.loss = process_group.wrap_ddp(self.model, loss, self.device)
        parts_s = {"reading": reading_s, **parts_s}
        step_s = {name: self.grad_accum_steps * seconds for name, seconds in parts_s.items()}
        if self.step == 0 and not OPTIMIZERS[self.settings.optimizer].is_slow_to_start:
            characters = getattr(self.optimizer, "characters", None)
            build = functools.partial(
                configure_optimizer, self.settings, self.plan.recipe, self.model, self.dtype, characters=characters
            )
            step_s["optimizer"] = time_optimizer_step(self.model, build, self.device)
        return step_s

    @contextlib.contextmanager
    def forward_context(self, is_last: bool) -> Iterator[None]:
        """Compute a loss in the run's dtype; is_last: the micro-step after which DDP averages gradients."""
        process_group.set_gradient_sync(self.loss, is_last)
        with devices.autocast(self.device, self.dtype):
            yield

    def clip_gradients(self) -> torch.Tensor:
        """Scale the gradients down to at most --grad_clip, and return the norm that they had.

        In float16 they were multiplied by the loss scale (Micikevicius et al. 2018, "Mixed Precision Training", section
        3.2): this divides them by it, once, and then adapts it, down where one overflowed. The optimizer's own step
        follows, not GradScaler.step: that leaves an overflow to the fused AdamW, which knows nothing of Muon's matrices.
        """
        if self.further:
            self.further.average_gradient()
        self.scaler.unscale_(self.optimizer)
        self.scaler.update()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
        return fsdp.full_norm(norm)

    def overflowed(self) -> bool:
        """Return whether the gradient of this step was scaled beyond float16's range. Call it once after each step.

        clip_gradients has then lowered the scale. Below a scale of 1 something else is wrong with the gradient.
        """
        before, self.loss_scale = self.loss_scale, self.scaler.get_scale()
        return 1 <= self.loss_scale < before

    def mean(self, *values: torch.Tensor) -> list[float]:
        """Return the means of scalars over the processes; waits for the device."""
        found: list[float] = process_group.all_reduce_mean(torch.stack(values)).tolist()
        return found

    # Evaluation

    def validation_losses(self) -> dict[str, float]:
        """Return the mean loss over the validation batches as val_loss, in nats per token.

        Where weights are averaged, that of the average is there too, as averaged_val_loss.
        """
        arguments = self.model, self.validation_loss, self.validation, self.device, self.dtype
        losses = {"val_loss": mean_loss(*arguments)}
        if self.average.is_on:
            with self.average.swapped_in():
                losses["averaged_val_loss"] = mean_loss(*arguments)
        return losses

    def sample_text(self) -> str:
        """Return --start_context and its continuation, with the same random numbers each time.

        It is written by the averaged weights, where there are any.
        """
        start = self.settings.start_context
        prompt = [self.tokenizer.end_of_text_id, *self.tokenizer.encode(start)]
        text = TextStream(self.tokenizer, prompt, self.settings.seed)
        with self.average.swapped_in(), fsdp.unsharded(self.model, self.dtype):
            pieces = stream_text(self.model, [text], SAMPLING, SAMPLE_TOKENS, self.model.config.context_length)
            return start + "".join(piece for _, piece in pieces)

    # Checkpoints

    def settings_dict(self) -> dict[str, Any]:
        """Return the settings that a later session compares with its own, with the recipe and the precision chosen."""
        chosen = dataclasses.asdict(self.plan.recipe) | {"dtype": devices.dtype_name(self.dtype)}
        return dataclasses.asdict(self.settings) | chosen

    def progress(self) -> dict[str, Any]:
        """Return how far the run has come, for a checkpoint's state."""
        scaler = {"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}
        averaged = {"n_averaged": self.average.n_updates} if self.average.is_on else {}
        return {
            "step": self.step, "best_val_loss": self.best_val_loss, "elapsed_s": self.elapsed_s, **scaler, **averaged
        }  # fmt: skip

    def load_progress(self, state: Mapping[str, Any]) -> None:
        """Load what `progress` returned. Raises KeyError where something is missing, ValueError where it is invalid."""
        step, best, elapsed_s = as_count(state["step"]), state["best_val_loss"], as_sum(state["elapsed_s"])
        if self.scaler.is_enabled():  # a checkpoint in another precision has no scale: begin with the first one
            saved = as_scaler_state(state["scaler"]) if "scaler" in state else {}
            self.scaler.load_state_dict(torch.amp.GradScaler(self.device.type).state_dict() | saved)
            self.loss_scale = self.scaler.get_scale()
        self.average.n_updates = as_count(state.get("n_averaged", 0))
        self.best_val_loss = None if best is None else as_sum(best)
        self.step, self.elapsed_s = step, elapsed_s

    def full_tensors(self, keep: bool) -> tuple[Tensors, Tensors, Tensors]:
        """Gather the weights, the optimizer's state with the random states, and the averaged weights, if there are any.

        Without `keep`, return none of them.
        """
        weights = fsdp.full_tensors(self.model.state_dict(), keep)
        training = fsdp.full_tensors(optimizer_tensors(self.model, self.optimizer), keep)
        training |= self.further.tensors() if self.further else {}
        training |= process_group.gather_rng_states(devices.get_rng_states(self.device))
        return weights, training, fsdp.full_tensors(self.average.tensors, keep)

    def load_tensors(
        self,
        weights: Mapping[str, torch.Tensor],
        training: Mapping[str, torch.Tensor],
        averaged: Mapping[str, torch.Tensor],
    ) -> None:
        """Load what `full_tensors` returned. Raises KeyError, ValueError or RuntimeError where it does not fit."""
        self.model.load_state_dict(fsdp.shard_tensors(weights, self.model.state_dict()))
        load_optimizer_tensors(self.model, self.optimizer, training)
        self.average.load(averaged)
        if self.further:
            self.further.load(training)
        states = process_group.select_rng_states(training)
        if process_group.is_main_process() or states:
            devices.set_rng_states(states, self.device)
        else:  # there were fewer processes
            process_group.seed_rank(self.settings.seed, self.step)


def make_batches(
    settings: TrainingSettings, plan: Plan, streams: Mapping[str, TokenStream], end_of_text_id: int
) -> tuple[TrainingBatches, list[Batch]]:
    """Return the training and the validation batches. Raises UserError where there are too few tokens."""
    length = plan.model.context_length
    batches = TrainingBatches(
        streams["train"],
        length,
        **plan.batch,
        seed=settings.seed,
        rank=process_group.rank(),
        shuffle=plan.recipe.shuffle,
        replace_rate=plan.recipe.replace_rate,
        end_of_text_id=end_of_text_id,
    )
    check_data_size(batches, len(streams["val"]))
    # The validation text is the same for any number of processes.
    size = settings.batch_size or (BATCH_SIZE if settings.budget_minutes is None else plan.batch_size)
    return batches, validation_batches(streams["val"], length, size, settings.eval_iter)


def choose_device_and_dtype(settings: TrainingSettings) -> tuple[torch.device, torch.dtype]:
    """Return the device of this process and the dtype of the run's matrix products. Raises UserError."""
    device = devices.choose_device(process_group.device_of_rank(settings.device))
    if device.type == "cuda" and process_group.world_size() > 1:
        torch.cuda.set_device(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for the products that stay in float32
    # The processes of a run may have different devices, but must compute in the same precision.
    return device, main_process(devices.choose_dtype)(settings.dtype, device, training=True)


@main_process
def require_disk_space(run: Run) -> None:
    """Raise UserError where the disk has no room for a checkpoint."""
    n_models = 2 if run.average.is_on else 1
    needed = n_models * sum(tensor.nbytes for tensor in run.model.state_dict().values()) + state_bytes(run.optimizer)
    free = free_bytes(run.output_dir)
    if free < needed:
        raise UserError(
            f"--output_dir {run.output_dir} has {free / 2**20:,.0f} MiB free and a checkpoint takes about"
            f" {needed / 2**20:,.0f} MiB (during a save there is one more than --keep_checkpoints and the best);"
            " make room, or name a folder on another disk"
        )


@main_process
def announce(run: Run, n_steps: int, step_s: Mapping[str, float]) -> None:
    """Print what a run is about to do, and write it to config.json; step_s are the seconds of each part of a step."""
    plan, batches = run.plan, run.batches
    left, context_length = n_steps - run.step, run.model.config.context_length
    n_shards = plan.n_processes if run.settings.parallel == "fsdp" else 1
    memory_bytes = devices.peak_memory_bytes(run.device) + state_bytes(run.optimizer) / n_shards
    total_s = sum(step_s.values())
    shares = ", ".join(f"{name} {seconds / total_s:.1%}" for name, seconds in step_s.items())
    tokens_per_s = batches.tokens_per_step / total_s
    mfu = devices.format_mfu(flops_per_token(run.model.config) * tokens_per_s / plan.n_processes, run.device, run.dtype)
    processes = "1 process" if plan.n_processes == 1 else f"{plan.n_processes} processes ({run.settings.parallel})"
    print(
        f"data: {describe_tokens(run.tokens.manifest)}\n"
        f"model: {run.model.n_parameters():,} parameters, {run.model.config}\n"
        f"device: {devices.describe_device(run.device)}, {run.dtype}, torch {torch.__version__}\n"
        f"steps: {left} to go of {n_steps}, {batches.steps_per_epoch} per epoch;"
        f" {batches.tokens_per_step:,} tokens per step = {plan.batch_size} sequences x {context_length} tokens"
        f" x {plan.grad_accum_steps} micro-steps x {processes}\n"
        f"memory: about {memory_bytes / 2**30:.2f} GiB (measured on one micro-step, and {run.settings.optimizer}'s state)\n"
        f"per step: {total_s:.3f} s ({shares}), {tokens_per_s:,.0f} tokens/s, MFU {mfu}\n"
        f"time: about {format_duration(left * total_s)} for the steps; evaluation comes on top",
        flush=True,
    )
    about = {
        "format": RUN_FORMAT,
        "settings": dataclasses.asdict(run.settings),
        "recipe": dataclasses.asdict(plan.recipe),
        "model": dataclasses.asdict(run.model.config),
        "text": source_name(Path(run.settings.data_dir)),
        "tokens": describe_tokens(run.tokens.manifest),
    }
    write_json(run.output_dir / RUN_FILE, about)


def finished_message(run: Run) -> str:
    """Return the message about a run that has nothing left to do."""
    return (
        f"{run.output_dir}: the run is finished at step {run.step}; to train longer, raise --n_epochs, --max_tokens,"
        " --max_steps or --budget_minutes"
    )


def closing_message(run: Run, n_steps: int) -> str:
    """Return the message at the end of a session."""
    if run.step < n_steps:
        return f"stopped at step {run.step} of {n_steps} and saved in {run.output_dir}; run the same command to resume"
    best = "unknown" if run.best_val_loss is None else f"{run.best_val_loss:.4f}"
    return (
        f"finished {n_steps} steps in {format_duration(run.elapsed_s)}, best validation loss of a checkpoint {best};"
        f" the loss curve is {run.output_dir / CURVE_FILE}"
    )
