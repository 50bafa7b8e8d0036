"""Models side by side, each trained as in its own project, for train_speed.py, memory.py and train_quality.py.

All have GPT-2's architecture in the dimensions of one GPTConfig, with biases and without dropout, and AdamW, but for two:
ours_modern_muon has the modern architecture and Muon, nanochat its own architecture, with more parameters, and optimizer. Some differences are the peers' own: transformers' labels are
its inputs, and it shifts them itself; llms-from-scratch has a separate output head; nanoGPT's vocabulary is padded to
a multiple of 64, as its author advises. AdamW is fused wherever the peer leaves the choice (transformers' Trainer takes
the fused one by default).

Shapes: B batch, T time.
"""

import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import machine  # noqa: F401  it lets gpt_model and gptkit be imported
import torch
from peers import build_nanochat, load_nanogpt
from torch import nn
from torch.nn import functional as F

from gpt_model import GPTConfig, GPTModel
from gptkit.base import devices
from gptkit.training.compilation import Loss, make_loss
from gptkit.training.cpu_layers import quicken
from gptkit.training.optimizers import BETAS, OPTIMIZERS, build_optimizer

LR, ADAM_LR, WEIGHT_DECAY, GRAD_CLIP = 6e-4, 0.02, 0.1, 1.0
OURS, MODERN = "ours", "ours_modern_muon"
TRANSFORMERS, NANOGPT, NANOCHAT, LLMS_FROM_SCRATCH = "transformers", "nanogpt", "nanochat", "llms_from_scratch"
Contender = tuple[Any, Loss, torch.optim.Optimizer]  # model, loss of a batch, optimizer
N_WARM_UP = 2  # micro-steps of each before those that count
K = TypeVar("K")
Wrap = Callable[[Any], Any]  # torch.compile, or a function that returns a module as it is


def build(
    name: str,
    config: GPTConfig,
    device: torch.device,
    dtype: torch.dtype,
    compile: bool,
    checkouts: Mapping[str, Path],
) -> Contender:
    """Build a contender: model, loss of a batch, and optimizer. Raises ImportError where a package is missing.

    `checkouts` has the folders of NANOGPT and NANOCHAT, where they are built.
    """
    wrap: Wrap = torch.compile if compile else (lambda module: module)
    if name == OURS:
        return _ours(config, device, dtype, wrap, "adamw")
    if name == MODERN:
        return _ours(dataclasses.replace(config, arch="modern"), device, dtype, wrap, "muon")
    if name == TRANSFORMERS:
        return _transformers(config, device, wrap)
    if name == LLMS_FROM_SCRATCH:
        return _llms_from_scratch(config, device, wrap)
    if name == NANOCHAT:
        return _nanochat(config, device, dtype, wrap, checkouts[name])
    assert name == NANOGPT
    return _nanogpt(config, device, wrap, checkouts[name])


