"""Measure how good a Japanese model a fixed time of training gives: ours against nanoGPT and nanochat, in bits per character.

Each contender trains for the same minutes, one after the other, seed by seed, from token shards made before, and is scored
on the same held-out documents of unseen authors, by gptkit/evaluation/scoring.py, in float32, at its end:

- ours: `pretraining.py --budget_minutes`, which chooses the model itself.
- nanogpt: its model and optimizer (AdamW with decay, cosine, clipping; 4 layers x 256, context 256, batch 4, lr 2e-3, the
  best found for a run of minutes on a CPU), from a checkout of it (peers.py).
- nanochat: its model, optimizer and schedules, compiled (peers.py), in each of --nanochat_sizes with each of
  --nanochat_rates; what has the lowest validation loss, as a mean over its seeds, counts.

Of the peers, as a rule, training alone counts, not the compiler's work; of ours everything does: starting, planning,
compiling, reports and checkpoints. --start treats both alike: the time until the second step is counted (for a peer, which
is in this process, without imports), or not counted (then ours gets as much more time as its start takes). What ours has
compiled is kept in --work_dir for its next runs, as it is on a user's machine.

In training nanoGPT multiplies in the type that it chooses for the CPU, float32; ours and nanochat in bfloat16 where the CPU
multiplies it (nanochat chooses that on CUDA only). --dtype gives all the same type.

The runs are added to those in the result file, which must have been measured on the same machine under the same conditions.
--ingredients instead leaves things out of ours, one at a time, in the same minutes.

    python benchmarks/train_quality.py --data_dir dataset/001 --heldout_path HELDOUT --minutes 4 --seeds 1 2 3 \\
        --nanogpt_dir CHECKOUT --nanochat_dir CHECKOUT --nanochat_rates 1 3 5 --work_dir WORK
    python benchmarks/train_quality.py --data_dir dataset/001 --heldout_path HELDOUT --work_dir WORK --ingredients --minutes 2
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from contenders import NANOCHAT, NANOGPT, OURS, dtype_as
from machine import log, versions, write_result
from peers import NanoGPTRecipe
from quality import END, evaluate_ours, open_streams, prepare_tokens, train_ours
from side_by_side import RUNNERS, USUALLY_COUNTED, PeerSettings, Setup, check_peers, compare, earlier_runs, train_all

from gptkit.base import devices
from gptkit.base.cli import run_command, setting
from gptkit.base.paths import existing_path

RECIPE = NanoGPTRecipe(lr=2e-3, beta2=0.95, dropout=0.0, warmup_share=0.05, batch_size=4)
GOALS = ((NANOGPT, END, 0.25), (NANOCHAT, END, 0.03))
COUNTS_START = {
    "usual": USUALLY_COUNTED,
    "counted": dict.fromkeys(RUNNERS, True),
    "not_counted": dict.fromkeys(RUNNERS, False),
}
INGREDIENTS: dict[str, dict[str, object]] = {
    "the recipe": {},
    "AdamW in place of Muon (lr 4e-3)": {"optimizer": "adamw", "lr": "4e-3"},
    "GPT-2's architecture": {"arch": "gpt2"},
    "no start from token pairs": {"bigram_steps": 0},
    "nanoGPT's size (4 x 256, context 256)": {"model_size": "mini"},
    "a batch of 512 tokens": {"batch_size": 4, "grad_accum_steps": 1},
    "a batch of 4,096 tokens": {"batch_size": 32, "grad_accum_steps": 1},
}


@dataclass(frozen=True, kw_only=True)
class TrainQualityConfig(PeerSettings):
    """Measure bits per character after a fixed time of training, against nanoGPT and nanochat."""

    data_dir: str = setting(help="text shards of prepare_aozora_jsonl.py", group="data")
    heldout_path: str = setting(help="JSONL of documents by unseen authors", group="data")
    work_dir: str = setting(help="a new folder for tokens and checkpoints", group="data")
    vocab_size: int = setting(4096, "tokens of the vocabulary", group="data")
    contenders: tuple[str, ...] = setting((OURS, NANOGPT, NANOCHAT), "those to train now", group="contenders")
    nanogpt_sizes: tuple[str, ...] = setting(("4x256",), "layers x width", group="contenders")
    nanochat_rates: tuple[str, ...] = setting(("1", "3", "5"), "factors of its learning rates", group="contenders")
    minutes: float = setting(8.0, "time that each contender trains", more_than=0, group="measurement")
    start: Literal["usual", "counted", "not_counted"] = setting(
        "usual", "whether the time until the first step counts (usual: for ours alone)", group="measurement"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "type of matrix products", group="measurement")
    max_steps: int | None = setting(None, "steps of a run, for a test", at_least=3, group="measurement")
    ingredients: bool = setting(False, "leave things out of ours, one at a time", group="measurement")


def main(config: TrainQualityConfig) -> None:
    data_dir = existing_path(config.data_dir, "--data_dir")
    text_path = existing_path(config.heldout_path, "--heldout_path")
    if not config.ingredients:
        check_peers(config, config.contenders, RUNNERS)
    Path(config.work_dir).mkdir(parents=True, exist_ok=True)
    device = devices.choose_device(config.device)
    suffix = "" if config.dtype == "auto" else f"_{config.dtype}"
    if config.ingredients:
        write_result(f"train_ingredients{suffix}", leave_out(config))
        return
    name = f"train_quality_{config.minutes:g}{suffix}" + ("" if config.start == "usual" else f"_start_{config.start}")
    contest(name, config, data_dir, text_path, device)


def contest(name: str, config: TrainQualityConfig, data_dir: Path, text_path: Path, device: torch.device) -> None:
    """Train the contenders and write the figures of each run, and the comparison, to the result file."""
    devices.keep_freed_memory(device, trim_threshold=2 * devices.LARGEST_FROM_HEAP)  # the peers', see contenders.py
    conditions = {
        "minutes": config.minutes,
        "start": config.start,
        "vocab_size": config.vocab_size,
        "device": devices.describe_device(device),
        "max_steps": config.max_steps,
        "heldout_sha256": hashlib.sha256(text_path.read_bytes()).hexdigest(),
        "dtype": {each: devices.dtype_name(dtype_as(each, config.dtype, device)) for each in RUNNERS},
        **versions("torch"),
    }
    work_dir = Path(config.work_dir)
    tokenizer, data = prepare_tokens(data_dir, work_dir, config.vocab_size)
    n_tokens = len(open_streams(data, tokenizer)["train"])
    conditions["tokens"] = n_tokens
    earlier_runs(name, conditions)  # refuses others before training, not after
    setup = Setup(
        settings=config,
        minutes=config.minutes,
        device=device,
        dtype=lambda contender: dtype_as(contender, config.dtype, device),
        flags={"device": config.device},
        training_flags={"dtype": config.dtype},
        variables={"TORCHINDUCTOR_CACHE_DIR": str((work_dir / "compiled").resolve())},
        folder=work_dir,
        tokenizer=tokenizer,
        data=data,
        text_path=text_path,
        vocab_size=config.vocab_size,
        n_tokens=n_tokens,
        nanogpt_recipe=RECIPE,
        counts_start=COUNTS_START[config.start],
        max_steps=config.max_steps,
    )
    runs = [(contender, seed) for seed in config.seeds for contender in config.contenders]
    train_all(name, conditions, setup, runs, RUNNERS, lambda found: compare(found, GOALS))


def leave_out(config: TrainQualityConfig) -> dict[str, Any]:
    """Train ours with each thing of INGREDIENTS changed; return the figures."""
    device = {"device": config.device}
    tokenizer, data = prepare_tokens(config.data_dir, Path(config.work_dir), config.vocab_size)
    found = {}
    for i, (name, flags) in enumerate(INGREDIENTS.items()):
        output_dir = Path(config.work_dir) / f"ingredient_{i}"
        run = train_ours(data, tokenizer, config.minutes, output_dir, device | {"dtype": config.dtype} | flags)
        found[name] = {
            "bits_per_char": round(evaluate_ours(output_dir, Path(config.heldout_path), device), 4),
            "tokens": run["tokens"],
            "steps": run["step"],
            "emb_dim": run["model"]["emb_dim"],
            "n_layers": run["model"]["n_layers"],
        }
        log(f"{name}: {found[name]}")
    return {"minutes": config.minutes, "vocab_size": config.vocab_size, "runs": found}


if __name__ == "__main__":
    run_command(TrainQualityConfig, main)
