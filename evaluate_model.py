"""How well trained GPTs predict a text: experiment folders, or models of others, and a file of works in, figures out.

    python evaluate_model.py --exp_dir exp001 --text_path dataset/heldout.jsonl
    python evaluate_model.py --exp_dir exp001 exp002 --hf_model rinna/japanese-gpt2-small --text_path dataset/heldout.jsonl

The figure to compare models by is bits_per_char, whatever their tokenizers; gptkit/evaluation.py defines it. Standard
output gets JSON alone: an object, or of several models an array. Standard error gets the rest, and of several models a
table.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from gpt_model import GPTModel
from gptkit.base import devices
from gptkit.base.cli import UserError, first_line, progress_bar, run_command, setting
from gptkit.base.paths import existing_path, hub_folder
from gptkit.evaluation.documents import read_documents
from gptkit.evaluation.scoring import score_documents
from gptkit.text.tokenizer import HF_PATTERNS, Tokenizer, load_hf
from gptkit.training import checkpoints


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How well trained GPTs predict a text: bits per character, loss and perplexity, as JSON."""

    exp_dir: tuple[str, ...] = setting((), "experiment folders (or the folders of checkpoints in them)")
    hf_model: tuple[str, ...] = setting(
        (), "causal models that transformers loads: folders, or repositories of the hub"
    )
    text_path: str = setting(
        help="a .jsonl, .jsonl.gz or .jsonl.xz file of works, or a .txt file of works with <|endoftext|> between them"
    )
    max_chars: int | None = setting(
        None, "read only the first works, as many as so many characters hold, and at least one", at_least=1
    )
    stride: int | None = setting(
        None, "tokens by which the windows of a long work move on (default: half the model's context)", at_least=1
    )
    batch_size: int = setting(8, "windows at once", at_least=1)
    checkpoint: checkpoints.Choice = setting("newest", "best: the one with the lowest validation loss")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "of matrix products (auto: bfloat16 on GPUs that multiply it)"
    )


@dataclass(frozen=True)
class Contender:
    """A model as scoring needs it."""

    name: str
    forward: Callable[[torch.Tensor], torch.Tensor]  # ids (B, T) -> logits (B, T, V)
    tokenizer: Any  # a Tokenizer, or what encodes like one
    context_length: int
    n_parameters: int


@dataclass(frozen=True)
class WithinVocabulary:
    """A tokenizer whose added newline token a model has no row for: to the model a newline is unknown."""

    tokenizer: Tokenizer
    n_words: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def encode(self, text: str) -> list[int]:
        return [i if i < self.n_words else self.tokenizer.unknown_id for i in self.tokenizer.encode(text)]  # type: ignore[misc]


def main(config: EvaluationConfig) -> None:
    device = devices.choose_device(config.device)
    if not config.exp_dir and not config.hf_model:
        raise UserError("no model is named; give --exp_dir, --hf_model or both")
    path = existing_path(config.text_path, "--text_path")
    if not path.is_file():
        raise UserError(f"--text_path {path} is no file; name a .jsonl or .txt file")
    found: list[dict[str, Any]] = []
    try:
        for contender in contenders(config, device):
            found.append(evaluate(config, contender, device))
    finally:  # what was found is not thrown away for a mistake in a later one
        if len(found) > 1:
            print(table(found), file=sys.stderr)
        if found:
            several = len(config.exp_dir) + len(config.hf_model) > 1
            print(json.dumps(found if several else found[0]))  # in ASCII, which every locale shows as it is


def contenders(config: EvaluationConfig, device: torch.device) -> Iterator[Contender]:
    """One after the other, so that one is held at a time. Raises UserError."""
    folders = [checkpoints.choose_checkpoint(exp_dir, config.checkpoint) for exp_dir in config.exp_dir]
    patterns = [*HF_PATTERNS, "*.json", "*.safetensors"]
    of_others = {name: hub_folder(name, "--hf_model", patterns) for name in config.hf_model}
    for folder in folders:
        model, tokenizer = checkpoints.load_checkpoint(folder, GPTModel.from_dimensions, device)
        yield Contender(str(folder), model.eval(), tokenizer, model.config.context_length, model.n_parameters())
    for name, folder in of_others.items():
        yield of_transformers(name, folder, device)


