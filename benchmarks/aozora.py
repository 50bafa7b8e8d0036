"""The public yardstick for little text and many epochs: fixed text in, bits per character of unseen authors out.

A track is a list of documents of the Aozora Bunko subset (aozora_lists.py) and a time to train on it. Everything is
made of that text alone, under --work_dir: text shards, a BPE tokenizer, token shards (once; their time is not counted).
Then each contender trains for the track's minutes, and is scored on the held-out works, both at its end and at its
lowest validation loss, which is that of a hundredth of the track's own text:

- ours: `pretraining.py --budget_minutes M --model_size auto`, nothing else. Its end is what evaluate_model.py takes
  without a flag, as a user does.
- before: the same command of an earlier checkout of this project (--before_dir). It reports and saves once per epoch,
  so that its best epoch is there to be scored; it has no recipe for many epochs.
- nanogpt, nanochat: their models and recipes (peers.py). The sizes and rates to try are flags, and the one with the
  lowest validation loss counts. They count training alone, not the compiler's work; ours also starting, planning,
  reports and checkpoints.

The rules: one stock model at the end, no other text, no choosing by the held-out works (--development scores on other
works, for choosing settings), and three seeds where a difference is claimed. A contender may be run alone: its runs are
added to those in the result file, which must have been measured on the same machine under the same conditions. Where
each has cores of its own, several may run at a time, each in a process and a --work_dir of its own.

    python benchmarks/aozora.py --track 1M --jsonl_path SUBSET --heldout_path HELDOUT --work_dir WORK \\
        --before_dir CHECKOUT --nanogpt_dir CHECKOUT --nanochat_dir CHECKOUT
    python benchmarks/aozora.py --track 350k --contenders ours --seeds 1 2 3 --jsonl_path SUBSET … --work_dir WORK
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from aozora_lists import DEVELOPMENT, HELDOUT, prepare_documents
from contenders import NANOCHAT, NANOGPT, OURS
from machine import versions
from quality import BEST, END, open_streams, prepare_tokens, train_ours
from side_by_side import (
    RUNNERS,
    USUALLY_COUNTED,
    PeerSettings,
    Runner,
    Runs,
    Setup,
    check_checkout,
    check_peers,
    compare,
    earlier_runs,
    train_all,
    train_project,
)

from gptkit.base import devices
from gptkit.base.cli import UserError, run_command, setting

BEFORE = "before"
CONTENDERS = (OURS, BEFORE, NANOGPT, NANOCHAT)
NOT_OVERFITTED = 1.005  # times the lowest validation loss, at most, at the end


@dataclass(frozen=True)
class Track:
    """A time to train on a list of documents, and how many fewer bits per character ours is to have than others."""

    minutes: float
    threads: int | None  # None: those of the machine, for a GPU
    goals: tuple[tuple[str, str, float], ...]  # (contender, its end or best, share that ours saves)
    max_steps: int | None = None  # of each run, for a test


TRACKS = {
    "sample": Track(5, 1, (), max_steps=20),
    "350k": Track(6, 2, ((BEFORE, BEST, 0.0),)),
    "1M": Track(25, 1, ((BEFORE, END, 0.13), (BEFORE, BEST, 0.05), (NANOGPT, BEST, 0.15), (NANOCHAT, BEST, 0.05))),
    "4M": Track(30, 2, ((BEFORE, END, 0.06),)),
    "50M": Track(8, None, ((BEFORE, END, 0.0),)),
}


@dataclass(frozen=True, kw_only=True)
class AozoraConfig(PeerSettings):
    """Train contenders on a fixed list of Aozora Bunko's works, and score them on works of unseen authors."""

    track: Literal["sample", "350k", "1M", "4M", "50M"] = setting(help="the list, and with it time and threads")
    contenders: tuple[str, ...] = setting(CONTENDERS, "those to train now")
    minutes: float | None = setting(None, "time that each contender trains (default: the track's)", more_than=0)
    threads: int | None = setting(None, "threads that compute (default: the track's)", at_least=1)

    jsonl_path: str = setting(
        help="the JSONL of the subset (for the track sample: dataset/sample/sample.jsonl)", group="data"
    )
    heldout_path: str | None = setting(None, "JSONL of the held-out works", group="data")
    development: bool = setting(False, "score on the development works instead, for choosing settings", group="data")
    work_dir: str = setting(help="folder for tokens and checkpoints", group="data")
    vocab_size: int = setting(4096, "pieces of the tokenizer", group="data")

    before_dir: str | None = setting(None, "an earlier checkout of this project", group="contenders")


