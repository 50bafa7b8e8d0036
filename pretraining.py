"""Pretrain a GPT on text shards: tokenize, train, evaluate, sample, save; resume where an earlier run stopped.

    python pretraining.py --data_dir dataset/001 --use_pretokenized --output_dir exp001/model_checkpoints

The story is main() and train(), top to bottom. The model is gpt_model.py's; everything else is in gptkit/. Exit codes:
0 finished (or --max_minutes have passed), 2 a user's mistake, reported in one line, 75 stopped: run again to resume.
"""

from gptkit.base.startup import prepare_process

if __name__ == "__main__":
    prepare_process()  # before the imports below, which take seconds

import dataclasses
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from gpt_model import BUDGET_PRESETS, PRESETS, Arch, GPTConfig, GPTModel
from gptkit.base import devices
from gptkit.base.cli import UserError, run_command, setting
from gptkit.base.files import as_dict
from gptkit.data.batches import TrainingBatches
from gptkit.data.token_folder import TokenFolder, prepare_tokens, token_folder_path
from gptkit.distributed import fsdp, process_group
from gptkit.distributed.process_group import is_main_process, main_process
from gptkit.interop import huggingface
from gptkit.text.tokenizer import Tokenizer, TokenizerSettings
from gptkit.training import checkpoints
from gptkit.training.bigram_init import initialize_from_bigrams
from gptkit.training.chain import run_chain
from gptkit.training.compilation import BatchTooLarge, checkpoint_activations, oom_as_user_error, restart
from gptkit.training.compiler_gain import compiles
from gptkit.training.cpu_layers import quicken
from gptkit.training.distillation import load_teacher, sizes_within
from gptkit.training.further_tokens import make_further_tokens
from gptkit.training.guard import Guard
from gptkit.training.identity import require_same_run, run_identity, warn_changed_settings
from gptkit.training.loading import load_run_tokenizer
from gptkit.training.loggers import import_logger, open_logger
from gptkit.training.optimizers import set_schedules
from gptkit.training.pace import Pace, is_finished, time_left_s
from gptkit.training.planning import Plan, choose_plan
from gptkit.training.run import (
    Run,
    announce,
    choose_device_and_dtype,
    closing_message,
    finished_message,
    make_batches,
    require_disk_space,
)
from gptkit.training.run_log import RunLog
from gptkit.training.saver import Saver
from gptkit.training.sessions import Locks, check_output_dir, describe_environment, lock_output, record_session
from gptkit.training.settings import (
    BATCH_SIZE,
    TrainingSettings,
    characters_for,
    check_training_settings,
    configure_optimizer,
)
from gptkit.training.signals import EXIT_STOPPED, StopSignals

DIMENSIONS = ("arch", "context_length", "emb_dim", "n_layers", "n_heads", "n_kv_heads", "qkv_bias")


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig(TokenizerSettings, TrainingSettings):
    """Pretrain a GPT on text shards. The same command line resumes a run that stopped."""

    init_from: str | None = setting(
        None,
        "start from the weights of GPT-2 or Qwen3 in this folder or hub repository, with its tokenizer",
        group="model",
    )
    arch: Arch | None = setting(None, "modern: in the form of Qwen3 (the default); gpt2: GPT-2's", group="model")
    model_size: Literal["auto", "nano", "micro", "tiny", "mini", "midi", "124M", "355M", "774M", "1558M"] | None = (
        setting(
            None,
            "dimensions to start from (default: 124M); auto: the best for --budget_minutes on this machine",
            group="model",
        )
    )
    context_length: int | None = setting(
        None, "tokens the model sees at once (default: of --model_size)", at_least=1, group="model"
    )
    emb_dim: int | None = setting(None, "width of the model (default: of --model_size)", at_least=1, group="model")
    n_layers: int | None = setting(None, "transformer blocks (default: of --model_size)", at_least=1, group="model")
    n_heads: int | None = setting(None, "attention heads (default: of --model_size)", at_least=1, group="model")
    n_kv_heads: int | None = setting(
        None, "modern: heads of keys and values, each for some heads (default: --n_heads)", at_least=1, group="model"
    )
    qkv_bias: bool | None = setting(
        None, "gpt2: biases in the attention's input projections (default: yes)", group="model"
    )


