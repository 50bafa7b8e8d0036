"""How good a Japanese model a fixed time of training gives: ours against nanoGPT's recipe, by bits per character.

Each contender trains for the same minutes, one after the other, from token shards made before. nanoGPT's recipe is its
own model and its own optimizer (AdamW with decay, cosine, clipping; 4 layers x 256, context 256, batch 4, lr 2e-3, the
best found for a run of minutes on a CPU), from a checkout of it. Ours is `pretraining.py --budget_minutes`, which
chooses the model itself. Then all are scored on the same held-out works, unseen authors', by gptkit/evaluation.py, in
float32. Each multiplies in training in the type that its project chooses for the CPU (contenders.dtype_as): where that
multiplies bfloat16, ours does and nanoGPT's does not. --dtype gives both the same.

Apart from that, ours trains a model of nanoGPT's size for half of the time, to see whether it comes to nanoGPT's last
validation loss on the same windows (ours in the type of the run, which changes less than a thousandth of it), and with
what share of its tokens. --ingredients leaves things out of ours, one at
a time, at the same minutes.

    python benchmarks/train_quality.py --data_dir dataset/001 --heldout_path HELDOUT --nanogpt_dir CHECKOUT
    python benchmarks/train_quality.py --data_dir dataset/001 --heldout_path HELDOUT --ingredients --minutes 2
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from contenders import NANOGPT, OURS, dtype_as, load_nanogpt
from machine import ROOT, read_texts, say, write_result

from gptkit.base import devices
from gptkit.data.batches import TrainingBatches, validation_batches
from gptkit.data.pretokenization import load_manifest, open_tokens
from gptkit.evaluation.scoring import score_documents
from gptkit.text.tokenizer import load_sentencepiece

CPU = torch.device("cpu")
NANOGPT_SIZE = dict(n_layer=4, n_head=4, n_embd=256, block_size=256, bias=False, dropout=0.0)
BATCH_SIZE, LR, WARMUP_SHARE, N_VALIDATION = 4, 2e-3, 0.05, 20
SAME_SIZE = ("--model_size", "mini", "--batch_size", "4", "--grad_accum_steps", "1", "--eval_iter", str(N_VALIDATION))
INGREDIENTS: dict[str, tuple[str, ...]] = {
    "the recipe": (),
    "AdamW in place of Muon (lr 4e-3)": ("--optimizer", "adamw", "--lr", "4e-3"),
    "GPT-2's architecture": ("--arch", "gpt2"),
    "no start from token pairs": ("--bigram_steps", "0"),
    "nanoGPT's size (4 x 256, context 256)": ("--model_size", "mini"),
    "a batch of 512 tokens": ("--batch_size", "4", "--grad_accum_steps", "1"),
    "a batch of 4,096 tokens": ("--batch_size", "32", "--grad_accum_steps", "1"),
}


def train_nanogpt(
    folder: Path, data: Path, tokenizer: Any, minutes: float, dtype: torch.dtype
) -> tuple[dict[str, Any], Any]:
    """Train nanoGPT's model for so long; what came out, and the model as ids -> logits."""
    module = load_nanogpt(folder)
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
            say(f"nanoGPT: step {step}, loss {loss.item():.4f}, {time.monotonic() - start:.0f} s")
    model.eval()
    found = validation_batches(tokens["val"], int(context), BATCH_SIZE, N_VALIDATION)
    with torch.no_grad():
        val_loss = sum(model(*batch)[1].item() for batch in found) / len(found)

    def forward(ids: torch.Tensor) -> torch.Tensor:  # with targets it gives the logits of all positions
        ids = ids.contiguous()  # it takes views of it
        logits: torch.Tensor = model(ids, ids)[0]
        return logits

    return {"steps": step, "tokens": step * batches.tokens_per_step, "val_loss": val_loss}, forward


