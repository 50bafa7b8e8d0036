"""Train ours and its peers for the same time on the same tokens, and compare them: what aozora.py and train_quality.py share.

A run is known by its contender, its variant (size and rates) and its seed. The runs of a contender are added to those in the
result file, so that each may be run alone.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from contenders import NANOCHAT, NANOGPT, OURS
from machine import ROOT, log, machine, result_path, revision_of, save_result
from peers import NanoGPTRecipe, compilation, nanochat, nanogpt, parse_size
from quality import BEST, END, Peer, evaluate_ours, losses_of, train_and_score, train_ours

from gpt_model import GPTConfig, GPTModel
from gptkit.base import devices
from gptkit.base.cli import UserError, setting

CHECKOUTS = {  # a file that is in it, and what it is
    NANOGPT: ("model.py", "a checkout of nanoGPT"),
    NANOCHAT: ("nanochat/gpt.py", "a checkout of nanochat"),
}
USUALLY_COUNTED = {OURS: True, NANOGPT: False, NANOCHAT: False}  # the time until the first steps
Runs = Iterator[tuple[str, dict[str, Any]]]  # (variant, figures)
Runner = Callable[["Setup", int], Runs]  # … of a seed


@dataclass(frozen=True, kw_only=True)
class PeerSettings:
    """The flags of the peers, and of the runs."""

    seeds: tuple[str, ...] = setting(("123",), "seeds, for a run of each contender with each")
    nanogpt_dir: str | None = setting(None, "a checkout of nanoGPT", group="contenders")
    nanogpt_sizes: tuple[str, ...] = setting(("4x128", "4x256"), "layers x width", group="contenders")
    nanochat_dir: str | None = setting(None, "a checkout of nanochat", group="contenders")
    nanochat_sizes: tuple[str, ...] = setting(("3x128",), "layers x width", group="contenders")
    nanochat_rates: tuple[str, ...] = setting(("1", "3"), "factors of its learning rates", group="contenders")
    compile_peers: bool | None = setting(
        None, "torch.compile the peers (default: nanochat always, nanoGPT on CUDA)", group="contenders"
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", group="device")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all contenders share."""

    settings: PeerSettings
    minutes: float
    device: torch.device
    dtype: Callable[[str], torch.dtype]  # of a contender's matrix products
    flags: Mapping[str, object]  # of each command of ours
    variables: Mapping[str, str]  # of the environment of ours
    folder: Path  # for checkpoints
    tokenizer: Path
    data: Path  # token shards
    text_path: Path  # the documents to score on
    vocab_size: int
    n_tokens: int  # of training text
    nanogpt_recipe: NanoGPTRecipe = NanoGPTRecipe()
    counts_start: Mapping[str, bool]  # by contender: whether the time until its first steps counts
    training_flags: Mapping[str, object] = field(default_factory=dict)  # of ours besides the budget
    max_steps: int | None = None  # of a run, for a test


def check_peers(settings: PeerSettings, contenders: tuple[str, ...], known: Mapping[str, Any]) -> None:
    """Raise UserError where a setting is none, or a folder that a contender needs is not what it should be."""
    for contender in contenders:
        if contender not in known:
            raise UserError(f"--contenders {contender} is none of {', '.join(known)}")
        if contender in CHECKOUTS:
            check_checkout(contender, getattr(settings, f"{contender}_dir"), *CHECKOUTS[contender])
    for seed in settings.seeds:
        if not seed.isdecimal():
            raise UserError(f"--seeds {seed} is not a whole number")
    for rate in settings.nanochat_rates:
        if not rate.replace(".", "", 1).isdecimal() or not float(rate):
            raise UserError(f"--nanochat_rates {rate} is not a factor; give a number above 0")
    for flag in ("nanogpt_sizes", "nanochat_sizes"):
        for size in getattr(settings, flag):
            parse_size(size, f"--{flag}")


def check_checkout(contender: str, folder: str | None, file: str, what: str) -> None:
    """Raise UserError where the folder of a contender is not given, or does not hold that file."""
    if folder is None:
        raise UserError(f"--{contender}_dir is needed, {what}; or name other --contenders")
    if not (Path(folder) / file).is_file():
        raise UserError(f"--{contender}_dir {folder} holds no {file}; name {what}")


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


