"""The teacher of a run: the model of an earlier one, whose predictions it learns from beside the text.

It is loaded here; the loss that it takes part in is in loss.py. A chain of such runs is in chain.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptkit.base.cli import UserError
from gptkit.base.paths import existing_path
from gptkit.distributed.process_group import broadcast_parameters, is_main_process, main_process
from gptkit.text.tokenizer import Tokenizer
from gptkit.training.checkpoints import AVERAGED_FILE, MODEL_FILE, SUMS_FILE, SUMS_LINE, read_state
from gptkit.training.loading import checkpoint_name, load_chosen
from gptkit.training.loss import SoftTargets
from gptkit.training.settings import TrainingSettings

HiddenStates = Callable[[torch.Tensor], torch.Tensor]  # ids (B, T) -> (B, T, C)


@dataclass(frozen=True)
class Teacher:
    """A model in evaluation mode, and its share of the loss."""

    model: Any  # a GPT: hidden_states, head_weight (V, C), config.context_length
    share: float
    identity: dict[str, str]  # "weights": the SHA-256 of their file; "name": for messages
    hidden_states: HiddenStates

    def compiled(self) -> "Teacher":
        """Return the teacher with its forward pass compiled."""
        return replace(self, hidden_states=torch.compile(self.model.hidden_states))

    @torch.no_grad()
    def soft_targets(self, inputs: torch.Tensor) -> SoftTargets:
        """Return what it predicts after each of the inputs (B, T), under the caller's autocast."""
        return SoftTargets(self.hidden_states(inputs), self.model.head_weight, self.share)


def load_teacher(
    settings: TrainingSettings,
    output_dir: Path,
    tokenizer: Tokenizer,
    build: Callable[[dict[str, Any]], nn.Module],
    device: torch.device,
) -> Teacher | None:
    """Load the newest checkpoint of --distill_from, averaged if it is, on the device of each process; None where the flag is not given.

    The main process alone reads files; `build` makes a model from its dimensions. Random streams may advance. Raises
    UserError where there is no checkpoint, or it is of the run in output_dir itself, or its tokenizer is another.
    """
    exp_dir, share = settings.distill_from, settings.distill_weight
    if exp_dir is None:
        return None
    loaded: list[nn.Module] = []

    @main_process
    def load() -> tuple[dict[str, str], dict[str, Any]]:
        existing_path(exp_dir, "--distill_from")
        try:
            folder, model, its_tokenizer, is_averaged = load_chosen(exp_dir, "averaged", build, device)
        except UserError as error:
            raise UserError(str(error).replace("--exp_dir", "--distill_from", 1))
        if folder.resolve().parent == output_dir.resolve():
            raise UserError(f"--distill_from {exp_dir} is the run in --output_dir itself; name an earlier one")
        if its_tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"--distill_from {exp_dir} has another tokenizer than this run; give that run's, or name another one"
            )
        loaded.append(model)
        print(
            f"teacher: {checkpoint_name(folder, is_averaged)}, {sum(p.numel() for p in model.parameters()):,} parameters, {share:g} of the loss"
        )
        try:
            weights = weights_sha256(folder, AVERAGED_FILE if is_averaged else MODEL_FILE)
        except OSError as error:  # its run, which trains, has removed it meanwhile
            raise UserError(f"--distill_from {exp_dir}: {error}; run the same command again")
        return {"weights": weights, "name": f"{folder}, {weights[:8]}"}, read_state(folder)["identity"]["model"]

    identity, dimensions = load()
    model: Any = loaded[0] if is_main_process() else build(dimensions).to(device)
    broadcast_parameters(model.parameters())
    model.eval().requires_grad_(False)
    return Teacher(model, share, identity, model.hidden_states)


def weights_sha256(checkpoint: Path, file: str) -> str:
    """Return the SHA-256 of a verified checkpoint's file of weights, as its SHA256SUMS names it."""
    lines = (checkpoint / SUMS_FILE).read_text("ascii").splitlines()
    sums = {match[2]: match[1] for match in map(SUMS_LINE.fullmatch, lines) if match}
    return sums[file]


def sizes_within(teacher: Teacher | None, sizes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return those of a run's models to choose from whose context the teacher has too. Raises UserError where none is."""
    if teacher is None:
        return sizes
    most = teacher.model.config.context_length
    found = {name: size for name, size in sizes.items() if size.context_length <= most}
    if not found:
        wanted = min(size.context_length for size in sizes.values())
        raise UserError(
            f"--distill_from {teacher.identity['name']} sees {most} tokens at once, fewer than this run's {wanted}; give"
            f" --context_length {most} or less, or another teacher"
        )
    return found
