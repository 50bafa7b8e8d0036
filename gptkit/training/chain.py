"""Train a chain of runs by one command: each learns from the text and from the one before it (distillation.py).

    OUTPUT_DIR/link_1    an ordinary run
    OUTPUT_DIR/link_2    a run with link_1 as its teacher
    OUTPUT_DIR           the last one

This is self-distillation in sequence (Furlanello et al. 2018, "Born-Again Neural Networks", arXiv 1805.04770).
Each link is a run of its own, with its own initial weights, checkpoints and log. Those that are finished are left alone.
"""

import contextlib
import faulthandler
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from gptkit.base.cli import UserError
from gptkit.base.files import as_dict
from gptkit.base.streams import stop_log
from gptkit.distributed.process_group import main_process, sync_flags
from gptkit.training.checkpoints import LINK, find_checkpoints, read_state_or_empty
from gptkit.training.run_log import as_number, read_jsonl
from gptkit.training.sessions import SESSIONS_FILE, check_output_dir, lock_output
from gptkit.training.settings import TrainingSettings
from gptkit.training.signals import StopSignals

Settings = TypeVar("Settings", bound=TrainingSettings)
MIN_BUDGET_MINUTES = 1e-6  # of a link whose share is used up: 0 would be no budget


def run_chain(
    settings: Settings, run: Callable[[Settings, float, StopSignals], bool], started_at: float, stop: StopSignals
) -> None:
    """Train the links of --chain in order, from the first that is not finished, until one has to stop; or the one run.

    `run` trains one, from its settings, the time.monotonic() at which its budget began, and the signals; it returns
    whether the run is finished. Raises UserError.
    """
    if settings.chain is None:
        run(settings, started_at, stop)
        return
    folders = link_folders(settings)
    began, used_s = time.monotonic(), 0.0
    for number, folder in enumerate(folders, 1):
        is_last = folder == folders[-1]
        is_done, before_s = progress_of(folder)
        if is_last or not is_done:
            minutes_left = None if settings.max_minutes is None else settings.max_minutes - minutes_since(began)
            if minutes_left is not None and minutes_left <= 0:
                print(f"stopped before link {number} of {len(folders)}; run the same command to resume")
                return
            link = replace(link_settings(settings, folders, number, used_s), max_minutes=minutes_left)
            # The last link locks its folder, that of the chain, itself.
            with contextlib.nullcontext() if is_last else lock_output(folders[-1]):
                print(f"link {number} of {len(folders)}: {folder}", flush=True)
                is_done = run(link, started_at, stop)
            if is_done:
                require_checkpoint(link)
            if is_last or not is_done:
                return
            leave_link(stop, number, len(folders))
        elapsed_s = progress_of(folder)[1]
        started_at += elapsed_s - before_s  # the budget of the next one begins where this one's clock stopped
        used_s += elapsed_s


@main_process
def link_folders(settings: TrainingSettings) -> list[Path]:
    """Return the output folders of the links. Raises UserError where they hold something else than this chain."""
    if settings.distill_from:
        raise UserError(
            f"--chain {settings.chain} trains its teachers itself; leave --distill_from {settings.distill_from} out"
        )
    output_dir = check_output_dir(settings.output_dir, settings.resume)
    folders = [output_dir / f"{LINK}{number}" for number in range(1, settings.chain or 1)]
    for folder in folders:
        check_output_dir(str(folder), settings.resume)
    if find_checkpoints(output_dir) and not all(progress_of(folder)[0] for folder in folders):
        raise UserError(
            f"--output_dir {output_dir} holds a run that is not the last one of --chain {settings.chain}; name another"
            " folder, or give the --chain that it began with"
        )
    return [*folders, output_dir]


@main_process
def progress_of(folder: Path) -> tuple[bool, float]:
    """Return whether the run in a folder is finished, and the seconds that it took up to its newest checkpoint."""
    found, sessions = find_checkpoints(folder), read_jsonl(folder / SESSIONS_FILE)
    if not found:
        return False, 0.0
    is_finished = bool(sessions) and as_dict(sessions[-1].get("end")).get("how") == "finished"
    return is_finished, as_number(read_state_or_empty(found[-1]).get("elapsed_s")) or 0.0


@main_process
def require_checkpoint(link: TrainingSettings) -> None:
    """Raise UserError where a finished link has none: its share of the budget was over before the first step."""
    if not find_checkpoints(Path(link.output_dir)):
        raise UserError(
            f"--budget_minutes leaves {link.budget_minutes:.2g} for {link.output_dir}, which are over before its first"
            " step; give more, or tokenize the text first (pretokenize.py)"
        )


@main_process
def minutes_since(began: float) -> float:
    """Return the minutes since a time of time.monotonic(), by the clock of the main process."""
    return (time.monotonic() - began) / 60


def link_settings(settings: Settings, folders: list[Path], number: int, used_s: float) -> Settings:
    """Return the settings of a link, from 1, with its share of the budget, of which used_s seconds are gone.

    Each has a seed of its own: a student that began like its teacher would have less to learn from it (Allen-Zhu & Li
    2020, arXiv 2012.09816).
    """
    link = replace(
        settings,
        chain=None,
        output_dir=str(folders[number - 1]),
        distill_from=str(folders[number - 2]) if number > 1 else None,
        seed=settings.seed + number - 1,
    )
    if settings.budget_minutes is not None:
        share = (settings.budget_minutes - used_s / 60) / (len(folders) - number + 1)
        link = replace(link, budget_minutes=max(share, MIN_BUDGET_MINUTES))
    if not settings.use_pretokenized:  # tokenize once, where the last link looks for its own tokens
        link = replace(link, use_pretokenized=True, pretokenized_dir=str(folders[-1] / "tokens"))
    return link


def leave_link(stop: StopSignals, number: int, n_links: int) -> None:
    """Free what a finished link has left in this process; exit where a signal asked for it meanwhile."""
    stop_log()
    is_signalled, _ = sync_flags(stop.received is not None)
    faulthandler.cancel_dump_traceback_later()  # sync_flags expects a step soon
    if is_signalled:
        stop.exit(f"link {number} of {n_links} is finished")
    stop.exits_at_once = True
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
