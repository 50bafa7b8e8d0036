"""The recipe of a run: what its flags leave open about regularization, schedules and averaging, and how it is chosen.

A text that is read less than about MANY_EPOCHS times needs no regularization: Muennighoff et al. 2023 (arXiv 2305.16264)
find up to four epochs nearly as good as new text.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from gptkit.base.cli import setting
from gptkit.base.files import as_dict

MANY_EPOCHS = 4.0
Shuffle = Literal["windows", "documents"]


@dataclass(frozen=True, kw_only=True)
class RecipeSettings:
    """The flags of a recipe; None leaves the choice to the planner."""

    drop_rate: float | None = setting(
        None, "dropout (default: by how often the text is read)", at_least=0, group="regularization"
    )
    weight_decay: float | None = setting(
        None,
        "decay of matrices, with muon those of the blocks; galore_adamw has none (default: by how often the text is read)",
        at_least=0,
        group="regularization",
    )
    shuffle: Shuffle | None = setting(
        None,
        "each epoch, take the windows of the text in a new order, or the documents, from which windows are cut anew"
        " (default: by how often the text is read)",
        group="regularization",
    )
    average_epochs: float | None = setting(
        None,
        "average the weights exponentially over about so many epochs, beside the training; 0: no average (default: by how"
        " often the text is read)",
        at_least=0,
        group="regularization",
    )


@dataclass(frozen=True)
class Recipe:
    """The same, with everything decided. The defaults are the recipe for text that is read once."""

    drop_rate: float = 0.0
    weight_decay: float = 0.1
    shuffle: Shuffle = "windows"
    average_epochs: float = 0.0


def choose_recipe(settings: RecipeSettings, n_epochs: float) -> Recipe:
    """Return the recipe for a run that reads its text n_epochs times, with what the settings ask for."""
    recipe = Recipe()
    if n_epochs >= MANY_EPOCHS:
        recipe = replace(recipe, drop_rate=0.2, weight_decay=0.4, shuffle="documents")
    return with_given(recipe, settings)


def saved_recipe(settings: RecipeSettings, state: Mapping[str, Any]) -> Recipe:
    """Return the recipe of the run whose state is given, with what the settings ask for now.

    Versions before 0.2.0 kept only settings. Raises ValueError where the state is damaged.
    """
    saved = as_dict(as_dict(state.get("plan")).get("recipe")) or as_dict(state.get("settings"))
    values: dict[str, Any] = {}
    for field in fields(Recipe):
        value = saved.get(field.name)
        if value is None:
            continue
        if type(value) is int and type(field.default) is float:
            value = float(value)
        if type(value) is not type(field.default):
            raise ValueError(f"{field.name} is {value!r}")
        values[field.name] = value
    return with_given(Recipe(**values), settings)


def with_given(recipe: Recipe, settings: RecipeSettings) -> Recipe:
    """Return the recipe with those of its values that the settings name."""
    given = {field.name: getattr(settings, field.name) for field in fields(RecipeSettings)}
    return replace(recipe, **{name: value for name, value in given.items() if value is not None})
