"""Pretrain a GPT on text shards: tokenize, train, evaluate, sample, save; go on where an earlier run stopped.

    python pretraining.py --data_dir dataset/001 --use_pretokenized --output_dir exp001/model_checkpoints

The story is main() and train(), top to bottom. The model is gpt_model.py's; everything else lives in gptkit/. Exit
codes: 0 finished (or --max_minutes are over), 2 a mistake, told in one line, 75 stopped by a signal, with all saved.
"""

import contextlib
import dataclasses
import functools
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from gpt_model import BUDGET_PRESETS, PRESETS, Arch, GPTConfig, GPTModel
from gptkit.base import devices
from gptkit.base.cli import UserError, first_line, format_duration, run_command, setting
from gptkit.base.files import as_dict, folder_lock, read_json, signature, write_json
from gptkit.base.paths import existing_path
from gptkit.data.batches import Batch, TrainingBatches, check_data_size, validation_batches
from gptkit.data.pretokenization import describe_tokens, load_manifest, open_tokens, pretokenize, token_files
from gptkit.data.text_shards import SELF_CHECK_CHARS, sample_documents, source_name
from gptkit.distributed import fsdp, process_group
from gptkit.evaluation.scoring import mean_loss
from gptkit.generation.generate import TextStream, stream_text
from gptkit.generation.sampling import SamplingSettings
from gptkit.interop import huggingface
from gptkit.text.check import raise_on_damage
from gptkit.text.tokenizer import (
    Tokenizer,
    TokenizerSettings,
    load_saved_tokenizer,
    load_tokenizer,
    with_model_tokenizer,
)
from gptkit.training import checkpoints, planning
from gptkit.training.bigram_init import MIN_TOKENS_PER_WORD, fit_to_bigrams
from gptkit.training.compilation import (
    BatchTooLarge,
    Loss,
    checkpoint_activations,
    compile_and_time,
    find_batch_size,
    oom_as_user_error,
    time_optimizer_step,
)
from gptkit.training.loggers import import_logger, open_logger
from gptkit.training.optimizers import (
    build_optimizer,
    import_galore,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from gptkit.training.planning import Plan
from gptkit.training.run_log import RunLog, draw_loss_curve
from gptkit.training.sessions import environment, record_session
from gptkit.training.settings import (
    MAX_ROLLBACKS,
    TrainingSettings,
    choose_intervals,
    choose_length,
    lr_multiplier,
    max_total_steps,
    peak_lr,
    time_left_s,
)
from gptkit.training.signals import STOPPED, StopSignals

DIMENSIONS = ("arch", "context_length", "emb_dim", "n_layers", "n_heads", "n_kv_heads", "qkv_bias")
RUN_FILE, RUN_FORMAT = "config.json", "gptkit-run"


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig(TokenizerSettings, TrainingSettings):
    """Pretrain a GPT on text shards. The same command line goes on where an earlier run stopped."""

    init_from: str | None = setting(
        None,
        "begin with the weights of this folder or repository of the hub: GPT-2's or Qwen3's form, tokenizer included",
    )
    arch: Arch | None = setting(None, "modern: in the form of Qwen3 (the default); gpt2: GPT-2's")
    model_size: Literal["auto", "nano", "micro", "tiny", "mini", "midi", "124M", "355M", "774M", "1558M"] | None = (
        setting(None, "dimensions to start from (default: 124M); auto: the best for --budget_minutes on this machine")
    )
    context_length: int | None = setting(None, "tokens the model sees at once (default: of --model_size)", at_least=1)
    emb_dim: int | None = setting(None, "width of the model (default: of --model_size)", at_least=1)
    n_layers: int | None = setting(None, "transformer blocks (default: of --model_size)", at_least=1)
    n_heads: int | None = setting(None, "attention heads (default: of --model_size)", at_least=1)
    n_kv_heads: int | None = setting(
        None, "modern: heads of keys and values, each for a group of heads (default: --n_heads)", at_least=1
    )
    drop_rate: float = setting(0.0, "dropout", at_least=0)
    qkv_bias: bool | None = setting(None, "gpt2: biases in the attention's input projections (default: yes)")


@dataclass
class Progress:
    """How far a run has come. A checkpoint holds all of it."""

    step: int = 0  # optimizer steps done
    best_val_loss: float | None = None  # nats a token, of the checkpoints saved
    elapsed_s: float = 0.0
    loss_sum: float = 0.0  # of the steps since the last report
    n_losses: int = 0
    n_skipped: int = 0  # steps without an update, for their loss or gradient was not finite
    n_skipped_in_a_row: int = 0
    n_rollbacks: int = 0  # to an earlier checkpoint, each halving the learning rate


@dataclass(frozen=True)
class Run:
    """What a run works with."""

    config: "PretrainingConfig"
    output_dir: Path
    tokenizer: Tokenizer
    manifest: dict[str, Any]  # of the token shards
    files: list[Path]  # the token shards and their manifest,
    unchanged: list[Any]  # and their signature when the run began
    plan: Plan
    identity: dict[str, Any]
    batches: TrainingBatches
    validation: list[Batch]
    model: GPTModel
    optimizer: torch.optim.Optimizer
    device: torch.device
    dtype: torch.dtype


def main(config: PretrainingConfig, began: float, stop: StopSignals) -> None:
    """Set up, go on from the newest checkpoint or begin, and train, with the output folder held for this process."""
    output_dir = process_group.on_main(lambda: check_settings(config))
    device, dtype = choose_device_and_dtype(config)
    devices.keep_freed_memory(device)
    with hold(output_dir):
        checkpoint = process_group.on_main(lambda: checkpoints.newest_valid(output_dir))
        settings = with_model_tokenizer(config, config.init_from)
        if checkpoint and settings is not config:  # the folder that the run began with may be gone
            tokenizer = load_saved_tokenizer(checkpoint / checkpoints.TOKENIZER_DIR)
        else:
            tokenizer = load_tokenizer(settings)
        state = process_group.on_main(lambda: checkpoints.read_state(checkpoint) if checkpoint else {})
        identity = run_identity(config, tokenizer)
        refuse_another_run(checkpoint, state, identity)
        folder, manifest = process_group.on_main(lambda: find_tokens(config, tokenizer))
        files = token_files(folder, manifest)
        unchanged = signature(files)
        tokens = open_tokens(folder, manifest)
        n_tokens = len(tokens["train"])
        plan = process_group.on_main(
            lambda: choose_plan(config, tokenizer.vocab_size, n_tokens, state, began, device, dtype)
        )
        identity = identity | plan.identity() | {"tokens": manifest["fingerprint"]}
        refuse_another_run(checkpoint, state, identity)
        batches = TrainingBatches(
            tokens["train"], plan.model.context_length, **plan.batch, seed=config.seed, rank=process_group.rank()
        )
        check_data_size(batches, len(tokens["val"]))
        asked = config.batch_size or (16 if config.budget_minutes is None else plan.batch_size)  # by any processes
        validation = validation_batches(tokens["val"], plan.model.context_length, asked, config.eval_iter)
        with oom_as_user_error(plan.batch_size, plan.grad_accum_steps):
            model = build_model(config, plan, batches, checkpoint is None, device, dtype)
            optimizer = build_optimizer(
                model, config.optimizer, peak_lr(config), config.adam_lr, config.weight_decay, dtype
            )
            run = Run(
                config, output_dir, tokenizer, manifest, files, unchanged, plan, identity, batches, validation, model,
                optimizer, device, dtype,
            )  # fmt: skip
            progress = load(run, checkpoint) if checkpoint else Progress()
            is_late = process_group.on_main(lambda: time_left_s(config, progress, began) < planning.CLOSING_S)
            if progress.step >= max_total_steps(config, batches) or is_late:
                print(
                    f"{output_dir}: the run is finished, step {progress.step}; more: --n_epochs, --max_tokens,"
                    " --max_steps or --budget_minutes, as it was given"
                )
                return
            if checkpoint:
                print(f"going on from {checkpoint}")
                planning.warn_changed_settings(state.get("settings"), settings_of(run), progress.step)
                process_group.on_main(lambda: checkpoints.set_aside_newer(checkpoint))
            with contextlib.ExitStack() as session:
                end: dict[str, Any] = {}
                if process_group.is_main_process():
                    end = session.enter_context(
                        record_session(output_dir, progress.step, config, environment(device, dtype))
                    )
                train(run, progress, began, stop, end)


def train(run: Run, progress: Progress, began: float, stop: StopSignals, end: dict[str, Any]) -> None:
    """The steps from progress.step on, with reports, samples and checkpoints, to the end or to a wish to stop.

    How they ended comes into `end`.
    """
    config, model, optimizer = run.config, run.model, run.optimizer
    loss_of_batch, step_s = compile_and_measure(run, progress)
    total_steps = choose_length(config, run.batches, progress, began, sum(step_s.values()))
    n_steps = process_group.on_main(lambda: total_steps(progress.step))
    process_group.on_main(lambda: check_room(run))
    stop.at_once = False  # from here on there is a step to finish
    process_group.on_main(lambda: announce(run, progress, n_steps, step_s))
    every = choose_intervals(config, n_steps)
    before_s = progress.elapsed_s + (time.monotonic() - began if config.budget_minutes else 0)
    logger = open_logger(
        config.logger if process_group.is_main_process() else "none",
        run.output_dir,
        progress.step,
        dataclasses.asdict(config),
    )
    log = RunLog(
        run.output_dir,
        progress.step,
        n_steps,
        run.batches.tokens_per_step,
        before_s,
        logger,
        process_group.is_main_process(),
    )
    saver = checkpoints.BackgroundSaver(run.output_dir, config.keep_checkpoints, log.say)
    saved_at_s = log.session_s
    feed = run.batches.iterate_from(progress.step, run.device)
    batch = next(feed)
    while True:
        rate = lr_multiplier(config, progress.step, n_steps) / 2**progress.n_rollbacks
        set_learning_rate(optimizer, rate)
        step_loss = torch.zeros((), device=run.device)
        for micro_step in range(run.plan.grad_accum_steps):
            process_group.set_gradient_sync(loss_of_batch, is_last=micro_step == run.plan.grad_accum_steps - 1)
            with devices.autocast(run.device, run.dtype):
                loss = loss_of_batch(*batch) / run.plan.grad_accum_steps
            loss.backward()
            step_loss += loss.detach()
            batch = next(feed)  # read while the device computes
        grad_norm = fsdp.full_norm(torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip))
        train_loss, norm = process_group.all_reduce_mean(
            torch.stack((step_loss, grad_norm))
        ).tolist()  # waits for the device
        if count_step(progress, train_loss, norm, log):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        is_over = log.session_s > 60 * (config.max_minutes or math.inf)
        is_late = log.session_s - saved_at_s > 60 * config.save_every_minutes
        is_signalled, n_steps, is_over, is_late = process_group.sync_flags(
            stop.received is not None, total_steps(progress.step), is_over, is_late
        )
        log.step(progress.step, n_steps)
        is_end = progress.step >= n_steps
        is_stop = is_signalled or is_over
        is_save = is_end or progress.step % every["save"] == 0
        val_loss: float | None = None
        if (is_save or progress.step % every["report"] == 0) and progress.n_losses:
            refuse_changed_tokens(run)
            val_loss = mean_loss(model, loss_of_batch, run.validation, run.device, run.dtype)
            means = dict(train_loss=progress.loss_sum / progress.n_losses, val_loss=val_loss)
            if math.isfinite(val_loss):
                lr = optimizer.param_groups[0]["lr"]
                log.report(progress.step, run.batches.epoch_of(progress.step), **means, lr=lr, grad_norm=norm)
                progress.loss_sum, progress.n_losses = 0.0, 0
        if progress.n_skipped_in_a_row >= config.max_bad_steps or not math.isfinite(val_loss or 0.0):
            progress = go_back(run, progress, saver)
            log.roll_back(progress.step)
            feed = run.batches.iterate_from(progress.step, run.device)
            batch = next(feed)
            continue
        if is_end or (progress.step % every["sample"] == 0 and not is_stop):
            log.sample(progress.step, sample_text(run))
        if is_end or is_stop or ((is_save or is_late) and not progress.n_skipped_in_a_row):
            progress.elapsed_s, saved_at_s = log.elapsed_s, log.session_s
            save(run, progress, val_loss, saver, log)
        if is_end or is_stop:
            break
    saver.wait()
    log.close()
    if saver.failure:
        raise UserError(f"{saver.failure}; make room and run the same command: it goes on from the one before")
    end |= {"step": progress.step, "how": "finished" if is_end else "stopped", "reason": stop.received}
    if is_signalled and not is_end:
        stop.end(f"step {progress.step} of {n_steps} is saved in {run.output_dir}")
    print(closing_words(run.output_dir, progress, n_steps))


