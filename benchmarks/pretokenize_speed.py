"""Text shards -> token shards: pretokenize.py with one and two workers against transformers' AutoTokenizer.

Each way is a process of its own and its whole time counts. They run in turn, because the machines are shared and
slow down and speed up. AutoTokenizer's fast backend takes all cores by itself, so its equal is two workers on a
machine of two cores. Two processes of one worker each, at once, show what the second core can bring at all beside
whatever else the machine does. (AutoTokenizer's ids are wrong besides: unknown pieces become end-of-text.) Memory is measured in runs
apart, from the high-water mark that Linux keeps for each process, on the corpus and on one of four times its size.

    python benchmarks/pretokenize_speed.py --data_dir dataset/001 --hf_name FOLDER
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from machine import end_if_failed, run, say, script, start, write_result

AUTO_TOKENIZER = """
import sys
from pathlib import Path
import numpy as np
from transformers import AutoTokenizer
data_dir, name, output, separator = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
with open(output, "wb") as target:
    for path in sorted(Path(data_dir).glob("*.txt")):
        works = [work.lower() for work in path.read_text(encoding="utf-8").split(separator) if work.strip()]
        for i in range(0, len(works), 64):
            for found in tokenizer.backend_tokenizer.encode_batch(works[i : i + 64], add_special_tokens=False):
                np.array([*found.ids, tokenizer.eos_token_id], dtype=np.uint16).tofile(target)
"""
N_ROUNDS = 3
N_TIMES = 4  # of the corpus, for the second measurement of memory
POLL_S = 0.05


def status_of_all() -> dict[int, dict[str, str]]:
    """/proc/*/status by process id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = path.read_text().splitlines()
        except OSError:  # it has ended
            continue
        found[int(path.parent.name)] = dict(line.split(":", 1) for line in lines if ":" in line)
    return found


def descendants(pid: int, status: dict[int, dict[str, str]]) -> list[int]:
    children = [child for child, fields in status.items() if int(fields["PPid"]) == pid]
    return children + [below for child in children for below in descendants(child, status)]


def is_helper(pid: int) -> bool:
    """multiprocessing's own small processes, which tokenize nothing."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"resource_tracker" in command or b"forkserver" in command


def peak_memory(command: list[str]) -> dict[str, Any]:
    """The peak of the main process and of each worker."""
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
    """The same shards N_TIMES, under other names."""
    target.mkdir()
    shards = []
    for i in range(N_TIMES):
        for shard in manifest["shards"]:
            file = f"copy{i}_{shard['file']}"
            (target / file).symlink_to((data_dir / shard["file"]).resolve())
            shards.append(shard | {"file": file})
    (target / "manifest.json").write_text(json.dumps(manifest | {"shards": shards}), encoding="utf-8")


def measure_times(data_dir: Path, hf_name: str, separator: str, folder: Path) -> dict[str, list[float]]:
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
            say(f"round {i + 1}/{N_ROUNDS} {name}: {elapsed_s:.2f} s")
    return times_s


def run_both(first: list[str], second: list[str]) -> float:
    """The time of two processes that start together, until both have ended."""
    with ThreadPoolExecutor(2) as pool:
        return max(elapsed_s for elapsed_s, _ in pool.map(run, (first, second)))


def pretokenize(data_dir: Path, hf_name: str, output: Path, n_workers: int) -> list[str]:
    return script("pretokenize.py", data_dir=data_dir, hf_name=hf_name, output_dir=output, num_workers=n_workers)


def measure_memory(data_dir: Path, large: Path, hf_name: str, folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for n_workers in (1, 2):
        for times, source in ((1, data_dir), (N_TIMES, large)):
            name = f"{n_workers}_workers_{times}x"
            found[name] = peak_memory(pretokenize(source, hf_name, folder / f"memory_{name}", n_workers))
            say(f"peak memory, {name}: {found[name]}")
    return found


def worst_mib(memory: dict[str, dict[str, Any]], size: str) -> float:
    """The largest process that tokenizes: with one worker that may be the main process."""
    return max(
        mib
        for name, peaks in memory.items()
        if name.endswith(size)
        for mib in (peaks["workers_mib"] or [peaks["main_mib"]])
    )


def measure(data_dir: Path, hf_name: str) -> dict[str, Any]:
    manifest = json.loads((data_dir / "manifest.json").read_bytes())
    n_bytes = sum((data_dir / shard["file"]).stat().st_size for shard in manifest["shards"])
    for shard in manifest["shards"]:
        (data_dir / shard["file"]).read_bytes()  # the disk's cache, the same for all
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        times_s = measure_times(data_dir, hf_name, manifest["separator"], folder)
        enlarge(data_dir, manifest, folder / "large")
        memory = measure_memory(data_dir, folder / "large", hf_name, folder)
    n_copies = {"two_apart": 2}  # the others do the corpus once
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of pretokenize.py, against AutoTokenizer")
    parser.add_argument("--data_dir", type=Path, required=True, help="text shards of prepare_aozora_jsonl.py")
    parser.add_argument("--hf_name", required=True, help="a folder with rinna's tokenizer")
    options = parser.parse_args()
    if not Path("/proc/self/status").exists():
        sys.exit("error: memory is read from /proc; run this on Linux")
    if importlib.util.find_spec("google") is None or importlib.util.find_spec("google.protobuf") is None:
        sys.exit("error: AutoTokenizer needs protobuf for rinna's tokenizer; pip install protobuf")
    write_result("pretokenize_speed", measure(options.data_dir, options.hf_name))


if __name__ == "__main__":
    main()
