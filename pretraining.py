"""Pretrain a GPT on text shards: tokenize, train, evaluate, sample, save; go on where an earlier run stopped.

    python pretraining.py --data_dir dataset/001 --use_pretokenized --output_dir exp001/model_checkpoints

The story is main(), top to bottom. The model is gpt_model.py's; everything else it calls lives in gptkit/.
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from gpt_model import PRESETS, GPTConfig, GPTModel
from gptkit import checkpoints, devices
from gptkit.batches import TrainingBatches, check_size, validation_batches
from gptkit.command_line import UserError, existing_path, run_command, setting
from gptkit.compilation import compile_and_try, memory_told
from gptkit.evaluation import mean_loss
from gptkit.files import lock_folder, read_json, write_json
from gptkit.generation import generate
from gptkit.losses import next_token_loss
from gptkit.optimizers import (
    DEFAULT_LR,
    OptimizerName,
    build_optimizer,
    import_galore,
    load_optimizer_tensors,
    optimizer_tensors,
)
from gptkit.pretokenization import (
    SELF_CHECK_CHARS,
    describe_tokens,
    load_manifest,
    open_tokens,
    pretokenize,
    sample_works,
)
from gptkit.run_log import RunLog, draw_loss_curve, format_duration
from gptkit.schedules import learning_rate
from gptkit.tokenization import Tokenizer, TokenizerSettings, load_tokenizer
from gptkit.tokenizer_check import refuse_problems

RUN_FILE, RUN_FORMAT = "config.json", "gptkit-run"


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig(TokenizerSettings):
    """Pretrain a GPT on text shards. The same command line goes on where an earlier run stopped."""

    data_dir: str = setting(help="folder of text shards (dataset/prepare_aozora_jsonl.py makes it)")
    output_dir: str = setting("model_checkpoints", "folder for checkpoints, metrics.jsonl and loss_curve.png")
    use_pretokenized: bool = setting(False, "keep token shards in --pretokenized_dir and reuse them while they match")
    pretokenized_dir: str | None = setting(
        None, "with --use_pretokenized: folder of token shards (default: DATA_DIR_pretok)"
    )
    val_fraction: float = setting(
        0.01, "share of the works kept for validation, chosen by a hash", more_than=0, at_most=0.5
    )

    model_size: Literal["tiny", "mini", "124M", "355M", "774M", "1558M"] = setting("124M", "dimensions to start from")
    context_length: int | None = setting(None, "tokens the model sees at once (default: of --model_size)", at_least=1)
    emb_dim: int | None = setting(None, "width of the model (default: of --model_size)", at_least=1)
    n_layers: int | None = setting(None, "transformer blocks (default: of --model_size)", at_least=1)
    n_heads: int | None = setting(None, "attention heads (default: of --model_size)", at_least=1)
    drop_rate: float = setting(0.0, "dropout", at_least=0)
    qkv_bias: bool = setting(True, "biases in the attention's input projections")

    n_epochs: int = setting(1, "passes over the training tokens", at_least=1)
    max_steps: int | None = setting(
        None, "end the run, and its schedule, after at most these optimizer steps", at_least=1
    )
    max_minutes: float | None = setting(
        None, "save and stop after these minutes of training; the same command goes on", more_than=0
    )
    batch_size: int = setting(16, "sequences a micro-step", at_least=1)
    grad_accum_steps: int = setting(1, "micro-steps whose gradients are summed for one optimizer step", at_least=1)

    optimizer: OptimizerName = setting("adamw", "AdamW, or GaLore (which needs galore-torch)")
    lr: float | None = setting(None, "peak learning rate (default: 6e-4; with galore_adamw 5e-3)", more_than=0)
    min_lr: float | None = setting(
        None, "learning rate at the end of the cosine (default: a tenth of --lr)", at_least=0
    )
    warmup_steps: int | None = setting(
        None, "steps of linear warmup (default: 5 % of the run, at most 1000)", at_least=0
    )
    weight_decay: float = setting(0.1, "decay of matrices (adamw only)", at_least=0)
    grad_clip: float = setting(1.0, "gradients are scaled down to at most this norm", more_than=0)

    eval_freq: int = setting(100, "report losses every so many steps", at_least=1)
    eval_iter: int = setting(20, "batches of validation text at each report", at_least=1)
    print_sample_iter: int = setting(100, "print a sample every so many steps", at_least=1)
    start_context: str = setting("吾輩は", "how the samples begin")
    save_ckpt_freq: int = setting(500, "save a checkpoint every so many steps, and at the end", at_least=1)
    resume: Literal["auto", "none"] = setting(
        "auto", "auto: go on from the newest checkpoint; none: refuse if there is one"
    )

    seed: int = setting(
        123, "of the weights, the order of the data, dropout and samples", at_least=0, at_most=2**63 - 1
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "of matrix products (auto: bfloat16 on CUDA)")
    compile: bool = setting(False, "torch.compile the model; where that fails, go on without")


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # optimizer steps done
    best_val_loss: float = math.inf
    elapsed_s: float = 0.0


def main(config: PretrainingConfig) -> None:
    device, dtype = choose_device_and_dtype(config)
    output_dir = check_output_dir(config)
    tokenizer = load_tokenizer(config)
    model_config = choose_model_config(config, tokenizer.vocab_size)
    identity = run_identity(config, model_config, tokenizer)
    refuse_another_run(output_dir, identity)
    folder, manifest = find_tokens(config, tokenizer)
    identity["tokens"] = manifest["fingerprint"]
    refuse_another_run(output_dir, identity)
    tokens = open_tokens(folder, manifest)
    batches = TrainingBatches(
        tokens["train"], model_config.context_length, config.batch_size, config.grad_accum_steps, config.seed
    )
    check_size(batches, len(tokens["val"]))
    total_steps = min(config.n_epochs * batches.steps_per_epoch, config.max_steps or sys.maxsize)
    validation = validation_batches(tokens["val"], model_config.context_length, config.batch_size, config.eval_iter)

    torch.manual_seed(config.seed)
    model = GPTModel(model_config).to(device)
    rate_of = choose_schedule(config, total_steps)
    optimizer = build_optimizer(model, config.optimizer, rate_of(0), config.weight_decay)
    progress = resume(output_dir, model, optimizer, device)
    if progress.step >= total_steps:
        print(
            f"{output_dir}: the run is finished, step {progress.step} of {total_steps}; more: --n_epochs, --max_steps"
        )
        return
    hold(output_dir)
    forward, micro_step_s = compile_and_try(model, config.compile, batches.micro_batch(progress.step, 0), device, dtype)
    announce(config, model, batches, manifest, progress, total_steps, micro_step_s, device, dtype)

    log = RunLog(output_dir, progress.step, total_steps, batches.tokens_per_step, progress.elapsed_s)
    losses: list[torch.Tensor] = []  # of the steps since the last report
    for step in range(progress.step, total_steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_of(step)
        for micro_step in range(config.grad_accum_steps):
            inputs, targets = (ids.to(device) for ids in batches.micro_batch(step, micro_step))  # each (B, T)
            with devices.autocast(device, dtype):
                loss = next_token_loss(forward(inputs), targets) / config.grad_accum_steps
            loss.backward()
            losses.append(loss.detach())
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        n_done = step + 1
        log.step(n_done)
        is_last = n_done == total_steps or log.session_s > 60 * (config.max_minutes or math.inf)
        is_save = is_last or n_done % config.save_ckpt_freq == 0
        if is_save or n_done % config.eval_freq == 0:
            train_loss = torch.stack(losses).sum().item() * config.grad_accum_steps / len(losses)
            losses.clear()
            val_loss = mean_loss(model, forward, validation, device, dtype)
            values = dict(train_loss=train_loss, val_loss=val_loss, lr=rate_of(step), grad_norm=grad_norm.item())
            check_finite(values, n_done, output_dir)
            log.report(n_done, step // batches.steps_per_epoch + 1, **values)
        if n_done % config.print_sample_iter == 0 or n_done == total_steps:
            check_finite({"grad_norm": grad_norm.item()}, n_done, output_dir)
            log.say(f"sample after step {n_done}: {sample_text(config, model, tokenizer)}")
        if is_save:
            progress = Progress(n_done, min(progress.best_val_loss, val_loss), log.elapsed_s)
            state = {**dataclasses.asdict(progress), "val_loss": val_loss, "identity": identity}
            state["settings"] = dataclasses.asdict(config)
            training = optimizer_tensors(model, optimizer) | devices.random_states(device)
            checkpoints.save_checkpoint(output_dir, state, model.state_dict(), training, tokenizer.files())
            draw_loss_curve(log.metrics_path, log.curve_path)
        if is_last:
            break
    log.close()
    print(closing_words(output_dir, progress, total_steps))


def choose_device_and_dtype(config: PretrainingConfig) -> tuple[torch.device, torch.dtype]:
    """The device of the run and the type of its matrix products. Raises UserError."""
    try:
        device = devices.choose_device(config.device)
    except ValueError as error:
        raise UserError(str(error))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what float32 products are left
    return device, devices.choose_dtype(config.dtype, device)


def check_output_dir(config: PretrainingConfig) -> Path:
    """The output folder, which is not made before everything else is known to be right. Raises UserError."""
    folder = Path(config.output_dir)
    if not config.output_dir or (folder.exists() and not folder.is_dir()):
        raise UserError(f"--output_dir {config.output_dir!r} is no folder; name one")
    if config.pretokenized_dir and not config.use_pretokenized:
        raise UserError(
            f"--pretokenized_dir {config.pretokenized_dir} is given without --use_pretokenized; add that flag"
        )
    if config.optimizer == "galore_adamw":
        import_galore()
    if config.min_lr is not None and config.min_lr > choose_peak(config):
        raise UserError(f"--min_lr {config.min_lr} is above the peak, --lr {choose_peak(config)}; give a smaller one")
    try:
        config.start_context.encode()
    except UnicodeEncodeError:
        raise UserError(f"--start_context {config.start_context!a} is not valid text; give it in UTF-8")
    if config.resume == "none" and checkpoints.find_checkpoints(folder):
        raise UserError(f"--output_dir {folder} holds a run already; name another folder, or go on with --resume auto")
    written = [name for name in (RUN_FILE, "metrics.jsonl", "loss_curve.png") if (folder / name).exists()]
    try:
        ours = not written or read_json(folder / RUN_FILE)["format"] == RUN_FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"--output_dir {folder} holds something else ({written[0]}); name a new or empty folder")
    return folder


def hold(output_dir: Path) -> None:
    """Make the output folder and keep other runs out of it. Raises UserError where one is at work there."""
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock_folder(output_dir)
    except BlockingIOError as holder:
        raise UserError(
            f"--output_dir {output_dir} is in use by another run, {holder}; wait for it or name another folder"
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
        refuse_problems(tokenizer, sample_works(text, SELF_CHECK_CHARS), config.accept_problems)
        manifest = pretokenize(text, folder, tokenizer, config.val_fraction)
    return folder, manifest


def choose_model_config(config: PretrainingConfig, vocab_size: int) -> GPTConfig:
    """The preset, with what the command line says otherwise. Raises UserError."""
    named = ("context_length", "emb_dim", "n_layers", "n_heads")
    given = {name: getattr(config, name) for name in named if getattr(config, name) is not None}
    try:
        return GPTConfig(
            vocab_size, **PRESETS[config.model_size] | given, drop_rate=config.drop_rate, qkv_bias=config.qkv_bias
        )
    except ValueError as error:
        raise UserError(str(error))


def choose_peak(config: PretrainingConfig) -> float:
    return config.lr or DEFAULT_LR[config.optimizer]


def choose_schedule(config: PretrainingConfig, total_steps: int) -> Callable[[int], float]:
    """step (from 0) -> learning rate."""
    peak = choose_peak(config)
    final = peak / 10 if config.min_lr is None else config.min_lr
    wanted = min(total_steps // 20, 1000) if config.warmup_steps is None else config.warmup_steps
    warmup_steps = min(wanted, total_steps)
    return lambda step: learning_rate(step, peak=peak, final=final, warmup_steps=warmup_steps, total_steps=total_steps)


def run_identity(config: PretrainingConfig, model_config: GPTConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What must stay the same for a checkpoint to go on as one run; the fingerprint of the tokens comes to it."""
    named = ("optimizer", "batch_size", "grad_accum_steps", "seed", "val_fraction")
    identity = {"model": dataclasses.asdict(model_config), "tokenizer": tokenizer.fingerprint}
    return identity | {name: getattr(config, name) for name in named}


