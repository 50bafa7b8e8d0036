"""Choose a checkpoint and build its model (for generation, evaluation, export), and load tokenizers.

What the files of a checkpoint are, and which are valid, is decided in checkpoints.py.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn
from torch.overrides import TorchFunctionMode

from gptkit.base.cli import UserError, first_line
from gptkit.base.paths import existing_path, refuse_pickles
from gptkit.text.tokenizer import (
    Tokenizer,
    TokenizerSettings,
    load_saved_tokenizer,
    load_tokenizer,
    with_model_tokenizer,
)
from gptkit.training.checkpoints import (
    AVERAGED_FILE,
    MODEL_FILE,
    STATE_FILE,
    SUMS_FILE,
    TOKENIZER_DIR,
    find_checkpoints,
    find_run,
    first_valid,
    has_average,
    read_state,
    read_state_or_empty,
    read_tensors,
    sort_by_val_loss,
)

Model = TypeVar("Model", bound=nn.Module)
Choice = Literal["averaged", "newest", "best"]
CHOICE_HELP = (
    "averaged: the averaged weights of the newest one, or its weights where the run does not average; newest: its weights"
    " themselves; best: the one with the lowest validation loss"
)


class SkipInitialization(TorchFunctionMode):
    """Skips the initialization of parameters that are then loaded; it takes seconds, on the meta device too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def choose_checkpoint(exp_dir: str, choice: Choice) -> Path:
    """Return the checkpoint that --exp_dir means, verified: that folder itself, one in it, or one in a folder below.

    Raises UserError.
    """
    folder = existing_path(exp_dir, "--exp_dir")
    if folder.is_file():
        refuse_pickles([folder])
        raise UserError(f"--exp_dir {folder} is a file; name the folder of an experiment or of a checkpoint")
    if (folder / STATE_FILE).is_file() or (folder / SUMS_FILE).is_file():  # one checkpoint, by name
        return first_valid(_candidates(folder), training=False)
    runs = {run: find_run(run) for run in ([folder] if find_run(folder) else sorted(folder.glob("[!.]*/")))}
    runs = {run: found for run, found in runs.items() if found}
    if not runs:
        names = ("latest", "best") if choice != "best" else ("best", "latest")
        copies = [path for name in names for path in (folder / name, *folder.glob(f"*/{name}"))]
        copies = [path for path in copies if (path / STATE_FILE).is_file()]  # without what they were links to
        if copies:
            return first_valid(copies, training=False)
        refuse_pickles([*folder.glob("*.*"), *folder.glob("*/*.*")])
        raise UserError(
            f"--exp_dir {folder} holds no checkpoint (step_…); pretraining.py writes one every --save_ckpt_freq steps"
        )
    if len(runs) > 1:
        raise UserError(f"--exp_dir {folder} holds several runs; name one: {', '.join(map(str, runs))}")
    (found,) = runs.values()
    try:
        return first_valid(found[::-1] if choice != "best" else sort_by_val_loss(found), training=False)
    except UserError:
        if all(folder.is_dir() for folder in found):
            raise
        return choose_checkpoint(exp_dir, choice)  # a run that trains has removed some of these meanwhile


def _candidates(folder: Path) -> list[Path]:
    """Return a checkpoint given by its folder; before it, with a warning, newer (better) ones than `latest` (`best`)."""
    place, found = folder.absolute(), read_state_or_empty(folder).get("step")
    step = found if isinstance(found, int) else -1
    is_copy = place.name in ("latest", "best") and not place.is_symlink()  # a link that no later save could move
    beside = find_checkpoints(place.parent) if is_copy else []
    if place.name == "best":
        ordered = sort_by_val_loss([*beside, place])
        beside = ordered[: ordered.index(place)]
    else:
        beside = [path for path in reversed(beside) if int(path.name.removeprefix("step_")) > step]
    if beside:
        better = "newer" if place.name == "latest" else "better"
        print(
            f"warning: {folder} is a copy of step {step} and no link; a {better} one lies beside it and is used,"
            f" {beside[0]}",
            file=sys.stderr,
        )
    return [*beside, folder]


def load_chosen(
    exp_dir: str, choice: Choice, build: Callable[[dict[str, Any]], Model], device: torch.device
) -> tuple[Path, Model, Tokenizer, bool]:
    """Choose a checkpoint and load it; another where a run that trains removes it meanwhile. Raises UserError.

    Returns its folder, the model, the tokenizer, and whether the weights are averaged ones.
    """
    while True:
        folder = choose_checkpoint(exp_dir, choice)
        try:
            is_averaged = choice != "newest" and has_average(folder)
            return folder, *load_checkpoint(folder, build, device, is_averaged), is_averaged
        except (UserError, OSError):
            if folder.is_dir():
                raise


def checkpoint_name(folder: Path | str, is_averaged: bool) -> str:
    """Return what a message calls a checkpoint whose weights, or their average, are used."""
    return f"{folder} (averaged weights)" if is_averaged else str(folder)


def load_checkpoint(
    folder: Path, build: Callable[[dict[str, Any]], Model], device: torch.device, is_averaged: bool = False
) -> tuple[Model, Tokenizer]:
    """Load the model and the tokenizer of a checkpoint; `build` makes a model from its dimensions. Raises UserError."""
    tokenizer = load_saved_tokenizer(folder / TOKENIZER_DIR)
    return load_model(folder, build, tokenizer.vocab_size, device, is_averaged), tokenizer


def load_model(
    folder: Path,
    build: Callable[[dict[str, Any]], Model],
    vocab_size: int,
    device: torch.device,
    is_averaged: bool = False,
) -> Model:
    """Build a checkpoint's model from its dimensions, and load its weights or their average.

    vocab_size is the tokenizer's. Nothing is allocated before the dimensions are known to be those of the weights in
    the file. Raises UserError.
    """
    try:
        dimensions = read_state(folder)["identity"]["model"]
        if dimensions["vocab_size"] != vocab_size:
            raise ValueError(f"its tokenizer has {vocab_size} ids, and the model {dimensions['vocab_size']!r}")
        with SkipInitialization(), torch.device("meta"):
            expected = {name: list(tensor.shape) for name, tensor in build(dimensions).state_dict().items()}
        file = AVERAGED_FILE if is_averaged else MODEL_FILE
        weights = read_tensors(folder, file, torch.device("cpu"))  # mapped into memory, not read
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
