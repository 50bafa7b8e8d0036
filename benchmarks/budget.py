"""Whether `pretraining.py --budget_minutes` ends when it was asked to: the whole command, by a clock outside of it.

python benchmarks/budget.py --data_dir dataset/sample_001 dataset/001 --tokenizer_path TOKENIZER
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from machine import run, say, script, write_result


def measure(data_dir: Path, tokenizer_path: Path, minutes: float, device: str) -> dict[str, Any]:
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
    say(f"{data_dir}: {elapsed_s:.1f} s, {off:+.1%}")
    return {"asked_s": 60 * minutes, "took_s": round(elapsed_s, 1), "off": round(off, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description="How exactly --budget_minutes ends")
    parser.add_argument("--data_dir", type=Path, nargs="+", required=True, help="folders of text shards")
    parser.add_argument("--tokenizer_path", type=Path, required=True, help="a tokenizer of ours")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    runs = {
        str(i): measure(data_dir, options.tokenizer_path, options.minutes, options.device)
        for i, data_dir in enumerate(options.data_dir, 1)
    }
    goals = {"each within 5 % of the time asked for": all(abs(found["off"]) <= 0.05 for found in runs.values())}
    write_result("budget", {"runs": runs, "goals": goals})


if __name__ == "__main__":
    main()