def refuse_another_run(output_dir: Path, identity: dict[str, Any]) -> None:
    """Raise UserError where the newest checkpoint belongs to a run of another identity."""
    found = checkpoints.find_checkpoints(output_dir)
    before = checkpoints.read_state(found[-1]).get("identity") if found else identity
    flags = {"model": "model (--model_size and the dimensions)", "tokens": "text (--data_dir)"}
    for name, value in identity.items():
        known = before.get(name) if isinstance(before, dict) else None
        if known != value:
            change = f" ({known}, now {value})" if name not in ("model", "tokenizer", "tokens") else ""
            raise UserError(
                f"{found[-1]} is from a run with another {flags.get(name, '--' + name)}{change};"
                " give the settings of that run, or another --output_dir"
            )


def resume(output_dir: Path, model: GPTModel, optimizer: torch.optim.Optimizer, device: torch.device) -> Progress:
    """Load the newest checkpoint, if there is one, into model, optimizer and random streams. Raises UserError."""
    found = checkpoints.find_checkpoints(output_dir)
    if not found:
        return Progress()
    state = checkpoints.read_state(found[-1])
    training = checkpoints.read_tensors(found[-1], checkpoints.TRAINING_FILE, torch.device("cpu"))
    weights = checkpoints.read_tensors(found[-1], checkpoints.MODEL_FILE, device)
    try:
        progress = Progress(int(state["step"]), float(state["best_val_loss"]), float(state["elapsed_s"]))
        model.load_state_dict(weights)
        load_optimizer_tensors(model, optimizer, training)
        devices.set_random_states(training, device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{found[-1]} is damaged ({reason}); remove it to go on from an older checkpoint, if there is one"
        )
    print(f"going on from {found[-1]}")
    return progress


