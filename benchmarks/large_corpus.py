"""Ten billion tokens against ten million: the time to the first batches and the memory of a run.

The token shards are sparse files, which take no room: all zeros, of 8 million tokens each, as 25 MB of Japanese text
gives. Both runs are the same two steps of a tiny model; the difference is what a large corpus costs.

    python benchmarks/large_corpus.py --tokenizer_path dataset/sample/tokenizer
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from machine import run, say, script, versions, write_result

from gptkit.base.files import sha256_of
from gptkit.data.pretokenization import COUNTS, SPLITS, manifest_of
from gptkit.data.token_shards import token_dtype
from gptkit.text.tokenizer import Tokenizer, load_sentencepiece

SHARD_TOKENS = 8_000_000
VAL_TOKENS = 1000  # of each shard
SIZES = {"small": 10_000_000, "large": 10_000_000_000}
MOST_SECONDS_MORE, MOST_TIMES_MEMORY = 5.0, 1.5


def make_corpus(folder: Path, n_tokens: int, tokenizer: Tokenizer) -> None:
    """A folder of token shards as pretokenize.py leaves it, but for the content of its files."""
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


def measure(options: argparse.Namespace, corpus: Path, output: Path) -> tuple[float, float]:
    """Seconds and peak MiB of a run of two steps."""
    flags = {
        "data_dir": corpus.parent / "no_text_here", "pretokenized_dir": corpus, "output_dir": output, "max_steps": 2,
        "tokenizer": "sentencepiece", "tokenizer_path": options.tokenizer_path, "context_length": options.context_length,
        "n_layers": 2, "emb_dim": 64, "n_heads": 2, "batch_size": 4, "eval_iter": 1, "device": "cpu",
    }  # fmt: skip
    return run([*script("pretraining.py", **flags), "--use_pretokenized"])


def main() -> None:
    parser = argparse.ArgumentParser(description="What a large corpus costs at the start of a run")
    parser.add_argument("--tokenizer_path", type=Path, required=True, help="a SentencePiece model")
    parser.add_argument("--context_length", type=int, default=128)
    parser.add_argument("--n_rounds", type=int, default=3)
    options = parser.parse_args()
    tokenizer = load_sentencepiece(str(options.tokenizer_path))
    seconds: dict[str, list[float]] = {name: [] for name in SIZES}
    memory: dict[str, list[float]] = {name: [] for name in SIZES}
    with tempfile.TemporaryDirectory() as folder:
        for name, n_tokens in SIZES.items():
            make_corpus(Path(folder) / name, n_tokens, tokenizer)
        for i in range(options.n_rounds):
            for name in SIZES:
                elapsed_s, peak_mib = measure(options, Path(folder) / name, Path(folder) / f"out_{name}_{i}")
                seconds[name].append(round(elapsed_s, 2))
                memory[name].append(round(peak_mib, 1))
                say(f"{name}: {elapsed_s:.2f} s, {peak_mib:.0f} MiB")
    more_s = statistics.median(seconds["large"]) - statistics.median(seconds["small"])
    times = statistics.median(memory["large"]) / statistics.median(memory["small"])
    result = {
        "tokens": SIZES,
        "context_length": options.context_length,
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


if __name__ == "__main__":
    main()
