"""Write the checkpoints of a run in the background, load them, and roll back to one."""

import functools
import math
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from gptkit.base import devices
from gptkit.base.cli import UserError, first_line, print_line
from gptkit.base.files import free_bytes
from gptkit.distributed.process_group import broadcast_tensors, is_main_process, main_process
from gptkit.training import checkpoints
from gptkit.training.guard import Guard
from gptkit.training.run import Run
from gptkit.training.run_log import CURVE_FILE, METRICS_FILE, draw_loss_curve
from gptkit.training.settings import MAX_ROLLBACKS


class Saver:
    """Writes and loads the checkpoints of a run: its tensors, its progress and its guard's counts."""

    def __init__(self, run: Run, guard: Guard) -> None:
        self.run, self.guard = run, guard
        self._writer = BackgroundWriter(run.output_dir, run.settings.keep_checkpoints)

    def save(self, elapsed_s: float, losses: Mapping[str, float]) -> None:
        """Write a checkpoint of this moment, and draw the loss curve, in the background of the main process.

        elapsed_s are the seconds of training; losses those of a report, if there is one now, in nats per token. That of
        the weights that are used later, which are the averaged ones where there are any, decides which checkpoint is best.
        """
        run = self.run
        val_loss = losses.get("averaged_val_loss", losses.get("val_loss"))
        run.elapsed_s = elapsed_s
        if val_loss is not None:
            run.best_val_loss = min(val_loss, run.best_val_loss or math.inf)
        state = run.progress() | self.guard.state_dict() | {"val_loss": val_loss, "identity": run.identity}
        state |= {"plan": run.plan.state_dict(), "settings": run.settings_dict()}
        weights, training, averaged = run.full_tensors(keep=is_main_process())
        if is_main_process():
            draw = functools.partial(draw_loss_curve, run.output_dir / METRICS_FILE, run.output_dir / CURVE_FILE)
            self._writer.save(state, weights, training, run.tokenizer.files(), averaged, then=draw)

    def load(self, checkpoint: Path) -> None:
        """Load a checkpoint into the run and its guard. Raises UserError."""
        state = checkpoints.read_state(checkpoint)

        def read(file: str) -> dict[str, torch.Tensor]:
            return broadcast_tensors(lambda: checkpoints.read_tensors(checkpoint, file, torch.device("cpu")))

        training, weights = read(checkpoints.TRAINING_FILE), read(checkpoints.MODEL_FILE)
        averaged: dict[str, torch.Tensor] = {}
        if self.run.average.is_on:
            if main_process(checkpoints.has_average)(checkpoint):
                averaged = read(checkpoints.AVERAGED_FILE)
            else:
                print(f"note: {checkpoint} has no averaged weights; their average begins here", file=sys.stderr)
        if "n_returns" in state:  # as version 0.1 called it
            state.setdefault("n_rollbacks", state["n_returns"])
        try:
            self.run.load_progress(state)
            self.guard.load_state_dict(state)
            self.run.load_tensors(weights, training, averaged)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if devices.is_out_of_memory(error):
                raise
            raise UserError(
                f"{checkpoint} is damaged ({first_line(error)}); remove it to resume from an older checkpoint, if there"
                " is one"
            )

    def roll_back(self) -> None:
        """Load the last good checkpoint, with half of the learning rate. Raises UserError where that is not possible."""
        self._writer.wait()
        guard, settings = self.guard, self.run.settings
        trouble = f"the loss or its gradient is not finite, {guard.n_skipped_in_a_row} steps in a row, at step {self.run.step}"
        remedy = "run the same command with a lower --lr or a higher --warmup_steps"
        if settings.on_divergence == "stop" or guard.n_rollbacks >= MAX_ROLLBACKS:
            raise UserError(
                f"{trouble}; {remedy}: it resumes from the newest checkpoint in {self.run.output_dir}, if there is one"
            )
        if_none = f"{trouble}, and there is no checkpoint to go back to; {remedy}, or a smaller --save_ckpt_freq"
        checkpoint = find_last_good(self.run.output_dir, if_none)
        n_rollbacks, n_skipped = guard.n_rollbacks + 1, guard.n_skipped
        self.load(checkpoint)
        guard.n_rollbacks, guard.n_skipped = n_rollbacks, n_skipped
        print_line(f"warning: {trouble}; going back to {checkpoint} with 1/{2**n_rollbacks} of the rate")

    def finish(self) -> None:
        """Wait until all is written. Raises UserError where the last checkpoint could not be written."""
        self._writer.close()
        if self._writer.failure:
            raise UserError(f"{self._writer.failure}; make room and run the same command to resume from the newest")


@main_process
def find_last_good(output_dir: Path, if_none: str) -> Path:
    """Return the newest valid checkpoint before which no step was skipped.

    Raises UserError, with the message `if_none` where there is no such checkpoint, and where all are damaged.
    """
    found = checkpoints.find_checkpoints(output_dir)
    good = [folder for folder in found if checkpoints.read_state_or_empty(folder).get("n_skipped_in_a_row") == 0]
    if not good:
        raise UserError(if_none)
    return checkpoints.first_valid(good[::-1])


class BackgroundWriter:
    """Writes checkpoints while training continues, one at a time.

    A save that fails prints a warning and leaves the earlier checkpoints unchanged; `failure` then holds what went
    wrong, until one succeeds.
    """

    def __init__(self, output_dir: Path, keep: int) -> None:
        self.output_dir, self.keep = output_dir, keep
        self.failure: str | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._future: Future[None] | None = None

    def save(
        self,
        state: dict[str, Any],
        model: Mapping[str, torch.Tensor],
        training: Mapping[str, torch.Tensor],
        tokenizer: Mapping[str, bytes],
        averaged: Mapping[str, torch.Tensor] | None = None,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy the tensors to host memory, and return; another thread writes them, and then calls `then`."""
        self.wait()
        groups = (model, training, averaged or {})
        needed = sum(tensor.nbytes for tensors in groups for tensor in tensors.values()) + (1 << 20)
        free = free_bytes(self.output_dir)
        if free < needed:
            self._fail(state["step"], f"it takes {needed / 2**20:,.0f} MiB and the disk has {free / 2**20:,.0f} MiB")
            return
        weights, rest, average = (
            {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()} for tensors in groups
        )
        write = functools.partial(
            checkpoints.save_checkpoint, self.output_dir, state, weights, rest, tokenizer, self.keep, average
        )
        self._future = self._pool.submit(self._write, state["step"], write, then)

    def _write(self, step: int, write: Callable[[], Path], then: Callable[[], None]) -> None:
        try:
            write()
        except (UserError, OSError) as error:
            self._fail(step, str(error))
        else:
            self.failure = None
            then()

    def _fail(self, step: int, reason: str) -> None:
        self.failure = f"the checkpoint of step {step} could not be saved: {reason}"
        print_line(f"warning: {self.failure}; earlier checkpoints are unchanged")

    def wait(self) -> None:
        """Wait until the save in progress, if there is one, has ended."""
        if self._future:
            self._future.result()
            self._future = None

    def close(self) -> None:
        """Wait likewise, and end the thread that writes."""
        self.wait()
        self._pool.shutdown()
