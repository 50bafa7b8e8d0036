"""Take standard streams away from commands at random moments: no work may be lost, and the exit code must be right.

Standard output and standard error go to a pipe or a terminal each, or share one. One or both are closed before the
command begins, or lose their reader at a random moment, as when `tee` is killed or a terminal is closed. A run of
pretraining.py then ends by itself or by a signal, which must save; it is resumed, and its end compared with a run that
lost nothing. pretokenize.py, train_tokenizer.py, evaluate_model.py and export_hf.py must leave what they leave alone.

    python benchmarks/checks/lost_streams.py --data_dir dataset/sample_001 --tokenizer_path dataset/sample/tokenizer
"""

import dataclasses
import json
import os
import pty
import random
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _path  # noqa: F401  it lets the modules of benchmarks/ be imported
from machine import SAMPLE, log, read_metrics, script, versions, write_result

from gptkit.base.cli import run_command, setting
from gptkit.base.paths import existing_path
from gptkit.training.checkpoints import find_checkpoints, verify_checkpoint
from gptkit.training.signals import EXIT_STOPPED

RUN = {
    "n_layers": 1, "emb_dim": 32, "n_heads": 2, "context_length": 32, "drop_rate": 0.1, "device": "cpu",
    "batch_size": 4, "grad_accum_steps": 2, "max_steps": 600, "lr": 0.003, "eval_iter": 2, "eval_freq": 10,
    "save_ckpt_freq": 1000, "print_sample_iter": 100,
}  # fmt: skip
PATHS = ("data_dir", "tokenizer_path")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True)
class LostStreamsConfig:
    """Take standard streams away from commands at random moments, and compare what they leave."""

    data_dir: str = setting(help="small text shards")
    tokenizer_path: str = setting(help="a SentencePiece model")
    n_runs: int = setting(30, "runs of pretraining.py", at_least=1)
    n_each: int = setting(5, "runs of each other command", at_least=1)
    seed: int = setting(0, "seed of the moments")


class Reader:
    """What reads a stream of a command, through a pipe or a terminal, until it leaves."""

    def __init__(self, kind: str) -> None:
        self._source, self.target = pty.openpty() if kind == "terminal" else os.pipe()
        self._left = threading.Event()
        self.received = b""
        os.set_blocking(self._source, False)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._left.is_set():
            try:
                self.received += os.read(self._source, 1 << 16)
            except BlockingIOError:
                pass
            except OSError:  # the last writer of a terminal has left
                break
            self._left.wait(0.02)
        os.close(self._source)

    def leave(self) -> None:
        """Leave, as a killed `tee` or a closed terminal does; wait until that has happened."""
        self._left.set()
        self._thread.join()


def main(config: LostStreamsConfig) -> None:
    data, tokenizer = (str(existing_path(getattr(config, name), f"--{name}").resolve()) for name in PATHS)
    config = dataclasses.replace(config, data_dir=data, tokenizer_path=tokenizer)  # commands run in other folders
    draw = random.Random(config.seed)
    with tempfile.TemporaryDirectory() as folder:
        found = {"pretraining": check_pretraining(config, Path(folder), draw)}
        experiment = Path(folder) / "whole"
        for name, command in other_commands(config, experiment).items():
            found[name] = check_command(name, command, config.n_each, Path(folder), draw)
    result = {
        "settings": RUN,
        "versions": versions("torch"),
        "by_command": found,
        "goals": {
            "at least 30 runs of pretraining": found["pretraining"]["runs"] >= 30,
            "no work lost": all(each["lost"] == 0 for each in found.values()),
            "each exit code right": all(each["wrong_codes"] == 0 for each in found.values()),
            "run.log whole": found["pretraining"]["broken_logs"] == 0,
        },
    }
    write_result("lost_streams", result)


def run_losing(command: list[str], seconds: float, number: int | None, cwd: Path, draw: random.Random) -> Any:
    """Run a command that loses streams within so many seconds, then receives a signal if `number` is one.

    Returns its exit code, what was read of standard output and how the streams were lost.
    """
    shared = draw.random() < 0.5
    kinds = [draw.choice(("pipe", "terminal")) for _ in range(1 if shared else 2)]
    readers = [Reader(kind) for kind in kinds]
    targets = [readers[0].target, readers[-1].target]
    closed = [d for d in (1, 2) if draw.random() < 0.5] if draw.random() < 0.3 else []

    def prepare() -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        for descriptor in closed:
            os.close(descriptor)

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=cwd,
        stdout=targets[0],
        stderr=targets[1],
        preexec_fn=prepare,  # noqa: PLW1509  the threads only read
    )
    for target in set(targets):
        os.close(target)
    time.sleep(draw.uniform(0, seconds))
    losing = [] if closed else draw.sample(readers, draw.randint(1, len(readers)))
    for reader in losing:
        reader.leave()
    if number is not None:
        time.sleep(draw.uniform(0, seconds / 2))
        process.send_signal(number)
    code = process.wait(timeout=300)
    time.sleep(0.1)  # until the readers have read the rest
    for reader in readers:
        reader.leave()
    how = (
        f"{'one' if shared else 'each its'} {'/'.join(kinds)}, {closed or len(losing)} {'closed' if closed else 'lost'}"
    )
    return code, readers[0].received, how


