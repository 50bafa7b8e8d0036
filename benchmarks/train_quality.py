"""Measure how good a Japanese model a fixed time of training gives: ours against nanoGPT's recipe, in bits per character.

Each contender trains for the same minutes, one after the other, from token shards made before. nanoGPT's recipe is its
own model and its own optimizer (AdamW with decay, cosine, clipping; 4 layers x 256, context 256, batch 4, lr 2e-3, the
best found for a run of minutes on a CPU), from a checkout of it. Ours is `pretraining.py --budget_minutes`, which
chooses the model itself. Then all are scored on the same held-out documents of unseen authors, by
gptkit/evaluation/scoring.py, in float32. In training each multiplies in the type that its project chooses for the CPU
(contenders.dtype_as): on one that multiplies bfloat16, ours does and nanoGPT does not. --dtype gives both the same type.

Apart from that, ours trains a model of nanoGPT's size for half of the time, to see whether it reaches nanoGPT's last
validation loss on the same windows (ours in the type of the run, which changes less than a thousandth of it), and with
what share of its tokens. --ingredients instead leaves things out of ours, one at a time, in the same minutes.

    python benchmarks/train_quality.py --data_dir dataset/001 --heldout_path HELDOUT --nanogpt_dir CHECKOUT --work_dir WORK
    python benchmarks/train_quality.py --data_dir dataset/001 --heldout_path HELDOUT --work_dir WORK --ingredients --minutes 2
"""

import json
import math
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from contenders import NANOGPT, OURS, dtype_as, load_nanogpt
from machine import log, output_of, read_metrics, read_texts, script, write_result

from gptkit.base import devices
from gptkit.base.cli import UserError, run_command, setting
from gptkit.base.paths import existing_path
from gptkit.data.batches import TrainingBatches, validation_batches
from gptkit.data.pretokenization import load_manifest, open_tokens
from gptkit.evaluation.scoring import score_documents
from gptkit.text.tokenizer import load_sentencepiece

CPU = torch.device("cpu")
NANOGPT_SIZE = dict(n_layer=4, n_head=4, n_embd=256, block_size=256, bias=False, dropout=0.0)
BATCH_SIZE, LR, WARMUP_SHARE, N_VALIDATION = 4, 2e-3, 0.05, 20
SAME_SIZE = {"model_size": "mini", "batch_size": 4, "grad_accum_steps": 1, "eval_iter": N_VALIDATION}
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
    tokenizer_path, data = prepare(config)
    tokenizer = load_sentencepiece(str(tokenizer_path))
    dtypes = {name: dtype_as(name, config.dtype, CPU) for name in (NANOGPT, OURS)}
    theirs, forward = train_nanogpt(checkout, data, tokenizer, config.minutes, dtypes[NANOGPT])
    score = score_documents(forward, tokenizer, read_texts(heldout_path), int(NANOGPT_SIZE["block_size"]))
    theirs["bits_per_char"] = round(score.bits_per_char, 4)
    log(f"nanoGPT: {theirs}")
    half = train_ours(data, tokenizer_path, config.dtype, config.minutes / 2, work_dir / "same_size", **SAME_SIZE)
    reached = next((report for report in half["reports"] if report["val_loss"] <= theirs["val_loss"]), None)
    half["bits_per_char"] = round(evaluate_ours(work_dir / "same_size", heldout_path), 4)
    log(f"ours, nanoGPT's size, half of the time: {half['bits_per_char']}; nanoGPT's loss was reached at {reached}")
    ours = train_ours(data, tokenizer_path, config.dtype, config.minutes, work_dir / "ours")
    ours["bits_per_char"] = round(evaluate_ours(work_dir / "ours", heldout_path), 4)
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
    tokenizer, data = prepare(config)
    found = {}
    for i, (name, flags) in enumerate(INGREDIENTS.items()):
        output_dir = Path(config.work_dir) / f"ingredient_{i}"
        run = train_ours(data, tokenizer, config.dtype, config.minutes, output_dir, **flags)
        found[name] = {
            "bits_per_char": round(evaluate_ours(output_dir, Path(config.heldout_path)), 4),
            "tokens": run["tokens"],
            "steps": run["step"],
            "emb_dim": run["model"]["emb_dim"],
            "n_layers": run["model"]["n_layers"],
        }
        log(f"{name}: {found[name]}")
    return {"minutes": config.minutes, "vocab_size": config.vocab_size, "runs": found}


