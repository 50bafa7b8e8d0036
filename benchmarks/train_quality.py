"""Measure how good a Japanese model a fixed time of training gives: ours against nanoGPT's recipe, in bits per character.

Each contender trains for the same minutes, one after the other, from token shards made before. nanoGPT's recipe is its
own model and its own optimizer (AdamW with decay, cosine, clipping; 4 layers x 256, context 256, batch 4, lr 2e-3, the
best found for a run of minutes on a CPU), from a checkout of it (peers.py). Ours is `pretraining.py
--budget_minutes`, which chooses the model itself. Then all are scored on the same held-out documents of unseen authors,
by gptkit/evaluation/scoring.py, in float32. In training each multiplies in the type that its project chooses for the CPU
(contenders.dtype_as): on one that multiplies bfloat16, ours does and nanoGPT does not. --dtype gives both the same type.

Apart from that, ours trains a model of nanoGPT's size for half of the time, to see whether it reaches nanoGPT's last
validation loss on the same windows (ours in the type of the run, which changes less than a thousandth of it), and with
what share of its tokens. --ingredients instead leaves things out of ours, one at a time, in the same minutes.

    python benchmarks/train_quality.py --data_dir dataset/001 --heldout_path HELDOUT --nanogpt_dir CHECKOUT --work_dir WORK
    python benchmarks/train_quality.py --data_dir dataset/001 --heldout_path HELDOUT --work_dir WORK --ingredients --minutes 2
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from contenders import NANOGPT, OURS, dtype_as
from machine import log, write_result
from peers import NanoGPTRecipe, nanogpt
from quality import END, evaluate_ours, prepare_tokens, train_and_score, train_ours

from gptkit.base import devices
from gptkit.base.cli import UserError, run_command, setting
from gptkit.base.paths import existing_path

CPU = torch.device("cpu")
ON_CPU: dict[str, object] = {"device": "cpu"}
RECIPE = NanoGPTRecipe(lr=2e-3, beta2=0.95, dropout=0.0, warmup_share=0.05, batch_size=4)
SAME_SIZE: dict[str, object] = {"model_size": "mini", "batch_size": RECIPE.batch_size, "grad_accum_steps": 1}
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
class TrainQualityConfig:
    """Measure bits per character after a fixed time of training, against nanoGPT."""

    data_dir: str = setting(help="text shards of prepare_aozora_jsonl.py", group="data")
    heldout_path: str = setting(help="JSONL of documents by unseen authors", group="data")
    work_dir: str = setting(help="a new folder for tokens and checkpoints", group="data")
    nanogpt_dir: str | None = setting(None, "a checkout of nanoGPT", group="measurement")
    minutes: float = setting(8.0, "time that each contender trains", more_than=0, group="measurement")
    vocab_size: int = setting(4096, "tokens of the vocabulary", group="measurement")
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "type of matrix products", group="measurement")
    ingredients: bool = setting(False, "leave things out of ours, one at a time", group="measurement")


def main(config: TrainQualityConfig) -> None:
    existing_path(config.data_dir, "--data_dir")
    existing_path(config.heldout_path, "--heldout_path")
    if config.nanogpt_dir is None and not config.ingredients:
        raise UserError("--nanogpt_dir is needed, a checkout of nanoGPT (or --ingredients)")
    Path(config.work_dir).mkdir(parents=True, exist_ok=True)
    suffix = "" if config.dtype == "auto" else f"_{config.dtype}"
    if config.nanogpt_dir is None or config.ingredients:
        write_result(f"train_ingredients{suffix}", leave_out(config))
    else:
        checkout = existing_path(config.nanogpt_dir, "--nanogpt_dir")
        write_result(f"train_quality{suffix}", against_nanogpt(config, checkout))


def against_nanogpt(config: TrainQualityConfig, checkout: Path) -> dict[str, Any]:
    """Train nanoGPT's recipe, ours in its size for half of the time, and ours; return the figures."""
    work_dir, heldout_path = Path(config.work_dir), Path(config.heldout_path)
    tokenizer_path, data = prepare_tokens(config.data_dir, work_dir, config.vocab_size)
    dtypes = {name: dtype_as(name, config.dtype, CPU) for name in (NANOGPT, OURS)}
    torch.manual_seed(0)
    peer = nanogpt(checkout, config.vocab_size, "4x256", CPU, dtypes[NANOGPT], False, RECIPE)
    theirs = train_and_score(peer, data, tokenizer_path, heldout_path, config.minutes, CPU, seed=0)
    theirs |= {"val_loss": theirs["last_val_loss"], "bits_per_char": theirs["bits_per_char"][END]}
    log(f"nanoGPT: {theirs}")
    flags = ON_CPU | {"dtype": config.dtype}
    half = train_ours(data, tokenizer_path, config.minutes / 2, work_dir / "same_size", flags | SAME_SIZE)
    reached = next((report for report in half["reports"] if report["val_loss"] <= theirs["val_loss"]), None)
    half["bits_per_char"] = round(evaluate_ours(work_dir / "same_size", heldout_path, ON_CPU), 4)
    log(f"ours, nanoGPT's size, half of the time: {half['bits_per_char']}; nanoGPT's loss was reached at {reached}")
    ours = train_ours(data, tokenizer_path, config.minutes, work_dir / "ours", flags)
    ours["bits_per_char"] = round(evaluate_ours(work_dir / "ours", heldout_path, ON_CPU), 4)
    saved = 1 - ours["bits_per_char"] / theirs["bits_per_char"]
    token_share = reached["tokens"] / theirs["tokens"] if reached else None
    time_share = reached["elapsed_s"] / (60 * config.minutes) if reached else None
    return {
        "minutes": config.minutes,
        "vocab_size": config.vocab_size,
        "dtype": {name: devices.dtype_name(dtype) for name, dtype in dtypes.items()},
        "nanogpt": theirs,
        "ours": ours,
        "ours_of_nanogpts_size_in_half_the_time": half,
        "fewer_bits_per_char": round(saved, 4),
        "share_of_nanogpts_tokens_to_its_loss": token_share and round(token_share, 3),
        "share_of_nanogpts_time_to_its_loss": time_share and round(time_share, 3),
        "goals": {
            "at least 10 % fewer bits per character than nanoGPT": saved >= 0.1,
            "nanoGPT's loss with at most 45 % of its tokens": token_share is not None and token_share <= 0.45,
            "and in at most half of its time": time_share is not None and time_share <= 0.5,
        },
    }


def leave_out(config: TrainQualityConfig) -> dict[str, Any]:
    """Train ours with each thing of INGREDIENTS changed; return the figures."""
    tokenizer, data = prepare_tokens(config.data_dir, Path(config.work_dir), config.vocab_size)
    found = {}
    for i, (name, flags) in enumerate(INGREDIENTS.items()):
        output_dir = Path(config.work_dir) / f"ingredient_{i}"
        run = train_ours(data, tokenizer, config.minutes, output_dir, ON_CPU | {"dtype": config.dtype} | flags)
        found[name] = {
            "bits_per_char": round(evaluate_ours(output_dir, Path(config.heldout_path), ON_CPU), 4),
            "tokens": run["tokens"],
            "steps": run["step"],
            "emb_dim": run["model"]["emb_dim"],
            "n_layers": run["model"]["n_layers"],
        }
        log(f"{name}: {found[name]}")
    return {"minutes": config.minutes, "vocab_size": config.vocab_size, "runs": found}


if __name__ == "__main__":
    run_command(TrainQualityConfig, main)
