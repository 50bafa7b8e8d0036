"""Measure what each ingredient of the recipe for many epochs gives: one changed at a time, in bits per character.

All runs have the same model, text and number of steps, so that they may run side by side on a busy machine (--jobs).
They are scored on the development works of aozora_lists.py, whose authors wrote nothing of the text: by their last
weights, and by the averaged ones. The teacher of a distilled run is the run of the planner's recipe with the same seed,
which must lie in --work_dir or run now. The last rows have a model that is not of Qwen3's form (forms.py). Times are
given, but are those of a machine that does other things too.

    python benchmarks/ingredients.py --jsonl_path SUBSET --work_dir WORK
    python benchmarks/ingredients.py --jsonl_path SUBSET --work_dir WORK --rows "no dropout" --seeds 1 2 3
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from aozora_lists import DEVELOPMENT, prepare_documents
from forms import FORMS
from machine import ROOT, log, machine, result_path, revision_of, save_result
from quality import evaluate_ours, prepare_tokens, train_ours

from gptkit.base.cli import UserError, run_command, setting

BASE = "the planner's recipe"
DECAYS, FOLLOWED_BY_DECAYS = {"weight_decay", "embedding_decay"}, {"lr", "adam_lr"}  # the planner divides them by rates
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # scoring takes 17 s; with two threads for each of two jobs, 4 minutes
FORM_ROWS = {f"{form} (not Qwen3's form)": form for form in FORMS}
REMEDY = "remove it, or name another folder in RESULTS_DIR"
ROWS: dict[str, dict[str, object]] = {
    BASE: {},
    "the recipe of one epoch": {
        "drop_rate": 0, "weight_decay": 0.1, "embedding_decay": 0, "shuffle": "windows", "average_epochs": 0,
    },
    "no decay of embedding and head": {"embedding_decay": 0},
    "decay 0.1 of the matrices": {"weight_decay": 0.1},
    "no dropout": {"drop_rate": 0},
    "dropout 0.2": {"drop_rate": 0.2},
    "windows in a new order, not documents": {"shuffle": "windows"},
    "5 % of the input tokens replaced": {"replace_rate": 0.05},
    "average over half an epoch": {"average_epochs": 0.5},
    "average over two epochs": {"average_epochs": 2},
    "the rate constant, then linear to its end over 60 %": {"lr_schedule": "linear"},
    "decay rising from 0 to twice": {"decay_schedule": "rising"},
    "decay that dips in the middle": {"decay_schedule": "dip"},
    "cautious decay": {"cautious_decay": True},
    "MuonEq-R": {"muon_scaling": "rows"},
    "NorMuon": {"muon_scaling": "neurons"},
    "Muon's momentum rising over 300 steps": {"momentum_warmup": 300},
    "the token after the next too": {"further_tokens": 0.3},
    "no shared characters": {"share_characters": 0},
    "characters shared at the full rate": {"share_characters": 1},
    "half of the matrices' rate": {"lr": 0.01},
    "twice the matrices' rate": {"lr": 0.04},
    "the embedding's rate 0.01": {"adam_lr": 0.01},
    "the embedding's rate 0.05": {"adam_lr": 0.05},
    "the embedding's rate 0.1": {"adam_lr": 0.1},
    "AdamW (lr 4e-3) in place of Muon": {"optimizer": "adamw", "lr": "4e-3"},
    "distilled from the planner's recipe": {"distill_from": BASE},
    "distilled from it, 0.7 of the loss": {"distill_from": BASE, "distill_weight": 0.7},
    **{row: {} for row in FORM_ROWS},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class IngredientsConfig:
    """Measure what each ingredient of the recipe for many epochs gives, one changed at a time."""

    track: Literal["sample", "350k", "1M", "4M"] = setting("350k", "the list of documents, of aozora.py")
    model_size: str = setting("micro", "the model of all runs")
    n_epochs: int = setting(16, "passes over the text", at_least=1)
    rows: tuple[str, ...] = setting((), "ingredients to measure now (default: all)")
    seeds: tuple[str, ...] = setting(("1",), "seeds, for a run of each")
    jobs: int = setting(2, "runs at a time, each with one thread", at_least=1)
    jsonl_path: str = setting(help="the JSONL of the subset", group="data")
    work_dir: str = setting(help="folder for tokens and checkpoints", group="data")
    vocab_size: int = setting(4096, "pieces of the tokenizer", group="data")
    max_steps: int | None = setting(None, "steps of a run, for a test", at_least=1, group="data")


def main(config: IngredientsConfig) -> None:
    rows = chosen_rows(config)
    folder = Path(config.work_dir) / config.track
    heldout = config.jsonl_path if config.track == "sample" else None
    text_path = prepare_documents(config.track, config.jsonl_path, heldout, folder)
    tokenizer, data = prepare_tokens(folder / "text", folder, config.vocab_size)
    name = f"ingredients_{config.track}_{config.model_size}_{config.n_epochs}"
    conditions = {name: getattr(config, name) for name in ("track", "model_size", "n_epochs", "vocab_size")}
    conditions |= {"scored_on": DEVELOPMENT}
    found, planned = earlier_rows(name, conditions)
    untaught = [seed for seed in config.seeds if f"seed {seed}" not in found.get(BASE, {})]
    if untaught and BASE not in rows and any("distill_from" in ROWS[row] for row in rows):
        raise UserError(f"the teacher with seed {untaught[0]} is missing; name {BASE!r} among --rows too")

    def output_dir_of(row: str, seed: str) -> Path:
        return folder / f"ingredient_{config.model_size}_{config.n_epochs}_{list(ROWS).index(row)}_{seed}"

    def measure(row: str, seed: str) -> None:
        output_dir = output_dir_of(row, seed)
        flags = flags_of(config, row, seed, output_dir_of(BASE, seed))
        form = FORM_ROWS.get(row)
        trained = train_ours(data, tokenizer, 0.0, output_dir, flags, variables=ONE_THREAD, form=form)

        def score(which: str) -> float:
            scoring = {"checkpoint": which, "device": "cpu"}
            return round(evaluate_ours(output_dir, text_path, scoring, variables=ONE_THREAD, form=form), 4)

        bits = {which: score(which) for which in ("newest", "averaged")}
        losses = [report["val_loss"] for report in trained["reports"]]
        if row == BASE and not planned:
            planned.update(trained["plan"]["recipe"])
        check_recipe(name, row, trained["plan"]["recipe"], planned)
        figures = {"bits_per_char": bits, "val_loss": losses[-1], "best_val_loss": min(losses)}
        figures |= {"seconds": trained["seconds"], "revision": revision_of(ROOT)}
        found.setdefault(row, {})[f"seed {seed}"] = figures
        log(f"{row}, seed {seed}: {bits}")

    content = ""
    with ThreadPoolExecutor(config.jobs) as pool:
        for distilled in (False, True):  # a teacher is trained first
            runs = [
                pool.submit(measure, row, seed)
                for seed in config.seeds
                for row in rows
                if ("distill_from" in ROWS[row]) == distilled
            ]
            for run in runs:
                run.result()
                measured = in_order(found)
                content = save_result(name, conditions | {"recipe": planned, "rows": measured} | against_base(measured))
    print(content, end="")


def flags_of(config: IngredientsConfig, row: str, seed: str, teacher: Path) -> dict[str, object]:
    """Return the flags of a row's training; `teacher` is the run that a distilled one learns from."""
    length: dict[str, object] = {"budget_minutes": None, "n_epochs": config.n_epochs, "max_steps": config.max_steps}
    flags = length | {"model_size": config.model_size, "seed": seed, "device": "cpu", "eval_freq": 100, **ROWS[row]}
    return flags | ({"distill_from": teacher} if "distill_from" in flags else {})