def of_transformers(name: str, folder: Path, device: torch.device) -> Contender:
    """A model that transformers loads, from safetensors alone; its text is read by our rules. Raises UserError."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer: Any = load_hf(str(folder), "--hf_model")
    try:
        model, about = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
        absent = sorted(about["missing_keys"]) + sorted(map(str, about["mismatched_keys"]))
        if absent:
            raise ValueError(f"its weights lack {absent[0]}")
        model = model.eval()
        n_words = model.get_input_embeddings().num_embeddings
        context_length = model.config.max_position_embeddings
    except Exception as error:  # it raises many kinds for a folder without a model
        raise UserError(f"--hf_model {name} is no causal model that transformers loads ({first_line(error)})")
    if tokenizer.vocab_size > n_words:
        if tokenizer.vocab_size > n_words + 1 or tokenizer.unknown_id is None:
            raise UserError(f"--hf_model {name} has {n_words} words and its tokenizer {tokenizer.vocab_size}")
        tokenizer = WithinVocabulary(tokenizer, n_words)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    model = model.to(device)
    return Contender(name, lambda ids: model(ids, use_cache=False).logits, tokenizer, context_length, n_parameters)


def evaluate(config: EvaluationConfig, contender: Contender, device: torch.device) -> dict[str, Any]:
    """Raises UserError."""
    dtype = devices.choose_dtype(config.dtype, device)
    tokenizer, context_length = contender.tokenizer, contender.context_length
    if config.stride is not None and config.stride > context_length:
        raise UserError(f"--stride {config.stride} is more than the model's context; give at most {context_length}")
    path = existing_path(config.text_path, "--text_path")
    # The works are read twice: a line that is none is found before the long work, and the time left is known.
    n_tokens = sum(len(tokenizer.encode(work)) + 1 for work in read_documents(path, config.max_chars))
    print(
        f"{contender.name}: {contender.n_parameters:,} parameters on {devices.describe_device(device)}, {dtype}",
        file=sys.stderr,
    )
    with progress_bar(n_tokens, "token", "evaluate") as progress:
        score = score_documents(
            contender.forward,
            tokenizer,
            read_documents(path, config.max_chars),
            context_length,
            stride=config.stride,
            batch_size=config.batch_size,
            device=device,
            dtype=dtype,
            progress=progress,
        )
    if not math.isfinite(score.perplexity):
        raise UserError(f"{contender.name} predicts nothing: its loss is {score.loss}; use another checkpoint")
    return {
        "bits_per_char": score.bits_per_char,
        "loss": score.loss,
        "perplexity": score.perplexity,
        "tokens": score.tokens,
        "characters": score.characters,
        "works": score.works,
        "unknown_tokens": score.unknown_tokens,
        "checkpoint": contender.name,
        "tokenizer": tokenizer.name,
    }


def table(found: list[dict[str, Any]]) -> str:
    """The models by bits per character, the best first."""
    rows = [("bits/char", "loss", "perplexity", "tokens", "unknown", "model")]
    for result in sorted(found, key=lambda result: result["bits_per_char"]):
        figures = (f"{result['bits_per_char']:.4f}", f"{result['loss']:.4f}", f"{result['perplexity']:,.2f}")
        rows.append((*figures, f"{result['tokens']:,}", f"{result['unknown_tokens']:,}", result["checkpoint"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([*(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)), row[-1]])
        for row in rows
    )


def run(config: EvaluationConfig) -> None:
    """main, with a lack of memory told in one line."""
    try:
        main(config)
    except (RuntimeError, MemoryError) as error:
        if not devices.is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory with --batch_size {config.batch_size}; give a smaller one, or use a larger machine"
        )


if __name__ == "__main__":
    run_command(EvaluationConfig, run)
