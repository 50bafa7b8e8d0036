"""Measure what torchrun costs one process, and what several send in a step against what calculator/scaling.py counts.

Overhead: the same run, started plainly and by torchrun with one process, in turns; the median tokens/s of the reports.
Traffic: runs of a few and of more steps, each in a network namespace of its own whose loopback counts the bytes; the
difference is the traffic of the steps between (Linux, as root). Size: the tensors of the last checkpoint. Activations:
how much the peak of PyTorch's allocator, as its profiler records it, grows with each token of a batch.

    python benchmarks/parallel_overhead.py --data_dir dataset/sample_001 --tokenizer_path dataset/sample/tokenizer
"""

import itertools
import re
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from calculator import scaling
from machine import log, output_of, read_metrics, script, torchrun, versions, write_result

from gpt_model import GPTConfig, GPTModel
from gptkit.base.cli import run_command, setting
from gptkit.base.paths import existing_path
from gptkit.text.tokenizer import load_sentencepiece
from gptkit.training.checkpoints import find_checkpoints
from gptkit.training.compilation import Loss, make_loss

DIMENSIONS: dict[str, Any] = {"n_layers": 3, "emb_dim": 192, "n_heads": 3, "context_length": 128}
QUIET = {"print_sample_iter": 10_000, "save_ckpt_freq": 10_000, "eval_iter": 1, "bigram_steps": 0}
ON_CPU = {"device": "cpu", "dtype": "float32"}
FEW_STEPS, MORE_STEPS = 3, 13
LEAST_SPEED, MOST_DIFFERENCE = 0.97, 0.05
JOBS = (
    ("ddp", 2, "muon", 2),
    ("ddp", 4, "adamw", 1),
    ("fsdp", 2, "muon", 2),
    ("fsdp", 2, "adamw", 1),
    ("fsdp", 4, "muon", 1),
)


@dataclass(frozen=True, kw_only=True)
class ParallelOverheadConfig:
    """Measure the cost of torchrun, and the traffic of several processes."""

    data_dir: str = setting(help="small text shards")
    tokenizer_path: str = setting(help="a SentencePiece model")
    n_rounds: int = setting(5, "runs of each kind for the overhead", at_least=1)
    n_steps: int = setting(60, "steps of each of these runs", at_least=20)


def main(config: ParallelOverheadConfig) -> None:
    existing_path(config.data_dir, "--data_dir")
    model = GPTConfig(load_sentencepiece(config.tokenizer_path).vocab_size, arch="modern", **DIMENSIONS)
    traffic: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for parallel, n, optimizer, accum in JOBS:
            job = scaling.Job(model, n, parallel, 2, accum, optimizer, bfloat16=False, backend="gloo")
            traffic |= measure_traffic(config, Path(folder), job)
        overhead = measure_overhead(config, Path(folder))
    activations = measure_activations(model)
    is_near = {
        key: all(abs(found[key] - 1) <= MOST_DIFFERENCE for found in traffic.values())
        for key in ("ratio", "checkpoint_to_calculated")
    }
    result = {
        "dimensions": DIMENSIONS,
        "versions": versions("torch"),
        "overhead": overhead,
        "traffic": traffic,
        "activations": activations,
        "goals": {
            f"torchrun at least {LEAST_SPEED:g} times as fast": overhead["torchrun_to_plain"] >= LEAST_SPEED,
            "traffic within 5 % of the calculated": is_near["ratio"],
            "checkpoint within 5 % of the calculated": is_near["checkpoint_to_calculated"],
            "activations within 5 % of the calculated": all(
                abs(found["ratio"] - 1) <= MOST_DIFFERENCE for found in activations.values()
            ),
        },
    }
    write_result("parallel_overhead", result)


def measure_overhead(config: ParallelOverheadConfig, work_dir: Path) -> dict[str, Any]:
    """Return the tokens/s of plain runs and of runs by torchrun with one process."""
    speeds: dict[str, list[float]] = {"plain": [], "torchrun": []}
    for i in range(config.n_rounds):
        for name in list(speeds)[:: 1 if i % 2 else -1]:
            output = work_dir / f"{name}_{i}"
            command = pretraining(config, output, batch_size=8, max_steps=config.n_steps, eval_freq=10)
            run_quietly(command if name == "plain" else torchrun(1, command))
            speeds[name].append(tokens_per_s(output))
            log(f"{name}: {speeds[name][-1]:.1f} tokens/s")
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    return {"tokens_per_s": speeds, "torchrun_to_plain": round(medians["torchrun"] / medians["plain"], 4)}