def main(config: PretrainingConfig, started_at: float, stop: StopSignals) -> bool:
    """Set up a run, load its newest checkpoint if there is one, and train. Return whether the run is finished."""
    output_dir = check_settings(config)
    device, dtype = choose_device_and_dtype(config)
    devices.keep_freed_memory(device)
    with lock_output(output_dir) as locks:
        checkpoint = checkpoints.newest_valid(output_dir)
        state = checkpoints.read_state(checkpoint) if checkpoint else {}
        tokenizer = load_run_tokenizer(config, config.init_from, checkpoint)
        teacher = load_teacher(config, output_dir, tokenizer, GPTModel.from_dimensions, device)
        identity = run_identity(config, tokenizer, teacher.identity if teacher else None)
        require_same_run(checkpoint, state, identity)  # before tokens are made by another tokenizer
        tokens = open_token_folder(config, output_dir, tokenizer, locks)
        streams = tokens.open()
        sizes = sizes_within(teacher, model_sizes(config, tokenizer.vocab_size, state))
        characters = characters_for(config, tokenizer, sizes, device, state, config.init_from is not None)
        plan = choose_plan(
            config, sizes, GPTModel, state, len(streams["train"]), started_at, device, dtype, teacher, characters,
            is_pretrained=config.init_from is not None,
        )  # fmt: skip
        identity |= plan.identity() | {"tokens": tokens.fingerprint}
        require_same_run(checkpoint, state, identity, plan)
        batches, validation = make_batches(config, plan, streams, tokenizer.end_of_text_id)
        with oom_as_user_error(plan.batch_size, plan.grad_accum_steps):
            model = build_model(config, plan, batches, checkpoint is None, device, dtype)
            further = make_further_tokens(model, plan.recipe.further_tokens, plan.model.context_length, config.parallel)
            projection = further.projection if further else None
            optimizer = configure_optimizer(config, plan.recipe, model, dtype, projection, characters)
            run = Run(
                config, tokenizer, tokens, plan, identity, batches, validation, model, optimizer, device, dtype,
                teacher, further,
            )  # fmt: skip
            guard = Guard(config.max_bad_steps)
            saver = Saver(run, guard)
            if checkpoint:
                saver.load(checkpoint)
            if is_finished(config, batches, run.step, run.elapsed_s, started_at):
                print(finished_message(run))
                return True
            if checkpoint:
                print(f"resuming from {checkpoint}")
                warn_changed_settings(state.get("settings"), run.settings_dict(), run.step)
                checkpoints.set_aside_newer(checkpoint)
            with record_session(output_dir, run.step, config, describe_environment(device, dtype)) as end:
                return train(run, guard, saver, started_at, stop, end)