def count_step(progress: Progress, train_loss: float, norm: float, log: RunLog) -> bool:
    """Count a step that was computed; whether its gradient may be applied."""
    progress.step += 1
    if math.isfinite(train_loss) and math.isfinite(norm):
        progress.loss_sum += train_loss
        progress.n_losses += 1
        progress.n_skipped_in_a_row = 0
        return True
    progress.n_skipped += 1
    progress.n_skipped_in_a_row += 1
    log.say(
        f"warning: step {progress.step} is skipped, its loss is {train_loss} and its gradient's norm {norm}"
        f" ({progress.n_skipped} skipped so far, {progress.n_skipped_in_a_row} in a row)"
    )
    return False


def go_back(run: Run, progress: Progress, saver: checkpoints.BackgroundSaver) -> Progress:
    """Load the last good checkpoint, to go on with half of the learning rate. Raises UserError where that is over."""
    saver.wait()
    remedy = "run the same command with a lower --lr or a higher --warmup_steps"
    trouble = (
        f"the loss or its gradient is not finite, {progress.n_skipped_in_a_row} steps in a row, at step {progress.step}"
    )
    if run.config.on_divergence == "stop" or progress.n_rollbacks >= MAX_ROLLBACKS:
        raise UserError(
            f"{trouble}; {remedy}: it goes on from the newest checkpoint in {run.output_dir}, if there is one"
        )

    def last_good() -> Path:
        found = checkpoints.find_checkpoints(run.output_dir)
        good = [f for f in found if checkpoints.read_state_or_empty(f).get("n_skipped_in_a_row") == 0]
        if not good:
            raise UserError(
                f"{trouble}, and there is no checkpoint to go back to; {remedy}, or a smaller --save_ckpt_freq"
            )
        return checkpoints.first_valid(good[::-1])

    checkpoint = process_group.on_main(last_good)
    before = load(run, checkpoint)
    before.n_rollbacks, before.n_skipped = progress.n_rollbacks + 1, progress.n_skipped
    print(f"warning: {trouble}; going back to {checkpoint} with 1/{2**before.n_rollbacks} of the rate", flush=True)
    return before


