"""nanoGPT and nanochat with their recipes, from checkouts of them, for train_quality.py, aozora.py and contenders.py.

Theirs are the model, its initialization and the optimizer, which their own code builds, and the rates, decays and
schedules, whose values are those of their training scripts; those scripts themselves read their own corpora and count
steps, so that the loop (quality.py) is ours: batches and validation windows are those of our token shards, and the
length of a run, which their schedules need, follows from the time and the speed so far.

nanoGPT: train.py and config/train_shakespeare_char.py, the recipe for small text. nanochat: nanochat/gpt.py,
nanochat/optim.py and scripts/base_train.py. Both multiply in the type that is given, although on a CPU both would
choose float32, which is slower where the CPU multiplies bfloat16.
"""

import contextlib
import importlib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quality import Peer

from gptkit.base import devices
from gptkit.base.cli import UserError
from gptkit.training.schedules import learning_rate

HEAD_WIDTH = 64


@dataclass(frozen=True)
class NanoGPTRecipe:
    """nanoGPT's settings; the defaults are those of config/train_shakespeare_char.py, apart from the batch.

    There a step has 16,384 characters of about 1 million, here 2,048 tokens.
    """

    lr: float = 1e-3
    beta2: float = 0.99
    dropout: float = 0.2
    warmup_share: float = 0.02  # 100 of 5,000 steps
    context_length: int = 256
    batch_size: int = 8


WEIGHT_DECAY, BETA1, GRAD_CLIP, FINAL_SHARE = 0.1, 0.9, 1.0, 0.1  # of nanoGPT's train.py
# Of nanochat's scripts/base_train.py: the defaults of its flags, and the batch (tokens) that they were tuned for.
RATES = {"unembedding_lr": 0.008, "embedding_lr": 0.3, "scalar_lr": 0.5, "matrix_lr": 0.02}
DECAY, TUNED_BATCH, TUNED_DEPTH, TUNED_WIDTH = 0.28, 2**19, 12, 768
WARMUP_STEPS, WARMDOWN_SHARE, FINAL_RATE_SHARE = 40, 0.65, 0.05
MOMENTUM_STEPS, FIRST_MOMENTUM, MOMENTUM, FINAL_MOMENTUM = 400, 0.85, 0.97, 0.90
NANOCHAT_CONTEXT, NANOCHAT_BATCH = 128, 16


def parse_size(size: str, flag: str) -> tuple[int, int]:
    """Return (layers, width) of a size such as 4x256. Raises UserError."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)
    if not match or int(match[2]) % HEAD_WIDTH:
        raise UserError(
            f"{flag} {size} is not layers x width with a width of heads of {HEAD_WIDTH}; give one like 4x256"
        )
    return int(match[1]), int(match[2])


def load_nanogpt(folder: Path) -> Any:
    """Import model.py from a checkout of nanoGPT."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_nanochat(folder: Path, dtype: torch.dtype) -> Any:
    """Import nanochat/gpt.py from a checkout of nanochat, which computes in that type. Raises UserError."""
    os.environ["NANOCHAT_DTYPE"] = devices.dtype_name(dtype)  # read when it is imported
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("nanochat.gpt")
    except ImportError as error:
        raise UserError(f"--nanochat_dir {folder}: {error}; install what nanochat needs")
    finally:
        sys.path.remove(str(folder))


def nanogpt(
    folder: Path,
    vocab_size: int,
    size: str,
    device: torch.device,
    dtype: torch.dtype,
    compile: bool,
    recipe: NanoGPTRecipe = NanoGPTRecipe(),
) -> Peer:
    """Build nanoGPT's model in a size such as 4x256, with its optimizer. Raises UserError."""
    n_layers, width = parse_size(size, "--nanogpt_sizes")
    with contextlib.redirect_stdout(sys.stderr):  # it prints about itself, but standard output is for the result
        module = load_nanogpt(folder)
        dimensions = module.GPTConfig(
            block_size=recipe.context_length,
            vocab_size=math.ceil(vocab_size / 64) * 64,  # as its author advises
            n_layer=n_layers,
            n_head=width // HEAD_WIDTH,
            n_embd=width,
            dropout=recipe.dropout,
            bias=False,
        )
        model = module.GPT(dimensions).to(device)
        optimizer = model.configure_optimizers(WEIGHT_DECAY, recipe.lr, (BETA1, recipe.beta2), device.type)
    forward = torch.compile(model) if compile else model

    def set_rates(step: int, n_steps: int) -> None:
        warmup_steps = round(recipe.warmup_share * n_steps)
        lr = learning_rate(
            step, peak=recipe.lr, final=FINAL_SHARE * recipe.lr, warmup_steps=warmup_steps, total_steps=n_steps
        )
        for group in optimizer.param_groups:
            group["lr"] = lr

    def logits(ids: torch.Tensor) -> torch.Tensor:  # given targets, it returns the logits of all positions
        ids = ids.contiguous()  # it takes views of them
        found: torch.Tensor = model(ids, ids)[0]
        return found

    return Peer(
        settings={"size": size, **vars(recipe)},
        model=model,
        loss_of_batch=lambda inputs, targets: forward(inputs, targets)[1],
        validation_loss=lambda inputs, targets: model(inputs, targets)[1],
        logits=logits,
        optimizer=optimizer,
        set_rates=set_rates,
        context_length=recipe.context_length,
        batch_size=recipe.batch_size,
        grad_clip=GRAD_CLIP,
        autocast=dtype,
    )