def announce(
    config: PretrainingConfig,
    model: GPTModel,
    batches: TrainingBatches,
    manifest: dict[str, Any],
    progress: Progress,
    total_steps: int,
    micro_step_s: float,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Say what is about to happen, and write it to config.json."""
    left = total_steps - progress.step
    moments_bytes = sum(2 * p.numel() * p.element_size() for p in model.parameters())
    memory_bytes = devices.peak_memory_bytes(device) + moments_bytes
    estimate = format_duration(left * config.grad_accum_steps * micro_step_s)
    print(
        f"data: {describe_tokens(manifest)}\n"
        f"model: {model.n_parameters():,} parameters, {model.config}\n"
        f"device: {devices.describe_device(device)}, {dtype}, torch {torch.__version__}\n"
        f"steps: {left} to go of {total_steps}, {batches.steps_per_epoch} an epoch;"
        f" {batches.tokens_per_step:,} tokens a step = {config.batch_size} sequences x {model.config.context_length} tokens"
        f" x {config.grad_accum_steps} micro-steps x 1 process\n"
        f"memory: about {memory_bytes / 2**30:.2f} GiB (measured on one micro-step, and {config.optimizer}'s state)\n"
        f"time: about {estimate} for the steps, by the {micro_step_s:.2f} s of one micro-step; evaluation comes on top",
        flush=True,
    )
    run = {"format": RUN_FORMAT, "settings": dataclasses.asdict(config), "model": dataclasses.asdict(model.config)}
    write_json(Path(config.output_dir) / RUN_FILE, {**run, "tokens": describe_tokens(manifest)})


def check_finite(values: dict[str, float], step: int, output_dir: Path) -> None:
    """Stop a run that has broken down, before anything is saved of it. Raises UserError."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(
                f"{name} is {value} at step {step}; run the command again with a lower --lr or a higher --warmup_steps:"
                f" it goes on from the newest checkpoint in {output_dir}, if there is one"
            )


