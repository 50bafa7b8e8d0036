"""The recipe of a run: what its flags leave open about regularization, schedules and averaging, and how it is chosen.

A text that is read less than about MANY_EPOCHS times needs no regularization; Muennighoff et al. 2023 (arXiv 2305.16264)
find up to four epochs nearly as good as new text.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from gptkit.base.cli import UserError, as_flag, parse, setting
from gptkit.base.files import as_dict
from gptkit.data.batches import Shuffle
from gptkit.training.muon import MuonScaling
from gptkit.training.schedules import DecaySchedule, LRSchedule

MANY_EPOCHS = 3.0  # of them, or more: the regularized recipe
# How much the weights shrink per epoch at the peak rate, as an exponent: rate x decay x steps per epoch. It fits texts,
# batches and rates of any size, and grows with the square root of the epochs: of those tried 2 was the best for 4 epochs,
# and 2.5 or 4 for 8. The 16-epoch optima of Kim et al. 2025, "Pre-training under infinite compute" (arXiv 2509.14786),
# lie at 1.9 to 5.1.
SHRINKAGE = 1.0
# Dropout of 0.1 was better than none for 16 epochs, and for 4 and 8 it was worse; for 8 (mini), 0.033 gained 0.3 %. A
# compiled step on a CPU takes 6 % longer with any rate, and a lower one was not seen to gain that.
FREE_EPOCHS, DROP_PER_EPOCH, MIN_DROP_RATE, MAX_DROP_RATE = 4.0, 0.1 / 12, 0.03, 0.2
MAX_USEFUL_EPOCHS = 40.0  # more were not tried, and change the recipe no further
# With few steps per epoch more would leave little of each step, and 0.05 let a text of 35 steps per epoch be learnt by heart.
MAX_SHRINKAGE_PER_STEP = 0.1
AVERAGE_SHARE = 0.15  # of the epochs of a run
CHARACTER_SHARE = 0.5  # of the rates, for text read once as for text read often
# For text read once, a rate that stays and then falls linearly was better than a cosine, and 0.05 to 0.08 better for the
# embedding than 0.02 (micro). For text read four times (mini) the two together cost a hundredth of the bits, and for text
# read five and eight times (micro) they gained nothing.
SELDOM_ADAM_LR = 0.06
# In a wider model a step of the head, which has a share of that rate, moves the logits further, in proportion to the width
# (Yang et al. 2022, arXiv 2203.03466, table 8). Wider ones than this were not tried.
TRIED_WIDTH = 128
# Reading a token again is worth less each time, by this time constant in epochs (Muennighoff et al., section 4).
REPETITION_EPOCHS = 15.4


@dataclass(frozen=True, kw_only=True)
class RecipeSettings:
    """The flags of a recipe; None leaves the choice to the planner."""

    drop_rate: float | None = setting(
        None, "dropout (default: by how often the text is read)", at_least=0, less_than=1, group="regularization"
    )
    weight_decay: float | None = setting(
        None,
        "decay of matrices, with muon those of the blocks; galore_adamw has none (default: by how often the text is read)",
        at_least=0,
        group="regularization",
    )
    embedding_decay: float | None = setting(
        None,
        "with muon: decay of the embedding; the head shrinks as fast (default: by how often the text is read)",
        at_least=0,
        group="regularization",
    )
    shuffle: Shuffle | None = setting(
        None,
        "each epoch, take the windows of the text in a new order, or the documents, from which windows are cut anew"
        " (default: by how often the text is read)",
        group="regularization",
    )
    replace_rate: float | None = setting(
        None,
        "replace this share of the input tokens by random ones of the text (default: 0, none)",
        at_least=0,
        less_than=1,
        group="regularization",
    )
    average_epochs: float | None = setting(
        None,
        "average the weights exponentially over about so many epochs, but no more than a third of the steps so far, beside"
        " the training; 0: no average (default: by how often the text is read)",
        at_least=0,
        group="regularization",
    )
    adam_lr: float | None = setting(
        None,
        "with muon: peak learning rate of the embedding; head and norms take shares of it (default: by how often the text is"
        " read)",
        more_than=0,
        group="optimizer",
    )
    lr_schedule: LRSchedule | None = setting(
        None,
        "after the warmup, lower the learning rate along a cosine, or keep it and lower it linearly over the last"
        " --cooldown_share of the steps (default: cosine; with muon, a new model and text that is read seldom, linear)",
        group="optimizer",
    )
    cooldown_share: float | None = setting(
        None,
        "with --lr_schedule linear: the share of the steps over which the rate falls (default: 0.6)",
        more_than=0,
        at_most=1,
        group="optimizer",
    )
    decay_schedule: DecaySchedule | None = setting(
        None,
        "multiply the weight decays over the run by 1, by 0 rising to 2, or by 1 dipping to 1/8 in the middle and back"
        " (default: constant)",
        group="regularization",
    )
    cautious_decay: bool | None = setting(
        None, "with muon: decay only weights that the step does not move away from zero", group="regularization"
    )
    muon_scaling: MuonScaling | None = setting(
        None,
        "with muon: normalize the rows of the momentum before it is orthogonalized (rows), or those of the step after it"
        " (neurons, NorMuon) (default: none)",
        group="optimizer",
    )
    momentum_warmup: int | None = setting(
        None,
        "with muon: raise the momentum from 0.85 to 0.95 over the first so many steps (default: 0)",
        at_least=0,
        group="optimizer",
    )
    share_characters: float | None = setting(
        None,
        "with muon: move tokens that have characters or scripts in common together as well, at this share of their learning"
        " rate; 0: only each by itself (default: 0.5 in a new model)",
        at_least=0,
        group="optimizer",
    )
    further_tokens: float | None = setting(
        None,
        "predict the token after the next too, by a projection that the model does not keep: the weight of that loss at the"
        " start, from which it falls to 0 at the end (default: 0, not at all)",
        at_least=0,
        group="regularization",
    )


@dataclass(frozen=True)
class Recipe:
    """The same, with everything decided. The defaults are the recipe for text that is read once."""

    drop_rate: float = 0.0
    weight_decay: float = 0.1
    embedding_decay: float = 0.0
    shuffle: Shuffle = "windows"
    replace_rate: float = 0.0
    average_epochs: float = 0.0
    adam_lr: float = 0.02
    lr_schedule: LRSchedule = "cosine"
    cooldown_share: float = 0.6
    decay_schedule: DecaySchedule = "constant"
    cautious_decay: bool = False
    muon_scaling: MuonScaling = "none"
    momentum_warmup: int = 0
    share_characters: float = 0.0
    further_tokens: float = 0.0


@dataclass(frozen=True)
class Reading:
    """How a run reads its text."""

    n_tokens: int  # of the text
    tokens_per_step: int
    n_epochs: float
    width: int  # of the model, its channels


def worth_of(n_tokens: int, n_epochs: float) -> float:
    """Return how many new tokens would teach as much as n_tokens read n_epochs times (Muennighoff et al., equation 5)."""
    repeated = 1 - math.exp(-max(n_epochs - 1, 0) / REPETITION_EPOCHS)
    return n_tokens * (min(n_epochs, 1) + REPETITION_EPOCHS * repeated)


def choose_recipe(settings: RecipeSettings, reading: Reading, lr: float | None) -> Recipe:
    """Return the recipe for a run, with what the settings ask for.

    `lr` is the peak rate of the matrices; None leaves rates, schedule and decays as they were for text that is read once,
    and tokens each to itself.
    """
    recipe = Recipe(share_characters=CHARACTER_SHARE if lr else 0.0)
    n_epochs = min(reading.n_epochs, MAX_USEFUL_EPOCHS)
    if lr and n_epochs < MANY_EPOCHS:
        adam_lr = max(SELDOM_ADAM_LR * min(TRIED_WIDTH / reading.width, 1), Recipe.adam_lr)
        recipe = replace(recipe, adam_lr=float(f"{adam_lr:.2g}"), lr_schedule="linear")
    if n_epochs >= MANY_EPOCHS:
        drop_rate = round(min(DROP_PER_EPOCH * (n_epochs - FREE_EPOCHS), MAX_DROP_RATE), 2)
        recipe = replace(
            recipe,
            drop_rate=drop_rate if drop_rate >= MIN_DROP_RATE else 0.0,
            shuffle="documents",
            average_epochs=float(f"{AVERAGE_SHARE * n_epochs:.3g}"),
        )
        if lr:
            per_step = SHRINKAGE * n_epochs**0.5 * reading.tokens_per_step / reading.n_tokens
            rates = lr, settings.adam_lr or recipe.adam_lr
            decays = [float(f"{min(per_step, MAX_SHRINKAGE_PER_STEP) / rate:.3g}") for rate in rates]
            recipe = replace(recipe, weight_decay=decays[0], embedding_decay=decays[1])
    return with_given(recipe, settings)


def describe_recipe(recipe: Recipe, reading: Reading) -> str:
    """Describe in two lines how often the text is read, what that means, and the recipe."""
    means = "nearly as good as new text"
    read = f"each of the {reading.n_tokens:,} tokens is read {reading.n_epochs:.1f} times"
    if reading.n_epochs < 1:
        read, means = f"{reading.n_epochs:.0%} of the {reading.n_tokens:,} tokens are read", "each once"
    if reading.n_epochs >= MAX_USEFUL_EPOCHS:
        means = "more than it deserves; more text, a larger model or --chain 2 gains more than further epochs"
    elif reading.n_epochs >= MANY_EPOCHS:
        means = f"worth {worth_of(1, reading.n_epochs):.1f} times as much text, if it is not learnt by heart"
    chosen = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    settings = ", ".join(f"{name} {value}" for name, value in chosen.items() if value != getattr(Recipe(), name))
    return f"text: {read}, {means}\nrecipe: {settings or 'that of text which is read once'}"


def saved_recipe(settings: RecipeSettings, state: Mapping[str, Any]) -> Recipe:
    """Return the recipe of the run whose state is given, with what the settings ask for now.

    What its version did not count to the recipe is among its settings. Raises UserError where the state is damaged.
    """
    saved = as_dict(state.get("settings")) | as_dict(as_dict(state.get("plan")).get("recipe"))
    names = [field.name for field in fields(Recipe) if saved.get(field.name) is not None]
    try:  # as flags, so that the bounds of flags hold for them
        values = parse(RecipeSettings, [as_flag(name, saved[name]) for name in names])
    except UserError as error:
        raise UserError(f"the newest checkpoint is damaged ({error}); remove it to resume from an older one")
    return with_given(with_given(Recipe(), values), settings)


def with_given(recipe: Recipe, settings: RecipeSettings) -> Recipe:
    """Return the recipe with those of its values that the settings name."""
    given = {field.name: getattr(settings, field.name) for field in fields(RecipeSettings)}
    return replace(recipe, **{name: value for name, value in given.items() if value is not None})
