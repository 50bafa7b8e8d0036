"""Check that one run gives the same curve by 1, 2 and 4 processes, with ddp and fsdp, stopped, killed, on two machines.

Each run has the same 200 steps of 16 sequences with gradient accumulation, by torchrun and gloo on loopback. The
validation loss of every report is compared with that of one process started plainly. Then come runs that are stopped
with two processes and resumed by one and by four, one with a process killed under torchrun's --max-restarts, and one by
two agents with a rendezvous, with a process of the second killed: these last two must end with the bytes of the run
never killed.

    python benchmarks/checks/parallel_runs.py --data_dir dataset/sample_001 --tokenizer_path dataset/sample/tokenizer
"""

import os
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import _path  # noqa: F401  it lets the modules of benchmarks/ be imported
from machine import log, read_metrics, script, torchrun, versions, write_result

from gptkit.base.cli import run_command, setting
from gptkit.base.paths import existing_path
from gptkit.training.checkpoints import find_checkpoints

SETTINGS: dict[str, object] = {
    "n_layers": 2, "emb_dim": 64, "n_heads": 2, "context_length": 64, "batch_size": 4, "max_steps": 200, "n_epochs": 9, "eval_freq": 20,
    "eval_iter": 8, "save_ckpt_freq": 40, "print_sample_iter": 200, "device": "cpu", "dtype": "float32", "bigram_steps": 5,
}  # fmt: skip
SEQUENCES, KILL_AFTER = 16, 60  # sequences per step; the step whose report a kill or a stop waits for
MOST_DIFFERENCE = 1e-4  # nats per token
RESUMED = "resuming from"  # what a run prints


@dataclass(frozen=True, kw_only=True)
class ParallelRunsConfig:
    """Check that one run gives the same curve by several processes."""

    data_dir: str = setting(help="small text shards")
    tokenizer_path: str = setting(help="a SentencePiece model")


def main(config: ParallelRunsConfig) -> None:
    existing_path(config.data_dir, "--data_dir")
    existing_path(config.tokenizer_path, "--tokenizer_path")
    with tempfile.TemporaryDirectory() as folder:
        differences, bytes_equal = soak(config, Path(folder))
        losses = [report["val_loss"] for report in read_metrics(Path(folder) / "alone_muon")]
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


def soak(config: ParallelRunsConfig, work_dir: Path) -> tuple[dict[str, float], dict[str, bool]]:
    """Return the largest difference of each run, and whether the killed ones end with equal bytes."""
    differences: dict[str, float] = {}

    def compare(name: str, output: Path, optimizer: str = "muon") -> None:
        differences[name] = largest_difference(output, work_dir / f"alone_{optimizer}")
        log(f"{name}: {differences[name]:.2e}")

    for optimizer in ("muon", "adamw"):
        finish(start(pretraining(config, work_dir / f"alone_{optimizer}", 1, optimizer=optimizer)))
        for parallel in ("ddp", "fsdp"):
            for n in (1, 2, 4):
                output = work_dir / f"{optimizer}_{parallel}_{n}"
                command = pretraining(config, output, n, optimizer=optimizer, parallel=parallel)
                finish(start(torchrun(n, command)))
                compare(f"{optimizer}, {parallel}, {n} processes", output, optimizer)
    for n in (1, 4):
        for parallel in ("ddp", "fsdp"):
            compare(f"2 processes, then {n} ({parallel})", stop_and_resume(config, work_dir, n, parallel))
    bytes_equal = {}
    for name, run in (("a process killed", run_with_kill), ("two machines, a process killed", run_on_two_machines)):
        output = run(config, work_dir)
        compare(name, output)
        bytes_equal[name] = same_bytes(output, work_dir / "muon_ddp_2")
    return differences, bytes_equal


def stop_and_resume(config: ParallelRunsConfig, work_dir: Path, n_processes: int, parallel: str) -> Path:
    """Stop a run of two processes, resume it by so many, and return its folder."""
    output = work_dir / f"stopped_{n_processes}_{parallel}"
    command = pretraining(config, output, 2)
    agent = start(torchrun(2, command))
    wait_for_report(output)
    agent.send_signal(signal.SIGTERM)
    finish(agent, may_fail=True)
    assert len(read_metrics(output)) < 200 // 20
    finish(start(torchrun(n_processes, [*command, "--parallel", parallel])))
    return output


def run_with_kill(config: ParallelRunsConfig, work_dir: Path) -> Path:
    """Kill one of two processes, which torchrun starts again, and return the run's folder."""
    output = work_dir / "killed"
    agent = start(torchrun(2, pretraining(config, output, 2), "--standalone", "--max-restarts=1"))
    wait_for_report(output)
    pid = worker(agent, 1)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert RESUMED in finish(agent)
    return output


def run_on_two_machines(config: ParallelRunsConfig, work_dir: Path) -> Path:
    """Kill a process of the second of two agents, as on two machines, and return the run's folder."""
    output = work_dir / "two_machines"
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    flags = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--max-restarts=2")
    agents = [start(torchrun(1, pretraining(config, output, 2), *flags)) for _ in range(2)]
    wait_for_report(output)
    (pid,) = [pid for agent in agents if (pid := worker(agent, 1)) is not None]
    os.kill(pid, signal.SIGKILL)
    assert RESUMED in "".join(finish(agent) for agent in agents)
    return output


def pretraining(config: ParallelRunsConfig, output: Path, n_processes: int, **flags: object) -> list[str]:
    """Return the command line of the run, with as many micro-steps as give SEQUENCES."""
    accum = SEQUENCES // (4 * n_processes)
    where = {"data_dir": config.data_dir, "pretokenized_dir": output.parent / "tokens", "output_dir": output}
    tokenizer = {"tokenizer": "sentencepiece", "tokenizer_path": config.tokenizer_path}
    flags = {**SETTINGS, "grad_accum_steps": accum, **where, **tokenizer, **flags}
    return [*script("pretraining.py", **flags), "--use_pretokenized"]


def start(command: list[str]) -> subprocess.Popen[str]:
    """Start a command on the loopback, with one thread in each process."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")


def finish(process: subprocess.Popen[str], may_fail: bool = False) -> str:
    """Wait for a command's end and return its output."""
    output = process.communicate()[0]
    assert may_fail or process.returncode == 0, output
    return output


def wait_for_report(output: Path) -> None:
    """Wait until a run reports step KILL_AFTER."""
    while not any(report["step"] >= KILL_AFTER for report in read_metrics(output)):
        time.sleep(0.02)


def worker(agent: subprocess.Popen[str], rank: int) -> int | None:
    """Return the id of the process with that rank which this torchrun started, if it started it."""
    for task in Path(f"/proc/{agent.pid}/task").iterdir():
        for pid in (task / "children").read_text().split():
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return int(pid)
    return None


def largest_difference(output: Path, expected: Path) -> float:
    """Return the largest difference of the validation losses of two runs' reports."""
    found, wanted = (read_metrics(folder) for folder in (output, expected))
    assert [report["step"] for report in found] == [report["step"] for report in wanted]
    return max(abs(f["val_loss"] - w["val_loss"]) for f, w in zip(found, wanted, strict=True))


def same_bytes(output: Path, expected: Path) -> bool:
    """Return whether the last checkpoints of two runs are equal."""
    names = ("model.safetensors", "training.safetensors")
    pairs = ([find_checkpoints(folder)[-1] / name for folder in (output, expected)] for name in names)
    return all(one.read_bytes() == other.read_bytes() for one, other in pairs)


if __name__ == "__main__":
    run_command(ParallelRunsConfig, main)
