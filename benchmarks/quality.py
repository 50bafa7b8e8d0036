"""Train and score models for train_quality.py and aozora.py: ours by the project's commands, the peers in this process.

Ours is pretraining.py, whose budget counts everything. A peer's clock counts its training alone: not its first steps,
in which a compiler works, and not the validation.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import ROOT, log, output_of, read_metrics, read_texts, run, run_logged, script
from torch import nn

from gptkit.base import devices
from gptkit.data.batches import TrainingBatches, check_data_size, validation_batches
from gptkit.data.pretokenization import load_manifest, open_tokens
from gptkit.data.token_shards import TokenStream
from gptkit.evaluation.scoring import mean_loss, score_documents
from gptkit.text.tokenizer import load_sentencepiece
from gptkit.training.compilation import Loss

END, BEST = "end", "best"  # of a run: its last weights, and those of its lowest validation loss
N_VALIDATION = 20  # batches, as --eval_iter's default
N_UNCOUNTED = 2  # steps of a peer before its clock starts
UNKNOWN_STEPS = 1_000_000  # the length of a run before its speed is known
REPORTS = 20  # of a run that reads its text less often


@dataclass(frozen=True)
class Peer:
    """A model of another project with its recipe, ready to train."""

    settings: Mapping[str, Any]  # to be written into the result
    model: nn.Module
    loss_of_batch: Loss  # in training; it may be compiled
    validation_loss: Loss
    logits: Callable[[torch.Tensor], torch.Tensor]  # (B, T) -> (B, T, V)
    optimizer: torch.optim.Optimizer
    set_rates: Callable[[int, int], None]  # before step number … of so many
    context_length: int
    batch_size: int
    grad_clip: float | None
    autocast: torch.dtype  # float32 where the model itself chooses


def prepare_tokens(data_dir: str | Path, work_dir: Path, vocab_size: int) -> tuple[Path, Path]:
    """Return our tokenizer of so many pieces and the token shards by it; made once, their time is not counted."""
    tokenizer, data = work_dir / f"tokenizer_{vocab_size}", work_dir / f"tokens_{vocab_size}"
    source = {"data_dir": data_dir}
    if not tokenizer.exists():
        run(script("dataset/train_tokenizer.py", **source, output_dir=tokenizer, vocab_size=vocab_size))
    run(script("pretokenize.py", **source, output_dir=data, tokenizer="sentencepiece", tokenizer_path=tokenizer))
    return tokenizer, data


def train_ours(
    data: Path,
    tokenizer: Path,
    minutes: float,
    output_dir: Path,
    flags: Mapping[str, object],
    project: Path = ROOT,
    variables: Mapping[str, str] | None = None,
    form: str | None = None,
) -> dict[str, Any]:
    """Run a project's pretraining.py for so long, from the beginning, and return its figures.

    `flags` are added to those for the data and the dial, or replace them (None: leave it out); `variables` are added to the
    environment; `form` is one of forms.py, of which only this project knows.
    """
    shutil.rmtree(output_dir, ignore_errors=True)
    where = {"data_dir": data / "text_is_not_needed", "pretokenized_dir": data, "output_dir": output_dir}
    fixed = {"tokenizer": "sentencepiece", "tokenizer_path": tokenizer, "budget_minutes": minutes, "model_size": "auto"}
    given = {name: value for name, value in {**where, **fixed, **flags}.items() if value is not None}
    command = [*script(str(project / "pretraining.py"), **given), "--use_pretokenized"]
    elapsed_s = run_logged(in_form(command, form), output_dir.with_suffix(".log"), **(variables or {}))
    metrics = read_metrics(output_dir)
    (checkpoint,) = sorted(output_dir.glob("step_*"))[-1:]
    state = json.loads((checkpoint / "state.json").read_bytes())
    last = {name: metrics[-1][name] for name in ("step", "tokens", "val_loss")}
    more = {"model": state["identity"]["model"], "plan": state["plan"], "reports": metrics}
    return {**last, "seconds": round(elapsed_s, 1), **more}


def evaluate_ours(
    output_dir: Path,
    text_path: Path,
    flags: Mapping[str, object],
    project: Path = ROOT,
    variables: Mapping[str, str] | None = None,
    form: str | None = None,
) -> float:
    """Return the bits per character of a run's model, by a project's evaluate_model.py; see train_ours."""
    command = script(str(project / "evaluate_model.py"), exp_dir=output_dir, text_path=text_path, **flags)
    return float(json.loads(output_of(in_form(command, form), **(variables or {})))["bits_per_char"])


def in_form(command: list[str], form: str | None) -> list[str]:
    """Return the command line that runs one of our scripts with a model of a form of forms.py, or None: of its own."""
    return command if form is None else [command[0], str(ROOT / "benchmarks" / "forms.py"), form, *command[1:]]


def open_streams(data: Path, tokenizer: Path) -> dict[str, TokenStream]:
    """Return the streams of prepare_tokens: "train" and "val"."""
    return open_tokens(data, load_manifest(data, load_sentencepiece(str(tokenizer))))


def train_and_score(
    peer: Peer,
    data: Path,
    tokenizer: Path,
    text_path: Path,
    minutes: float,
    device: torch.device,
    seed: int,
    max_steps: int | None = None,
    counts_start: bool = False,
) -> dict[str, Any]:
    """Train a peer for so long and score it at its end and at its lowest validation loss; return the figures."""
    streams = open_streams(data, tokenizer)
    trained, curve, best = train_peer(peer, streams, minutes, device, seed, max_steps, counts_start)
    documents, encoder = read_texts(text_path), load_sentencepiece(str(tokenizer))
    peer.model.eval()
    bits = {}
    for which, weights in ((END, peer.model.state_dict()), (BEST, best)):
        peer.model.load_state_dict(weights)
        score = score_documents(peer.logits, encoder, documents, peer.context_length, device=device)
        bits[which] = round(score.bits_per_char, 4)
    n_parameters = sum(parameter.numel() for parameter in peer.model.parameters())
    return {"bits_per_char": bits, **last_and_best(curve), **peer.settings, "parameters": n_parameters, **trained}


def last_and_best(curve: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    """Return a curve of (epochs, training loss, validation loss), rounded, with its last and lowest validation loss."""
    losses = [val_loss for _, _, val_loss in curve]
    rounded = [(round(epochs, 2), round(train_loss, 4), round(val_loss, 4)) for epochs, train_loss, val_loss in curve]
    lowest, last = round(min(losses), 4), round(losses[-1], 4)
    return {"last_val_loss": last, "best_val_loss": lowest, "epochs": rounded[-1][0], "curve": rounded}


def losses_of(reports: Sequence[Mapping[str, Any]], n_tokens: int) -> dict[str, Any]:
    """Return the figures of a run's reports on a text of n_tokens: the losses of the weights that are scored.

    Those are averaged where there is an average; "not_averaged" has the last and lowest loss of the others.
    """

    def losses(name: str) -> dict[str, Any]:
        return last_and_best(
            [
                (report["tokens"] / n_tokens, report["train_loss"], report.get(name, report["val_loss"]))
                for report in reports
            ]
        )

    plain = losses("val_loss")
    return losses("averaged_val_loss") | {
        "not_averaged": {name: plain[name] for name in ("last_val_loss", "best_val_loss")}
    }


def train_peer(
    peer: Peer,
    streams: Mapping[str, TokenStream],
    minutes: float,
    device: torch.device,
    seed: int,
    max_steps: int | None = None,
    counts_start: bool = False,
) -> tuple[dict[str, Any], list[tuple[float, float, float]], dict[str, torch.Tensor]]:
    """Train a peer for so long, or max_steps; return its figures, its curve, and its weights at the lowest validation loss.

    It is validated about once per epoch, and at least REPORTS times. The curve has (epochs, training loss, validation
    loss). The model keeps its last weights. The first N_UNCOUNTED steps, in which a compiler works, take of the time only
    where counts_start.
    """
    batches = TrainingBatches(streams["train"], peer.context_length, peer.batch_size, 1, seed)
    check_data_size(batches, len(streams["val"]))
    validation = validation_batches(streams["val"], peer.context_length, peer.batch_size, N_VALIDATION)
    curve: list[tuple[float, float, float]] = []
    best: dict[str, torch.Tensor] = {}
    peer.model.train()
    limit = max_steps or UNKNOWN_STEPS
    losses, step, reported, n_steps = torch.zeros((), device=device), 0, 0, limit
    start_s = uncounted_s = 0.0
    began = time.monotonic()
    while step < n_steps:
        losses += _train_step(peer, batches, step, n_steps, device)
        step += 1
        now = time.monotonic()
        if step <= N_UNCOUNTED:
            start_s = uncounted_s = now - began
            continue
        spent_s = now - began - uncounted_s
        left_s = max(60 * minutes - spent_s - (start_s if counts_start else 0.0), 0.0)
        n_steps = min(step + math.ceil(left_s * (step - N_UNCOUNTED) / spent_s), limit)
        if step == n_steps or step - reported >= max(min(batches.steps_per_epoch, n_steps // REPORTS), 1):
            devices.synchronize(device)
            train_loss = losses.item() / (step - reported)
            val_loss = mean_loss(peer.model, peer.validation_loss, validation, device, peer.autocast)
            if all(val_loss < before for _, _, before in curve):
                best = {name: tensor.detach().clone() for name, tensor in peer.model.state_dict().items()}
            epochs = step / batches.steps_per_epoch
            curve.append((epochs, train_loss, val_loss))
            log(f"step {step}/{n_steps}, epoch {epochs:.2f}: train {train_loss:.4f}, val {val_loss:.4f}")
            losses.zero_()
            reported = step
            uncounted_s += time.monotonic() - now
    seconds = {"start_s": round(start_s, 1), "seconds": round(spent_s, 1)}  # the second without the first
    figures = {"steps": step, "tokens": step * batches.tokens_per_step, **seconds}
    return figures, curve, best


def _train_step(peer: Peer, batches: TrainingBatches, step: int, n_steps: int, device: torch.device) -> torch.Tensor:
    """Take one optimizer step of a peer and return its loss."""
    peer.set_rates(step, n_steps)
    inputs, targets = (ids.to(device, non_blocking=True) for ids in batches.micro_batch(step, 0))
    with devices.autocast(device, peer.autocast):
        loss = peer.loss_of_batch(inputs, targets)
    loss.backward()
    if peer.grad_clip is not None:
        nn.utils.clip_grad_norm_(peer.model.parameters(), peer.grad_clip)
    peer.optimizer.step()
    peer.optimizer.zero_grad(set_to_none=True)
    return loss.detach()