def prepare(config: TrainQualityConfig) -> tuple[Path, Path]:
    """Return our tokenizer of so many pieces and the token shards by it; made once, their time is not counted."""
    work_dir = Path(config.work_dir)
    tokenizer, data = work_dir / f"tokenizer_{config.vocab_size}", work_dir / f"tokens_{config.vocab_size}"
    source = {"data_dir": config.data_dir}
    if not tokenizer.exists():
        training = script("dataset/train_tokenizer.py", **source, output_dir=tokenizer, vocab_size=config.vocab_size)
        subprocess.run(training, check=True)
    tokenize = script("pretokenize.py", **source, output_dir=data, tokenizer="sentencepiece", tokenizer_path=tokenizer)
    subprocess.run(tokenize, check=True)
    return tokenizer, data


def train_nanogpt(
    checkout: Path, data: Path, tokenizer: Any, minutes: float, dtype: torch.dtype
) -> tuple[dict[str, Any], Any]:
    """Train nanoGPT's model for so long; return its figures, and the model as a function ids -> logits."""
    module = load_nanogpt(checkout)
    tokens = open_tokens(data, load_manifest(data, tokenizer))
    context = NANOGPT_SIZE["block_size"]
    batches = TrainingBatches(tokens["train"], int(context), BATCH_SIZE, 1, 0)
    torch.manual_seed(0)
    vocab_size = math.ceil(tokenizer.vocab_size / 64) * 64
    model = module.GPT(module.GPTConfig(vocab_size=vocab_size, **NANOGPT_SIZE))
    optimizer = model.configure_optimizers(0.1, LR, (0.9, 0.95), "cpu")
    start, step = time.monotonic(), 0
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        share = min(done / WARMUP_SHARE, 1) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = LR * max(share, 1e-3)
        inputs, targets = batches.micro_batch(step, 0)
        with devices.autocast(CPU, dtype):
            _, loss = model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 200 == 0:
            log(f"nanoGPT: step {step}, loss {loss.item():.4f}, {time.monotonic() - start:.0f} s")
    model.eval()
    found = validation_batches(tokens["val"], int(context), BATCH_SIZE, N_VALIDATION)
    with torch.no_grad():
        val_loss = sum(model(*batch)[1].item() for batch in found) / len(found)

    def forward(ids: torch.Tensor) -> torch.Tensor:  # given targets, it returns the logits of all positions
        ids = ids.contiguous()  # it takes views of them
        logits: torch.Tensor = model(ids, ids)[0]
        return logits

    return {"steps": step, "tokens": step * batches.tokens_per_step, "val_loss": val_loss}, forward


def train_ours(
    data: Path, tokenizer: Path, dtype: str, minutes: float, output_dir: Path, **flags: object
) -> dict[str, Any]:
    """Run pretraining.py for so long, from the beginning, and return its figures."""
    shutil.rmtree(output_dir, ignore_errors=True)
    where = {"data_dir": data / "text_is_not_needed", "pretokenized_dir": data, "output_dir": output_dir}
    fixed = {"tokenizer": "sentencepiece", "tokenizer_path": tokenizer, "device": "cpu", "dtype": dtype}
    flags = {"budget_minutes": minutes, "model_size": "auto", **where, **fixed, **flags}
    start = time.monotonic()
    with open(output_dir.with_suffix(".log"), "w") as output:
        command = [*script("pretraining.py", **flags), "--use_pretokenized"]
        subprocess.run(command, check=True, stdout=output, stderr=subprocess.STDOUT)
    elapsed_s = time.monotonic() - start
    metrics = read_metrics(output_dir)
    (checkpoint,) = sorted(output_dir.glob("step_*"))[-1:]
    identity = json.loads((checkpoint / "state.json").read_bytes())["identity"]
    last = {name: metrics[-1][name] for name in ("step", "tokens", "val_loss")}
    return {**last, "seconds": round(elapsed_s, 1), "model": identity["model"], "reports": metrics}


def evaluate_ours(output_dir: Path, heldout_path: Path) -> float:
    """Return the bits per character of a run's model."""
    command = script("evaluate_model.py", exp_dir=output_dir, text_path=heldout_path, device="cpu")
    return float(json.loads(output_of(command))["bits_per_char"])


if __name__ == "__main__":
    run_command(TrainQualityConfig, main)
