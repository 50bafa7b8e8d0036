"""Checkpoints: folders `step_00000300` that hold all that a run needs to resume, and all that inference needs.

    model.safetensors      the weights
    averaged.safetensors   the averaged weights, where the run averages them (averaging.py)
    training.safetensors   the optimizer's state and the random states
    tokenizer/             the tokenizer's files
    state.json             step, losses, what the run is (model dimensions and fingerprints), its settings
    SHA256SUMS             the checksum of each of these, written last (sha256sum -c reads it)

A folder is written under a temporary name, synced, and renamed; then the links `latest` and `best` are moved, which
are for people: readers look for the folders, and trust none whose checksums do not fit. The newest ones and the one
with the lowest validation loss are kept. Nothing here is a pickle, so a stranger's checkpoint runs no code.
"""

import functools
import math
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from gptkit.base.cli import UserError, warn_once
from gptkit.base.files import (
    load_tensors,
    move_folder,
    read_json,
    replace,
    sha256_of,
    sync_file,
    sync_folder,
    write_atomically,
    write_json,
)
from gptkit.distributed.process_group import main_process

FORMAT, VERSION = "gptkit-checkpoint", 2
STATE_FILE, MODEL_FILE, TRAINING_FILE = "state.json", "model.safetensors", "training.safetensors"
AVERAGED_FILE, SUMS_FILE, TOKENIZER_DIR = "averaged.safetensors", "SHA256SUMS", "tokenizer"
LINK = "link_"  # what the folders of a chain's links are called, with a number; the last link is in the folder above
SUMS_LINE = re.compile(r"([0-9a-f]{64})  ((?:tokenizer/)?[\w-][\w.-]*)")  # no path leads out of the folder
MAX_SUMS_BYTES, MAX_STATE_BYTES = 1 << 16, 1 << 24
PREFIXES = ("_orig_mod.", "module.")  # what torch.compile and DistributedDataParallel put before each name


class DamagedCheckpoint(Exception):
    """A checkpoint that must not be used, and why."""


class UnreadableCheckpoint(DamagedCheckpoint):
    """A checkpoint that the file system does not give, and why; a network drive may in a moment."""


# Writing


def save_checkpoint(
    output_dir: Path,
    state: dict[str, Any],
    model: Mapping[str, torch.Tensor],
    training: Mapping[str, torch.Tensor],
    tokenizer: Mapping[str, bytes],
    keep: int = 2,
    averaged: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write the folder of state["step"] and remove all checkpoints but the newest `keep` and the best.

    Raises UserError where weights are not finite, and where the disk is full.
    """
    folder = output_dir / f"step_{state['step']:08d}"
    weights, average = without_prefixes(model), without_prefixes(averaged or {})
    named = (*weights.items(), *average.items())
    broken = next((name for name, tensor in named if not tensor.isfinite().all()), None)
    if broken:
        raise UserError(f"{folder} is not written: {broken} holds values that are not finite")
    partial = output_dir / f".{folder.name}.partial"
    for leftover in output_dir.glob(".step_*.partial"):  # of a run that was killed while it wrote or removed one
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        (partial / TOKENIZER_DIR).mkdir(parents=True)
        for name, content in tokenizer.items():
            (partial / TOKENIZER_DIR / name).write_bytes(content)
        save_file(weights, partial / MODEL_FILE)
        save_file(dict(training), partial / TRAINING_FILE)
        if average:
            save_file(average, partial / AVERAGED_FILE)
        write_json(partial / STATE_FILE, {"format": FORMAT, "version": VERSION, **state})
        names = (MODEL_FILE, *([AVERAGED_FILE] if average else []), STATE_FILE, TRAINING_FILE)
        files = [partial / name for name in names]
        files += [partial / TOKENIZER_DIR / name for name in sorted(tokenizer)]
        for path in files:
            sync_file(path)
        sync_folder(partial / TOKENIZER_DIR)
        write_checksums(partial, files)
        if folder.exists():  # the same step, saved again
            _remove(folder)
        move_folder(partial, folder)
        sync_folder(output_dir)
    except SafetensorError as error:  # so safetensors reports a full disk
        raise UserError(f"{folder} could not be written ({error}); make room on the disk")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _prune(output_dir, keep)
    return folder


def write_checksums(folder: Path, files: list[Path]) -> None:
    """Write SHA256SUMS of the files in a checkpoint, as sha256sum would."""
    sums = "".join(f"{sha256_of(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)
    write_atomically(folder / SUMS_FILE, sums.encode())


def without_prefixes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors by the names that the bare model gives them."""
    return {functools.reduce(str.removeprefix, PREFIXES * 2, name): tensor for name, tensor in tensors.items()}


def _prune(output_dir: Path, keep: int) -> None:
    checkpoints = find_checkpoints(output_dir)
    best = sort_by_val_loss(checkpoints)[0]
    for folder in set(checkpoints[:-keep]) - {best}:
        _remove(folder)
    for name, folder in (("latest", checkpoints[-1]), ("best", best)):
        _link(output_dir / name, folder)


def _link(link: Path, folder: Path) -> None:
    """Make `link` point to a folder beside it, where the file system has links and the name is free."""
    if link.exists() and not link.is_symlink():
        return
    temporary = link.with_name(f".{link.name}.partial")
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder.name, target_is_directory=True)
        replace(temporary, link)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        warn_once("link", f"{link} cannot be made ({error.strerror}); name the folder {folder.name} itself")