def main(config: AozoraConfig) -> None:
    track = TRACKS[config.track]
    check_settings(config)
    device = devices.choose_device(config.device)
    threads = config.threads or track.threads
    if threads:
        torch.set_num_threads(threads)
    devices.keep_freed_memory(device, trim_threshold=2 * devices.LARGEST_FROM_HEAP)  # the peers', see contenders.py
    minutes = config.minutes or track.minutes
    name = f"aozora_{config.track}" + ("_development" if config.development else "")
    conditions = {
        "track": config.track,
        "minutes": minutes,
        "threads": threads,
        "device": devices.describe_device(device),
        "vocab_size": config.vocab_size,
        "scored_on": DEVELOPMENT if config.development else HELDOUT,
        **versions("torch"),
    }
    earlier_runs(name, conditions)  # refuses others before training, not after
    folder = Path(config.work_dir) / config.track
    text_path = prepare_documents(config.track, config.jsonl_path, config.heldout_path, folder)
    tokenizer, data = prepare_tokens(folder / "text", folder, config.vocab_size)
    variables = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    setup = Setup(
        settings=config,
        minutes=minutes,
        device=device,
        dtype=lambda contender: devices.choose_dtype("auto", device, training=True),  # that of ours
        flags={} if config.device == "auto" else {"device": config.device},
        variables=variables,
        folder=folder,
        tokenizer=tokenizer,
        data=data,
        text_path=text_path,
        vocab_size=config.vocab_size,
        n_tokens=len(open_streams(data, tokenizer)["train"]),
        counts_start=USUALLY_COUNTED,
        max_steps=track.max_steps,
    )
    runs = itertools.product(config.contenders, config.seeds)
    train_all(name, conditions, setup, runs, runners(config), lambda found: judge(found, track))


def check_settings(config: AozoraConfig) -> None:
    """Raise UserError where a setting is none, or a folder that a contender needs is not what it should be."""
    check_peers(config, config.contenders, runners(config))
    if BEFORE in config.contenders:
        check_checkout(BEFORE, config.before_dir, "pretraining.py", "an earlier checkout of this project")
    if config.development == (config.heldout_path is not None):
        raise UserError("give either --heldout_path, for a final score, or --development, for choosing settings")
    if config.development and config.track in ("50M", "sample"):
        raise UserError(f"--development is not for --track {config.track}, whose list holds such works")


def runners(config: AozoraConfig) -> dict[str, Runner]:
    """Return the contenders; each yields (variant, figures) for a seed."""

    def run_before(setup: Setup, seed: int) -> Runs:
        """Train by the dial of an earlier checkout, with a report and a checkpoint in each epoch."""
        project = Path(config.before_dir or "").resolve()
        n_steps = steps_per_epoch(setup, project)
        yield "auto", train_project(setup, seed, project, f"{BEFORE}_{seed}", eval_freq=n_steps, save_ckpt_freq=n_steps)

    found = {**RUNNERS, BEFORE: run_before}
    return {contender: found[contender] for contender in CONTENDERS}


def steps_per_epoch(setup: Setup, project: Path) -> int:
    """Return the optimizer steps in which the dial of a project reads the text once, by its plan for one step."""
    flags = {"max_steps": 1, **setup.flags}
    plan = train_ours(
        setup.data, setup.tokenizer, setup.minutes, setup.folder / "plan", flags, project, setup.variables
    )
    return max(setup.n_tokens // plan["tokens"], 1)


def judge(found: Mapping[str, Mapping[str, Any]], track: Track) -> dict[str, Any]:
    """Return the comparison of ours with the others, and the goals met, of which one is ours alone."""
    result = compare(found, track.goals)
    if result:
        losses = [figures for run in found[OURS].values() for figures in (run, run["not_averaged"])]
        result["goals"] = {
            "the last validation loss of each run of ours, averaged or not, within 0.5 % of its best": all(
                figures["last_val_loss"] <= NOT_OVERFITTED * figures["best_val_loss"] for figures in losses
            )
        } | result["goals"]
    return result


if __name__ == "__main__":
    run_command(AozoraConfig, main)