def train_step(
    contender: Contender, inputs: torch.Tensor, targets: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Take one optimizer step on a batch, inputs and targets each (B, T), and return its loss.

    The step is that of pretraining.py and of nanoGPT's train.py, whose gradient scaler does nothing except in float16.
    """
    model, loss_of_batch, optimizer = contender
    with devices.autocast(device, dtype):
        loss = loss_of_batch(inputs, targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def allocate_as(name: str, device: torch.device) -> None:
    """Set the allocator, before a contender's turn, as its project sets it.

    On the CPU ours keeps freed memory, as pretraining.py does. The peers leave glibc alone, whose thresholds settle at
    these values once a large tensor was freed (mallopt(3): 32 MiB for mmap, twice that for returning memory).
    """
    if name in (OURS, MODERN):
        devices.keep_freed_memory(device)
    else:
        devices.keep_freed_memory(device, trim_threshold=2 * devices.LARGEST_FROM_HEAP)


def dtype_as(name: str, choice: str, device: torch.device) -> torch.dtype:
    """Return the type of a contender's matrix products; "auto" is the type that its project trains with on a CPU.

    There ours uses bfloat16 where the CPU multiplies it. nanoGPT's train.py uses autocast on CUDA only, transformers'
    Trainer with bf16=True only, and the book's loops never: they stay in float32. nanochat, which is for CUDA, is given
    the type of ours. On CUDA all get the same 16 bits, although nanoGPT and nanochat alone choose it by themselves.
    """
    return devices.choose_dtype(choice, device, training=name in (OURS, MODERN, NANOCHAT))


def random_batch(
    config: GPTConfig, batch_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:  # inputs and targets, each (B, T)
    """Return a batch of random ids and the ids that follow them."""
    ids = torch.randint(config.vocab_size, (batch_size, config.context_length + 1)).to(device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def median_micro_step_s(
    runs: Mapping[K, tuple[nn.Module, Loss]],
    batch: tuple[torch.Tensor, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    n_rounds: int,
) -> dict[K, float]:
    """Return the median seconds that forward and backward take for each model and its loss, measured in turns."""
    seconds: dict[K, list[float]] = {key: [] for key in runs}
    for i in range(N_WARM_UP + n_rounds):
        for key in list(runs)[:: 1 if i % 2 else -1]:
            model, loss = runs[key]
            began = time.perf_counter()
            with devices.autocast(device, dtype):
                loss(*batch).backward()
            seconds[key].append(time.perf_counter() - began)
            model.zero_grad(set_to_none=True)
    return {key: statistics.median(each[N_WARM_UP:]) for key, each in seconds.items()}


def _ours(config: GPTConfig, device: torch.device, dtype: torch.dtype, wrap: Wrap, optimizer: str) -> Contender:
    model = quicken(GPTModel(config).to(device))
    loss_of_batch = make_loss(model, wrap(model.hidden_states), config.vocab_size)
    return (
        model,
        loss_of_batch,
        build_optimizer(model, optimizer, OPTIMIZERS[optimizer].default_lr, ADAM_LR, WEIGHT_DECAY, dtype),
    )


def _adamw(model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    fused = device.type in ("cuda", "cpu")
    return torch.optim.AdamW(model.parameters(), LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=fused)


def _transformers(config: GPTConfig, device: torch.device, wrap: Wrap) -> Contender:
    from transformers import GPT2Config, GPT2LMHeadModel

    dimensions = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.context_length,
        n_embd=config.emb_dim,
        n_layer=config.n_layers,
        n_head=config.n_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(dimensions).to(device).train()
    forward = wrap(model)
    return model, lambda inputs, targets: forward(input_ids=inputs, labels=inputs).loss, _adamw(model, device)


def _llms_from_scratch(config: GPTConfig, device: torch.device, wrap: Wrap) -> Contender:
    from llms_from_scratch.ch04 import GPTModel as BookModel  # type: ignore[import-not-found]

    named = ("vocab_size", "context_length", "emb_dim", "n_layers", "n_heads", "qkv_bias")
    model = BookModel({name: getattr(config, name) for name in named} | {"drop_rate": 0.0}).to(device)
    forward = wrap(model)

    def loss_of_batch(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(forward(inputs).flatten(0, 1), targets.flatten())

    return model, loss_of_batch, _adamw(model, device)


def _nanogpt(config: GPTConfig, device: torch.device, wrap: Wrap, folder: Path) -> Contender:
    module = load_nanogpt(folder)
    with contextlib.redirect_stdout(sys.stderr):  # it prints about itself, but standard output is for the result
        dimensions = module.GPTConfig(
            block_size=config.context_length,
            vocab_size=config.padded_vocab_size,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            n_embd=config.emb_dim,
            dropout=0.0,
            bias=True,
        )
        model = module.GPT(dimensions).to(device)
        optimizer = model.configure_optimizers(WEIGHT_DECAY, LR, BETAS, device.type)
    forward = wrap(model)
    return model, lambda inputs, targets: forward(inputs, targets)[1], optimizer


def _nanochat(config: GPTConfig, device: torch.device, dtype: torch.dtype, wrap: Wrap, folder: Path) -> Contender:
    model, optimizer, _ = build_nanochat(
        folder,
        config.vocab_size,
        config.n_layers,
        config.emb_dim,
        config.n_heads,
        config.context_length,
        1.0,
        device,
        dtype,
    )
    forward = wrap(model)

    def loss_of_batch(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, enabled=False):  # it chooses the types itself
            loss: torch.Tensor = forward(inputs, targets)
        return loss

    return model, loss_of_batch, optimizer