def _remove(folder: Path) -> None:
    doomed = folder.with_name(f".{folder.name}.old.partial")  # a half-deleted folder must not have a checkpoint's name
    try:
        replace(folder, doomed)
    except OSError:  # some file systems cannot rename a folder, and Windows none of which a file is open
        (folder / SUMS_FILE).unlink(missing_ok=True)  # without it, no reader trusts what is left
        doomed = folder
    # On a mounted bucket a folder that was just renamed sometimes cannot be removed; the next save removes it.
    shutil.rmtree(doomed, ignore_errors=True)


# Reading


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints in a folder, verified or not, oldest step first."""
    found = output_dir.glob("step_*") if output_dir.is_dir() else iter(())
    named = [path for path in found if re.fullmatch(r"step_\d{8,}", path.name) and path.is_dir()]
    return sorted(named, key=lambda path: int(path.name.removeprefix("step_")))


def find_run(folder: Path) -> list[Path]:
    """Return the checkpoints in an output folder; of a chain that has none there yet, those of its highest link."""
    links = [path for path in folder.glob(f"{LINK}*/") if path.name.removeprefix(LINK).isdecimal()]
    links.sort(key=lambda path: int(path.name.removeprefix(LINK)), reverse=True)
    return next((found for run in (folder, *links) if (found := find_checkpoints(run))), [])


def verify_checkpoint(folder: Path, training: bool = True) -> None:
    """Raise DamagedCheckpoint where a file is missing, has changed, or does not belong to a checkpoint.

    Without `training`, the optimizer's state is not read and may be missing: generation does not need it.
    """
    sums = _read_checksums(folder)
    unread = set() if training else {TRAINING_FILE}
    wanted = {STATE_FILE, MODEL_FILE, TRAINING_FILE} - unread
    if not wanted < sums.keys():
        raise DamagedCheckpoint(f"{SUMS_FILE} does not name what a checkpoint holds")
    for name in sorted(sums.keys() - unread):
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise DamagedCheckpoint(f"{name} is missing")
        try:
            found = sha256_of(path)
        except OSError as error:
            raise UnreadableCheckpoint(f"{name} cannot be read ({error})")
        if found != sums[name]:
            raise DamagedCheckpoint(f"{name} is not what was saved")
    try:
        _read_state(folder)
    except ValueError as error:
        raise DamagedCheckpoint(f"{STATE_FILE}: {error}")


def _read_checksums(folder: Path) -> dict[str, str]:
    """Return what SHA256SUMS holds, by name. Raises DamagedCheckpoint."""
    try:
        path = folder / SUMS_FILE
        if path.stat().st_size > MAX_SUMS_BYTES:
            raise DamagedCheckpoint(f"{SUMS_FILE} is too large")
        lines = path.read_bytes().decode("ascii").split("\n")
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{SUMS_FILE} is missing")
    except OSError as error:
        raise UnreadableCheckpoint(f"{SUMS_FILE} cannot be read ({error})")
    except ValueError as error:
        raise DamagedCheckpoint(f"{SUMS_FILE} cannot be read ({error})")
    matches = [SUMS_LINE.fullmatch(line) for line in lines]
    sums = {match[2]: match[1] for match in matches if match}
    if len(sums) != len(lines) - 1 or lines[-1]:
        raise DamagedCheckpoint(f"{SUMS_FILE} does not name what a checkpoint holds")
    return sums


def has_average(folder: Path) -> bool:
    """Return whether a verified checkpoint holds averaged weights too: only a file that SHA256SUMS names counts.

    Raises UserError where it is gone meanwhile.
    """
    try:
        return AVERAGED_FILE in _read_checksums(folder)
    except DamagedCheckpoint as error:
        raise UserError(f"{folder} is damaged ({error}); use another checkpoint")


def first_valid(candidates: list[Path], training: bool = True) -> Path:
    """Return the first valid checkpoint, after a warning for each before it. Raises UserError where there is none."""
    damage: dict[Path, DamagedCheckpoint] = {}
    for folder in candidates:
        try:
            verify_checkpoint(folder, training)
        except DamagedCheckpoint as error:
            damage[folder] = error
            continue
        for passed_over, reason in damage.items():
            print(f"warning: {passed_over} is damaged ({reason}); {folder} is used instead", file=sys.stderr)
        return folder
    reasons = "; ".join(f"{folder}: {reason}" for folder, reason in damage.items())
    remedy = "restore one, or remove them to start a new run"
    if any(isinstance(error, UnreadableCheckpoint) for error in damage.values()):
        remedy = "run the same command again when the drive can read them"
    raise UserError(f"no checkpoint is intact ({reasons}); {remedy}")


@main_process
def newest_valid(output_dir: Path) -> Path | None:
    """Return the newest valid checkpoint; None where there are none. Raises UserError where all are damaged."""
    found = find_checkpoints(output_dir)
    return first_valid(found[::-1]) if found else None


@main_process
def set_aside_newer(checkpoint: Path) -> None:
    """Rename the damaged checkpoints that are newer, so that they do not count among those to keep."""
    for folder in find_checkpoints(checkpoint.parent):
        if int(folder.name.removeprefix("step_")) > int(checkpoint.name.removeprefix("step_")):
            aside = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            move_folder(folder, aside)


def sort_by_val_loss(checkpoints: list[Path]) -> list[Path]:
    """Sort by validation loss; those of equal loss, or without a readable one, newest first."""

    def val_loss(folder: Path) -> float:
        try:
            loss = float(read_state_or_empty(folder)["val_loss"])
        except (KeyError, TypeError, ValueError):
            return math.inf
        return math.inf if math.isnan(loss) else loss

    return sorted(reversed(checkpoints), key=val_loss)


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE_FILE
    if path.stat().st_size > MAX_STATE_BYTES:
        raise ValueError("too large for a state")
    state = read_json(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT or state.get("version") != VERSION:
        raise ValueError("not a checkpoint that this version reads")
    return state


def read_state_or_empty(folder: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint that may be damaged; {} where it cannot be read."""
    try:
        return _read_state(folder)
    except (OSError, ValueError):
        return {}


@main_process
def read_state(folder: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint. Raises UserError."""
    try:
        return _read_state(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / STATE_FILE}: {error}; remove {folder} to use an older checkpoint")


def read_tensors(folder: Path, file: str, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the tensors of MODEL_FILE, AVERAGED_FILE or TRAINING_FILE, by name. Raises UserError."""
    try:
        return without_prefixes(load_tensors(folder / file, device))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / file}: cannot be read ({error}); remove {folder} to use an older checkpoint")
