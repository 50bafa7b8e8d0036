"""Kill a small run by SIGKILL at random moments, during saves too: the same command must end with the same bytes.

This is done for AdamW, Muon and GaLore in turn, with dropout, two micro-steps per step, and two epochs, and then for
the ingredients of the recipe for many epochs: averaged weights, decay of everything by a schedule, documents in a new
order, replaced tokens, shared characters, and a teacher. Each run is killed again and again, every second time while a
checkpoint is being written (its temporary folder is there before the kill and after it), and otherwise at a random moment
after the process started. A run that ends is compared with one that was never killed, and another begins. Needs
galore-torch.

    python benchmarks/checks/run_kills.py --data_dir dataset/sample_001 --tokenizer_path dataset/sample/tokenizer
"""

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _path  # noqa: F401  it lets the modules of benchmarks/ be imported
from machine import log, read_metrics, script, versions, write_result

from gptkit.base.cli import run_command, setting
from gptkit.base.paths import existing_path
from gptkit.training.checkpoints import DamagedCheckpoint, find_checkpoints, verify_checkpoint

SETTINGS = {
    "n_layers": 1, "emb_dim": 32, "n_heads": 2, "context_length": 32, "drop_rate": 0.1, "device": "cpu",
    "batch_size": 4, "grad_accum_steps": 2, "n_epochs": 2, "lr": 0.003, "eval_iter": 2, "eval_freq": 10,
    "save_ckpt_freq": 10, "print_sample_iter": 100,
}  # fmt: skip
TEACHER, MANY_EPOCHS = "adamw", "many epochs"
RUNS: dict[str, dict[str, object]] = {
    TEACHER: {"optimizer": "adamw"},
    "muon": {"optimizer": "muon"},
    "galore_adamw": {"optimizer": "galore_adamw"},
    MANY_EPOCHS: {
        "optimizer": "muon", "average_epochs": 0.3, "weight_decay": 2, "embedding_decay": 2, "decay_schedule": "dip",
        "cautious_decay": True, "muon_scaling": "neurons", "momentum_warmup": 20, "shuffle": "documents",
        "replace_rate": 0.05, "further_tokens": 0.3, "lr_schedule": "linear", "distill_weight": 0.5,
    },
}  # fmt: skip
MAX_SESSION_S = 12.0  # before a kill at a random moment
COMPARED = ("model.safetensors", "training.safetensors", "averaged.safetensors")


@dataclass(frozen=True, kw_only=True)
class RunKillsConfig:
    """Kill runs at random moments, and compare the bytes at the end."""

    data_dir: str = setting(help="small text shards")
    tokenizer_path: str = setting(help="a SentencePiece model")
    n_kills: int = setting(80, "kills of all runs together", at_least=4)
    seed: int = setting(0, "seed of the moments")


def main(config: RunKillsConfig) -> None:
    existing_path(config.data_dir, "--data_dir")
    existing_path(config.tokenizer_path, "--tokenizer_path")
    draw = random.Random(config.seed)
    with tempfile.TemporaryDirectory() as folder:
        found = {name: soak(config, name, Path(folder), draw) for name in RUNS}
    total = {key: sum(each[key] for each in found.values()) for key in found[TEACHER]}
    result = {
        "settings": SETTINGS,
        "versions": versions("torch", "safetensors", "galore-torch"),
        "runs": RUNS,
        "by_run": found,
        "total": total,
        "goals": {
            "at least 20 kills of each": all(
                each["killed"] + each["killed in a save"] >= 20 for each in found.values()
            ),
            "at least 20 of them in a save": total["killed in a save"] >= 20,
            "each end byte-identical": total["ends_equal_to_the_run_never_killed"] == total["ended"],
            "no checkpoint damaged": total["damaged_checkpoints"] == 0,
        },
    }
    write_result("run_kills", result)


def soak(config: RunKillsConfig, name: str, work_dir: Path, draw: random.Random) -> dict[str, Any]:
    """Kill runs of one kind; return how often, and how many ended with the bytes of the run never killed."""
    unkilled, output = work_dir / f"{name}_whole", work_dir / f"{name}_killed"
    subprocess.run(pretraining(config, name, unkilled), check=True, stdout=subprocess.DEVNULL)
    expected = outcome(unkilled)
    command = pretraining(config, name, output)
    counts = {"killed": 0, "killed in a save": 0, "ended": 0}
    n_equal = n_damaged = 0
    while counts["killed"] + counts["killed in a save"] < config.n_kills // len(RUNS):
        during_save = counts["killed in a save"] <= counts["killed"]
        end = run_until_kill(command, output, during_save, draw)
        counts[end] += 1
        for checkpoint in find_checkpoints(output) if output.is_dir() else []:
            try:
                verify_checkpoint(checkpoint)
            except DamagedCheckpoint:
                n_damaged += 1
        if end == "ended":
            n_equal += outcome(output) == expected
            shutil.rmtree(output)
        log(f"{name}: {counts}, {n_damaged} damaged checkpoints")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    counts["ended"] += 1
    n_equal += outcome(output) == expected
    return {**counts, "ends_equal_to_the_run_never_killed": n_equal, "damaged_checkpoints": n_damaged}


def run_until_kill(command: list[str], output: Path, during_save: bool, draw: random.Random) -> str:
    """Run the command until the kill; return "killed", "killed in a save", or "ended"."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    n_to_pass = draw.randrange(1, 8)  # the kill comes in this save
    deadline = time.monotonic() + (60 if during_save else draw.uniform(0, MAX_SESSION_S))
    was_saving = False
    while process.poll() is None and time.monotonic() < deadline:
        saving = during_save and is_saving(output)
        n_to_pass -= saving and not was_saving
        if n_to_pass == 0:
            break
        was_saving = saving
        if not during_save:
            time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    errors = (process.communicate()[1] or b"").decode()
    if process.returncode == 0:
        return "ended"
    assert process.returncode == -signal.SIGKILL, errors
    return "killed in a save" if is_saving(output) else "killed"


def pretraining(config: RunKillsConfig, name: str, output: Path) -> list[str]:
    """Return the command line of a run of that kind."""
    where = {"data_dir": config.data_dir, "pretokenized_dir": output.parent / "tokens", "output_dir": output}
    tokenizer = {"tokenizer": "sentencepiece", "tokenizer_path": config.tokenizer_path}
    flags = {**SETTINGS, **RUNS[name]}
    if name == MANY_EPOCHS:
        flags["distill_from"] = output.parent / f"{TEACHER}_whole"
    return [*script("pretraining.py", **where, **tokenizer, **flags), "--use_pretokenized"]


def is_saving(output: Path) -> bool:
    """Return whether a checkpoint's temporary folder is there."""
    return output.is_dir() and any(
        entry.name.startswith(".step_") and entry.name.endswith(".partial") for entry in os.scandir(output)
    )


def outcome(output: Path) -> list[Any]:
    """Return what must be the same: the bytes of the last checkpoint, and the reports except for the clock's fields."""
    last = find_checkpoints(output)[-1]
    verify_checkpoint(last)
    reports = read_metrics(output)
    for report in reports:
        del report["tokens_per_s"], report["elapsed_s"]
    files = {name: (last / name).read_bytes() for name in COMPARED if (last / name).exists()}
    return [last.name, files, reports]


if __name__ == "__main__":
    run_command(RunKillsConfig, main)
