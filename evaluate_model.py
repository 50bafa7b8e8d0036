"""How well a trained GPT predicts a text: an experiment folder and a file of works in, one JSON object out.

    python evaluate_model.py --exp_dir exp001 --text_path dataset/heldout.jsonl

The figure to compare models by is bits_per_char, whatever their tokenizers; gptkit/evaluation.py defines it. Standard
output gets the JSON object alone, standard error the rest.
"""

import json
import math
import sys
from dataclasses import dataclass
from typing import Literal

from gpt_model import GPTConfig, GPTModel
from gptkit import checkpoints, devices
from gptkit.command_line import UserError, existing_path, run_command, setting
from gptkit.evaluation import read_works, score_works
from gptkit.run_log import shown
from gptkit.tokenization import load_saved


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How well a trained GPT predicts a text: bits per character, loss and perplexity, as one JSON object."""

    exp_dir: str = setting(help="experiment folder (or the folder of checkpoints in it)")
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
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "of matrix products (auto: bfloat16 on CUDA)")


def main(config: EvaluationConfig) -> None:
    try:
        device = devices.choose_device(config.device)
    except ValueError as error:
        raise UserError(str(error))
    dtype = devices.choose_dtype(config.dtype, device)
    path = existing_path(config.text_path, "--text_path")
    if not path.is_file():
        raise UserError(f"--text_path {path} is no file; name a .jsonl or .txt file")
    folder = checkpoints.choose_checkpoint(config.exp_dir, config.checkpoint)
    tokenizer = load_saved(folder / "tokenizer")
    model = checkpoints.load_model(
        folder, lambda model: GPTModel(GPTConfig(**model)), tokenizer.vocab_size, device
    ).eval()
    context_length = model.config.context_length
    if config.stride is not None and config.stride > context_length:
        raise UserError(f"--stride {config.stride} is more than the model's context; give at most {context_length}")
    # The works are read twice: a line that is none is found before the long work, and the time left is known.
    n_tokens = sum(len(tokenizer.encode(work)) + 1 for work in read_works(path, config.max_chars))
    print(
        f"{folder}: {model.n_parameters():,} parameters on {devices.describe_device(device)}, {dtype}", file=sys.stderr
    )
    with shown(n_tokens, "token", "evaluate") as progress:
        score = score_works(
            model,
            tokenizer,
            read_works(path, config.max_chars),
            context_length,
            stride=config.stride,
            batch_size=config.batch_size,
            device=device,
            dtype=dtype,
            progress=progress,
        )
    if not math.isfinite(score.perplexity):
        raise UserError(f"{folder} predicts nothing: its loss is {score.loss}; use another checkpoint")
    result = {
        "bits_per_char": score.bits_per_char,
        "loss": score.loss,
        "perplexity": score.perplexity,
        "tokens": score.tokens,
        "characters": score.characters,
        "works": score.works,
        "unknown_tokens": score.unknown_tokens,
        "checkpoint": str(folder),
        "tokenizer": tokenizer.name,
    }
    print(json.dumps(result))  # in ASCII, which every locale shows as it is


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
