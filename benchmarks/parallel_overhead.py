"""What torchrun costs one process, and what several send a step against what scaling.py says they do.

Overhead: the same run, started plainly and by torchrun with one process, in turns; the median tokens/s of the reports.
Traffic: runs of a few and of more steps, each in a network namespace of its own whose loopback counts the bytes; the
difference is that of the steps between (Linux, as root). Size: the last checkpoint's tensors. Activations: how much the
peak of what PyTorch's allocator gave out, as its profiler records it, grows with each token of a batch.

    python benchmarks/parallel_overhead.py --data_dir dataset/sample_001 --tokenizer_path dataset/sample/tokenizer
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import scaling
import torch
from machine import say, script, torchrun, versions, write_result

from gpt_model import GPTConfig, GPTModel
from gptkit.text.tokenizer import load_sentencepiece
from gptkit.training.checkpoints import find_checkpoints
from gptkit.training.compilation import Loss, make_loss

DIMENSIONS: dict[str, Any] = {"n_layers": 3, "emb_dim": 192, "n_heads": 3, "context_length": 128}
QUIET = {"print_sample_iter": 10_000, "save_ckpt_freq": 10_000, "eval_iter": 1, "bigram_steps": 0}
ON = {"device": "cpu", "dtype": "float32"}
FEW, MORE = 3, 13  # steps
LEAST_SPEED, MOST_DIFFERENCE = 0.97, 0.05
JOBS = (
    ("ddp", 2, "muon", 2),
    ("ddp", 4, "adamw", 1),
    ("fsdp", 2, "muon", 2),
    ("fsdp", 2, "adamw", 1),
    ("fsdp", 4, "muon", 1),
)


def command(options: argparse.Namespace, output: Path, **flags: object) -> list[str]:
    where = {"data_dir": options.data_dir, "pretokenized_dir": output.parent / "tokens", "output_dir": output}
    tokenizer = {"tokenizer": "sentencepiece", "tokenizer_path": options.tokenizer_path}
    flags = {**where, **tokenizer, **DIMENSIONS, **QUIET, **ON, **flags}
    return [*script("pretraining.py", **flags), "--use_pretokenized"]


def said_by(line: list[str]) -> str:
    """Standard output of a command that must succeed."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.run(line, env=variables, capture_output=True, encoding="utf-8")
    if process.returncode:
        sys.exit(f"error: exit code {process.returncode}\n{process.stdout[-2000:]}\n{process.stderr[-2000:]}")
    return process.stdout


def tokens_per_s(output: Path) -> float:
    """The median of the reports but the first."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["tokens_per_s"] for line in lines[1:])


def measure_overhead(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    speeds: dict[str, list[float]] = {"plain": [], "torchrun": []}
    for i in range(options.n_rounds):
        for name in list(speeds)[:: 1 if i % 2 else -1]:
            output = work / f"{name}_{i}"
            line = command(options, output, batch_size=8, max_steps=options.n_steps, eval_freq=10)
            said_by(line if name == "plain" else torchrun(1, line))
            speeds[name].append(tokens_per_s(output))
            say(f"{name}: {speeds[name][-1]:.1f} tokens/s")
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    return {"tokens_per_s": speeds, "torchrun_to_plain": round(medians["torchrun"] / medians["plain"], 4)}


def bytes_sent(line: list[str]) -> int:
    """By all processes of a run, counted by the loopback of a new network namespace."""
    inside = 'ip link set lo up && "$@" >&2 && cat /proc/net/dev'
    match = re.search(r"lo:\s*(\d+)", said_by(["unshare", "-n", "sh", "-c", inside, "sh", *line]))
    assert match
    return int(match[1])


def measure_traffic(options: argparse.Namespace, work: Path, job: scaling.Job) -> dict[str, Any]:
    name = f"{job.parallel}, {job.n_gpus} processes, {job.optimizer}, {job.grad_accum_steps} micro-steps"
    sent = []
    for n_steps in (FEW, MORE):
        output = work / f"{name}_{n_steps}"
        flags: dict[str, object] = {
            "batch_size": job.batch_size,
            "grad_accum_steps": job.grad_accum_steps,
            "max_steps": n_steps,
        }
        flags |= {"optimizer": job.optimizer, "parallel": job.parallel, "eval_freq": 10_000}
        sent.append(bytes_sent(torchrun(job.n_gpus, command(options, output, **flags))))
    measured = (sent[1] - sent[0]) / (MORE - FEW)
    calculated = job.n_gpus * sum(scaling.traffic(job).values())
    saved = sum(path.stat().st_size for path in find_checkpoints(output)[-1].glob("*.safetensors"))
    found = {
        "bytes_a_step": round(measured),
        "calculated": round(calculated),
        "ratio": round(measured / calculated, 4),
        "checkpoint_to_calculated": round(saved / scaling.checkpoint(job, scaling.Hardware())["bytes"], 4),
    }
    say(f"{name}: {found}")
    return {name: found}


def peak_bytes(loss: Loss, batch_size: int, model: GPTConfig, bfloat16: bool) -> int:
    """The most that was allocated within one micro-step."""
    ids = torch.randint(model.vocab_size, (batch_size, model.context_length + 1))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            found = loss(inputs, targets)
        found.backward()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(n_bytes for _, n_bytes in changes))


def measure_activations(model: GPTConfig) -> dict[str, Any]:
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
        say(f"activations, {name}: {found[name]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of torchrun, and the traffic of several processes")
    parser.add_argument("--data_dir", type=Path, required=True, help="small text shards")
    parser.add_argument("--tokenizer_path", type=Path, required=True, help="a SentencePiece model")
    parser.add_argument("--n_rounds", type=int, default=5)
    parser.add_argument("--n_steps", type=int, default=60)
    options = parser.parse_args()
    model = GPTConfig(load_sentencepiece(str(options.tokenizer_path)).vocab_size, arch="modern", **DIMENSIONS)
    traffic: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for parallel, n, optimizer, accum in JOBS:
            job = scaling.Job(model, n, parallel, 2, accum, optimizer, bfloat16=False, backend="gloo")
            traffic |= measure_traffic(options, Path(folder), job)
        overhead = measure_overhead(options, Path(folder))
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


if __name__ == "__main__":
    main()
