"""How long prepare_aozora_jsonl.py takes against the least that such a script can do, and its peak memory.

The least: `json.loads` over the lines, and writing text and separator into one file. Both run as processes
of their own, in turn, because the machines are shared and slow down and speed up.

    python benchmarks/prepare_speed.py --jsonl_path dataset/aozorabunko-dedupe-clean.jsonl
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SEPARATOR = "<|endoftext|>"
PLAIN = """
import json, sys
with open(sys.argv[1], encoding="utf-8", newline="\\n") as source, open(sys.argv[2], "w", encoding="utf-8") as target:
    for line in source:
        target.write(json.loads(line)["text"] + sys.argv[3])
"""


def run(command: list[str]) -> tuple[float, float]:
    """(elapsed_s, peak_mib) of one process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    elapsed_s = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"error: exit code {process.returncode} from {' '.join(command)}; run it alone to see why")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return elapsed_s, usage.ru_maxrss * unit / 2**20


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def measure(jsonl_path: Path, n_runs: int) -> dict[str, Any]:
    times_s: dict[str, list[float]] = {"plain": [], "prepare": []}
    peak_mib = {"plain": 0.0, "prepare": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        prepare = [str(ROOT / "dataset" / "prepare_aozora_jsonl.py"), "--jsonl_path", str(jsonl_path)]
        commands = {
            "plain": [sys.executable, "-c", PLAIN, str(jsonl_path), f"{folder}/plain.txt", SEPARATOR],
            "prepare": [sys.executable, *prepare, "--output_dir", f"{folder}/shards", "--separator", SEPARATOR],
        }
        for i in range(-1, n_runs):  # the first turn warms the disk's cache and does not count
            for name, command in commands.items():
                elapsed_s, mib = run(command)
                if i >= 0:
                    times_s[name].append(elapsed_s)
                    peak_mib[name] = max(peak_mib[name], mib)
                    print(f"run {i + 1}/{n_runs} {name}: {elapsed_s:.2f} s, {mib:.0f} MiB", file=sys.stderr, flush=True)
    medians_s = {name: statistics.median(values) for name, values in times_s.items()}
    return {
        "input": {"file": jsonl_path.name, "bytes": jsonl_path.stat().st_size},
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()},
        "median_s": {name: round(value, 3) for name, value in medians_s.items()},
        "ratio": round(medians_s["prepare"] / medians_s["plain"], 2),
        "peak_mib": {name: round(value, 1) for name, value in peak_mib.items()},
        "times_s": {name: [round(value, 3) for value in values] for name, values in times_s.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of prepare_aozora_jsonl.py against plain json.loads and writing")
    parser.add_argument("--jsonl_path", type=Path, required=True, help="an uncompressed .jsonl file")
    parser.add_argument("--n_runs", type=int, default=9, help="runs of each (9)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "prepare_speed.json")
    options = parser.parse_args()
    result = measure(options.jsonl_path, options.n_runs)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(
        f"{options.output}: prepare takes {result['ratio']} times as long, {result['peak_mib']['prepare']} MiB at peak"
    )


if __name__ == "__main__":
    main()
