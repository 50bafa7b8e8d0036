"""Measure pretokenize.py, text shards -> token shards, with one and two workers against transformers' AutoTokenizer.

Each runs as a process of its own, and its full time counts. They take turns, because the machines are shared and their
speed changes. AutoTokenizer's fast backend uses all cores by itself, so that its equal is two workers on a machine of
two cores. Two processes of one worker each, at the same time, show what the second core can add at all beside whatever
else the machine does. (AutoTokenizer's ids are also wrong: unknown pieces become end-of-text.) Memory is measured in
separate runs, from the high-water mark that Linux keeps for each process, on the corpus and on one of four times its
size.

    python benchmarks/pretokenize_speed.py --data_dir dataset/001 --hf_name FOLDER
"""

import importlib.util
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import end_if_failed, log, run, script, start, write_result

from gptkit.base.cli import UserError, run_command, setting
from gptkit.base.paths import existing_path

AUTO_TOKENIZER = """
import sys
from pathlib import Path
import numpy as np
from transformers import AutoTokenizer
data_dir, name, output, separator = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
with open(output, "wb") as target:
    for path in sorted(Path(data_dir).glob("*.txt")):
        documents = [text.lower() for text in path.read_text(encoding="utf-8").split(separator) if text.strip()]
        for i in range(0, len(documents), 64):
            for found in tokenizer.backend_tokenizer.encode_batch(documents[i : i + 64], add_special_tokens=False):
                np.array([*found.ids, tokenizer.eos_token_id], dtype=np.uint16).tofile(target)
"""
N_ROUNDS = 3
N_TIMES = 4  # the size of the second corpus whose memory is measured, in sizes of the first
POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class PretokenizeSpeedConfig:
    """Measure speed and memory of pretokenize.py, against AutoTokenizer."""

    data_dir: str = setting(help="text shards of prepare_aozora_jsonl.py")
    hf_name: str = setting(help="a folder with rinna's tokenizer")


def main(config: PretokenizeSpeedConfig) -> None:
    if not Path("/proc/self/status").exists():
        raise UserError("memory is read from /proc; run this on Linux")
    if importlib.util.find_spec("google") is None or importlib.util.find_spec("google.protobuf") is None:
        raise UserError("AutoTokenizer needs protobuf for rinna's tokenizer; pip install protobuf")
    data_dir = existing_path(config.data_dir, "--data_dir")
    write_result("pretokenize_speed", measure(data_dir, config.hf_name))


def measure(data_dir: Path, hf_name: str) -> dict[str, Any]:
    """Measure times and memory on the text shards of a folder."""
    manifest = json.loads((data_dir / "manifest.json").read_bytes())
    n_bytes = sum((data_dir / shard["file"]).stat().st_size for shard in manifest["shards"])
    for shard in manifest["shards"]:
        (data_dir / shard["file"]).read_bytes()  # into the disk's cache, the same for all
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        times_s = measure_times(data_dir, hf_name, manifest["separator"], folder)
        enlarge(data_dir, manifest, folder / "large")
        memory = measure_memory(data_dir, folder / "large", hf_name, folder)
    n_copies = {"two_apart": 2}  # the others tokenize the corpus once
    median_s = {name: statistics.median(values) / n_copies.get(name, 1) for name, values in times_s.items()}
    speed = {name: n_bytes / 1e6 / elapsed_s for name, elapsed_s in median_s.items()}
    two_to_one = speed["two_workers"] / speed["one_worker"]
    two_to_auto = speed["two_workers"] / speed["auto_tokenizer"]
    once, larger = worst_mib(memory, "_1x"), worst_mib(memory, f"_{N_TIMES}x")
    return {
        "input": {"bytes": n_bytes, "works": manifest["works"], "shards": len(manifest["shards"])},
        "tokenizer": Path(hf_name).name,
        "median_mb_per_s": {name: round(value, 2) for name, value in speed.items()},
        "two_workers_to_one": round(two_to_one, 2),
        "two_processes_apart_to_one": round(speed["two_apart"] / speed["one_worker"], 2),
        "two_workers_to_auto_tokenizer": round(two_to_auto, 2),
        "one_worker_to_auto_tokenizer": round(speed["one_worker"] / speed["auto_tokenizer"], 2),
        "memory": memory,
        "goals": {
            "one worker at least 11 MB/s": speed["one_worker"] >= 11,
            "two workers at least 1.7 times one": two_to_one >= 1.7,
            "two workers at least 4 times AutoTokenizer, which takes all cores": two_to_auto >= 4,
            "less than 600 MB a worker": max(once, larger) * 2**20 < 600e6,
            f"at most 10 % more memory a worker at {N_TIMES} times the corpus": larger <= 1.1 * once,
        },
        "times_s": {name: [round(value, 2) for value in values] for name, values in times_s.items()},
    }


