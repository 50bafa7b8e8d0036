"""Evaluate how well trained GPTs predict a text: experiment folders or other models, on a file of documents.

    python evaluate_model.py --exp_dir exp001 --text_path dataset/heldout.jsonl
    python evaluate_model.py --exp_dir exp001 exp002 --hf_model rinna/japanese-gpt2-small --text_path dataset/heldout.jsonl

The figure to compare models by is bits_per_char, whatever their tokenizers; gptkit/evaluation/scoring.py defines it.
Only JSON is printed to standard output (to the file evaluate_model.out where that is closed): an object, or an array
for several models. Everything else is printed to standard error, for several models also a table.
"""

from gptkit.base.startup import prepare_process

if __name__ == "__main__":
    prepare_process()  # before the imports below, which take seconds

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt_model import GPTModel
from gptkit.base import devices
from gptkit.base.cli import UserError, first_line, progress_bar, run_command, setting
from gptkit.base.paths import existing_path, hub_folder
from gptkit.base.streams import has_failed
from gptkit.evaluation.documents import read_documents
from gptkit.evaluation.scoring import score_documents
from gptkit.interop.huggingface import torchvision_problem
from gptkit.text.tokenizer import HF_PATTERNS, Tokenizer, load_hf
from gptkit.training.loading import CHOICE_HELP, Choice, checkpoint_name, choose_checkpoint, load_chosen


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluate how well trained GPTs predict a text: bits per character, loss and perplexity, as JSON."""

    exp_dir: tuple[str, ...] = setting((), "experiment folders (or the folders of checkpoints in them)", group="model")
    hf_model: tuple[str, ...] = setting(
        (), "causal models that transformers loads: folders, or repositories of the hub", group="model"
    )
    checkpoint: Choice = setting("averaged", CHOICE_HELP, group="model")
    text_path: str = setting(
        help="a .jsonl, .jsonl.gz or .jsonl.xz file, or a .txt file of documents with <|endoftext|> between them",
        group="data",
    )
    max_chars: int | None = setting(
        None,
        "read only the first documents, as many as so many characters hold, and at least one",
        at_least=1,
        group="data",
    )
    stride: int | None = setting(
        None,
        "tokens between the beginnings of the windows of a long document (default: half the model's context)",
        at_least=1,
        group="batch",
    )
    batch_size: int = setting(8, "windows per batch", at_least=1, group="batch")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", group="device")
    dtype: devices.DtypeName = setting(
        "auto", "of matrix products (auto: on a GPU bfloat16, or float16 on older ones; else float32)", group="device"
    )


@dataclass(frozen=True)
class Contender:
    """A model to evaluate, in the form that scoring needs."""

    name: str
    forward: Callable[[torch.Tensor], torch.Tensor]  # ids (B, T) -> logits (B, T, V)
    tokenizer: Any  # a Tokenizer, or an object with its attributes
    context_length: int
    n_parameters: int
    is_averaged: bool = False  # the weights are the averaged ones of a checkpoint


@dataclass(frozen=True)
class WithinVocabulary:
    """A tokenizer for a model whose embedding has no row for the added newline token: a newline becomes unknown."""

    tokenizer: Tokenizer
    vocab_size: int  # rows of the model's embedding

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def encode(self, text: str) -> list[int]:
        return [i if i < self.vocab_size else self.tokenizer.unknown_id for i in self.tokenizer.encode(text)]  # type: ignore[misc]


def main(config: EvaluationConfig) -> None:
    device = devices.choose_device(config.device)
    if not config.exp_dir and not config.hf_model:
        raise UserError("no model is named; give --exp_dir, --hf_model or both")
    path = existing_path(config.text_path, "--text_path")
    if not path.is_file():
        raise UserError(f"--text_path {path} is not a file; name a .jsonl or .txt file")
    results: list[dict[str, Any]] = []
    try:
        for contender in load_contenders(config, device):
            results.append(evaluate(config, contender, device))
    finally:  # an error with a later model must not lose these results
        if len(results) > 1:
            print(format_table(results), file=sys.stderr)
        if results:
            several = len(config.exp_dir) + len(config.hf_model) > 1
            print_result(json.dumps(results if several else results[0]))  # in ASCII, which every locale can show


def print_result(line: str) -> None:
    """Print a line to standard output; where that is closed, append it to evaluate_model.out, as nohup would do."""
    print(line, flush=True)
    if has_failed(sys.stdout):
        try:
            with open("evaluate_model.out", "a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        except OSError:
            print(line, file=sys.stderr)
            raise
        print("standard output is closed: the result is in evaluate_model.out", file=sys.stderr)


def load_contenders(config: EvaluationConfig, device: torch.device) -> Iterator[Contender]:
    """Yield the models one after the other, so that one is in memory at a time. Raises UserError."""
    for exp_dir in config.exp_dir:  # so that a mistake is reported before the first long computation
        choose_checkpoint(exp_dir, config.checkpoint)
    patterns = [*HF_PATTERNS, "*.json", "*.safetensors"]
    hf_folders = {name: hub_folder(name, "--hf_model", patterns) for name in config.hf_model}
    for exp_dir in config.exp_dir:
        build = GPTModel.from_dimensions
        folder, model, tokenizer, is_averaged = load_chosen(exp_dir, config.checkpoint, build, device)
        n_parameters = model.n_parameters()
        yield Contender(str(folder), model.eval(), tokenizer, model.config.context_length, n_parameters, is_averaged)
    for name, folder in hf_folders.items():
        yield load_hf_model(name, folder, device)


def load_hf_model(name: str, folder: Path, device: torch.device) -> Contender:
    """Load a model with transformers, from safetensors alone, and its tokenizer with load_hf. Raises UserError."""
    problem = torchvision_problem()
    if problem:
        raise UserError(f"--hf_model {name}: {problem}")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer: Any = load_hf(str(folder), "--hf_model")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
        missing = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
        if missing:
            raise ValueError(f"its weights lack {missing[0]}")
        model = model.eval()
        vocab_size = model.get_input_embeddings().num_embeddings
        context_length = model.config.max_position_embeddings
    except Exception as error:  # it raises many kinds for a folder without a model
        raise UserError(f"--hf_model {name} is not a causal model that transformers loads ({first_line(error)})")
    if tokenizer.vocab_size > vocab_size:
        if tokenizer.vocab_size > vocab_size + 1 or tokenizer.unknown_id is None:
            raise UserError(
                f"--hf_model {name} has {vocab_size} tokens and its tokenizer {tokenizer.vocab_size}; choose another model"
            )
        tokenizer = WithinVocabulary(tokenizer, vocab_size)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    model = model.to(device)
    return Contender(name, lambda ids: model(ids, use_cache=False).logits, tokenizer, context_length, n_parameters)


def evaluate(config: EvaluationConfig, contender: Contender, device: torch.device) -> dict[str, Any]:
    """Score one model on --text_path and return its figures as they are printed. Raises UserError."""
    dtype = devices.choose_dtype(config.dtype, device)
    tokenizer, context_length = contender.tokenizer, contender.context_length
    if config.stride is not None and config.stride > context_length:
        raise UserError(f"--stride {config.stride} is more than the model's context; give at most {context_length}")
    path = existing_path(config.text_path, "--text_path")
    # The documents are read twice: a bad line is found before the long computation, and the time left is known.
    n_tokens = sum(len(tokenizer.encode(document)) + 1 for document in read_documents(path, config.max_chars))
    name, where = checkpoint_name(contender.name, contender.is_averaged), devices.describe_device(device)
    print(f"{name}: {contender.n_parameters:,} parameters on {where}, {dtype}", file=sys.stderr)
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
        raise UserError(
            f"{contender.name} has a loss of {score.loss}, which is not a usable score; use another checkpoint"
            + (", or --dtype float32, which has a wider range" if dtype == torch.float16 else "")
        )
    return {
        "bits_per_char": score.bits_per_char,
        "loss": score.loss,
        "perplexity": score.perplexity,
        "tokens": score.tokens,
        "characters": score.characters,
        "works": score.documents,
        "unknown_tokens": score.unknown_tokens,
        "checkpoint": contender.name,
        "tokenizer": tokenizer.name,
    } | ({"weights": "averaged"} if contender.is_averaged else {})


def format_table(results: list[dict[str, Any]]) -> str:
    """Return a table of the models by bits per character, the best first."""
    rows = [("bits/char", "loss", "perplexity", "tokens", "unknown", "model")]
    for result in sorted(results, key=lambda result: result["bits_per_char"]):
        figures = (f"{result['bits_per_char']:.4f}", f"{result['loss']:.4f}", f"{result['perplexity']:,.2f}")
        name = checkpoint_name(result["checkpoint"], "weights" in result)
        rows.append((*figures, f"{result['tokens']:,}", f"{result['unknown_tokens']:,}", name))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([*(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)), row[-1]])
        for row in rows
    )


def run(config: EvaluationConfig) -> None:
    """Call main. Raises UserError where memory runs out."""
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
