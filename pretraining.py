"""Pretrain a GPT on text shards: tokenize, train, evaluate, sample, save; go on where an earlier run stopped.

    python pretraining.py --data_dir dataset/001 --use_pretokenized --output_dir exp001/model_checkpoints

The story is main(), top to bottom. The model is gpt_model.py's; everything else it calls lives in gptkit/.
"""

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from gpt_model import LADDER, PRESETS, Arch, GPTConfig, GPTModel
from gptkit import budget, checkpoints, devices
from gptkit.batches import TrainingBatches, check_size, validation_batches
from gptkit.bigrams import MIN_TOKENS_PER_WORD, fit_to_bigrams
from gptkit.command_line import UserError, existing_path, run_command, setting
from gptkit.compilation import Loss, compile_and_try, memory_told, optimizer_step_s
from gptkit.evaluation import mean_loss
from gptkit.files import lock_folder, read_json, write_json
from gptkit.generation import generate
from gptkit.optimizers import (
    DEFAULT_LR,
    OptimizerName,
    build_optimizer,
    import_galore,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
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
from gptkit.token_shards import TokenStream
from gptkit.tokenization import Tokenizer, TokenizerSettings, load_tokenizer
from gptkit.tokenizer_check import refuse_problems

RUN_FILE, RUN_FORMAT = "config.json", "gptkit-run"
MICRO_STEP_TOKENS = {"cpu": 4096, "cuda": 32_768}  # with a budget: the most tokens in one pass through the model


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

    arch: Arch = setting("modern", "modern: in the form of Qwen3; gpt2: GPT-2's")
    model_size: Literal["auto", "nano", "micro", "tiny", "mini", "124M", "355M", "774M", "1558M"] = setting(
        "124M", "dimensions to start from; auto: the best for --budget_minutes on this machine"
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
        None, "sequences a micro-step (default: 16; with a budget what suits its length)", at_least=1
    )
    grad_accum_steps: int | None = setting(
        None, "micro-steps whose gradients are summed for one optimizer step (default: 1, as --batch_size)", at_least=1
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
    save_ckpt_freq: int | None = setting(
        None, "save a checkpoint every so many steps, and at the end (default: 500; with a budget 4 times)", at_least=1
    )
    resume: Literal["auto", "none"] = setting(
        "auto", "auto: go on from the newest checkpoint; none: refuse if there is one"
    )

    seed: int = setting(
        123, "of the weights, the order of the data, dropout and samples", at_least=0, at_most=2**63 - 1
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "of matrix products (auto: bfloat16 on CUDA)")
    compile: bool | None = setting(None, "torch.compile the model (default: on CUDA); where that fails, go on without")


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # optimizer steps done
    best_val_loss: float = math.inf
    elapsed_s: float = 0.0


def main(config: PretrainingConfig, began: float) -> None:
    device, dtype = choose_device_and_dtype(config)
    devices.keep_freed_memory(device)
    output_dir = check_output_dir(config)
    tokenizer = load_tokenizer(config)
    refuse_another_run(output_dir, run_identity(config, tokenizer))
    folder, manifest = find_tokens(config, tokenizer)
    tokens = open_tokens(folder, manifest)
    plan = choose_plan(config, tokenizer.vocab_size, len(tokens["train"]), began, device, dtype)
    identity = run_identity(config, tokenizer) | plan.identity() | {"tokens": manifest["fingerprint"]}
    refuse_another_run(output_dir, identity)
    batches = TrainingBatches(
        tokens["train"], plan.model.context_length, plan.batch_size, plan.grad_accum_steps, config.seed
    )
    check_size(batches, len(tokens["val"]))
    validation = validation_batches(tokens["val"], plan.model.context_length, plan.batch_size, config.eval_iter)

    torch.manual_seed(config.seed)
    model = GPTModel(plan.model).to(device)
    optimizer = build_optimizer(model, config.optimizer, choose_peak(config), config.adam_lr, config.weight_decay)
    progress = resume(output_dir, model, optimizer, device)
    if is_finished(config, batches, progress, began):
        print(
            f"{output_dir}: the run is finished, step {progress.step}; more: --n_epochs, --max_tokens, --max_steps"
            " or --budget_minutes, as it was given"
        )
        return
    hold(output_dir)
    if progress.step == 0:
        start_from_bigrams(config, model, tokens["train"])
    loss_of_batch, step_s = compile_and_measure(config, model, optimizer, batches, progress, device, dtype)
    total_steps = choose_length(config, batches, progress, began, sum(step_s.values()))
    announce(config, plan, model, batches, manifest, progress, total_steps(progress.step), step_s, device, dtype)

    n_steps = total_steps(progress.step)
    before_s = progress.elapsed_s + (time.monotonic() - began if config.budget_minutes else 0)
    log = RunLog(output_dir, progress.step, n_steps, batches.tokens_per_step, before_s)
    every = choose_intervals(config, n_steps)
    losses: list[torch.Tensor] = []  # of the steps since the last report
    for step in itertools.count(progress.step):
        set_learning_rate(optimizer, choose_rate(config, step, n_steps))
        for micro_step in range(plan.grad_accum_steps):
            inputs, targets = (ids.to(device, non_blocking=True) for ids in batches.micro_batch(step, micro_step))
            with devices.autocast(device, dtype):
                loss = loss_of_batch(inputs, targets) / plan.grad_accum_steps
            loss.backward()
            losses.append(loss.detach())
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        n_done = step + 1
        n_steps = total_steps(n_done)
        log.step(n_done, n_steps)
        is_last = n_done >= n_steps or log.session_s > 60 * (config.max_minutes or math.inf)
        is_save = is_last or n_done % every["save"] == 0
        if is_save or n_done % every["report"] == 0:
            train_loss = torch.stack(losses).sum().item() * plan.grad_accum_steps / len(losses)
            losses.clear()
            val_loss = mean_loss(model, loss_of_batch, validation, device, dtype)
            lr = optimizer.param_groups[0]["lr"]
            values = dict(train_loss=train_loss, val_loss=val_loss, lr=lr, grad_norm=grad_norm.item())
            check_finite(values, n_done, output_dir)
            log.report(n_done, step // batches.steps_per_epoch + 1, **values)
        if n_done % every["sample"] == 0 or n_done >= n_steps:
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
    print(closing_words(output_dir, progress, n_steps))


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
    if config.model_size == "auto" and config.budget_minutes is None:
        raise UserError("--model_size auto needs --budget_minutes; or name a size")
    if config.max_minutes and config.budget_minutes:
        raise UserError("--max_minutes stops a run that --budget_minutes ends; give one of them")
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


@dataclass(frozen=True)
class Plan:
    """The model of a run and its batch."""

    model: GPTConfig
    batch_size: int
    grad_accum_steps: int

    def identity(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def choose_plan(
    config: PretrainingConfig,
    vocab_size: int,
    n_training_tokens: int,
    began: float,
    device: torch.device,
    dtype: torch.dtype,
) -> Plan:
    """What the command line says; what it leaves to the budget, by measuring this machine. Raises UserError.

    A run that goes on keeps what it chose when it began.
    """
    auto = config.model_size == "auto"
    if config.budget_minutes is None:
        model = choose_model_config(config, config.model_size, vocab_size)
        return Plan(model, config.batch_size or 16, config.grad_accum_steps or 1)
    found = checkpoints.find_checkpoints(Path(config.output_dir))
    if found:
        before = checkpoints.read_state(found[-1]).get("identity", {})
        try:
            model = GPTConfig(**before["model"]) if auto else choose_model_config(config, config.model_size, vocab_size)
            accum = config.grad_accum_steps or int(before["grad_accum_steps"])
            return Plan(model, config.batch_size or int(before["batch_size"]), accum)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{found[-1]} is damaged ({error!r}); remove it to go on from an older checkpoint")
    left_s = 60 * config.budget_minutes - (time.monotonic() - began)
    if left_s < 5:
        raise UserError(
            f"--budget_minutes {config.budget_minutes} are over before training begins; give more, or make the tokens"
            " before (pretokenize.py)"
        )
    chosen = None
    for size in LADDER if auto else (config.model_size,):
        model = choose_model_config(config, size, vocab_size)
        tokens_per_s = measure_tokens_per_s(config, model, device, dtype)
        total_tokens = left_s * tokens_per_s
        n_passes, per_parameter = total_tokens / n_training_tokens, total_tokens / model.n_block_parameters
        print(
            f"{size}: {tokens_per_s:,.0f} tokens/s, so {total_tokens:,.0f} tokens in {format_duration(left_s)}:"
            f" {n_passes:.2f} passes over the text, {per_parameter:.1f} for each parameter of the blocks",
            flush=True,
        )
        if chosen and per_parameter < budget.TOKENS_PER_PARAMETER:
            break  # larger ones see still less
        chosen = size, model, total_tokens
    assert chosen
    size, model, total_tokens = chosen
    n_sequences = budget.sequences_per_step(total_tokens, model.context_length)
    at_once = max(MICRO_STEP_TOKENS["cuda" if device.type == "cuda" else "cpu"] // model.context_length, 1)
    batch_size = config.batch_size or min(n_sequences, at_once)
    plan = Plan(model, batch_size, config.grad_accum_steps or max(n_sequences // batch_size, 1))
    why = f"the largest with {budget.TOKENS_PER_PARAMETER:g} tokens a parameter" if auto else "as asked for"
    print(
        f"chosen: {size}, {why}; {plan.batch_size} x {plan.grad_accum_steps} sequences a step, for about"
        f" {budget.STEPS} steps",
        flush=True,
    )
    return plan


def measure_tokens_per_s(
    config: PretrainingConfig, model_config: GPTConfig, device: torch.device, dtype: torch.dtype
) -> float:
    """What this machine trains, by a few steps of such a model on random tokens. Changes no random stream."""
    states = devices.random_states(device)
    model = GPTModel(model_config).to(device)
    optimizer = build_optimizer(model, config.optimizer, choose_peak(config), config.adam_lr, config.weight_decay)
    n_sequences = max((1024 if device.type == "cpu" else 16_384) // model_config.context_length, 1)
    ids = torch.randint(model_config.vocab_size, (n_sequences, model_config.context_length + 1))
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    _, step_s = compile_and_try(model, model_config.vocab_size, False, batch, device, dtype)
    seconds = sum(step_s.values()) + optimizer_step_s(model, optimizer, device)
    devices.set_random_states(states, device)
    return batch[0].numel() / seconds


def choose_model_config(config: PretrainingConfig, size: str, vocab_size: int) -> GPTConfig:
    """The preset, with what the command line says otherwise. Raises UserError."""
    named = ("context_length", "emb_dim", "n_layers", "n_heads", "n_kv_heads", "qkv_bias")
    given = {name: getattr(config, name) for name in named if getattr(config, name) is not None}
    if config.qkv_bias and config.arch == "modern":
        raise UserError("--qkv_bias needs --arch gpt2; a modern model has no biases")
    try:
        return GPTConfig(vocab_size, **PRESETS[size] | given, arch=config.arch, drop_rate=config.drop_rate)
    except ValueError as error:
        raise UserError(str(error))


def choose_peak(config: PretrainingConfig) -> float:
    return config.lr or DEFAULT_LR[config.optimizer]


def choose_rate(config: PretrainingConfig, step: int, n_steps: int) -> float:
    """The learning rate of a step (from 0), as a share of the peak."""
    final = 0.05 if config.min_lr is None else config.min_lr / choose_peak(config)
    share = 50 if config.optimizer == "muon" else 20
    wanted = min(n_steps // share, 1000) if config.warmup_steps is None else config.warmup_steps
    return learning_rate(step, peak=1.0, final=final, warmup_steps=min(wanted, n_steps), total_steps=n_steps)


def choose_intervals(config: PretrainingConfig, n_steps: int) -> dict[str, int]:
    """How many steps lie between two reports, samples and checkpoints."""
    report = config.eval_freq or (100 if config.budget_minutes is None else max(n_steps // 20, 1))
    sample = config.print_sample_iter or (100 if config.budget_minutes is None else 5 * report)
    save = config.save_ckpt_freq or (500 if config.budget_minutes is None else 5 * report)
    return {"report": report, "sample": sample, "save": save}


def most_steps(config: PretrainingConfig, batches: TrainingBatches) -> int:
    """The steps after which a run ends, whatever time it has."""
    n_epochs = config.n_epochs or (sys.maxsize if config.budget_minutes or config.max_tokens else 1)
    limits = [n_epochs * batches.steps_per_epoch, config.max_steps or sys.maxsize]
    return min(*limits, max((config.max_tokens or sys.maxsize) // batches.tokens_per_step, 1))


def time_left_s(config: PretrainingConfig, progress: Progress, began: float) -> float:
    """Of the budget, at the start of this session; its end takes a little too."""
    return 60 * (config.budget_minutes or math.inf) - progress.elapsed_s - (time.monotonic() - began)


def is_finished(config: PretrainingConfig, batches: TrainingBatches, progress: Progress, began: float) -> bool:
    return progress.step >= most_steps(config, batches) or time_left_s(config, progress, began) < budget.CLOSING_S


def choose_length(
    config: PretrainingConfig, batches: TrainingBatches, progress: Progress, began: float, step_s: float
) -> Callable[[int], int]:
    """A function: steps done -> steps that the run will have."""
    most = most_steps(config, batches)
    if config.budget_minutes is None:
        return lambda n_done: most
    timed = budget.total_steps_in(time_left_s(config, progress, began) - budget.CLOSING_S, progress.step, step_s)
    return lambda n_done: min(timed(n_done), most)


def start_from_bigrams(config: PretrainingConfig, model: GPTModel, tokens: TokenStream) -> None:
    """Fit embedding and head of a new modern model to the counts of token pairs."""
    known = len(tokens) >= MIN_TOKENS_PER_WORD * model.config.vocab_size
    n_steps = (50 if known else 0) if config.bigram_steps is None else config.bigram_steps
    if config.arch == "modern" and n_steps:
        start = time.monotonic()
        weights = model.tok_emb.weight, model.head_weight
        loss = fit_to_bigrams(tokens, *weights, model.config.vocab_size, n_steps, config.seed)
        print(f"start: fitted to token pairs, {loss:.3f} nats a token, {time.monotonic() - start:.1f} s", flush=True)


def compile_and_measure(
    config: PretrainingConfig,
    model: GPTModel,
    optimizer: torch.optim.Optimizer,
    batches: TrainingBatches,
    progress: Progress,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Loss, dict[str, float]]:
    """The loss of a batch by the model, compiled or not, and the seconds of each part of an optimizer step."""
    start = time.monotonic()
    batch = batches.micro_batch(progress.step, 0)
    reading_s = time.monotonic() - start
    compile = device.type == "cuda" if config.compile is None else config.compile
    loss_of_batch, parts_s = compile_and_try(model, model.config.vocab_size, compile, batch, device, dtype)
    parts_s = {"reading": reading_s, **parts_s}
    step_s = {name: batches.grad_accum_steps * seconds for name, seconds in parts_s.items()}
    if progress.step == 0 and config.optimizer != "galore_adamw":
        step_s["optimizer"] = optimizer_step_s(model, optimizer, device)
    return loss_of_batch, step_s


def run_identity(config: PretrainingConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What must stay the same for a checkpoint to go on as one run; the plan and the tokens' fingerprint come to it."""
    named = ("optimizer", "seed", "val_fraction")
    return {"tokenizer": tokenizer.fingerprint} | {name: getattr(config, name) for name in named}


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
    plan: Plan,
    model: GPTModel,
    batches: TrainingBatches,
    manifest: dict[str, Any],
    progress: Progress,
    n_steps: int,
    step_s: dict[str, float],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Say what is about to happen, and write it to config.json."""
    left = n_steps - progress.step
    n_moments = 1 if config.optimizer == "muon" else 2
    moments_bytes = sum(n_moments * p.numel() * p.element_size() for p in model.parameters())
    memory_bytes = devices.peak_memory_bytes(device) + moments_bytes
    total_s = sum(step_s.values())
    shares = ", ".join(f"{name} {seconds / total_s:.1%}" for name, seconds in step_s.items())
    mfu = devices.utilization(model.n_flops_per_token() * batches.tokens_per_step / total_s, device, dtype)
    print(
        f"data: {describe_tokens(manifest)}\n"
        f"model: {model.n_parameters():,} parameters, {model.config}\n"
        f"device: {devices.describe_device(device)}, {dtype}, torch {torch.__version__}\n"
        f"steps: {left} to go of {n_steps}, {batches.steps_per_epoch} an epoch;"
        f" {batches.tokens_per_step:,} tokens a step = {plan.batch_size} sequences x {model.config.context_length} tokens"
        f" x {plan.grad_accum_steps} micro-steps x 1 process\n"
        f"memory: about {memory_bytes / 2**30:.2f} GiB (measured on one micro-step, and {config.optimizer}'s state)\n"
        f"a step: {total_s:.3f} s ({shares}), {batches.tokens_per_step / total_s:,.0f} tokens/s, MFU {mfu}\n"
        f"time: about {format_duration(left * total_s)} for the steps; evaluation comes on top",
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


def closing_words(output_dir: Path, progress: Progress, n_steps: int) -> str:
    if progress.step < n_steps:
        return f"stopped at step {progress.step} of {n_steps} and saved in {output_dir}; the same command goes on"
    return (
        f"finished {n_steps} steps in {format_duration(progress.elapsed_s)}, best validation loss of a"
        f" checkpoint {progress.best_val_loss:.4f}; the loss curve is {output_dir / 'loss_curve.png'}"
    )


def run(config: PretrainingConfig) -> None:
    """main, with a lack of memory told in one line."""
    began = time.monotonic() - time.process_time()  # imports took that long
    with memory_told(config.batch_size):
        main(config, began)


if __name__ == "__main__":
    run_command(PretrainingConfig, run)
