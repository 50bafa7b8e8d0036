"""Calculate what a run on many GPUs needs: memory, traffic, time per step, time per save, data.

Counted, not guessed: parameters from the model itself (on the meta device), activations from what autograd saves of one
real block of that width, traffic from the collectives that gptkit/distributed calls. Assumed: the share of the peak that
training reaches (--mfu), the links and the disk. parallel_overhead.py compares the traffic and the size of a checkpoint
with small runs.

    python benchmarks/calculator/scaling.py --model 1B --n_gpus 64 --parallel fsdp
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # gpt_model and gptkit lie there

from gpt_model import PRESETS, GPTConfig, GPTModel, TransformerBlock, rotary_tables
from gptkit.base.cli import run_command, setting
from gptkit.training.loss import CHUNK_BYTES
from gptkit.training.planning import flops_per_token

SIZES = {
    **PRESETS,
    "1B": dict(context_length=2048, emb_dim=2048, n_layers=20, n_heads=16),
    "7B": dict(context_length=4096, emb_dim=4096, n_layers=32, n_heads=32),
}
FLOAT, HALF = 4, 2  # bytes
NEWTON_SCHULZ_STEPS = 5
PROBE_TOKENS = 64  # read by the block whose activations are counted
TOKENIZE_BYTES_PER_S = 14.5e6  # of text, by one worker: benchmarks/results/pretokenize_speed.json
HASH_BYTES_PER_S = 1.5e9  # SHA-256 with the processor's own instructions


@dataclass(frozen=True)
class Job:
    """A run: n_gpus processes, each with batch_size sequences per micro-step."""

    model: GPTConfig
    n_gpus: int
    parallel: str = "fsdp"
    batch_size: int = 8
    grad_accum_steps: int = 1
    optimizer: str = "muon"
    bfloat16: bool = True
    activation_checkpointing: bool = False
    backend: str = "nccl"

    @property
    def tokens_per_micro_step(self) -> int:
        """Return the tokens that one GPU reads in a micro-step."""
        return self.batch_size * self.model.context_length

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens that all GPUs read in a step."""
        return self.n_gpus * self.grad_accum_steps * self.tokens_per_micro_step

    @property
    def product_bytes(self) -> int:
        """Return the bytes of a number in a matrix product."""
        return HALF if self.bfloat16 else FLOAT


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One GPU, its links and the disk. Defaults: an H100 with NVLink in the node, 400 Gbit/s per GPU between nodes."""

    tflops: float = setting(989.0, "1e12 dense bfloat16 operations/s, by the data sheet", more_than=0, group="hardware")
    mfu: float = setting(0.40, "share of them that training reaches", more_than=0, at_most=1, group="hardware")
    memory_gb: float = setting(80.0, "memory of a GPU", more_than=0, group="hardware")
    link_gb_per_s: float = setting(
        40.0, "each way, between a GPU and one of another machine", more_than=0, group="hardware"
    )
    disk_gb_per_s: float = setting(2.0, "of the folder that holds the checkpoints", more_than=0, group="hardware")


@dataclass(frozen=True, kw_only=True)
class ScalingConfig(Hardware):
    """Calculate what a run on many GPUs needs."""

    model: str = setting("1B", "size of the model", choices=SIZES, group="model")
    arch: Literal["modern", "gpt2"] = setting("modern", "architecture", group="model")
    vocab_size: int = setting(32_000, "tokens of the vocabulary", at_least=1, group="model")
    chars_per_token: float = setting(
        1.92, "characters per token: our own BPE of 16,000 pieces has 1.92", more_than=0, group="model"
    )
    n_gpus: int = setting(64, "processes, one on each GPU", at_least=1, group="run")
    parallel: Literal["ddp", "fsdp"] = setting("fsdp", "how they share the work", group="run")
    batch_size: int = setting(8, "sequences per GPU per micro-step", at_least=1, group="run")
    grad_accum_steps: int = setting(1, "micro-steps per step", at_least=1, group="run")
    optimizer: Literal["muon", "adamw"] = setting("muon", "optimizer", group="run")
    activation_checkpointing: bool = setting(
        False, "save only the input of each block, and compute the rest again", group="run"
    )


def main(config: ScalingConfig) -> None:
    print(json.dumps(plan(config), indent=1))


def plan(config: ScalingConfig) -> dict[str, Any]:
    """Return all figures of a run."""
    dimensions: dict[str, Any] = {"arch": config.arch, **SIZES[config.model]}
    model = GPTConfig(config.vocab_size, **dimensions)
    job = Job(
        model, config.n_gpus, config.parallel, config.batch_size, config.grad_accum_steps, config.optimizer,
        activation_checkpointing=config.activation_checkpointing,
    )  # fmt: skip
    hardware = Hardware(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Hardware)})
    bytes_by = memory(job)
    speed = step(job, hardware)
    corpus = data(1e13, config.vocab_size, config.chars_per_token, speed["tokens_per_s"], 256)
    return {
        "model": dataclasses.asdict(model) | {"parameters": counts(model)["all"]},
        "job": {name: value for name, value in dataclasses.asdict(job).items() if name != "model"},
        "hardware": dataclasses.asdict(hardware),
        "tokens_per_step": job.tokens_per_step,
        "memory_gb_a_gpu": {name: round(value / 1e9, 2) for name, value in bytes_by.items()},
        "fits": bytes_by["peak"] < 0.9e9 * hardware.memory_gb,
        "traffic_gb_a_gpu_a_step": {name: round(value / 1e9, 5) for name, value in traffic(job).items()},
        "step": {name: round(value, 4) for name, value in speed.items()},
        "checkpoint": {name: round(value, 2) for name, value in checkpoint(job, hardware).items()},
        "text_10_tb": {name: round(value, 1) for name, value in corpus.items()},
    }


def counts(model: GPTConfig) -> dict[str, int]:
    """Count parameters: all, those of a block, and Muon's (the blocks' matrices); and the operations per token."""
    with torch.device("meta"):
        built = GPTModel(model)
    block = sum(p.numel() for p in built.trf_blocks[0].parameters())
    matrices = sum(p.numel() for p in built.trf_blocks.parameters() if p.dim() == 2)
    return {
        "all": built.n_parameters(),
        "block": block,
        "matrices": matrices,
        "flops_per_token": flops_per_token(model),
    }


def activation_bytes_per_token(model: GPTConfig, bfloat16: bool) -> float:
    """Return what autograd saves of one block per token, without weights (and their copies in bfloat16)."""
    few = dataclasses.replace(model, context_length=PROBE_TOKENS, n_layers=1)
    block = TransformerBlock(few)
    rotation = rotary_tables(few) if model.arch == "modern" else None
    x = torch.randn(1, PROBE_TOKENS, model.emb_dim, requires_grad=True)
    shapes = {tuple(p.shape) for p in block.parameters() if p.dim() == 2}
    shapes |= {shape[::-1] for shape in shapes}
    saved: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in shapes and tensor.numel() >= PROBE_TOKENS:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        out = block(x, rotation)
    assert out.requires_grad
    return sum(saved.values()) / PROBE_TOKENS


def memory(job: Job) -> dict[str, float]:
    """Return the bytes on each GPU by their use; the peak is that of the backward pass or of the optimizer's step."""
    n = counts(job.model)
    n_shards = job.n_gpus if job.parallel == "fsdp" else 1
    rest, state = n["all"] - n["block"] * job.model.n_layers, 2 * FLOAT * n["all"]
    if job.optimizer == "muon":
        state = FLOAT * n["matrices"] + 2 * FLOAT * (n["all"] - n["matrices"])
    found: dict[str, float] = {
        "weights": FLOAT * n["all"] / n_shards,
        "gradients": FLOAT * n["all"] / n_shards,
        "optimizer": state / n_shards,
    }
    found["gathered"] = 0.0
    if job.parallel == "fsdp":  # two blocks and one's gradients, and all that is no block with its gradients
        found["gathered"] = 2 * job.product_bytes * n["block"] + 2 * FLOAT * n["block"] + 2 * FLOAT * rest
    elif job.bfloat16:  # autocast's copies
        found["gathered"] = HALF * n["matrices"]
    per_block = activation_bytes_per_token(job.model, job.bfloat16)
    between = FLOAT * job.model.emb_dim  # the residual stream between blocks, per token
    n_saved = 1 if job.activation_checkpointing else job.model.n_layers
    tokens = job.tokens_per_micro_step
    after = 2 * between + (HALF * job.model.emb_dim if job.bfloat16 else 0)  # the last norm, and the loss's gradient
    found["activations"] = tokens * (n_saved * per_block + (job.model.n_layers - n_saved) * between + after)
    n_logits = job.model.padded_vocab_size
    n_rows = min(max(CHUNK_BYTES["cuda"] // (4 * n_logits), 64), tokens)
    found["logits"] = n_rows * n_logits * (2 * job.product_bytes + FLOAT)
    found["muon"] = 0.0
    if job.optimizer == "muon":  # it steps all matrices of one shape at once
        largest = max(shape[0] * shape[1] for shape in muon_shapes(job.model))
        found["muon"] = job.model.n_layers * largest * (2 * FLOAT + 3 * job.product_bytes)
    static = sum(found[name] for name in ("weights", "gradients", "optimizer"))
    found["peak"] = static + max(found["gathered"] + found["activations"] + found["logits"], found["muon"])
    return found


def muon_shapes(model: GPTConfig) -> list[tuple[int, int]]:
    """Return the shapes of one block's matrices."""
    with torch.device("meta"):
        block = TransformerBlock(model)
    return [(p.shape[0], p.shape[1]) for p in block.parameters() if p.dim() == 2]


def traffic(job: Job) -> dict[str, float]:
    """Return the bytes that each process sends in a step.

    In a ring each collective over W processes moves (W - 1) / W of its tensor. An all-reduce moves it twice; so does a
    reduce-scatter by gloo, as its traffic shows (parallel_overhead.py).
    """
    n, share = counts(job.model), (job.n_gpus - 1) / job.n_gpus
    if job.parallel == "ddp":
        return {"gradients": 2 * share * FLOAT * n["all"]}
    blocks = n["block"] * job.model.n_layers
    gathered = 2 * share * (job.product_bytes * blocks + FLOAT * (n["all"] - blocks))  # forward and backward
    found = {
        "weights": job.grad_accum_steps * gathered,
        "gradients": job.grad_accum_steps * share * FLOAT * n["all"] * (2 if job.backend == "gloo" else 1),
    }
    if job.optimizer == "muon":
        found["muon"] = share * FLOAT * n["matrices"]
    return found


def muon_flops(model: GPTConfig) -> float:
    """Return the operations of one step on each GPU: every GPU computes every matrix."""
    sides = [(min(shape), max(shape)) for shape in muon_shapes(model)]
    return model.n_layers * NEWTON_SCHULZ_STEPS * sum(4 * short**2 * long + 2 * short**3 for short, long in sides)


def step(job: Job, hardware: Hardware) -> dict[str, float]:
    """Return the seconds of a step and tokens per second: arithmetic and traffic overlap, and the longer one counts."""
    flops = counts(job.model)["flops_per_token"] * job.tokens_per_step / job.n_gpus
    flops *= 4 / 3 if job.activation_checkpointing else 1
    compute_s = flops / (hardware.mfu * hardware.tflops * 1e12)
    muon_s = muon_flops(job.model) / (hardware.mfu * hardware.tflops * 1e12) if job.optimizer == "muon" else 0.0
    by = traffic(job)
    gather_s = by.pop("muon", 0.0) / (hardware.link_gb_per_s * 1e9)
    traffic_s = sum(by.values()) / (hardware.link_gb_per_s * 1e9)
    step_s = max(compute_s, traffic_s) + muon_s + gather_s
    parts = {"compute_s": compute_s, "traffic_s": traffic_s, "optimizer_s": muon_s + gather_s, "step_s": step_s}
    return parts | {"tokens_per_s": job.tokens_per_step / step_s}


def checkpoint(job: Job, hardware: Hardware) -> dict[str, float]:
    """Return the bytes of a checkpoint, and the seconds that training waits and that writing it beside training takes."""
    n_bytes = memory(dataclasses.replace(job, parallel="ddp"))
    size = n_bytes["weights"] + n_bytes["optimizer"]
    wait_s = size / (hardware.link_gb_per_s * 1e9) if job.parallel == "fsdp" else size / 20e9  # gathered, or copied
    return {
        "bytes": size,
        "training_waits_s": wait_s,
        "written_in_s": size / (hardware.disk_gb_per_s * 1e9) + size / HASH_BYTES_PER_S,
        "host_memory_bytes_on_main": size,
        "host_memory_bytes_at_resume_a_process": size,
    }


def data(
    text_bytes: float, vocab_size: int, chars_per_token: float, tokens_per_s: float, n_workers: int
) -> dict[str, float]:
    """Return tokens, disk and time for a Japanese text of so many bytes (2.9 per character, as in Aozora Bunko)."""
    n_tokens = text_bytes / 2.9 / chars_per_token
    return {
        "tokens": n_tokens,
        "token_shards_bytes": n_tokens * (2 if vocab_size <= 1 << 16 else 4),
        "tokenizing_hours": text_bytes / TOKENIZE_BYTES_PER_S / n_workers / 3600,
        "shards_of_1_gb_of_text": text_bytes / 1e9,
        "days_of_one_pass": n_tokens / tokens_per_s / 86_400,
    }


if __name__ == "__main__":
    run_command(ScalingConfig, main)
