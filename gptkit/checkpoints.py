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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gptkit.command_line import UserError
from gptkit.files import read_json, sync_folder, write_json

FORMAT, VERSION = "gptkit-checkpoint", 1
STATE_FILE, MODEL_FILE, TRAINING_FILE = "state.json", "model.safetensors", "training.safetensors"


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


def _prune(output_dir: Path) -> None:
    checkpoints = find_checkpoints(output_dir)
    kept = {checkpoints[-1], best_checkpoint(checkpoints)}
    for folder in set(checkpoints) - kept:
        _remove(folder)


def _remove(folder: Path) -> None:
    doomed = folder.with_name(f".{folder.name}.old.partial")  # never a half-deleted folder under a proper name
    os.replace(folder, doomed)
    shutil.rmtree(doomed)
