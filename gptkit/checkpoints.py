"""Checkpoints: folders `step_00000300` that hold all a run needs to go on, and all that inference needs.

    model.safetensors      the weights
    training.safetensors   the optimizer's state and the random states
    tokenizer/             the tokenizer's files
    state.json             step, losses, what the run is (model dimensions and fingerprints), its settings; written last

A folder is written under a temporary name, synced, and renamed: what has its proper name is whole. The newest and
the one with the lowest validation loss are kept. Nothing here is a pickle, so a stranger's checkpoint runs no code.
"""

import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from gptkit.command_line import UserError, existing_path
from gptkit.files import read_json, sync_folder, write_json

FORMAT, VERSION = "gptkit-checkpoint", 1
STATE_FILE, MODEL_FILE, TRAINING_FILE = "state.json", "model.safetensors", "training.safetensors"
Choice = Literal["newest", "best"]
Model = TypeVar("Model", bound=nn.Module)


def save_checkpoint(
    output_dir: Path,
    state: dict[str, Any],
    model: Mapping[str, torch.Tensor],
    training: Mapping[str, torch.Tensor],
    tokenizer: Mapping[str, bytes],
) -> Path:
    """Write `step_…` (of state["step"]) and clear away checkpoints that are neither newest nor best."""
    folder = output_dir / f"step_{state['step']:08d}"
    partial = output_dir / f".{folder.name}.partial"
    for leftover in output_dir.glob(".step_*.partial"):  # of a run that was killed while it wrote or removed one
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        (partial / "tokenizer").mkdir(parents=True)
        for name, content in tokenizer.items():
            (partial / "tokenizer" / name).write_bytes(content)
        save_file(dict(model), partial / MODEL_FILE)
        save_file(dict(training), partial / TRAINING_FILE)
        for path in [*partial.glob("*.*"), *partial.glob("tokenizer/*")]:
            _sync(path)
        sync_folder(partial / "tokenizer")
        write_json(partial / STATE_FILE, {"format": FORMAT, "version": VERSION, **state})
        if folder.exists():  # the same step, saved again
            _remove(folder)
        os.replace(partial, folder)
        sync_folder(output_dir)
    except SafetensorError as error:  # its way to say that the disk is full
        raise UserError(
            f"{folder} could not be written ({error}); make room on the disk and run the same command again"
        )
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _prune(output_dir)
    return folder


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest step first."""
    found = output_dir.glob("step_*") if output_dir.is_dir() else iter(())
    whole = [path for path in found if re.fullmatch(r"step_\d{8,}", path.name) and (path / STATE_FILE).is_file()]
    return sorted(whole, key=lambda path: int(path.name.removeprefix("step_")))


def best_checkpoint(checkpoints: list[Path]) -> Path:
    """The one with the lowest validation loss; one that has none that can be read comes last, of equals the newest first."""

    def val_loss(folder: Path) -> float:
        try:
            loss = float(read_state(folder)["val_loss"])
        except (UserError, KeyError, TypeError, ValueError):
            return math.inf
        return math.inf if math.isnan(loss) else loss

    return min(reversed(checkpoints), key=val_loss)


def choose_checkpoint(exp_dir: str, choice: Choice) -> Path:
    """The checkpoint that --exp_dir means: that folder itself, one in it, or one in a folder below. Raises UserError."""
    folder = existing_path(exp_dir, "--exp_dir")
    if (folder / STATE_FILE).is_file():  # one checkpoint, by name
        return folder
    runs = {run: find_checkpoints(run) for run in [folder, *sorted(folder.glob("*/"))]}
    runs = {run: found for run, found in runs.items() if found}
    if not runs:
        raise UserError(
            f"--exp_dir {folder} holds no checkpoint (step_…); pretraining.py writes one every --save_ckpt_freq steps"
        )
    if len(runs) > 1:
        raise UserError(f"--exp_dir {folder} holds several runs; name one: {', '.join(map(str, runs))}")
    (found,) = runs.values()
    return found[-1] if choice == "newest" else best_checkpoint(found)


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises UserError."""
    try:
        state = read_json(folder / STATE_FILE)
        if not isinstance(state, dict) or state.get("format") != FORMAT or state.get("version") != VERSION:
            raise ValueError("not a checkpoint that this version reads")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / STATE_FILE}: {error}; remove {folder} to use an older checkpoint")
    return state


def read_tensors(folder: Path, file: str, device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of MODEL_FILE or TRAINING_FILE. Raises UserError."""
    try:
        return load_file(folder / file, device=str(device))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / file}: cannot be read ({error}); remove {folder} to use an older checkpoint")


def load_model(folder: Path, build: Callable[[dict[str, Any]], Model], device: torch.device) -> Model:
    """The model of a checkpoint, which `build` makes from its dimensions and the weights are put into.

    Raises UserError.
    """
    try:
        model = build(read_state(folder)["identity"]["model"])
        model.load_state_dict(read_tensors(folder, MODEL_FILE, torch.device("cpu")))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{folder} is damaged or from another version ({reason}); use another checkpoint")
    return model.to(device)


def _prune(output_dir: Path) -> None:
    checkpoints = find_checkpoints(output_dir)
    kept = {checkpoints[-1], best_checkpoint(checkpoints)}
    for folder in set(checkpoints) - kept:
        _remove(folder)


def _remove(folder: Path) -> None:
    doomed = folder.with_name(f".{folder.name}.old.partial")  # never a half-deleted folder under a proper name
    os.replace(folder, doomed)
    shutil.rmtree(doomed)