def build_nanochat(
    folder: Path,
    vocab_size: int,
    n_layers: int,
    width: int,
    n_heads: int,
    context_length: int,
    rate: float,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Any, torch.optim.Optimizer, float]:
    """Build nanochat's model and its optimizer, all of whose rates are times `rate`, and return the decay too.

    As base_train.py does, the rates follow the root of the batch, NANOCHAT_BATCH sequences, and the decay of the matrices
    its rule for a run whose tokens are in proportion to the model (there a ratio of tokens to parameters, which cancels
    out). The optimizer is cautious. Raises UserError.
    """
    with contextlib.redirect_stdout(sys.stderr):
        module = load_nanochat(folder, dtype)
        with torch.device("meta"):
            model = _nanochat_model(module, vocab_size, n_layers, width, n_heads, context_length)
            tuned = _nanochat_model(module, vocab_size, TUNED_DEPTH, TUNED_WIDTH, TUNED_WIDTH // 128, context_length)
        model.to_empty(device=device)
        model.init_weights()
        batch_share = math.sqrt(NANOCHAT_BATCH * context_length / TUNED_BATCH)
        decay = DECAY * batch_share * _scaling_parameters(tuned) / _scaling_parameters(model)
        rates = {name: rate * batch_share * lr for name, lr in RATES.items()}
        optimizer = model.setup_optimizer(**rates, weight_decay=decay)
    return model, optimizer, decay


def nanochat(
    folder: Path, vocab_size: int, size: str, rate: float, device: torch.device, dtype: torch.dtype, compile: bool
) -> Peer:
    """Build nanochat's model in a size such as 3x128, with its optimizer, all of whose rates are times `rate`.

    As in base_train.py, the decay of the matrices falls to zero by a cosine. Raises UserError.
    """
    n_layers, width = parse_size(size, "--nanochat_sizes")
    model, optimizer, decay = build_nanochat(
        folder, vocab_size, n_layers, width, width // HEAD_WIDTH, NANOCHAT_CONTEXT, rate, device, dtype
    )
    forward = torch.compile(model, dynamic=False) if compile else model

    def set_rates(step: int, n_steps: int) -> None:
        share = nanochat_rate_share(step, n_steps)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share
            if group["kind"] == "muon":
                group["momentum"] = nanochat_momentum(step, n_steps)
                group["weight_decay"] = decay * 0.5 * (1 + math.cos(math.pi * step / n_steps))

    return Peer(
        settings={"size": size, "rates": rate, "weight_decay": round(decay, 4)},
        model=model,
        loss_of_batch=forward,
        validation_loss=model,
        logits=model,
        optimizer=optimizer,
        set_rates=set_rates,
        context_length=NANOCHAT_CONTEXT,
        batch_size=NANOCHAT_BATCH,
        grad_clip=None,
        autocast=torch.float32,
    )


def nanochat_rate_share(step: int, n_steps: int) -> float:
    """Return base_train.py's learning rate of a step (from 0) as a share of the peak."""
    warmdown_steps = round(WARMDOWN_SHARE * n_steps)
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    left = min((n_steps - step) / max(warmdown_steps, 1), 1.0)
    return left + (1 - left) * FINAL_RATE_SHARE


def nanochat_momentum(step: int, n_steps: int) -> float:
    """Return base_train.py's momentum of Muon at a step (from 0)."""
    warmdown_steps = round(WARMDOWN_SHARE * n_steps)
    if step < MOMENTUM_STEPS:
        return FIRST_MOMENTUM + (MOMENTUM - FIRST_MOMENTUM) * step / MOMENTUM_STEPS
    done = max(step - (n_steps - warmdown_steps), 0) / max(warmdown_steps, 1)
    return MOMENTUM + (FINAL_MOMENTUM - MOMENTUM) * done


def _nanochat_model(module: Any, vocab_size: int, n_layers: int, width: int, n_heads: int, context_length: int) -> Any:
    return module.GPT(
        module.GPTConfig(
            sequence_len=context_length,
            vocab_size=vocab_size,
            n_layer=n_layers,
            n_head=n_heads,
            n_kv_head=n_heads,
            n_embd=width,
            window_pattern="L",  # as base_train.py advises where FlashAttention-3 is missing
        )
    )


def _scaling_parameters(model: Any) -> int:
    counts = model.num_scaling_params()
    found: int = counts["transformer_matrices"] + counts["lm_head"]
    return found


@contextlib.contextmanager
def compilation(enabled: bool) -> Iterator[None]:
    """Let what a peer compiles by itself, as nanochat its optimizer's steps, be compiled, or run as it is."""
    torch._dynamo.reset()  # the sizes of an earlier peer would count as recompilations
    with contextlib.ExitStack() as stack:
        if not enabled:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