def train(
    run: Run, guard: Guard, saver: Saver, started_at: float, stop: StopSignals, session_end: dict[str, Any]
) -> bool:
    """Train until the run is finished or has to stop, with reports, samples and checkpoints. Return whether it is finished.

    How the session ended is written into session_end.
    """
    pace, log = start_session(run, started_at, stop)
    batches = run.batches.iterate_from(run.step, run.device)
    batch = next(batches)
    while True:
        lr = pace.lr_multiplier(run.step) * guard.lr_scale
        set_schedules(run.optimizer, lr, pace.decay_multiplier(run.step), pace.momentum(run.step))
        if run.further:
            run.further.set_weight(pace.share_done(run.step))
        step_loss = torch.zeros((), device=run.device)
        for micro_step in range(run.grad_accum_steps):
            with run.forward_context(is_last=micro_step == run.grad_accum_steps - 1):  # DDP's all-reduce, autocast
                loss = run.loss(*batch) / run.grad_accum_steps
            run.scaler.scale(loss).backward()
            step_loss += loss.detach()
            batch = next(batches)  # read while the device computes
        train_loss, grad_norm = run.mean(step_loss, run.clip_gradients())  # the one wait for the device
        run.step += 1
        if guard.accepts(run.step, train_loss, grad_norm, run.overflowed()):
            run.optimizer.step()
            run.average.update()
        run.optimizer.zero_grad(set_to_none=True)

        due = pace.after_step(run.step)  # the same in all processes
        log.step(run.step, pace.n_steps)
        losses: dict[str, float] = {}
        if due.evaluate and guard.n_losses:
            run.tokens.require_unchanged()
            losses = run.validation_losses()
            if math.isfinite(losses["val_loss"]):
                report = {"train_loss": guard.take_mean_loss(), **losses, "lr": run.optimizer.param_groups[0]["lr"]}
                log.report(run.step, run.batches.epoch_of(run.step), **report, grad_norm=grad_norm)
        if guard.has_diverged(losses.get("val_loss")):
            saver.roll_back()
            pace.roll_back(run.step)
            log.roll_back(run.step)
            batches = run.batches.iterate_from(run.step, run.device)
            batch = next(batches)
            continue
        if due.sample:
            log.sample(run.step, run.sample_text())
        if due.stop or (due.save and not guard.n_skipped_in_a_row):
            pace.mark_saved()
            saver.save(log.elapsed_s, losses)
        if due.stop:
            break
    log.close()
    saver.finish()
    how = "finished" if due.is_finished else "stopped"
    session_end |= {"step": run.step, "how": how, "reason": stop.received}
    if due.is_signalled and not due.is_finished:
        stop.exit(f"step {run.step} of {pace.n_steps} is saved in {run.output_dir}")
    print(closing_message(run, pace.n_steps))
    return due.is_finished


def start_session(run: Run, started_at: float, stop: StopSignals) -> tuple[Pace, RunLog]:
    """Compile and time a step, announce the run, and return its pace and its log."""
    left_s = time_left_s(run.settings, run.elapsed_s, started_at)
    step_s = run.compile(compiles(run.settings, run.plan.model, run.plan.batch_size, run.device, run.dtype, left_s))
    n_forward = math.ceil(len(run.validation) / process_group.world_size()) * (2 if run.average.is_on else 1)
    pace = Pace(
        run.settings, run.plan.recipe, run.batches, stop,
        first_step=run.step, elapsed_s=run.elapsed_s, started_at=started_at, step_s=sum(step_s.values()),
        report_s=n_forward * step_s["forward"] / run.grad_accum_steps,
    )  # fmt: skip
    require_disk_space(run)
    stop.exits_at_once = False  # from here on there is a step to finish
    announce(run, pace.n_steps, step_s)
    name = run.settings.logger if is_main_process() else "none"
    logger = open_logger(name, run.output_dir, run.step, dataclasses.asdict(run.settings))
    log = RunLog(
        run.output_dir, run.step, pace.n_steps, run.batches.tokens_per_step, pace.elapsed_before_s, logger,
        is_main_process(),
    )  # fmt: skip
    pace.start_clock()
    return pace, log


@main_process
def check_settings(config: PretrainingConfig) -> Path:
    """Check the settings and return the output folder, without creating it. Raises UserError where they conflict."""
    folder = check_output_dir(config.output_dir, config.resume)
    check_training_settings(config, process_group.world_size())
    if config.model_size == "auto" and config.budget_minutes is None:
        raise UserError("--model_size auto needs --budget_minutes; or name a size")
    if config.init_from:
        given = [name for name in DIMENSIONS if name != "context_length" and getattr(config, name) is not None]
        given += ["model_size"] if config.model_size is not None else []
        if given:
            raise UserError(
                f"--{given[0]} is for a new model, not for that of --init_from {config.init_from}; leave it out"
            )
        if not checkpoints.find_checkpoints(folder):
            huggingface.read_dimensions(config.init_from)
    import_logger(config.logger, folder)
    return folder