def save(run: Run, progress: Progress, val_loss: float | None, saver: checkpoints.BackgroundSaver, log: RunLog) -> None:
    """Have a checkpoint of this moment written, and the loss curve drawn, beside the training."""
    if val_loss is not None:
        progress.best_val_loss = min(val_loss, progress.best_val_loss or math.inf)
    state = {**dataclasses.asdict(progress), "val_loss": val_loss, "identity": run.identity, "plan": run.plan.batch}
    state["settings"] = settings_of(run)
    keep = process_group.is_main_process()
    weights = fsdp.full_tensors(run.model.state_dict(), keep)
    training = fsdp.full_tensors(optimizer_tensors(run.model, run.optimizer), keep)
    training |= process_group.gather_rng_states(devices.get_rng_states(run.device))
    if keep:
        curve = functools.partial(draw_loss_curve, log.metrics_path, log.curve_path)
        saver.save(state, weights, training, run.tokenizer.files(), then=curve)


def settings_of(run: Run) -> dict[str, Any]:
    """What a checkpoint keeps for a later session to compare: the settings, with the precision that was chosen."""
    return dataclasses.asdict(run.config) | {"dtype": devices.dtype_name(run.dtype)}


def load(run: Run, checkpoint: Path) -> Progress:
    """Put a checkpoint into model, optimizer and random streams. Raises UserError."""
    state = process_group.on_main(lambda: checkpoints.read_state(checkpoint))
    training, weights = (
        process_group.broadcast_tensors(
            functools.partial(checkpoints.read_tensors, checkpoint, file, torch.device("cpu"))
        )
        for file in (checkpoints.TRAINING_FILE, checkpoints.MODEL_FILE)
    )
    try:
        progress = Progress(**{field.name: state[field.name] for field in dataclasses.fields(Progress)})
        counts = (
            progress.step,
            progress.n_losses,
            progress.n_skipped,
            progress.n_skipped_in_a_row,
            progress.n_rollbacks,
        )
        if not all(type(count) is int and 0 <= count < 2**53 for count in counts):
            raise ValueError("its counts are no counts")
        if not math.isfinite(progress.elapsed_s + progress.loss_sum + (progress.best_val_loss or 0.0)):
            raise ValueError("its sums are not finite")
        run.model.load_state_dict(fsdp.shard_tensors(weights, run.model.state_dict()))
        load_optimizer_tensors(run.model, run.optimizer, training)
        random_states = process_group.select_rng_states(training)
        if process_group.is_main_process() or random_states:
            devices.set_rng_states(random_states, run.device)
        else:  # there were fewer processes
            process_group.seed_rank(run.config.seed, progress.step)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if devices.is_out_of_memory(error):
            raise
        raise UserError(
            f"{checkpoint} is damaged ({first_line(error)}); remove it to go on from an older checkpoint, if there is one"
        )
    return progress