def check_pretraining(config: LostStreamsConfig, folder: Path, draw: random.Random) -> dict[str, int]:
    """Run pretraining.py again and again; count what went wrong."""
    where = {"data_dir": config.data_dir, "pretokenized_dir": folder / "tokens"}
    tokenizer = {"tokenizer": "sentencepiece", "tokenizer_path": config.tokenizer_path}

    def command(output: Path) -> list[str]:
        return [*script("pretraining.py", output_dir=output, **where, **tokenizer, **RUN), "--use_pretokenized"]

    def outcome(output: Path) -> list[bytes]:
        last = find_checkpoints(output)[-1]
        verify_checkpoint(last)
        return [(last / name).read_bytes() for name in ("model.safetensors", "training.safetensors")]

    start = time.monotonic()
    subprocess.run(command(folder / "whole"), check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - start
    expected = outcome(folder / "whole")
    counts = {"runs": 0, "signalled": 0, "lost": 0, "wrong_codes": 0, "broken_logs": 0}
    while counts["runs"] < config.n_runs:
        output = folder / f"run_{counts['runs']}"
        number = draw.choice((None, *SIGNALS))
        code, _, how = run_losing(command(output), 0.7 * seconds, number, folder, draw)
        right = [0] if number is None else [EXIT_STOPPED, 0]  # 0: it had ended by then
        if number is not None and not read_metrics(output):
            right += [-number, 130]  # it had not begun to train
        counts["wrong_codes"] += code not in right
        counts["broken_logs"] += code in (0, EXIT_STOPPED) and output.exists() and not is_whole(output, code)
        counts["signalled"] += code == EXIT_STOPPED
        if code == EXIT_STOPPED and read_metrics(output):
            counts["lost"] += not find_checkpoints(output)
        subprocess.run(command(output), check=True, stdout=subprocess.DEVNULL)
        counts["lost"] += outcome(output) != expected
        counts["runs"] += 1
        log(f"pretraining, {how}, signal {number}: exit code {code}; {counts}")
    return counts


def is_whole(output: Path, code: int) -> bool:
    """Return whether run.log has all reports and the last line, and no carriage return or progress bar."""
    logged = (output / "run.log").read_bytes().decode()
    lines = logged.splitlines()
    reported = [line.split("step ")[1].split("/")[0] for line in lines if line.startswith("epoch ")]
    last = lines[-1].startswith("stopped by") if code == EXIT_STOPPED else "finished" in lines[-1]
    steps = [str(record["step"]) for record in read_metrics(output)]
    return last and reported == steps and not any(mark in logged for mark in ("\r", "%|", "Traceback"))


def other_commands(config: LostStreamsConfig, experiment: Path) -> dict[str, tuple[list[str], str]]:
    """Return each command, without its output folder's flag, and that flag ("": it prints its result)."""
    tokenizer = {"tokenizer": "sentencepiece", "tokenizer_path": config.tokenizer_path}
    text = SAMPLE / "sample.jsonl"
    return {
        "pretokenize": (script("pretokenize.py", data_dir=config.data_dir, **tokenizer), "--output_dir"),
        "train_tokenizer": (
            script("dataset/train_tokenizer.py", data_dir=config.data_dir, vocab_size=600),
            "--output_dir",
        ),
        "evaluate_model": (script("evaluate_model.py", exp_dir=experiment, text_path=text, max_chars=2000), ""),
        "export_hf": (script("export_hf.py", exp_dir=experiment), "--output_dir"),
    }


def check_command(
    name: str, command: tuple[list[str], str], n_runs: int, folder: Path, draw: random.Random
) -> dict[str, int]:
    """Run a command again and again; count what went wrong."""
    arguments, flag = command

    def of(output: Path) -> list[str]:
        return [*arguments, flag, str(output)] if flag else arguments

    def files(output: Path) -> dict[str, bytes]:
        return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}

    whole = folder / f"{name}_whole"
    start = time.monotonic()
    printed = subprocess.run(of(whole), check=True, stdout=subprocess.PIPE).stdout
    seconds = time.monotonic() - start
    counts = {"runs": 0, "lost": 0, "wrong_codes": 0}
    for i in range(n_runs):
        output, work_dir = folder / f"{name}_{i}", folder / f"{name}_{i}_work"
        work_dir.mkdir()
        code, received, how = run_losing(of(output), seconds, None, work_dir, draw)
        counts["wrong_codes"] += code != 0
        if flag:
            counts["lost"] += files(output) != files(whole)
        else:
            kept = work_dir / "evaluate_model.out"
            results = [line for line in received.splitlines() if line.startswith(b"{")]
            results += kept.read_bytes().splitlines() if kept.exists() else []
            counts["lost"] += json.loads(printed) not in map(json.loads, results)
        counts["runs"] += 1
        log(f"{name}, {how}: exit code {code}; {counts}")
    return counts


if __name__ == "__main__":
    run_command(LostStreamsConfig, main)
