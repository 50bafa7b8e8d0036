"""Time whole runs of `pretraining.py --budget_minutes` by a clock outside of them: do they end when they should?

python benchmarks/budget.py --data_dir dataset/sample_001 dataset/001 --tokenizer_path TOKENIZER
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import log, run, script, write_result

from gptkit.base.cli import run_command, setting
from gptkit.base.paths import existing_path


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """Measure how exactly --budget_minutes ends."""

    data_dir: tuple[str, ...] = setting(help="folders of text shards")
    tokenizer_path: str = setting(help="a tokenizer of ours")
    minutes: float = setting(3.0, "the budget of each run", more_than=0)
    device: str = setting("cpu", "auto, cpu, cuda, cuda:N or mps")


def main(config: BudgetConfig) -> None:
    folders = [existing_path(folder, "--data_dir") for folder in config.data_dir]
    tokenizer_path = existing_path(config.tokenizer_path, "--tokenizer_path")
    runs = {
        str(i): measure(folder, tokenizer_path, config.minutes, config.device) for i, folder in enumerate(folders, 1)
    }
    goals = {"each within 5 % of the time asked for": all(abs(found["off"]) <= 0.05 for found in runs.values())}
    write_result("budget", {"runs": runs, "goals": goals})


def measure(data_dir: Path, tokenizer_path: Path, minutes: float, device: str) -> dict[str, Any]:
    """Run pretraining.py for so many minutes; return the time asked for, the time it took, and how far it was off."""
    with tempfile.TemporaryDirectory() as folder:
        command = script(
            "pretraining.py",
            data_dir=data_dir,
            tokenizer="sentencepiece",
            tokenizer_path=tokenizer_path,
            output_dir=Path(folder) / "run",
            model_size="auto",
            budget_minutes=minutes,
            device=device,
        )
        elapsed_s, _ = run(command)
    off = elapsed_s / (60 * minutes) - 1
    log(f"{data_dir}: {elapsed_s:.1f} s, {off:+.1%}")
    return {"asked_s": 60 * minutes, "took_s": round(elapsed_s, 1), "off": round(off, 4)}


if __name__ == "__main__":
    run_command(BudgetConfig, main)
