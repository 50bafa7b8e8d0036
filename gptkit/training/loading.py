"""Build the model of a checkpoint, for those who do not train it (generation, evaluation, export), and load tokenizers.

Which checkpoint is meant, and what its files are, is decided in checkpoints.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn
from torch.overrides import TorchFunctionMode

from gptkit.base.cli import UserError, first_line
from gptkit.text.tokenizer import (
    Tokenizer,
    TokenizerSettings,
    load_saved_tokenizer,
    load_tokenizer,
    with_model_tokenizer,
)
from gptkit.training.checkpoints import (
    MODEL_FILE,
    TOKENIZER_DIR,
    Choice,
    choose_checkpoint,
    read_state,
    read_tensors,
)

Model = TypeVar("Model", bound=nn.Module)


class SkipInitialization(TorchFunctionMode):
    """Skips the initialization of parameters that are then loaded; it takes seconds, on the meta device too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def load_chosen(
    exp_dir: str, choice: Choice, build: Callable[[dict[str, Any]], Model], device: torch.device
) -> tuple[Path, Model, Tokenizer]:
    """Choose a checkpoint and load it; another where a run that trains removes it meanwhile. Raises UserError."""
    while True:
        folder = choose_checkpoint(exp_dir, choice)
        try:
            return folder, *load_checkpoint(folder, build, device)
        except (UserError, OSError):
            if folder.is_dir():
                raise


def load_checkpoint(
    folder: Path, build: Callable[[dict[str, Any]], Model], device: torch.device
) -> tuple[Model, Tokenizer]:
    """Load the model and the tokenizer of a checkpoint; `build` makes a model from its dimensions. Raises UserError."""
    tokenizer = load_saved_tokenizer(folder / TOKENIZER_DIR)
    return load_model(folder, build, tokenizer.vocab_size, device), tokenizer


def load_model(folder: Path, build: Callable[[dict[str, Any]], Model], vocab_size: int, device: torch.device) -> Model:
    """Build a checkpoint's model from its dimensions, and load its weights.

    vocab_size is the tokenizer's. Nothing is allocated before the dimensions are known to be those of the weights in
    the file. Raises UserError.
    """
    try:
        dimensions = read_state(folder)["identity"]["model"]
        if dimensions["vocab_size"] != vocab_size:
            raise ValueError(f"its tokenizer has {vocab_size} ids, and the model {dimensions['vocab_size']!r}")
        with SkipInitialization(), torch.device("meta"):
            expected = {name: list(tensor.shape) for name, tensor in build(dimensions).state_dict().items()}
        weights = read_tensors(folder, MODEL_FILE, torch.device("cpu"))  # mapped into memory, not read
        found = {name: list(tensor.shape) for name, tensor in weights.items()}
        different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if different:
            raise ValueError(f"{different[0]} is {found.get(different[0])}, not {expected.get(different[0])}")
        with SkipInitialization():
            model = build(dimensions)
        broken = next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None)
        if broken:
            raise ValueError(f"{broken} holds values that are not finite")
        model.load_state_dict(weights)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} is damaged or from another version ({first_line(error)}); use another checkpoint")
    return model.to(device)


def load_run_tokenizer(settings: TokenizerSettings, init_from: str | None, checkpoint: Path | None) -> Tokenizer:
    """Load the tokenizer that the settings name, or that of --init_from; a resumed run has it in its checkpoint."""
    of_run = with_model_tokenizer(settings, init_from)
    if checkpoint and of_run is not settings:  # the folder that the run began with may be gone
        return load_saved_tokenizer(checkpoint / TOKENIZER_DIR)
    return load_tokenizer(of_run)
