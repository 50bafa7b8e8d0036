"""Measure our own tokenizer by size and kind: training time, characters per token on unseen text, speed of encoding.

python benchmarks/tokenizer_sizes.py --data_dir dataset/001 --heldout_path HELDOUT
"""

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from machine import log, read_texts, run, script, write_result

from gptkit.base.cli import run_command, setting
from gptkit.base.paths import existing_path

KINDS = (("bpe", 4_096), ("bpe", 8_192), ("bpe", 16_000), ("bpe", 32_000), ("unigram", 16_000))
N_ENCODINGS = 7  # the median counts


@dataclass(frozen=True, kw_only=True)
class TokenizerSizesConfig:
    """Measure our own tokenizer by size and kind."""

    data_dir: str = setting(help="text shards to train on")
    heldout_path: str = setting(help="documents of other authors: .jsonl or .jsonl.xz")


def main(config: TokenizerSizesConfig) -> None:
    data_dir = existing_path(config.data_dir, "--data_dir")
    heldout_path = existing_path(config.heldout_path, "--heldout_path")
    texts = read_texts(heldout_path)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model_type, vocab_size in KINDS:
            output = Path(folder) / f"{model_type}_{vocab_size}"
            rows.append(measure_kind(model_type, vocab_size, data_dir, texts, output))
            log(f"{rows[-1]}")
    n_bytes = sum(path.stat().st_size for path in data_dir.glob("*.txt"))
    inputs = {"bytes": n_bytes, "heldout_file": heldout_path.name, "heldout_works": len(texts)}
    write_result("tokenizer_sizes", {"input": inputs, "tokenizers": rows})


def measure_kind(model_type: str, vocab_size: int, data_dir: Path, texts: list[str], output: Path) -> dict[str, Any]:
    """Train one tokenizer and encode the texts with it."""
    training_s, training_mib = run(
        script(
            "dataset/train_tokenizer.py",
            data_dir=data_dir,
            output_dir=output,
            vocab_size=vocab_size,
            model_type=model_type,
        )
    )
    report = json.loads((output / "report.json").read_bytes())
    processor = sentencepiece.SentencePieceProcessor(model_file=str(output / "spiece.model"))
    times_s = []
    for _ in range(N_ENCODINGS):
        start = time.perf_counter()
        encoded = processor.encode(texts, num_threads=1)
        times_s.append(time.perf_counter() - start)
    n_tokens = sum(map(len, encoded))
    encoding_s = statistics.median(times_s)
    return {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "training_s": round(training_s, 1),
        "training_peak_mib": round(training_mib),
        "characters_per_token_works_held_out": report["measured"]["characters_per_token"],
        "characters_per_token_heldout_file": round(sum(map(len, texts)) / n_tokens, 4),
        "encoding_tokens_per_s": round(n_tokens / encoding_s),
        "encoding_mb_per_s": round(sum(len(text.encode()) for text in texts) / 1e6 / encoding_s, 1),
    }


if __name__ == "__main__":
    run_command(TokenizerSizesConfig, main)
