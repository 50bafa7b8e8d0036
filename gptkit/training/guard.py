"""Skip and count steps whose loss or gradient is not finite; too many in a row are a divergence.

In float16 a gradient also overflows where its loss was scaled too far: such a step is skipped, and is no sign of trouble.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gptkit.base.cli import print_line
from gptkit.training.settings import MAX_ROLLBACKS


@dataclass
class Guard:
    """Counts finite and skipped steps, and knows when a run has diverged. A checkpoint keeps its counts."""

    max_bad_steps: int  # in a row; then the run has diverged
    loss_sum: float = 0.0  # of the finite steps since the last report
    n_losses: int = 0  # how many those are
    n_skipped: int = 0  # steps without an update, in all
    n_skipped_in_a_row: int = 0
    n_rollbacks: int = 0  # to an earlier checkpoint

    @property
    def lr_scale(self) -> float:
        """Return the factor of the learning rate: each rollback halves it."""
        return 0.5**self.n_rollbacks

    def accepts(self, step: int, train_loss: float, grad_norm: float, overflowed: bool = False) -> bool:
        """Count a step that was computed, and return whether its gradient may be applied.

        overflowed: the gradient was scaled beyond float16's range, and the next one will be scaled less.
        """
        if math.isfinite(train_loss) and (math.isfinite(grad_norm) or overflowed):
            self.loss_sum += train_loss
            self.n_losses += 1
            self.n_skipped_in_a_row = 0
            if overflowed:
                print_line(f"step {step} is skipped: its scaled gradient overflowed float16; the loss scale is halved")
            return not overflowed
        self.n_skipped += 1
        self.n_skipped_in_a_row += 1
        print_line(
            f"warning: step {step} is skipped, its loss is {train_loss} and its gradient's norm {grad_norm}"
            f" ({self.n_skipped} skipped so far, {self.n_skipped_in_a_row} in a row)"
        )
        return False

    def has_diverged(self, val_loss: float | None) -> bool:
        """Return whether too many steps were skipped, or the validation loss, if there is one, is not finite."""
        return self.n_skipped_in_a_row >= self.max_bad_steps or not math.isfinite(val_loss or 0.0)

    def take_mean_loss(self) -> float:
        """Return the mean training loss of the finite steps since the last call. There must be at least one."""
        mean = self.loss_sum / self.n_losses
        self.loss_sum, self.n_losses = 0.0, 0
        return mean

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        state = asdict(self)
        del state["max_bad_steps"]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the counts. Raises KeyError where one is missing, ValueError where one is invalid."""
        counts = ("n_losses", "n_skipped", "n_skipped_in_a_row", "n_rollbacks")
        values = {name: as_count(state[name]) for name in counts}
        loss_sum = as_sum(state["loss_sum"])
        if values["n_rollbacks"] > MAX_ROLLBACKS:
            raise ValueError(f"{values['n_rollbacks']} rollbacks are more than a run can have")
        self.loss_sum = loss_sum
        for name, value in values.items():
            setattr(self, name, value)


def as_count(value: Any) -> int:
    """Return a count from a checkpoint. Raises ValueError where it is not a count."""
    if type(value) is not int or not 0 <= value < 2**53:
        raise ValueError(f"{value!r} is not a count")
    return value


def as_scaler_state(value: Any) -> dict[str, float]:
    """Return what changes in the state of a GradScaler, from a checkpoint. Raises KeyError and ValueError."""
    scale, n_steps = as_sum(value["scale"]), as_count(value["_growth_tracker"])
    if not 2.0**-100 < scale < 2.0**100 or n_steps >= 2**31:  # they become a float32 and an int32
        raise ValueError(f"{value} is no state of a loss scale")
    return {"scale": float(scale), "_growth_tracker": n_steps}


def as_sum(value: Any) -> float:
    """Return a sum from a checkpoint. Raises ValueError where it is not a finite number."""
    if type(value) not in (int, float) or not abs(value) < math.inf:
        raise ValueError(f"{value!r} is not a finite number")
    return value