def status_of_all() -> dict[int, dict[str, str]]:
    """Read /proc/*/status, by process id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = path.read_text().splitlines()
        except OSError:  # it has ended
            continue
        found[int(path.parent.name)] = dict(line.split(":", 1) for line in lines if ":" in line)
    return found


def descendants(pid: int, status: dict[int, dict[str, str]]) -> list[int]:
    """Return the ids of all processes below one."""
    children = [child for child, fields in status.items() if int(fields["PPid"]) == pid]
    return children + [below for child in children for below in descendants(child, status)]


def is_helper(pid: int) -> bool:
    """Return whether a process is one of multiprocessing's own, which tokenize nothing."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"resource_tracker" in command or b"forkserver" in command


def peak_memory(command: list[str]) -> dict[str, Any]:
    """Run a command and return the peaks of its main process and of each worker."""
    peaks_mib: dict[int, float] = {}
    helpers: set[int] = set()
    with tempfile.TemporaryFile() as errors:
        process = start(command, errors)
        try:
            while process.poll() is None:
                status = status_of_all()
                for pid in [process.pid, *descendants(process.pid, status)]:
                    if "VmHWM" in status.get(pid, {}):
                        peak_mib = int(status[pid]["VmHWM"].split()[0]) / 1024
                        peaks_mib[pid] = max(peaks_mib.get(pid, 0), peak_mib)
                        if is_helper(pid):
                            helpers.add(pid)
                time.sleep(POLL_S)
        finally:
            process.terminate()  # after Ctrl-C; without effect on one that has ended
        end_if_failed(process.returncode, command, errors)
    main_mib = peaks_mib.pop(process.pid)
    workers = sorted((mib for pid, mib in peaks_mib.items() if pid not in helpers), reverse=True)
    return {"main_mib": round(main_mib, 1), "workers_mib": [round(mib, 1) for mib in workers]}


def enlarge(data_dir: Path, manifest: dict[str, Any], target: Path) -> None:
    """Make a folder with the same shards N_TIMES, under other names."""
    target.mkdir()
    shards = []
    for i in range(N_TIMES):
        for shard in manifest["shards"]:
            file = f"copy{i}_{shard['file']}"
            (target / file).symlink_to((data_dir / shard["file"]).resolve())
            shards.append(shard | {"file": file})
    (target / "manifest.json").write_text(json.dumps(manifest | {"shards": shards}), encoding="utf-8")


def measure_times(data_dir: Path, hf_name: str, separator: str, folder: Path) -> dict[str, list[float]]:
    """Return the seconds of each way, round by round."""
    times_s: dict[str, list[float]] = {"one_worker": [], "two_workers": [], "two_apart": [], "auto_tokenizer": []}
    for i in range(N_ROUNDS):
        for name, found in times_s.items():
            output = folder / f"{name}_{i}"
            one = pretokenize(data_dir, hf_name, output, 1)
            if name == "one_worker":
                elapsed_s = run(one)[0]
            elif name == "two_workers":
                elapsed_s = run(pretokenize(data_dir, hf_name, output, 2))[0]
            elif name == "two_apart":
                elapsed_s = run_both(one, pretokenize(data_dir, hf_name, folder / f"{name}_{i}_other", 1))
            else:
                command = [sys.executable, "-c", AUTO_TOKENIZER, str(data_dir), hf_name, str(output), separator]
                elapsed_s = run(command)[0]
            found.append(elapsed_s)
            log(f"round {i + 1}/{N_ROUNDS} {name}: {elapsed_s:.2f} s")
    return times_s


def run_both(first: list[str], second: list[str]) -> float:
    """Start two commands at once, and return the seconds until both have ended."""
    with ThreadPoolExecutor(2) as pool:
        return max(elapsed_s for elapsed_s, _ in pool.map(run, (first, second)))


def pretokenize(data_dir: Path, hf_name: str, output: Path, n_workers: int) -> list[str]:
    """Return the command line of pretokenize.py."""
    return script("pretokenize.py", data_dir=data_dir, hf_name=hf_name, output_dir=output, num_workers=n_workers)


def measure_memory(data_dir: Path, large: Path, hf_name: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Return the peaks with one and two workers, on the corpus and on the large one."""
    found: dict[str, dict[str, Any]] = {}
    for n_workers in (1, 2):
        for times, source in ((1, data_dir), (N_TIMES, large)):
            name = f"{n_workers}_workers_{times}x"
            found[name] = peak_memory(pretokenize(source, hf_name, folder / f"memory_{name}", n_workers))
            log(f"peak memory, {name}: {found[name]}")
    return found


def worst_mib(memory: dict[str, dict[str, Any]], size: str) -> float:
    """Return the peak of the largest process that tokenizes: with one worker that may be the main process."""
    return max(
        mib
        for name, peaks in memory.items()
        if name.endswith(size)
        for mib in (peaks["workers_mib"] or [peaks["main_mib"]])
    )


if __name__ == "__main__":
    run_command(PretokenizeSpeedConfig, main)
