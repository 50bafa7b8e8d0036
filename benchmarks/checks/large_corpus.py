"""Check what ten billion tokens cost a run more than ten million: the time to the first batches, and the memory.

The token shards are sparse files, which take no room: all zeros, of 8 million tokens each, as many as 25 MB of Japanese
text give. Both runs are the same two steps of a tiny model; the difference is what a large corpus costs.

    python benchmarks/checks/large_corpus.py --tokenizer_path dataset/sample/tokenizer
"""

import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _path  # noqa: F401  it lets the modules of benchmarks/ be imported
import numpy as np
from machine import log, run, script, versions, write_result

from gptkit.base.cli import run_command, setting
from gptkit.base.files import sha256_of
from gptkit.base.paths import existing_path
from gptkit.data.pretokenization import manifest_of
from gptkit.data.token_records import COUNTS, SPLITS
from gptkit.data.token_shards import token_dtype
from gptkit.text.tokenizer import Tokenizer, load_sentencepiece

SHARD_TOKENS = 8_000_000
VAL_TOKENS = 1000  # for validation, of each shard
SIZES = {"small": 10_000_000, "large": 10_000_000_000}
MOST_SECONDS_MORE, MOST_TIMES_MEMORY = 5.0, 1.5


@dataclass(frozen=True, kw_only=True)
class LargeCorpusConfig:
    """Check what a large corpus costs at the start of a run."""

    tokenizer_path: str = setting(help="a SentencePiece model")
    context_length: int = setting(128, "tokens that the model sees at once", at_least=1)
    n_rounds: int = setting(3, "rounds, of which the median counts", at_least=1)


def main(config: LargeCorpusConfig) -> None:
    tokenizer = load_sentencepiece(str(existing_path(config.tokenizer_path, "--tokenizer_path")))
    seconds: dict[str, list[float]] = {name: [] for name in SIZES}
    memory: dict[str, list[float]] = {name: [] for name in SIZES}
    with tempfile.TemporaryDirectory() as folder:
        for name, n_tokens in SIZES.items():
            make_corpus(Path(folder) / name, n_tokens, tokenizer)
        for i in range(config.n_rounds):
            for name in SIZES:
                elapsed_s, peak_mib = measure(config, Path(folder) / name, Path(folder) / f"out_{name}_{i}")
                seconds[name].append(round(elapsed_s, 2))
                memory[name].append(round(peak_mib, 1))
                log(f"{name}: {elapsed_s:.2f} s, {peak_mib:.0f} MiB")
    more_s = statistics.median(seconds["large"]) - statistics.median(seconds["small"])
    times = statistics.median(memory["large"]) / statistics.median(memory["small"])
    result = {
        "tokens": SIZES,
        "context_length": config.context_length,
        "versions": versions("torch", "numpy"),
        "seconds": seconds,
        "peak_mib": memory,
        "seconds_more": round(more_s, 2),
        "times_the_memory": round(times, 3),
        "goals": {
            f"less than {MOST_SECONDS_MORE:g} s more": more_s < MOST_SECONDS_MORE,
            f"less than {MOST_TIMES_MEMORY:g} times the memory": times < MOST_TIMES_MEMORY,
        },
    }
    write_result("large_corpus", result)


def make_corpus(folder: Path, n_tokens: int, tokenizer: Tokenizer) -> None:
    """Make a folder of token shards as pretokenize.py leaves it, except for the content of its files."""
    folder.mkdir()
    dtype = np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")
    records: list[dict[str, Any]] = []
    hashes: dict[int, str] = {}  # by length: files of one length are the same
    for number in range(-(-n_tokens // SHARD_TOKENS)):
        record: dict[str, Any] = {}
        for split, length in zip(SPLITS, (min(SHARD_TOKENS, n_tokens), VAL_TOKENS), strict=True):
            file = f"{split}_combined_{number:05}.npy"
            np.lib.format.open_memmap(folder / file, mode="w+", dtype=dtype, shape=(length,))
            if length not in hashes:
                hashes[length] = sha256_of(folder / file)
            record[split] = {"file": file, "sha256": hashes[length], **dict.fromkeys(COUNTS, length)}
        records.append(record)
    manifest = manifest_of(tokenizer.name, tokenizer, 0.01, records)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def measure(config: LargeCorpusConfig, corpus: Path, output: Path) -> tuple[float, float]:
    """Return the seconds and the peak in MiB of a run of two steps."""
    flags = {
        "data_dir": corpus.parent / "no_text_here", "pretokenized_dir": corpus, "output_dir": output, "max_steps": 2,
        "tokenizer": "sentencepiece", "tokenizer_path": config.tokenizer_path, "context_length": config.context_length,
        "n_layers": 2, "emb_dim": 64, "n_heads": 2, "batch_size": 4, "eval_iter": 1, "device": "cpu",
    }  # fmt: skip
    return run([*script("pretraining.py", **flags), "--use_pretokenized"])


if __name__ == "__main__":
    run_command(LargeCorpusConfig, main)