def train_all(
    name: str,
    conditions: Mapping[str, Any],
    setup: Setup,
    runs: Iterable[tuple[str, str]],  # (contender, seed)
    runners: Mapping[str, Runner],
    judge: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> None:
    """Train the contenders, add each run to the result file with what `judge` says of all, and print that file at the end."""
    content = ""
    for contender, seed in runs:
        for variant, figures in runners[contender](setup, int(seed)):
            found = earlier_runs(name, conditions)  # again: another process may have added to them
            found.setdefault(contender, {})[f"{variant}, seed {seed}"] = figures
            log(f"{contender}, {variant}, seed {seed}: {figures['bits_per_char']}")
            content = save_result(name, {**conditions, "contenders": found, **judge(found)})
    print(content, end="")


# Contenders


def run_ours(setup: Setup, seed: int) -> Runs:
    """Train by the dial alone."""
    yield "auto", train_project(setup, seed, ROOT, f"{OURS}_{seed}")


def run_nanogpt(setup: Setup, seed: int) -> Runs:
    """Train nanoGPT in each size."""
    settings, folder = setup.settings, Path(setup.settings.nanogpt_dir or "")
    for size in settings.nanogpt_sizes:
        build = functools.partial(nanogpt, folder, setup.vocab_size, size, recipe=setup.nanogpt_recipe)
        yield size, train_other(setup, seed, NANOGPT, folder, build, compile=setup.device.type == "cuda")


def run_nanochat(setup: Setup, seed: int) -> Runs:
    """Train nanochat in each size with each factor of its rates."""
    settings, folder = setup.settings, Path(setup.settings.nanochat_dir or "").resolve()
    for size, rate in itertools.product(settings.nanochat_sizes, map(float, settings.nanochat_rates)):
        build = functools.partial(nanochat, folder, setup.vocab_size, size, rate)
        yield f"{size}, rates x {rate:g}", train_other(setup, seed, NANOCHAT, folder, build, compile=True)


RUNNERS: dict[str, Runner] = {OURS: run_ours, NANOGPT: run_nanogpt, NANOCHAT: run_nanochat}


def train_other(
    setup: Setup, seed: int, name: str, folder: Path, build: Callable[..., Peer], compile: bool
) -> dict[str, Any]:
    """Train and score a peer, which `build` makes for a device, a dtype, and compiled or not; return its figures.

    `compile` is what its project does; --compile_peers decides otherwise.
    """
    device, dtype, wanted = setup.device, setup.dtype(name), setup.settings.compile_peers
    compile = compile if wanted is None else wanted
    if dtype == torch.float16:  # it needs a scaler, which they are not given
        dtype = torch.float32
    with compilation(compile):
        torch.manual_seed(seed)
        peer = build(device=device, dtype=dtype, compile=compile)
        figures = train_and_score(
            peer, setup.data, setup.tokenizer, setup.text_path, setup.minutes, device, seed, setup.max_steps,
            setup.counts_start[name],
        )  # fmt: skip
    return figures | {"dtype": devices.dtype_name(dtype), "compiled": compile, "revision": revision_of(folder)}


def train_project(setup: Setup, seed: int, project: Path, name: str, **given: object) -> dict[str, Any]:
    """Train by the dial of a project with the flags given, score its models, and return the figures.

    Where the start of ours does not count, it gets the time besides that a run takes until its first report, after a step,
    where an earlier one has left what was compiled.
    """
    output_dir, variables = setup.folder / name, setup.variables
    flags = {"seed": seed, **setup.flags, **setup.training_flags} | (
        {"max_steps": setup.max_steps} if setup.max_steps else {}
    )

    def train(minutes: float, **more: object) -> dict[str, Any]:
        return train_ours(setup.data, setup.tokenizer, minutes, output_dir, flags | given | more, project, variables)

    minutes = setup.minutes
    if not setup.counts_start[OURS]:
        train(minutes, max_steps=1)
        minutes += train(minutes, max_steps=1)["reports"][0]["elapsed_s"] / 60
    trained = train(minutes)
    choices = {END: setup.flags, BEST: {"checkpoint": "best", **setup.flags}}
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
    """Return the variant with the lowest validation loss, a mean over its seeds, and its runs."""
    variants: dict[str, list[Any]] = {}
    for name, figures in runs.items():
        variants.setdefault(name.rpartition(", seed ")[0], []).append(figures)
    return min(variants.items(), key=lambda item: mean(figures["best_val_loss"] for figures in item[1]))


def bits_of(runs: Mapping[str, Any]) -> dict[str, float]:
    """Return the bits per character at the end and at best of the variant that counts: means over the seeds."""
    _, chosen = variant_of(runs)
    return {which: mean(figures["bits_per_char"][which] for figures in chosen) for which in (END, BEST)}


def compare(found: Mapping[str, Mapping[str, Any]], goals: tuple[tuple[str, str, float], ...]) -> dict[str, Any]:
    """Return how many fewer bits per character ours has at its end than the others, and which goals are met.

    A goal is a contender, its end or best, and the share that ours is to save.
    """
    if OURS not in found:
        return {}
    bits = {name: bits_of(runs) for name, runs in found.items()}
    fewer = {
        name: {which: round(1 - bits[OURS][END] / value, 4) for which, value in figures.items()}
        for name, figures in bits.items()
        if name != OURS
    }
    met = {}
    for name, which, share in goals:
        if name in fewer:
            words = f"at least {share:.0%} fewer bits per character" if share else "fewer bits per character"
            value = fewer[name][which]
            met[f"{words} than {name} at its {which}"] = value >= share if share else value > 0
    return {"bits_per_char": bits, "fewer_bits_per_char_than": fewer, "goals": met}
