"""SIGKILLs at random moments of a small run, during saves too: the same command goes on, the end is the same bytes.

For AdamW, Muon and GaLore in turn, with dropout, two micro-steps a step, and two epochs. Each run is killed again and
again, every second time while a checkpoint is being written (its temporary folder is there before the kill and after
it), else at a random moment from the process's start on; a run that ends is compared with one that was never killed,
and another begins. Needs galore-torch.

    python benchmarks/run_kills.py --data_dir dataset/sample_001 --tokenizer_path dataset/sample/tokenizer
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import ROOT, say, versions, write_result

from gptkit.training.checkpoints import DamagedCheckpoint, find_checkpoints, verify

SETTINGS = {
    "n_layers": 1, "emb_dim": 32, "n_heads": 2, "context_length": 32, "drop_rate": 0.1, "device": "cpu",
    "batch_size": 4, "grad_accum_steps": 2, "n_epochs": 2, "lr": 0.003, "eval_iter": 2, "eval_freq": 10,
    "save_ckpt_freq": 10, "print_sample_iter": 100,
}  # fmt: skip
OPTIMIZERS = ("adamw", "muon", "galore_adamw")
MOST_SECONDS = 12.0  # of a session before a kill at a random moment
COMPARED = ("model.safetensors", "training.safetensors")


def command(options: argparse.Namespace, optimizer: str, output: Path) -> list[str]:
    line = [sys.executable, str(ROOT / "pretraining.py"), "--data_dir", str(options.data_dir), "--optimizer", optimizer]
    line += ["--tokenizer", "sentencepiece", "--tokenizer_path", str(options.tokenizer_path), "--use_pretokenized"]
    line += ["--pretokenized_dir", str(output.parent / "tokens"), "--output_dir", str(output)]
    return line + [str(part) for name, value in SETTINGS.items() for part in (f"--{name}", value)]


def is_saving(output: Path) -> bool:
    return output.is_dir() and any(
        entry.name.startswith(".step_") and entry.name.endswith(".partial") for entry in os.scandir(output)
    )


def outcome(output: Path) -> list[Any]:
    """What must be the same: the bytes of the last checkpoint, and the reports but for the clock's part."""
    last = find_checkpoints(output)[-1]
    verify(last)
    reports = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for report in reports:
        del report["tokens_per_s"], report["elapsed_s"]
    return [last.name, *((last / name).read_bytes() for name in COMPARED), reports]


def session(line: list[str], output: Path, during_save: bool, draw: random.Random) -> str:
    """Run until the kill; "killed", "killed in a save", or "ended"."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    n_to_pass = draw.randrange(1, 8)  # saves that are let go by
    deadline = time.monotonic() + (60 if during_save else draw.uniform(0, MOST_SECONDS))
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


def soak(options: argparse.Namespace, optimizer: str, work: Path, draw: random.Random) -> dict[str, Any]:
    whole = work / f"{optimizer}_whole"
    subprocess.run(command(options, optimizer, whole), check=True, stdout=subprocess.DEVNULL)
    expected = outcome(whole)
    output = work / f"{optimizer}_killed"
    line = command(options, optimizer, output)
    counts = {"killed": 0, "killed in a save": 0, "ended": 0}
    n_equal = n_damaged = 0
    while counts["killed"] + counts["killed in a save"] < options.n_kills // len(OPTIMIZERS):
        during_save = counts["killed in a save"] <= counts["killed"]
        what = session(line, output, during_save, draw)
        counts[what] += 1
        for checkpoint in find_checkpoints(output) if output.is_dir() else []:
            try:
                verify(checkpoint)
            except DamagedCheckpoint:
                n_damaged += 1
        if what == "ended":
            n_equal += outcome(output) == expected
            shutil.rmtree(output)
        say(f"{optimizer}: {counts}, {n_damaged} damaged checkpoints")
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    counts["ended"] += 1
    n_equal += outcome(output) == expected
    return {**counts, "ends_equal_to_the_run_never_killed": n_equal, "damaged_checkpoints": n_damaged}


def main() -> None:
    parser = argparse.ArgumentParser(description="SIGKILLs at random moments, and the bytes at the end")
    parser.add_argument("--data_dir", type=Path, required=True, help="small text shards")
    parser.add_argument("--tokenizer_path", type=Path, required=True, help="a SentencePiece model")
    parser.add_argument("--n_kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        found = {name: soak(options, name, Path(folder), draw) for name in OPTIMIZERS}
    total = {key: sum(each[key] for each in found.values()) for key in found["adamw"]}
    result = {
        "settings": SETTINGS,
        "versions": versions("torch", "safetensors", "galore-torch"),
        "by_optimizer": found,
        "total": total,
        "goals": {
            "at least 60 kills": total["killed"] + total["killed in a save"] >= 60,
            "at least 20 of them in a save": total["killed in a save"] >= 20,
            "each end byte-identical": total["ends_equal_to_the_run_never_killed"] == total["ended"],
            "no checkpoint damaged": total["damaged_checkpoints"] == 0,
        },
    }
    write_result("run_kills", result)


if __name__ == "__main__":
    main()
