"""Measure prepare_aozora_jsonl.py, its time against the least that such a script can do, and its peak memory.

The least is `json.loads` over the lines, and writing text and separator into one file. Both run as processes of their
own, in turns, because the machines are shared and their speed changes.

    python benchmarks/prepare_speed.py --jsonl_path dataset/aozorabunko-dedupe-clean.jsonl
"""

import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import SEPARATOR, log, run, script, write_result

from gptkit.base.cli import run_command, setting
from gptkit.base.paths import existing_path

PLAIN = """
import json, sys
with open(sys.argv[1], encoding="utf-8", newline="\\n") as source, open(sys.argv[2], "w", encoding="utf-8") as target:
    for line in source:
        target.write(json.loads(line)["text"] + sys.argv[3])
"""


@dataclass(frozen=True, kw_only=True)
class PrepareSpeedConfig:
    """Measure prepare_aozora_jsonl.py against plain json.loads and writing."""

    jsonl_path: str = setting(help="an uncompressed .jsonl file")
    n_runs: int = setting(9, "runs of each", at_least=1)


def main(config: PrepareSpeedConfig) -> None:
    write_result("prepare_speed", measure(existing_path(config.jsonl_path, "--jsonl_path"), config.n_runs))


def measure(jsonl_path: Path, n_runs: int) -> dict[str, Any]:
    """Run both commands so many times, in turns."""
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
        for i in range(-1, n_runs):  # the first turn fills the disk's cache and is not counted
            for name, command in commands.items():
                elapsed_s, mib = run(command)
                if i >= 0:
                    times_s[name].append(elapsed_s)
                    peak_mib[name] = max(peak_mib[name], mib)
                    log(f"run {i + 1}/{n_runs} {name}: {elapsed_s:.2f} s, {mib:.0f} MiB")
    medians_s = {name: statistics.median(values) for name, values in times_s.items()}
    return {
        "input": {"file": jsonl_path.name, "bytes": jsonl_path.stat().st_size},
        "median_s": {name: round(value, 3) for name, value in medians_s.items()},
        "ratio": round(medians_s["prepare"] / medians_s["plain"], 2),
        "peak_mib": {name: round(value, 1) for name, value in peak_mib.items()},
        "times_s": {name: [round(value, 3) for value in values] for name, values in times_s.items()},
    }


if __name__ == "__main__":
    run_command(PrepareSpeedConfig, main)
