"""One run by 1, 2 and 4 processes, with ddp and fsdp, stopped, killed, on two machines: the same curve each time.

Each is the same 200 steps of 16 sequences with gradient accumulation, by torchrun and gloo on loopback; what is compared
is the validation loss of every report with that of one process started plainly. Then runs that stop with two processes
and go on with one and with four, one of whose processes is killed under torchrun's --max-restarts, and one by two agents
with a rendezvous, a process of the second killed: these last two must end with the bytes of the run never killed.

    python benchmarks/parallel_runs.py --data_dir dataset/sample_001 --tokenizer_path dataset/sample/tokenizer
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import say, script, torchrun, versions, write_result

from gptkit.training.checkpoints import find_checkpoints

SETTINGS: dict[str, object] = {
    "n_layers": 2, "emb_dim": 64, "n_heads": 2, "context_length": 64, "batch_size": 4, "max_steps": 200, "n_epochs": 9, "eval_freq": 20,
    "eval_iter": 8, "save_ckpt_freq": 40, "print_sample_iter": 200, "device": "cpu", "dtype": "float32", "bigram_steps": 5,
}  # fmt: skip
SEQUENCES, KILL_AFTER = 16, 60  # sequences a step; the step whose report a kill or a stop waits for
MOST_DIFFERENCE = 1e-4  # nats a token


def command(options: argparse.Namespace, output: Path, n_processes: int, **flags: object) -> list[str]:
    """The run, with as many micro-steps as give SEQUENCES."""
    accum = SEQUENCES // (4 * n_processes)
    where = {"data_dir": options.data_dir, "pretokenized_dir": output.parent / "tokens", "output_dir": output}
    tokenizer = {"tokenizer": "sentencepiece", "tokenizer_path": options.tokenizer_path}
    flags = {**SETTINGS, "grad_accum_steps": accum, **where, **tokenizer, **flags}
    return [*script("pretraining.py", **flags), "--use_pretokenized"]


def start(line: list[str]) -> subprocess.Popen[str]:
    variables = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(line, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")


def finish(process: subprocess.Popen[str], may_fail: bool = False) -> str:
    said = process.communicate()[0]
    assert may_fail or process.returncode == 0, said
    return said


def reports(output: Path) -> list[dict[str, Any]]:
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_kill(output: Path) -> None:
    while not any(report["step"] >= KILL_AFTER for report in reports(output)):
        time.sleep(0.02)


def worker(agent: subprocess.Popen[str], rank: int) -> int | None:
    """The id of the process with that rank which this torchrun started."""
    for task in Path(f"/proc/{agent.pid}/task").iterdir():
        for pid in (task / "children").read_text().split():
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return int(pid)
    return None


def difference(output: Path, wanted: Path) -> float:
    """The largest of all reports."""
    found, expected = (reports(folder) for folder in (output, wanted))
    assert [report["step"] for report in found] == [report["step"] for report in expected]
    return max(abs(f["val_loss"] - w["val_loss"]) for f, w in zip(found, expected, strict=True))


def same_bytes(output: Path, wanted: Path) -> bool:
    names = ("model.safetensors", "training.safetensors")
    pairs = ([find_checkpoints(folder)[-1] / name for folder in (output, wanted)] for name in names)
    return all(one.read_bytes() == other.read_bytes() for one, other in pairs)


def stopped_and_resumed(options: argparse.Namespace, work: Path, by: int, parallel: str) -> Path:
    output = work / f"stopped_{by}_{parallel}"
    line = command(options, output, 2)
    agent = start(torchrun(2, line))
    wait_for_kill(output)
    agent.send_signal(signal.SIGTERM)
    finish(agent, may_fail=True)
    assert len(reports(output)) < 200 // 20
    finish(start(torchrun(by, [*line, "--parallel", parallel])))
    return output


def killed(options: argparse.Namespace, work: Path) -> Path:
    output = work / "killed"
    agent = start(torchrun(2, command(options, output, 2), "--standalone", "--max-restarts=1"))
    wait_for_kill(output)
    pid = worker(agent, 1)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert "going on from" in finish(agent)
    return output


def two_machines(options: argparse.Namespace, work: Path) -> Path:
    output = work / "two_machines"
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    flags = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--max-restarts=2")
    agents = [start(torchrun(1, command(options, output, 2), *flags)) for _ in range(2)]
    wait_for_kill(output)
    (pid,) = [pid for agent in agents if (pid := worker(agent, 1)) is not None]
    os.kill(pid, signal.SIGKILL)
    said = "".join(finish(agent) for agent in agents)
    assert "going on from" in said
    return output


def soak(options: argparse.Namespace, work: Path) -> tuple[dict[str, float], dict[str, bool]]:
    """The largest difference of each run, and whether the killed ones end with equal bytes."""
    differences: dict[str, float] = {}

    def compare(name: str, output: Path, optimizer: str = "muon") -> None:
        differences[name] = difference(output, work / f"alone_{optimizer}")
        say(f"{name}: {differences[name]:.2e}")

    for optimizer in ("muon", "adamw"):
        finish(start(command(options, work / f"alone_{optimizer}", 1, optimizer=optimizer)))
        for parallel in ("ddp", "fsdp"):
            for n in (1, 2, 4):
                output = work / f"{optimizer}_{parallel}_{n}"
                finish(start(torchrun(n, command(options, output, n, optimizer=optimizer, parallel=parallel))))
                compare(f"{optimizer}, {parallel}, {n} processes", output, optimizer)
    for by in (1, 4):
        for parallel in ("ddp", "fsdp"):
            compare(f"2 processes, then {by} ({parallel})", stopped_and_resumed(options, work, by, parallel))
    bytes_equal = {}
    for name, run in (("a process killed", killed), ("two machines, a process killed", two_machines)):
        output = run(options, work)
        compare(name, output)
        bytes_equal[name] = same_bytes(output, work / "muon_ddp_2")
    return differences, bytes_equal


def main() -> None:
    parser = argparse.ArgumentParser(description="One run by several processes: the same curve")
    parser.add_argument("--data_dir", type=Path, required=True, help="small text shards")
    parser.add_argument("--tokenizer_path", type=Path, required=True, help="a SentencePiece model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        differences, bytes_equal = soak(options, Path(folder))
        losses = [report["val_loss"] for report in reports(Path(folder) / "alone_muon")]
    result = {
        "settings": SETTINGS | {"sequences_per_step": SEQUENCES},
        "versions": versions("torch"),
        "val_loss_first_and_last": [losses[0], losses[-1]],
        "largest_difference_of_val_loss": {name: float(f"{value:.2e}") for name, value in differences.items()},
        "bytes_equal_to_the_run_never_killed": bytes_equal,
        "goals": {
            f"each within {MOST_DIFFERENCE:g} of one process": max(differences.values()) <= MOST_DIFFERENCE,
            "killed runs end with the same bytes": all(bytes_equal.values()),
        },
    }
    write_result("parallel_runs", result)


if __name__ == "__main__":
    main()