def refuse_changed_tokens(run: Run) -> None:
    """Raise UserError where the token shards are not those that the run began with."""
    try:
        changed = signature(run.files) != run.unchanged
    except OSError:
        changed = True
    if changed:
        raise UserError(
            f"the token shards in {run.files[0].parent} changed under the run; it goes on from its newest checkpoint by"
            " the same command, once they are what they were"
        )


def choose_device_and_dtype(config: PretrainingConfig) -> tuple[torch.device, torch.dtype]:
    """The device of the run and the type of its matrix products. Raises UserError."""
    device = devices.choose_device(process_group.device_of_rank(config.device))
    if device.type == "cuda" and process_group.world_size() > 1:
        torch.cuda.set_device(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what float32 products are left
    # The processes of a run may be on unlike devices, and must round alike.
    return device, process_group.on_main(lambda: devices.choose_dtype(config.dtype, device, training=True))


def check_settings(config: PretrainingConfig) -> Path:
    """The output folder, which is not made yet. Raises UserError where settings do not go together."""
    folder = Path(config.output_dir)
    if not config.output_dir or (folder.exists() and not folder.is_dir()):
        raise UserError(f"--output_dir {config.output_dir!r} is no folder; name one")
    if config.pretokenized_dir and not config.use_pretokenized:
        raise UserError(
            f"--pretokenized_dir {config.pretokenized_dir} is given without --use_pretokenized; add that flag"
        )
    if config.optimizer == "galore_adamw":
        import_galore()
    if config.init_from:
        refuse_dimensions(config)
        if not checkpoints.find_checkpoints(folder):
            huggingface.read_dimensions(config.init_from)
    import_logger(config.logger, folder)
    if config.optimizer == "galore_adamw" and config.parallel == "fsdp":
        raise UserError("--optimizer galore_adamw needs whole matrices; give --parallel ddp, or muon or adamw")
    if config.auto_batch and process_group.world_size() > 1:
        raise UserError("--auto_batch is for one process; give --batch_size and --grad_accum_steps that fit")
    if config.model_size == "auto" and config.budget_minutes is None:
        raise UserError("--model_size auto needs --budget_minutes; or name a size")
    if config.max_minutes and config.budget_minutes:
        raise UserError("--max_minutes stops a run that --budget_minutes ends; give one of them")
    if config.min_lr is not None and config.min_lr > peak_lr(config):
        raise UserError(f"--min_lr {config.min_lr} is above the peak, --lr {peak_lr(config)}; give a smaller one")
    try:
        config.start_context.encode()
    except UnicodeEncodeError:
        raise UserError(f"--start_context {config.start_context!a} is not valid text; give it in UTF-8")
    if config.resume == "none" and checkpoints.find_checkpoints(folder):
        raise UserError(f"--output_dir {folder} holds a run already; name another folder, or go on with --resume auto")
    written = [
        name for name in (RUN_FILE, "metrics.jsonl", "samples.jsonl", "loss_curve.png") if (folder / name).exists()
    ]
    try:
        ours = not written or read_json(folder / RUN_FILE)["format"] == RUN_FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"--output_dir {folder} holds something else ({written[0]}); name a new or empty folder")
    return folder


