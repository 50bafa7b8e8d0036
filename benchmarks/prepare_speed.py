"""How long prepare_aozora_jsonl.py takes against the least that such a script can do, and its peak memory.

The least: `json.loads` over the lines, and writing text and separator into one file. Both run as processes
of their own, in turn, because the machines are shared and slow down and speed up.

    python benchmarks/prepare_speed.py --jsonl_path dataset/aozorabunko-dedupe-clean.jsonl
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import SEPARATOR, run, say, script, write_result

PLAIN = """
import json, sys
with open(sys.argv[1], encoding="utf-8", newline="\\n") as source, open(sys.argv[2], "w", encoding="utf-8") as target:
    for line in source:
        target.write(json.loads(line)["text"] + sys.argv[3])
"""


def measure(jsonl_path: Path, n_runs: int) -> dict[str, Any]:
    times_s: dict[str, list[float]] = {"plain": [], "prepare": []}
    peak_mib = {"plain": 0.0, "prepare": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "plain": [sys.executable, "-c", PLAIN, str(jsonl_path), f"{folder}/plain.txt", SEPARATOR],
            "prepare": script(
                "dataset/prepare_aozora_jsonl.py",
                jsonl_path=jsonl_path,
                output_dir=f"{folder}/shards",
                separator=SEPARATOR,
            ),
        }
        for i in range(-1, n_runs):  # the first turn warms the disk's cache and does not count
            for name, command in commands.items():
                elapsed_s, mib = run(command)
                if i >= 0:
                    times_s[name].append(elapsed_s)
                    peak_mib[name] = max(peak_mib[name], mib)
                    say(f"run {i + 1}/{n_runs} {name}: {elapsed_s:.2f} s, {mib:.0f} MiB")
    medians_s = {name: statistics.median(values) for name, values in times_s.items()}
    return {
        "input": {"file": jsonl_path.name, "bytes": jsonl_path.stat().st_size},
        "median_s": {name: round(value, 3) for name, value in medians_s.items()},
        "ratio": round(medians_s["prepare"] / medians_s["plain"], 2),
        "peak_mib": {name: round(value, 1) for name, value in peak_mib.items()},
        "times_s": {name: [round(value, 3) for value in values] for name, values in times_s.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of prepare_aozora_jsonl.py against plain json.loads and writing")
    parser.add_argument("--jsonl_path", type=Path, required=True, help="an uncompressed .jsonl file")
    parser.add_argument("--n_runs", type=int, default=9, help="runs of each (9)")
    options = parser.parse_args()
    write_result("prepare_speed", measure(options.jsonl_path, options.n_runs))


if __name__ == "__main__":
    main()