def measure_traffic(config: ParallelOverheadConfig, work_dir: Path, job: scaling.Job) -> dict[str, Any]:
    """Return the bytes that a job sends in a step and saves, against the calculated ones."""
    name = f"{job.parallel}, {job.n_gpus} processes, {job.optimizer}, {job.grad_accum_steps} micro-steps"
    sent = []
    for n_steps in (FEW_STEPS, MORE_STEPS):
        output = work_dir / f"{name}_{n_steps}"
        flags: dict[str, object] = {
            "batch_size": job.batch_size,
            "grad_accum_steps": job.grad_accum_steps,
            "max_steps": n_steps,
        }
        flags |= {"optimizer": job.optimizer, "parallel": job.parallel, "eval_freq": 10_000}
        sent.append(bytes_sent(torchrun(job.n_gpus, pretraining(config, output, **flags))))
    measured = (sent[1] - sent[0]) / (MORE_STEPS - FEW_STEPS)
    calculated = job.n_gpus * sum(scaling.traffic(job).values())
    saved = sum(path.stat().st_size for path in find_checkpoints(output)[-1].glob("*.safetensors"))
    found = {
        "bytes_a_step": round(measured),
        "calculated": round(calculated),
        "ratio": round(measured / calculated, 4),
        "checkpoint_to_calculated": round(saved / scaling.checkpoint(job, scaling.Hardware())["bytes"], 4),
    }
    log(f"{name}: {found}")
    return {name: found}


def measure_activations(model: GPTConfig) -> dict[str, Any]:
    """Return the bytes that a token's activations take, against the calculated ones."""
    found = {}
    for name, bfloat16 in (("float32", False), ("bfloat16", True)):
        built = GPTModel(model)
        loss = make_loss(built, built.hidden_states, model.vocab_size)
        few, more = (peak_bytes(loss, batch_size, model, bfloat16) for batch_size in (4, 20))
        measured = (more - few) / (16 * model.context_length)
        job = scaling.Job(model, 1, "ddp", 1, bfloat16=bfloat16)
        calculated = scaling.memory(job)["activations"] / model.context_length
        ratio = round(measured / calculated, 4)
        found[name] = {"bytes_a_token": round(measured), "calculated": round(calculated), "ratio": ratio}
        log(f"activations, {name}: {found[name]}")
    return found


def pretraining(config: ParallelOverheadConfig, output: Path, **flags: object) -> list[str]:
    """Return the command line of a run."""
    where = {"data_dir": config.data_dir, "pretokenized_dir": output.parent / "tokens", "output_dir": output}
    tokenizer = {"tokenizer": "sentencepiece", "tokenizer_path": config.tokenizer_path}
    flags = {**where, **tokenizer, **DIMENSIONS, **QUIET, **ON_CPU, **flags}
    return [*script("pretraining.py", **flags), "--use_pretokenized"]


def run_quietly(command: list[str]) -> str:
    """Run a command on the loopback, with one thread in each process, and return its standard output."""
    return output_of(command, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")


def tokens_per_s(output: Path) -> float:
    """Return the median of a run's reports except the first."""
    return statistics.median(report["tokens_per_s"] for report in read_metrics(output)[1:])


def bytes_sent(command: list[str]) -> int:
    """Run a command and return the bytes that all its processes sent, counted by the loopback of a new namespace."""
    inside = 'ip link set lo up && "$@" >&2 && cat /proc/net/dev'
    match = re.search(r"lo:\s*(\d+)", run_quietly(["unshare", "-n", "sh", "-c", inside, "sh", *command]))
    assert match
    return int(match[1])


def peak_bytes(loss: Loss, batch_size: int, model: GPTConfig, bfloat16: bool) -> int:
    """Return the most bytes that were allocated within one micro-step."""
    ids = torch.randint(model.vocab_size, (batch_size, model.context_length + 1))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            found = loss(inputs, targets)
        found.backward()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(n_bytes for _, n_bytes in changes))


if __name__ == "__main__":
    run_command(ParallelOverheadConfig, main)
