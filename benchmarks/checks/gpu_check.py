"""Check on this device what the tests check on a CPU. The result holds a true or false for each check.

The checks compare bfloat16 and float16 with float32, compiled with eager, the fused optimizer with the plain one, the loss in chunks
with torch's, and a stopped run with one that never stopped, bit for bit; they also take Muon's and GaLore's steps. On a
CPU the same checks run, except that a model is traced and not compiled to machine code, which takes a C++ compiler and a
minute.

A check that raises an error counts as false, and the others still run. --tiny makes all models tiny.

    python benchmarks/checks/gpu_check.py
"""

import copy
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import _path  # noqa: F401  it lets the modules of benchmarks/ be imported
import torch
from machine import SAMPLE, log, output_of, script, versions, write_result
from torch import nn
from torch.nn import functional as F

from gpt_model import ARCHS, Arch, GPTConfig, GPTModel
from gptkit.base import devices
from gptkit.base.cli import run_command, setting
from gptkit.training import checkpoints
from gptkit.training import loss as training_loss
from gptkit.training.compilation import make_loss
from gptkit.training.loss import linear_cross_entropy
from gptkit.training.muon import orthogonalize
from gptkit.training.optimizers import BETAS, EPS, build_optimizer

LR = 2e-3
N_FITTED = 30  # AdamW steps on one batch, after which the loss is no longer that of a uniform guess
N_RESUMED = 6  # optimizer steps of the run that is stopped after its first
HALF_LOSS, HALF_GRADIENT = 0.02, 0.05  # relative differences of bfloat16 and float16 from float32
LOSS_SCALE = 2.0**16  # in float16, as training begins with
SINGULAR_VALUES = 0.7, 1.3
Found = tuple[bool, dict[str, float]]  # whether the check holds, and what was measured
Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and targets, each (B, T)


@dataclass(frozen=True, kw_only=True)
class GpuCheckConfig:
    """Check what must be true on this device."""

    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    tiny: bool = setting(False, "models of a few thousand parameters")


def main(config: GpuCheckConfig) -> None:
    write_result("gpu_check", check_all(devices.choose_device(config.device), config.tiny))


def dimensions(tiny: bool) -> dict[str, Any]:
    """Return the dimensions of the models that are checked."""
    if tiny:
        return dict(vocab_size=130, context_length=16, emb_dim=32, n_layers=1, n_heads=2)
    return dict(
        vocab_size=4100, context_length=256, emb_dim=256, n_layers=2, n_heads=4
    )  # a vocabulary and a context that are no multiple of a block