def train_ours(
    data: Path, tokenizer: Path, options: argparse.Namespace, minutes: float, output_dir: Path, *extra: str
) -> dict[str, Any]:
    """Run pretraining.py for so long, from the beginning; what came out."""
    shutil.rmtree(output_dir, ignore_errors=True)
    command = [sys.executable, str(ROOT / "pretraining.py"), "--data_dir", str(data / "text_is_not_needed")]
    command += ["--use_pretokenized", "--pretokenized_dir", str(data), "--tokenizer", "sentencepiece"]
    command += ["--tokenizer_path", str(tokenizer), "--output_dir", str(output_dir), "--device", "cpu"]
    command += ["--dtype", options.dtype]
    command += [
        "--budget_minutes",
        str(minutes),
        *(() if "--model_size" in extra else ("--model_size", "auto")),
        *extra,
    ]
    start = time.monotonic()
    with open(output_dir.with_suffix(".log"), "w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    elapsed_s = time.monotonic() - start
    metrics = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    (checkpoint,) = sorted(output_dir.glob("step_*"))[-1:]
    identity = json.loads((checkpoint / "state.json").read_bytes())["identity"]
    kept = {name: metrics[-1][name] for name in ("step", "tokens", "val_loss")}
    return {**kept, "seconds": round(elapsed_s, 1), "model": identity["model"], "reports": metrics}


def evaluate_ours(output_dir: Path, heldout_path: Path) -> float:
    command = [sys.executable, str(ROOT / "evaluate_model.py"), "--exp_dir", str(output_dir)]
    command += ["--text_path", str(heldout_path), "--device", "cpu"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(found)["bits_per_char"])


def prepare(data_dir: Path, work: Path, vocab_size: int) -> tuple[Path, Path]:
    """Our tokenizer of so many pieces, and the token shards by it; made once, and their time does not count."""
    tokenizer, data = work / f"tokenizer_{vocab_size}", work / f"tokens_{vocab_size}"
    if not tokenizer.exists():
        command = [sys.executable, str(ROOT / "dataset/train_tokenizer.py"), "--data_dir", str(data_dir)]
        subprocess.run([*command, "--output_dir", str(tokenizer), "--vocab_size", str(vocab_size)], check=True)
    command = [sys.executable, str(ROOT / "pretokenize.py"), "--data_dir", str(data_dir), "--output_dir", str(data)]
    subprocess.run([*command, "--tokenizer", "sentencepiece", "--tokenizer_path", str(tokenizer)], check=True)
    return tokenizer, data


def against_nanogpt(options: argparse.Namespace) -> dict[str, Any]:
    tokenizer_path, data = prepare(options.data_dir, options.work_dir, options.vocab_size)
    tokenizer = load_sentencepiece(str(tokenizer_path))
    works = read_texts(options.heldout_path)
    dtypes = {name: dtype_as(name, options.dtype, CPU) for name in (NANOGPT, OURS)}
    theirs, forward = train_nanogpt(options.nanogpt_dir, data, tokenizer, options.minutes, dtypes[NANOGPT])
    score = score_documents(forward, tokenizer, works, int(NANOGPT_SIZE["block_size"]))
    theirs["bits_per_char"] = round(score.bits_per_char, 4)
    say(f"nanoGPT: {theirs}")
    half = train_ours(data, tokenizer_path, options, options.minutes / 2, options.work_dir / "same_size", *SAME_SIZE)
    reached = next((report for report in half["reports"] if report["val_loss"] <= theirs["val_loss"]), None)
    half["bits_per_char"] = round(evaluate_ours(options.work_dir / "same_size", options.heldout_path), 4)
    say(f"ours, nanoGPT's size, half of the time: {half['bits_per_char']}; nanoGPT's loss was reached at {reached}")
    ours = train_ours(data, tokenizer_path, options, options.minutes, options.work_dir / "ours")
    ours["bits_per_char"] = round(evaluate_ours(options.work_dir / "ours", options.heldout_path), 4)
    saved = 1 - ours["bits_per_char"] / theirs["bits_per_char"]
    token_share = reached["tokens"] / theirs["tokens"] if reached else None
    time_share = reached["elapsed_s"] / (60 * options.minutes) if reached else None
    return {
        "minutes": options.minutes,
        "vocab_size": options.vocab_size,
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


def leave_out(options: argparse.Namespace) -> dict[str, Any]:
    tokenizer, data = prepare(options.data_dir, options.work_dir, options.vocab_size)
    found = {}
    for i, (name, extra) in enumerate(INGREDIENTS.items()):
        output_dir = options.work_dir / f"ingredient_{i}"
        run = train_ours(data, tokenizer, options, options.minutes, output_dir, *extra)
        found[name] = {
            "bits_per_char": round(evaluate_ours(output_dir, options.heldout_path), 4),
            "tokens": run["tokens"],
            "steps": run["step"],
            "emb_dim": run["model"]["emb_dim"],
            "n_layers": run["model"]["n_layers"],
        }
        say(f"{name}: {found[name]}")
    return {"minutes": options.minutes, "vocab_size": options.vocab_size, "runs": found}


def main() -> None:
    parser = argparse.ArgumentParser(description="Bits per character after a fixed time, against nanoGPT")
    parser.add_argument("--data_dir", type=Path, required=True, help="text shards of prepare_aozora_jsonl.py")
    parser.add_argument("--heldout_path", type=Path, required=True, help="JSONL of works by unseen authors")
    parser.add_argument("--work_dir", type=Path, required=True, help="a new folder for tokens and checkpoints")
    parser.add_argument("--nanogpt_dir", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--dtype", choices=["auto", *devices.DTYPES], default="auto", help="of matrix products")
    parser.add_argument("--ingredients", action="store_true", help="leave things out of ours, one at a time")
    options = parser.parse_args()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    alike = "" if options.dtype == "auto" else f"_{options.dtype}"
    if options.ingredients:
        write_result(f"train_ingredients{alike}", leave_out(options))
    elif options.nanogpt_dir is None:
        sys.exit("error: --nanogpt_dir is needed, a checkout of nanoGPT (or --ingredients)")
    else:
        write_result(f"train_quality{alike}", against_nanogpt(options))


if __name__ == "__main__":
    main()
