"""An optimizer that is added through the registry alone: its flag, its training, its checkpoints."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, curve, environment, n_reported, newest, small_run

from gptkit.training.optimizers import OPTIMIZERS

ADDS_SGD = """
import sys
sys.path.insert(0, {root!r})
import torch
import pretraining
from gptkit.training.optimizers import OPTIMIZERS, OptimizerSpec

def build_sgd(parameters, settings, dtype):
    members = parameters.blocks + parameters.embeddings + parameters.vectors
    group = {{"params": members, "peak_lr": settings.lr, "weight_decay": settings.weight_decay}}
    return torch.optim.SGD([group], lr=settings.lr, momentum=0.9)

OPTIMIZERS["sgd"] = OptimizerSpec(
    build_sgd, default_lr=0.05, warmup_share=0.02, n_moments=1, state_keys=lambda group: ("momentum_buffer",)
)
pretraining.run_command(pretraining.PretrainingConfig, pretraining.launch)
"""


def run_with_sgd(script: Path, arguments: tuple[object, ...], kill_at: int | None = None) -> str:
    """Run pretraining.py with the added optimizer, to its end or until it has reported a step; return its output."""
    command = [sys.executable, str(script), *map(str, arguments)]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    output = Path(str(arguments[arguments.index("--output_dir") + 1]))
    deadline = time.monotonic() + 120
    while kill_at and n_reported(output) < kill_at:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if kill_at:
        process.send_signal(signal.SIGKILL)
    out, errors = process.communicate(timeout=120)
    assert kill_at or process.returncode == 0, errors
    return out


@pytest.mark.slow
def test_an_added_optimizer_trains_is_killed_and_resumes_byte_for_byte(tmp_path: Path, sample_shards: Path) -> None:
    script = tmp_path / "adds_sgd.py"
    script.write_text(ADDS_SGD.format(root=str(ROOT)), "utf-8")
    tokens = ("--pretokenized_dir", tmp_path / "tokens", "--max_steps", 80, "--lr", 1, "--weight_decay", 0)
    uninterrupted = (*small_run(sample_shards, tmp_path / "uninterrupted", "sgd"), *tokens)
    killed = (*small_run(sample_shards, tmp_path / "killed", "sgd"), *tokens)
    run_with_sgd(script, uninterrupted)
    run_with_sgd(script, killed, kill_at=50)
    assert "resuming from" in run_with_sgd(script, killed)
    for file in ("model.safetensors", "training.safetensors"):
        ours, theirs = (newest(tmp_path / name) / file for name in ("killed", "uninterrupted"))
        assert ours.read_bytes() == theirs.read_bytes(), file
    losses = [report["train_loss"] for report in curve(tmp_path / "killed")]
    assert curve(tmp_path / "killed") == curve(tmp_path / "uninterrupted")
    assert losses[-1] < losses[0]  # it trains


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_the_registry_says_of_an_optimizer_can_be(name: str) -> None:
    spec = OPTIMIZERS[name]
    assert 0 < spec.default_lr < 1
    assert 0 < spec.warmup_share < 0.5
    assert spec.n_moments in (1, 2)