def fitted_model(arch: Arch, tiny: bool, device: torch.device) -> tuple[GPTModel, Batch]:
    """Return a model that has learnt one batch, in float32, and the batch. A new modern one would predict nothing."""
    torch.manual_seed(0)
    config = GPTConfig(**dimensions(tiny), arch=arch)
    model = GPTModel(config).to(device)
    ids = torch.randint(config.vocab_size, (4, config.context_length + 1)).to(device)
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    optimizer = build_optimizer(model, "adamw", LR, LR, 0.0)
    loss_of_batch = make_loss(model, model.hidden_states, config.vocab_size)
    for _ in range(N_FITTED):
        loss_of_batch(*batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model, batch


def loss_and_gradient(
    model: GPTModel, hidden_states: Callable[[torch.Tensor], torch.Tensor], batch: Batch, dtype: torch.dtype
) -> tuple[float, torch.Tensor]:
    """Return the loss of a batch, and its gradient by all parameters as one vector."""
    scale = LOSS_SCALE if dtype == torch.float16 else 1.0
    with devices.autocast(batch[0].device, dtype):
        loss = make_loss(model, hidden_states, model.config.vocab_size)(*batch)
    (scale * loss).backward()
    gradient = nn.utils.parameters_to_vector([p.grad for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return loss.item(), gradient / scale


def relative(found: torch.Tensor | float, wanted: torch.Tensor | float) -> float:
    """Return the norm of the difference as a share of the norm of what is wanted."""
    found, wanted = torch.as_tensor(found).double(), torch.as_tensor(wanted).double()
    return ((found - wanted).norm() / wanted.norm()).item()


def half_like_float32(device: torch.device, tiny: bool, dtype: torch.dtype) -> Found:
    """Compare losses and gradients in a type of 16 bits with those in float32."""
    figures: dict[str, float] = {}
    for arch in ARCHS:
        model, batch = fitted_model(arch, tiny, device)
        wanted, wanted_gradient = loss_and_gradient(model, model.hidden_states, batch, torch.float32)
        found, gradient = loss_and_gradient(model, model.hidden_states, batch, dtype)
        figures |= {f"{arch}_loss_float32": wanted, f"{arch}_loss": relative(found, wanted)}
        figures[f"{arch}_gradient"] = relative(gradient, wanted_gradient)
    holds = all(figures[f"{arch}_loss"] <= HALF_LOSS for arch in ARCHS)
    return holds and all(figures[f"{arch}_gradient"] <= HALF_GRADIENT for arch in ARCHS), figures


def compiled_like_eager(device: torch.device, tiny: bool) -> Found:
    """Compare losses and gradients of a compiled model with those of a plain one."""
    dtype = devices.choose_dtype("auto", device, training=True)
    # Float32 differs by the order of sums. In 16 bits the compiler keeps more digits than separate kernels do.
    limits = (1e-5, 1e-4) if dtype == torch.float32 else (HALF_LOSS, HALF_GRADIENT)
    figures: dict[str, float] = {}
    for arch in ARCHS:
        model, batch = fitted_model(arch, tiny, device)
        compiled = torch.compile(model.hidden_states, backend="inductor" if device.type == "cuda" else "aot_eager")
        wanted, wanted_gradient = loss_and_gradient(model, model.hidden_states, batch, dtype)
        found, gradient = loss_and_gradient(model, compiled, batch, dtype)
        figures |= {f"{arch}_loss": relative(found, wanted), f"{arch}_gradient": relative(gradient, wanted_gradient)}
    return all(value <= limits[name.endswith("gradient")] for name, value in figures.items()), figures


def fused_like_plain(device: torch.device, tiny: bool) -> Found:
    """Take three steps of our AdamW and of torch's plain loop over parameters."""
    model, batch = fitted_model("modern", tiny, device)
    other = copy.deepcopy(model)
    ours = build_optimizer(model, "adamw", LR, LR, 0.1)
    by_name = dict(zip(model.parameters(), other.parameters(), strict=True))
    groups = [
        {"params": [by_name[p] for p in group["params"]], "weight_decay": group["weight_decay"]}
        for group in ours.param_groups
    ]
    plain = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=False, foreach=False)
    for _ in range(3):
        make_loss(model, model.hidden_states, model.config.vocab_size)(*batch).backward()
        for one, twin in by_name.items():
            twin.grad = one.grad.clone()  # type: ignore[union-attr]
        ours.step()
        plain.step()
        model.zero_grad(set_to_none=True)
    difference = max((one - twin).abs().max().item() for one, twin in by_name.items())
    return difference <= 0.01 * LR, {"largest_difference": difference, "fused": float(bool(ours.defaults["fused"]))}


def chunked_loss_like_torch(device: torch.device, tiny: bool) -> Found:
    """Compare linear_cross_entropy in several chunks, in each type, with F.cross_entropy in float32."""
    torch.manual_seed(0)
    n_tokens, n_channels, vocab_size = (150, 16, 100) if tiny else (1000, 256, 32_000)
    hidden = torch.randn(n_tokens, n_channels, device=device, requires_grad=True)
    weight = (torch.randn(vocab_size + 28, n_channels, device=device) / n_channels**0.5).requires_grad_()
    targets = torch.randint(vocab_size, (n_tokens,)).to(device)
    wanted = F.cross_entropy(hidden @ weight[:vocab_size].T, targets)
    wanted_gradients = torch.autograd.grad(wanted, (hidden, weight))
    figures: dict[str, float] = {}
    holds = True
    with mock.patch.dict(training_loss.CHUNK_BYTES, {device.type: 1}):  # the smallest chunks: 64 rows
        for name, dtype in devices.DTYPES.items():
            with devices.autocast(device, dtype):
                found = linear_cross_entropy(hidden, weight, targets, vocab_size)
            gradients = torch.autograd.grad(found, (hidden, weight))
            figures[f"{name}_loss"] = relative(found.detach(), wanted.detach())
            pairs = zip(gradients, wanted_gradients, strict=True)
            figures[f"{name}_gradient"] = max(relative(found, wanted) for found, wanted in pairs)
            loss_limit, limit = (1e-5, 1e-4) if dtype == torch.float32 else (HALF_LOSS, HALF_GRADIENT)
            holds &= figures[f"{name}_loss"] <= loss_limit and figures[f"{name}_gradient"] <= limit
    return holds, figures


def muon_orthogonalizes(device: torch.device, tiny: bool) -> Found:
    """Check singular values after it, of random matrices and of ones whose own span two powers of ten."""
    torch.manual_seed(0)
    n, wide = (16, 32) if tiny else (256, 1024)
    left, right = (torch.linalg.qr(torch.randn(4, size, n))[0] for size in (n, wide))
    spread = (left * torch.logspace(-2, 0, n)) @ right.mT  # (4, n, wide)
    found = []
    for dtype in {devices.choose_dtype("auto", device, training=True), torch.float16}:
        for matrices in (torch.randn(4, n, wide), spread, 1e-5 * spread.mT):
            found.append(torch.linalg.svdvals(orthogonalize(matrices.to(device), dtype).float().cpu()))
    smallest, largest = torch.stack(found).min().item(), torch.stack(found).max().item()
    holds = SINGULAR_VALUES[0] <= smallest and largest <= SINGULAR_VALUES[1]
    return holds, {"smallest": smallest, "largest": largest}


def galore_steps(device: torch.device, tiny: bool) -> Found:
    """Take two steps; the first makes the projectors. All matrices of blocks must move, and nothing become infinite."""
    model, batch = fitted_model("modern", tiny, device)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, "galore_adamw", LR, LR, 0.0)
    for _ in range(2):
        make_loss(model, model.hidden_states, model.config.vocab_size)(*batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    moved = {name: (p - before[name]).abs().max().item() for name, p in model.named_parameters()}
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    blocks = [moved[f"trf_blocks.{name}"] for name, p in model.trf_blocks.named_parameters() if p.dim() == 2]
    return finite and min(blocks) > 0, {"least_moved_matrix": min(blocks), "most_moved": max(moved.values())}


def resumed_like_uninterrupted(device: torch.device, tiny: bool, dtype: str) -> Found:
    """Compare pretraining.py on the sample, stopped after a step and resumed, with a run that never stopped.

    Where they differ, a second uninterrupted run shows whether the device adds up in the same order twice at all.
    """
    sizes = {**dimensions(tiny), "batch_size": 4, "grad_accum_steps": 2, "drop_rate": 0.1, "max_steps": N_RESUMED}
    del sizes["vocab_size"]  # the tokenizer's
    fixed = {
        "bigram_steps": 2,
        "eval_iter": 1,
        "device": device,
        "dtype": dtype,
        "tokenizer_path": SAMPLE / "tokenizer",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = {"jsonl_path": SAMPLE / "sample.jsonl", "output_dir": folder / "001"}
        output_of(script("dataset/prepare_aozora_jsonl.py", **source))

        def pretrain(output: str, **more: object) -> None:
            flags = {"data_dir": folder / "001", "output_dir": folder / output, "tokenizer": "sentencepiece"}
            command = script("pretraining.py", **flags, **fixed, **sizes, **more)
            output_of([*command, "--use_pretokenized", "--no-compile"])

        def weights(output: str) -> torch.Tensor:
            path = max((folder / output).glob("step_*"))
            tensors = checkpoints.read_tensors(path, checkpoints.MODEL_FILE, torch.device("cpu"))
            return torch.cat([tensors[key].flatten() for key in sorted(tensors)])

        def same_bytes(one: str, other: str) -> bool:
            paths = [folder / output / f"step_{N_RESUMED:08}" / checkpoints.MODEL_FILE for output in (one, other)]
            return paths[0].read_bytes() == paths[1].read_bytes()

        pretrain("whole")
        pretrain("stopped", max_minutes=1e-5)
        n_before = len(list((folder / "stopped").glob("step_*")))
        pretrain("stopped")
        holds = same_bytes("whole", "stopped")
        figures = {"stops": float(n_before), "largest_difference": 0.0}
        if not holds:
            figures["largest_difference"] = (weights("whole") - weights("stopped")).abs().max().item()
            pretrain("again")
            figures["whole_run_repeats_itself"] = float(same_bytes("whole", "again"))
        return holds, figures


CHECKS: dict[str, Callable[[torch.device, bool], Found]] = {
    "bfloat16 gives float32's loss within 2 % and its gradient within 5 %": partial(
        half_like_float32, dtype=torch.bfloat16
    ),
    "float16 gives float32's loss within 2 % and its gradient within 5 %": partial(
        half_like_float32, dtype=torch.float16
    ),
    "compiled gives eager's loss and gradient": compiled_like_eager,
    "AdamW as built steps as the plain loop": fused_like_plain,
    "the loss in chunks and its gradients are torch's": chunked_loss_like_torch,
    "Muon's singular values lie between 0.7 and 1.3": muon_orthogonalizes,
    "GaLore steps": galore_steps,
    "a stopped run ends as a whole one, bit for bit": partial(resumed_like_uninterrupted, dtype="auto"),
    "a stopped run in float16 ends as a whole one, bit for bit": partial(resumed_like_uninterrupted, dtype="float16"),
}


def check_all(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Run all checks, and return which hold."""
    checks: dict[str, bool] = {}
    figures: dict[str, dict[str, float]] = {}
    problems, skipped = {}, {}
    for name, check in CHECKS.items():
        if check is galore_steps and importlib.util.find_spec("galore_torch") is None:
            skipped[name] = "galore-torch is not installed"
            continue
        try:
            checks[name], figures[name] = check(device, tiny)
        except Exception as error:  # a device fails in its own way, and the other checks are worth knowing
            checks[name], problems[name] = False, f"{type(error).__name__}: {error}"
        log(f"{'ok    ' if checks[name] else 'FAILED'} {name}: {figures.get(name) or problems[name]}")
    return {
        "device": devices.describe_device(device),
        "versions": versions("torch", "galore-torch"),
        "checks": checks,
        "skipped": skipped,
        "problems": problems,
        "figures": {
            name: {key: float(f"{value:.4g}") for key, value in found.items()} for name, found in figures.items()
        },
    }


if __name__ == "__main__":
    run_command(GpuCheckConfig, main)