def sample_text(config: PretrainingConfig, model: GPTModel, tokenizer: Tokenizer) -> str:
    """What the model writes after --start_context; the same random numbers each time."""
    prompt = [tokenizer.end_of_text_id, *tokenizer.encode(config.start_context)]
    ids = generate(
        model,
        prompt,
        max_new_tokens=50,
        context_length=model.config.context_length,
        temperature=0.8,
        top_k=40,
        end_of_text_id=tokenizer.end_of_text_id,
        banned_ids=tokenizer.never_written,
        generator=torch.Generator().manual_seed(config.seed),
    )
    return config.start_context + tokenizer.decode_continuation(prompt, list(ids))


def closing_words(output_dir: Path, progress: Progress, total_steps: int) -> str:
    if progress.step < total_steps:
        return f"stopped at step {progress.step} of {total_steps} and saved in {output_dir}; the same command goes on"
    return (
        f"finished {total_steps} steps in {format_duration(progress.elapsed_s)}, best validation loss of a"
        f" checkpoint {progress.best_val_loss:.4f}; the loss curve is {output_dir / 'loss_curve.png'}"
    )


def run(config: PretrainingConfig) -> None:
    """main, with a lack of memory told in one line."""
    with memory_told(config.batch_size):
        main(config)


if __name__ == "__main__":
    run_command(PretrainingConfig, run)