@contextlib.contextmanager
def hold(output_dir: Path) -> Iterator[None]:
    """Make the output folder and keep other runs out of it. Raises UserError where one is at work there."""
    with contextlib.ExitStack() as stack:
        try:
            if process_group.is_main_process():
                stack.enter_context(folder_lock(output_dir))
        except BlockingIOError as holder:
            raise UserError(
                f"--output_dir {output_dir} is in use by another run, {holder}; wait for it or name another folder"
            )
        yield


def refuse_dimensions(config: PretrainingConfig) -> None:
    """Raise UserError where a flag asks for another model than --init_from has."""
    given = [name for name in DIMENSIONS if name != "context_length" and getattr(config, name) is not None]
    given += ["model_size"] if config.model_size is not None else []
    if given:
        raise UserError(
            f"--{given[0]} goes with a new model, and --init_from {config.init_from} has its own; leave it out"
        )


def find_tokens(config: PretrainingConfig, tokenizer: Tokenizer) -> tuple[Path, dict[str, Any]]:
    """The folder of token shards, made or made anew where it does not match, and its manifest. Raises UserError."""
    folder = Path(config.output_dir) / "tokens"
    if config.use_pretokenized:
        data_dir = Path(config.data_dir) if Path(config.data_dir).name else Path(config.data_dir).resolve()
        folder = Path(config.pretokenized_dir or data_dir.with_name(f"{data_dir.name}_pretok"))
    if config.use_pretokenized and not Path(config.data_dir).exists() and (folder / "manifest.json").exists():
        manifest = load_manifest(folder, tokenizer)
        print(
            f"--data_dir {config.data_dir} is not here: the token shards in {folder} are taken as they are",
            file=sys.stderr,
        )
    else:
        text = existing_path(config.data_dir, "--data_dir")
        raise_on_damage(tokenizer, sample_documents(text, SELF_CHECK_CHARS), config.accept_problems)
        manifest = pretokenize(text, folder, tokenizer, config.val_fraction)
    return folder, manifest


