"""Models as the benchmarks build and load them: apart from machine.py, which does not import torch."""

from typing import Any

import machine  # noqa: F401  it lets gpt_model and gptkit be imported
import torch

from gpt_model import GPTConfig, GPTModel
from gptkit.base.cli import UserError
from gptkit.text.tokenizer import Tokenizer
from gptkit.training.loading import load_chosen


def make_config(**dimensions: Any) -> GPTConfig:
    """Return the configuration with these dimensions. Raises UserError where they do not fit together."""
    try:
        return GPTConfig(**dimensions)
    except ValueError as error:
        raise UserError(str(error))


def load_experiment(exp_dir: str) -> tuple[GPTModel, Tokenizer]:
    """Return the model of an experiment's newest checkpoint, on the CPU and ready to evaluate, and its tokenizer."""
    _, model, tokenizer, _ = load_chosen(exp_dir, "averaged", GPTModel.from_dimensions, torch.device("cpu"))
    return model.eval(), tokenizer