def open_token_folder(config: PretrainingConfig, output_dir: Path, tokenizer: Tokenizer, locks: Locks) -> TokenFolder:
    """Find or make the token shards of the run. Raises UserError."""
    folder = token_folder_path(config.data_dir, output_dir, config.use_pretokenized, config.pretokenized_dir)
    manifest = prepare_tokens(
        config.data_dir, folder, tokenizer, config.val_fraction, config.accept_problems, locks,
        is_shared=config.use_pretokenized,
    )  # fmt: skip
    return TokenFolder(folder, manifest)


def model_sizes(config: PretrainingConfig, vocab_size: int, state: Mapping[str, Any]) -> dict[str, GPTConfig]:
    """Return the model configs to choose from, by name: one, unless the budget decides the size. Raises UserError."""
    try:
        if config.model_size != "auto":
            name = config.model_size or ("that of --init_from" if config.init_from else "124M")
            return {name: model_config(config, name, vocab_size, state)}
        if not state:
            return {name: model_config(config, name, vocab_size, state) for name in BUDGET_PRESETS}
        return {"auto": GPTConfig(**state["identity"]["model"])}  # as the run chose it when it began
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the newest checkpoint is damaged ({error!r}); remove it to resume from an older one")


def model_config(config: PretrainingConfig, size: str, vocab_size: int, state: Mapping[str, Any]) -> GPTConfig:
    """Return the config of a preset or of --init_from, changed as the command line says. Raises UserError.

    A run that resumes has the dimensions of --init_from in its state.
    """
    given = {name: getattr(config, name) for name in DIMENSIONS if getattr(config, name) is not None}
    known = as_dict(as_dict(state.get("identity")).get("model"))
    drops_attention = bool(known) and known.get("drop_attention", True)  # before 0.2.0 all did
    if config.init_from:
        dimensions = known or main_process(huggingface.read_dimensions)(config.init_from)
        if given.get("context_length", 0) > dimensions["context_length"]:
            raise UserError(
                f"--context_length {config.context_length} is more than the {dimensions['context_length']} of --init_from"
            )
    elif config.qkv_bias and config.arch != "gpt2":
        raise UserError("--qkv_bias needs --arch gpt2; a modern model has no biases")
    else:
        dimensions = {"arch": "modern", **PRESETS[size]}
    try:
        return GPTConfig(**dimensions | given | {"vocab_size": vocab_size, "drop_attention": drops_attention})
    except (ValueError, TypeError) as error:
        raise UserError(str(error))


def build_model(
    config: PretrainingConfig,
    plan: Plan,
    batches: TrainingBatches,
    is_new: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> GPTModel:
    """Build the model with its initial weights, the same in all processes; with FSDP, shard it over them."""
    torch.manual_seed(config.seed)
    model = quicken(GPTModel(plan.model).to(device))
    if is_new and config.init_from:
        main_process(huggingface.load_weights)(config.init_from, model)
    elif is_new:
        initialize_from_bigrams(model, batches.tokens, config.bigram_steps, config.seed)
    process_group.broadcast_parameters(model.parameters())
    process_group.seed_rank(config.seed, step=0)
    if config.activation_checkpointing:
        checkpoint_activations(model.trf_blocks)
    if config.parallel == "fsdp":
        fsdp.shard_model(model, model.trf_blocks, device, dtype)
    return model


def launch(config: PretrainingConfig) -> None:
    """Join the other processes, if there are any, and call main; with --auto_batch, restart when memory runs out."""
    started_at = time.monotonic() - time.process_time()  # so that the imports count too
    stop = StopSignals()
    try:
        with (
            process_group.process_group(config.parallel, config.hang_timeout_s),
            oom_as_user_error(config.batch_size or BATCH_SIZE, config.grad_accum_steps or 1),
        ):
            run_chain(config, main, started_at, stop)
    except process_group.ProcessLost as error:
        print(f"error: {error}; run the same command to resume from the newest checkpoint", file=sys.stderr)
        raise SystemExit(EXIT_STOPPED)
    except BatchTooLarge as error:
        if not config.auto_batch or not error.flags:
            raise
        print(f"warning: {error}; restarting with these", file=sys.stderr)
        restart(error)


if __name__ == "__main__":
    process_group.silence_other_ranks()
    run_command(PretrainingConfig, launch)
