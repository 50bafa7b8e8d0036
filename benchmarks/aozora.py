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

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
from aozora_lists import DEVELOPMENT, HELDOUT, prepare_documents
from machine import ROOT, log, machine, result_path, revision_of, save_result, versions
from peers import compilation, nanochat, nanogpt, parse_size
from quality import (
    BEST,
    END,
    Peer,
    evaluate_ours,
    losses_of,
    open_streams,
    prepare_tokens,
    train_and_score,
    train_ours,
)

from gpt_model import GPTConfig, GPTModel
from gptkit.base import devices
from gptkit.base.cli import UserError, run_command, setting

OURS, BEFORE, NANOGPT, NANOCHAT = "ours", "before", "nanogpt", "nanochat"
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
class AozoraConfig:
    """Train contenders on a fixed list of Aozora Bunko's works, and score them on works of unseen authors."""

    track: Literal["sample", "350k", "1M", "4M", "50M"] = setting(help="the list, and with it time and threads")
    contenders: tuple[str, ...] = setting((OURS, BEFORE, NANOGPT, NANOCHAT), "those to train now")
    seeds: tuple[str, ...] = setting(("123",), "seeds, for a run of each contender with each")
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
    nanogpt_dir: str | None = setting(None, "a checkout of nanoGPT", group="contenders")
    nanogpt_sizes: tuple[str, ...] = setting(("4x128", "4x256"), "layers x width", group="contenders")
    nanochat_dir: str | None = setting(None, "a checkout of nanochat", group="contenders")
    nanochat_sizes: tuple[str, ...] = setting(("3x128",), "layers x width", group="contenders")
    nanochat_rates: tuple[str, ...] = setting(("1", "3"), "factors of its learning rates", group="contenders")
    compile_peers: bool | None = setting(
        None, "torch.compile the peers (default: nanochat always, nanoGPT on CUDA)", group="contenders"
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", group="device")


@dataclass(frozen=True)
class Setup:
    """What all contenders of a track share."""

    config: AozoraConfig
    minutes: float
    device: torch.device
    variables: Mapping[str, str]  # of the environment of ours: its threads
    folder: Path  # of the track
    tokenizer: Path
    data: Path  # token shards
    text_path: Path  # the works to score on

    n_tokens: int  # of training text
    max_steps: int | None  # of a run, for a test

    @property
    def flags(self) -> dict[str, object]:
        """Return the flags of a command of ours besides the budget: none but a device that was asked for."""
        return {} if self.config.device == "auto" else {"device": self.config.device}


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
    n_tokens = len(open_streams(data, tokenizer)["train"])
    setup = Setup(config, minutes, device, variables, folder, tokenizer, data, text_path, n_tokens, track.max_steps)
    content = ""
    for contender in config.contenders:
        for seed in map(int, config.seeds):
            for variant, figures in RUNNERS[contender](setup, seed):
                found = earlier_runs(name, conditions)  # again: another process may have added to them
                found.setdefault(contender, {})[f"{variant}, seed {seed}"] = figures
                log(f"{contender}, {variant}, seed {seed}: {figures['bits_per_char']}")
                content = save_result(name, conditions | {"contenders": found} | compare(found, track))
    print(content, end="")


def check_settings(config: AozoraConfig) -> None:
    """Raise UserError where a setting is none, or a folder that a contender needs is not what it should be."""
    needed = {
        BEFORE: ("pretraining.py", config.before_dir, "an earlier checkout of this project"),
        NANOGPT: ("model.py", config.nanogpt_dir, "a checkout of nanoGPT"),
        NANOCHAT: ("nanochat/gpt.py", config.nanochat_dir, "a checkout of nanochat"),
    }
    for contender in config.contenders:
        if contender not in RUNNERS:
            raise UserError(f"--contenders {contender} is none of {', '.join(RUNNERS)}")
        if contender in needed:
            file, folder, what = needed[contender]
            if folder is None:
                raise UserError(f"--{contender}_dir is needed, {what}; or name other --contenders")
            if not (Path(folder) / file).is_file():
                raise UserError(f"--{contender}_dir {folder} holds no {file}; name {what}")
    for seed in config.seeds:
        if not seed.isdecimal():
            raise UserError(f"--seeds {seed} is not a whole number")
    for rate in config.nanochat_rates:
        if not rate.replace(".", "", 1).isdecimal() or not float(rate):
            raise UserError(f"--nanochat_rates {rate} is not a factor; give a number above 0")
    for flag in ("nanogpt_sizes", "nanochat_sizes"):
        for size in getattr(config, flag):
            parse_size(size, f"--{flag}")
    if config.development == (config.heldout_path is not None):
        raise UserError("give either --heldout_path, for a final score, or --development, for choosing settings")
    if config.development and config.track in ("50M", "sample"):
        raise UserError(f"--development is not for --track {config.track}, whose list holds such works")


def earlier_runs(name: str, conditions: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the runs in the result file by contender. Raises UserError where they are not comparable."""
    path = result_path(name)
    if not path.exists():
        return {}
    result = json.loads(path.read_bytes())
    expected = {**conditions, "machine": machine()}
    differing = next((key for key, value in expected.items() if result.get(key) != value), None)
    if differing:
        raise UserError(
            f"{path} was measured with {differing} {result.get(differing)}, not {expected[differing]}; remove it, or"
            " name another folder in RESULTS_DIR"
        )
    runs: dict[str, dict[str, Any]] = result["contenders"]
    return runs


# Contenders: each yields (variant, figures) for a seed


def run_ours(setup: Setup, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train by the dial alone."""
    yield "auto", train_project(setup, seed, ROOT, f"{OURS}_{seed}")


def run_before(setup: Setup, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train by the dial of an earlier checkout, with a report and a checkpoint in each epoch."""
    project = Path(setup.config.before_dir or "").resolve()
    n_steps = steps_per_epoch(setup, project)
    yield "auto", train_project(setup, seed, project, f"{BEFORE}_{seed}", eval_freq=n_steps, save_ckpt_freq=n_steps)


def run_nanogpt(setup: Setup, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train nanoGPT in each size."""
    config, folder = setup.config, Path(setup.config.nanogpt_dir or "")
    for size in config.nanogpt_sizes:
        build = functools.partial(nanogpt, folder, config.vocab_size, size)
        yield size, train_other(setup, seed, folder, build, compile=setup.device.type == "cuda")


def run_nanochat(setup: Setup, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train nanochat in each size with each factor of its rates."""
    config, folder = setup.config, Path(setup.config.nanochat_dir or "").resolve()
    for size, rate in itertools.product(config.nanochat_sizes, map(float, config.nanochat_rates)):
        build = functools.partial(nanochat, folder, config.vocab_size, size, rate)
        yield f"{size}, rates x {rate:g}", train_other(setup, seed, folder, build, compile=True)


RUNNERS = {OURS: run_ours, BEFORE: run_before, NANOGPT: run_nanogpt, NANOCHAT: run_nanochat}


def train_other(setup: Setup, seed: int, folder: Path, build: Callable[..., Peer], compile: bool) -> dict[str, Any]:
    """Train and score a peer, which `build` makes for a device, a dtype, and compiled or not; return its figures.

    `compile` is what its project does; --compile_peers decides otherwise.
    """
    device, wanted = setup.device, setup.config.compile_peers
    compile = compile if wanted is None else wanted
    dtype = devices.choose_dtype("auto", device, training=True)  # that of ours
    if dtype == torch.float16:  # it needs a scaler, which they are not given
        dtype = torch.float32
    with compilation(compile):
        torch.manual_seed(seed)
        peer = build(device, dtype, compile)
        figures = train_and_score(
            peer, setup.data, setup.tokenizer, setup.text_path, setup.minutes, device, seed, setup.max_steps
        )
    return figures | {"dtype": devices.dtype_name(dtype), "compiled": compile, "revision": revision_of(folder)}


def steps_per_epoch(setup: Setup, project: Path) -> int:
    """Return the optimizer steps in which the dial of a project reads the text once, by its plan for one step."""
    flags = {"max_steps": 1, **setup.flags}
    plan = train_ours(
        setup.data, setup.tokenizer, setup.minutes, setup.folder / "plan", flags, project, setup.variables
    )
    return max(setup.n_tokens // plan["tokens"], 1)


def train_project(setup: Setup, seed: int, project: Path, name: str, **given: int) -> dict[str, Any]:
    """Train by the dial of a project with the flags given, score its models, and return the figures."""
    output_dir, flags, variables = setup.folder / name, setup.flags, setup.variables
    chosen = {"seed": seed} | ({"max_steps": setup.max_steps} if setup.max_steps else {})
    trained = train_ours(
        setup.data, setup.tokenizer, setup.minutes, output_dir, flags | chosen | given, project, variables
    )
    choices = {END: flags, BEST: {"checkpoint": "best", **flags}}
    bits = {
        which: round(evaluate_ours(output_dir, setup.text_path, choice, project, variables), 4)
        for which, choice in choices.items()
    }
    with torch.device("meta"):
        model = GPTModel(GPTConfig(**trained["model"]))
    return {
        "bits_per_char": bits,
        **losses_of(trained["reports"], setup.n_tokens),
        "size": f"{model.config.n_layers}x{model.config.emb_dim}",
        "parameters": model.n_parameters(),
        "steps": trained["step"],
        "tokens": trained["tokens"],
        "seconds": trained["seconds"],
        "revision": revision_of(project),
    }


# Comparison


def variant_of(runs: Mapping[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """Return the variant with the lowest validation loss, a mean over its seeds, and its runs.

    A run is known by its variant and its seed.
    """
    variants: dict[str, list[Any]] = {}
    for name, figures in runs.items():
        variants.setdefault(name.rpartition(", seed ")[0], []).append(figures)
    return min(variants.items(), key=lambda item: mean(figures["best_val_loss"] for figures in item[1]))


def bits_of(runs: Mapping[str, Any]) -> dict[str, float]:
    """Return the bits per character at the end and at best of the variant that counts: means over the seeds."""
    _, chosen = variant_of(runs)
    return {which: mean(figures["bits_per_char"][which] for figures in chosen) for which in (END, BEST)}


def compare(found: Mapping[str, Mapping[str, Any]], track: Track) -> dict[str, Any]:
    """Return how many fewer bits per character ours has at its end than the others, and which goals are met."""
    if OURS not in found:
        return {}
    bits = {name: bits_of(runs) for name, runs in found.items()}
    fewer = {
        name: {which: round(1 - bits[OURS][END] / value, 4) for which, value in figures.items()}
        for name, figures in bits.items()
        if name != OURS
    }
    losses = [figures for run in found[OURS].values() for figures in (run, run["not_averaged"])]
    goals = {
        "the last validation loss of each run of ours, averaged or not, within 0.5 % of its best": all(
            figures["last_val_loss"] <= NOT_OVERFITTED * figures["best_val_loss"] for figures in losses
        )
    }
    for name, which, share in track.goals:
        if name in fewer:
            words = f"at least {share:.0%} fewer bits per character" if share else "fewer bits per character"
            value = fewer[name][which]
            goals[f"{words} than {name} at its {which}"] = value >= share if share else value > 0
    return {"bits_per_char": bits, "fewer_bits_per_char_than": fewer, "goals": goals}


if __name__ == "__main__":
    run_command(AozoraConfig, main)