def choose_plan(
    config: PretrainingConfig,
    vocab_size: int,
    n_training_tokens: int,
    state: dict[str, Any],
    began: float,
    device: torch.device,
    dtype: torch.dtype,
) -> Plan:
    """What the command line says; what it leaves to the budget, by measuring this machine. Raises UserError.

    A run that goes on keeps what it chose when it began.
    """
    auto = config.model_size == "auto"
    size = config.model_size or ("the one of --init_from" if config.init_from else "124M")
    n_processes = process_group.world_size()
    if config.budget_minutes is None:
        model = choose_model_config(config, size, vocab_size, state)
        plan = Plan(model, config.batch_size or 16, config.grad_accum_steps or 1, n_processes)
        return planning.resume_plan(plan, config, state)
    if state:
        try:
            known = state["identity"]["model"]
            model = GPTConfig(**known) if auto else choose_model_config(config, size, vocab_size, state)
            before = Plan(model, **state["plan"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the newest checkpoint is damaged ({error!r}); remove it to go on from an older one")
        given = config.batch_size or before.batch_size, config.grad_accum_steps or before.grad_accum_steps
        return planning.resume_plan(Plan(before.model, *given, n_processes), config, state)
    left_s = 60 * config.budget_minutes - (time.monotonic() - began)
    if left_s < 5:
        raise UserError(
            f"--budget_minutes {config.budget_minutes} are over before training begins; give more, or make the tokens"
            " before (pretokenize.py)"
        )
    return planning.plan_for_budget(
        left_s,
        {name: choose_model_config(config, name, vocab_size, state) for name in (BUDGET_PRESETS if auto else (size,))},
        lambda model: measure_tokens_per_s(config, model, device, dtype),
        n_training_tokens,
        device.type,
        config.batch_size,
        config.grad_accum_steps,
        n_processes,
    )


def measure_tokens_per_s(
    config: PretrainingConfig, model_config: GPTConfig, device: torch.device, dtype: torch.dtype
) -> float:
    """What this machine trains, by a few steps of such a model on random tokens. Changes no random stream."""
    states = devices.get_rng_states(device)
    model = GPTModel(model_config).to(device)
    optimizer = build_optimizer(model, config.optimizer, peak_lr(config), config.adam_lr, config.weight_decay, dtype)
    n_sequences = max((1024 if device.type == "cpu" else 16_384) // model_config.context_length, 1)
    ids = torch.randint(model_config.vocab_size, (n_sequences, model_config.context_length + 1))
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    _, step_s = compile_and_time(model, model_config.vocab_size, False, batch, device, dtype)
    seconds = sum(step_s.values()) + time_optimizer_step(model, optimizer, device)
    devices.set_rng_states(states, device)
    return batch[0].numel() / seconds


def choose_model_config(config: PretrainingConfig, size: str, vocab_size: int, state: Mapping[str, Any]) -> GPTConfig:
    """The preset, or the dimensions of --init_from, with what the command line says otherwise. Raises UserError.

    Those of --init_from stand in the state of a run that goes on.
    """
    given = {name: getattr(config, name) for name in DIMENSIONS if getattr(config, name) is not None}
    if config.init_from:
        known = as_dict(as_dict(state.get("identity")).get("model"))
        dimensions = known or huggingface.read_dimensions(config.init_from)
        if given.get("context_length", 0) > dimensions["context_length"]:
            raise UserError(
                f"--context_length {config.context_length} is more than the {dimensions['context_length']} of --init_from"
            )
    elif config.qkv_bias and config.arch != "gpt2":
        raise UserError("--qkv_bias needs --arch gpt2; a modern model has no biases")
    else:
        dimensions = {"arch": "modern", **PRESETS[size]}
    try:
        return GPTConfig(**dimensions | given | {"vocab_size": vocab_size, "drop_rate": config.drop_rate})
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
    """The model of the run with its first weights, the same in all processes, which may share its parts."""
    torch.manual_seed(config.seed)
    model = GPTModel(plan.model).to(device)
    if is_new and config.init_from:
        process_group.on_main(lambda: huggingface.load_weights(str(config.init_from), model))
    elif is_new:
        process_group.on_main(lambda: start_from_bigrams(config, model, batches))
    process_group.broadcast_parameters(model.parameters())
    process_group.seed_rank(config.seed, step=0)
    if config.activation_checkpointing:
        checkpoint_activations(model.trf_blocks)
    if config.parallel == "fsdp":
        fsdp.shard_model(model, model.trf_blocks, device, dtype)
    return model


def start_from_bigrams(config: PretrainingConfig, model: GPTModel, batches: TrainingBatches) -> None:
    """Fit embedding and head of a new modern model to the counts of token pairs."""
    known = len(batches.tokens) >= MIN_TOKENS_PER_WORD * model.config.vocab_size
    n_steps = (50 if known else 0) if config.bigram_steps is None else config.bigram_steps
    if not model.config.is_tied and n_steps:
        start = time.monotonic()
        weights = model.tok_emb.weight, model.head_weight
        loss = fit_to_bigrams(batches.tokens, *weights, model.config.vocab_size, n_steps, config.seed)
        print(f"start: fitted to token pairs, {loss:.3f} nats a token, {time.monotonic() - start:.1f} s", flush=True)


def compile_and_measure(run: Run, progress: Progress) -> tuple[Loss, dict[str, float]]:
    """The loss of a batch by the model, compiled or not, and the seconds of each part of an optimizer step.

    Raises TooLarge, with a batch that was seen to fit, where memory runs out.
    """
    model, plan, device, dtype = run.model, run.plan, run.device, run.dtype
    start = time.monotonic()
    batch = run.batches.micro_batch(progress.step, 0)
    reading_s = time.monotonic() - start
    compile = device.type == "cuda" if run.config.compile is None else run.config.compile
    vocab_size = model.config.vocab_size
    try:
        loss_of_batch, parts_s = compile_and_time(model, vocab_size, compile, batch, device, dtype)
    except (RuntimeError, MemoryError) as error:
        if not devices.is_out_of_memory(error) or process_group.world_size() > 1:
            raise
        loss_of_batch = None
    if loss_of_batch is None:  # outside the handler, which would hold on to what did not fit
        fits = find_batch_size(
            lambda n: compile_and_time(model, vocab_size, False, (batch[0][:n], batch[1][:n]), device, dtype),
            plan.batch_size,
        )
        raise BatchTooLarge(plan.batch_size, plan.grad_accum_steps, fits, fits=True)
    parts_s = {"reading": reading_s, **parts_s}
    step_s = {name: plan.grad_accum_steps * seconds for name, seconds in parts_s.items()}
    if progress.step == 0 and run.config.optimizer != "galore_adamw":
        step_s["optimizer"] = time_optimizer_step(model, run.optimizer, device)
    return loss_of_batch if run.config.parallel == "fsdp" else process_group.wrap_ddp(
        model, loss_of_batch, device
    ), step_s


def run_identity(config: PretrainingConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What must stay the same for a checkpoint to go on as one run; the plan and the tokens' fingerprint come to it."""
    named = ("optimizer", "seed", "val_fraction", "init_from")
    return {"tokenizer": tokenizer.fingerprint} | {name: getattr(config, name) for name in named}


def refuse_another_run(checkpoint: Path | None, state: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise UserError where the checkpoint to go on from belongs to a run of another identity."""
    known = state.get("identity")
    if isinstance(known, dict) and isinstance(known.get("model"), dict):
        with contextlib.suppress(TypeError, ValueError):  # an older version had fewer dimensions
            known = known | {"model": dataclasses.asdict(GPTConfig(**known["model"]))}
    different = planning.find_difference(known, identity) if checkpoint else None
    if different:
        raise UserError(
            f"{checkpoint} is from a run with another {different}; give the settings of that run, or another --output_dir"
        )


def moments_bytes(run: Run) -> int:
    """What the optimizer's state will take: two moments of each parameter, with muon at least one."""
    n_moments = 1 if run.config.optimizer == "muon" else 2
    return sum(n_moments * p.numel() * p.element_size() for p in run.model.parameters())


def check_room(run: Run) -> None:
    """Raise UserError where the disk has no room for a checkpoint."""
    needed = sum(tensor.nbytes for tensor in run.model.state_dict().values()) + moments_bytes(run)
    free = shutil.disk_usage(run.output_dir).free
    if free < needed:
        raise UserError(
            f"--output_dir {run.output_dir} has {free / 2**20:,.0f} MiB free and a checkpoint takes about"
            f" {needed / 2**20:,.0f} MiB (and during a save one more than --keep_checkpoints and the best are there);"
            " make room, or name a folder on another disk"
        )


def announce(run: Run, progress: Progress, n_steps: int, step_s: dict[str, float]) -> None:
    """Say what is about to happen, and write it to config.json."""
    left = n_steps - progress.step
    n_parts = run.plan.n_processes if run.config.parallel == "fsdp" else 1
    memory_bytes = devices.peak_memory_bytes(run.device) + moments_bytes(run) / n_parts
    total_s = sum(step_s.values())
    shares = ", ".join(f"{name} {seconds / total_s:.1%}" for name, seconds in step_s.items())
    tokens_per_s = run.batches.tokens_per_step / total_s
    mfu = devices.format_mfu(
        planning.flops_per_token(run.model.config) * tokens_per_s / run.plan.n_processes, run.device, run.dtype
    )
    processes = (
        "1 process" if run.plan.n_processes == 1 else f"{run.plan.n_processes} processes ({run.config.parallel})"
    )
    print(
        f"data: {describe_tokens(run.manifest)}\n"
        f"model: {run.model.n_parameters():,} parameters, {run.model.config}\n"
        f"device: {devices.describe_device(run.device)}, {run.dtype}, torch {torch.__version__}\n"
        f"steps: {left} to go of {n_steps}, {run.batches.steps_per_epoch} an epoch;"
        f" {run.batches.tokens_per_step:,} tokens a step = {run.plan.batch_size} sequences x {run.model.config.context_length} tokens"
        f" x {run.plan.grad_accum_steps} micro-steps x {processes}\n"
        f"memory: about {memory_bytes / 2**30:.2f} GiB (measured on one micro-step, and {run.config.optimizer}'s state)\n"
        f"a step: {total_s:.3f} s ({shares}), {tokens_per_s:,.0f} tokens/s, MFU {mfu}\n"
        f"time: about {format_duration(left * total_s)} for the steps; evaluation comes on top",
        flush=True,
    )
    about: dict[str, Any] = {
        "format": RUN_FORMAT,
        "settings": dataclasses.asdict(run.config),
        "model": dataclasses.asdict(run.model.config),
    }
    about |= {"text": source_name(Path(run.config.data_dir)), "tokens": describe_tokens(run.manifest)}
    write_json(run.output_dir / RUN_FILE, about)


def sample_text(run: Run) -> str:
    """What the model writes after --start_context; the same random numbers each time."""
    tokenizer, start = run.tokenizer, run.config.start_context
    text = TextStream(tokenizer, [tokenizer.end_of_text_id, *tokenizer.encode(start)], run.config.seed)
    how = SamplingSettings(temperature=0.8, top_k=40)
    with fsdp.unsharded(run.model, run.dtype):
        written = stream_text(run.model, [text], how, 50, run.model.config.context_length)
        return start + "".join(piece for _, piece in written)


def closing_words(output_dir: Path, progress: Progress, n_steps: int) -> str:
    if progress.step < n_steps:
        return f"stopped at step {progress.step} of {n_steps} and saved in {output_dir}; the same command goes on"
    best = "unknown" if progress.best_val_loss is None else f"{progress.best_val_loss:.4f}"
    return (
        f"finished {n_steps} steps in {format_duration(progress.elapsed_s)}, best validation loss of a"
        f" checkpoint {best}; the loss curve is {output_dir / 'loss_curve.png'}"
    )


def run(config: PretrainingConfig) -> None:
    """main; where memory ran out and --auto_batch is given, this process begins anew with a smaller batch."""
    began = time.monotonic() - time.process_time()  # imports took that long
    stop = StopSignals()
    try:
        with (
            process_group.process_group(config.parallel, config.hang_timeout_s),
            oom_as_user_error(config.batch_size or 16, config.grad_accum_steps or 1),
        ):
            main(config, began, stop)
    except process_group.ProcessLost as error:
        print(f"error: {error}; the same command goes on from the newest checkpoint", file=sys.stderr)
        raise SystemExit(STOPPED)
    except BatchTooLarge as error:
        if not config.auto_batch or not error.smaller_batch:
            raise
        print(f"warning: {error}; trying that", file=sys.stderr)
        n_sequences = error.batch_size * error.grad_accum_steps
        smaller = {"batch_size": error.smaller_batch, "grad_accum_steps": n_sequences // error.smaller_batch}
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [*sys.orig_argv, *(str(part) for k, v in smaller.items() for part in (f"--{k}", v))])


if __name__ == "__main__":
    process_group.silence_other_ranks()
    run_command(PretrainingConfig, run)