def chosen_rows(config: IngredientsConfig) -> list[str]:
    """Return the rows to measure, and raise UserError if --rows names one that is not in ROWS."""
    unknown = next((row for row in config.rows or () if row not in ROWS), None)
    if unknown:
        raise UserError(f"--rows {unknown!r} is none of {', '.join(map(repr, ROWS))}")
    return list(config.rows or ROWS)


def in_order(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rows in the order of ROWS."""
    return {row: dict(found[row]) for row in ROWS if row in found}


def earlier_rows(name: str, conditions: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return the rows and the planner's recipe that are in the result file, both empty where there is none.

    Raises UserError where they were measured otherwise.
    """
    path = result_path(name)
    if not path.exists():
        return {}, {}
    result = json.loads(path.read_bytes())
    if any(result.get(key) != value for key, value in {**conditions, "machine": machine()}.items()):
        raise UserError(f"{path} was measured otherwise; {REMEDY}")
    return result["rows"], result.get("recipe", {})


def check_recipe(name: str, row: str, recipe: Mapping[str, Any], planned: Mapping[str, Any]) -> None:
    """Raise UserError if a row's recipe differs from that of the result file elsewhere than in what the row changes."""
    changed = {*ROWS[row], *(DECAYS if FOLLOWED_BY_DECAYS & ROWS[row].keys() else ())}
    same = recipe.keys() - changed if "optimizer" not in changed else set()  # others leave out what they do not have
    if any(planned.get(key, recipe[key]) != recipe[key] for key in same):
        raise UserError(f"the planner's recipe has changed since {result_path(name)} was written; {REMEDY}")


def against_base(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return by how much each row has more bits per character than BASE, averaged weights against averaged weights.

    Where both have the same seeds, only those count.
    """
    more = {}
    for row, runs in found.items():
        seeds = runs.keys() & found.get(BASE, {}).keys()
        if seeds and row != BASE:
            bits = [
                mean(figures[seed]["bits_per_char"]["averaged"] for seed in seeds) for figures in (runs, found[BASE])
            ]
            more[row] = round(bits[0] / bits[1] - 1, 4)
    return {"more_bits_per_char_than_the_base": more}


if __name__ == "__main__":
    run_command(IngredientsConfig, main)
