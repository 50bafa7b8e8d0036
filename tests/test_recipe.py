"""training/recipe.py: the recipe by how often the text is read, what flags and checkpoints say of it, and its description."""

import dataclasses
import math
from typing import Any

import pytest

from gptkit.base.cli import UserError
from gptkit.training import recipe
from gptkit.training.recipe import MANY_EPOCHS, Reading, Recipe, RecipeSettings, choose_recipe, describe_recipe

LR = 0.02


def choose(
    n_epochs: float, n_tokens: int = 500_000, tokens_per_step: int = 2048, width: int = 128, **given: Any
) -> Recipe:
    return choose_recipe(RecipeSettings(**given), Reading(n_tokens, tokens_per_step, n_epochs, width), LR)


def test_settings_and_recipe_have_the_same_fields() -> None:
    names = [field.name for field in dataclasses.fields(Recipe)]
    assert [field.name for field in dataclasses.fields(RecipeSettings)] == names
    assert all(getattr(RecipeSettings(), name) is None for name in names)


@pytest.mark.parametrize("n_epochs", [0.01, 1, MANY_EPOCHS - 0.01])
def test_few_epochs_keep_the_recipe_of_one(n_epochs: float) -> None:
    once = Recipe(share_characters=recipe.CHARACTER_SHARE, lr_schedule="linear", cooldown_share=0.6)
    assert dataclasses.replace(choose(n_epochs), adam_lr=once.adam_lr) == once


def test_weights_shrink_by_the_same_share_per_epoch_for_any_text_batch_and_rate() -> None:
    for n_tokens, tokens_per_step in ((500_000, 2048), (500_000, 512), (30_000_000, 65_536)):
        found = choose(16, n_tokens, tokens_per_step)
        steps_per_epoch = n_tokens / tokens_per_step
        for lr, decay in ((LR, found.weight_decay), (found.adam_lr, found.embedding_decay)):
            assert lr * decay * steps_per_epoch == pytest.approx(4 * recipe.SHRINKAGE, rel=0.01)
        assert found.shuffle == "documents"
        assert found.drop_rate == 0.1
        assert found.average_epochs == pytest.approx(16 * recipe.AVERAGE_SHARE, rel=0.01)


@pytest.mark.parametrize("n_epochs", [3, 30, 1e6])
@pytest.mark.parametrize("steps_per_epoch", [1, 2, 20, 500])
def test_no_step_shrinks_the_weights_by_much(n_epochs: float, steps_per_epoch: int) -> None:
    found = choose(n_epochs, 2048 * steps_per_epoch)
    for shrinkage in (LR * found.weight_decay, found.adam_lr * found.embedding_decay):
        assert 0 < shrinkage <= 1.01 * recipe.MAX_SHRINKAGE_PER_STEP
    assert found.average_epochs <= recipe.AVERAGE_SHARE * recipe.MAX_USEFUL_EPOCHS


def test_without_rates_the_decays_stay_plain() -> None:
    found = choose_recipe(RecipeSettings(), Reading(500_000, 2048, 16, 128), None)
    assert (found.weight_decay, found.embedding_decay) == (Recipe.weight_decay, Recipe.embedding_decay)
    assert (found.shuffle, found.drop_rate, found.share_characters) == ("documents", 0.1, 0.0)
    assert (found.adam_lr, found.lr_schedule) == (0.02, "cosine")


def test_the_embedding_learns_faster_where_the_text_is_read_seldom() -> None:
    assert choose(MANY_EPOCHS - 0.01).adam_lr == recipe.SELDOM_ADAM_LR > Recipe.adam_lr
    often = choose(MANY_EPOCHS)
    assert (often.adam_lr, often.lr_schedule) == (Recipe.adam_lr, "cosine")


def test_a_wide_model_keeps_the_rate_of_before() -> None:
    rates = [choose(1, width=width).adam_lr for width in (96, 128, 192, 384, 768, 1600)]
    assert rates == [0.06, 0.06, 0.04, 0.02, 0.02, 0.02]


def test_the_decay_of_the_embedding_follows_its_rate_where_that_is_given() -> None:
    given = choose(8, adam_lr=0.1)
    assert given.adam_lr == 0.1
    assert 0.1 * given.embedding_decay == pytest.approx(LR * given.weight_decay, rel=0.01)


def test_dropout_grows_with_the_epochs_from_where_it_pays_up_to_a_bound() -> None:
    expected = [0, 0, 0, 0.03, 0.05, 0.1, 0.2]
    assert [choose(n_epochs).drop_rate for n_epochs in (3, 4, 6, 8, 10, 16, 1000)] == expected


def test_a_flag_wins_also_where_it_is_zero() -> None:
    found = choose(16, drop_rate=0.0, weight_decay=0.3, shuffle="windows", average_epochs=0.0)
    assert (found.drop_rate, found.weight_decay, found.shuffle, found.average_epochs) == (0.0, 0.3, "windows", 0.0)
    assert found.embedding_decay == choose(16).embedding_decay


def test_a_token_is_worth_less_each_time_it_is_read() -> None:
    worth = [recipe.worth_of(1000, n_epochs) for n_epochs in (0.5, 1, 4, 16, 64, 1e9)]
    assert worth[:2] == [500, 1000]
    assert worth[2] == pytest.approx(1000 * (1 + 15.4 * (1 - math.exp(-3 / 15.4))))
    assert 3600 < worth[2] < 4000  # "nearly as good as new text"
    assert worth == sorted(worth)
    assert worth[-1] == pytest.approx(16_400)


@pytest.mark.parametrize(
    ("n_epochs", "expected"),
    [
        (0.25, "text: 25% of the 5,000 tokens are read, each once"),
        (2.0, "text: each of the 5,000 tokens is read 2.0 times, nearly as good as new text"),
        (16.0, "text: each of the 5,000 tokens is read 16.0 times, worth 10.6 times as much text"),
        (300.0, "text: each of the 5,000 tokens is read 300.0 times, more than it deserves"),
    ],
)
def test_how_often_the_text_is_read_is_said(n_epochs: float, expected: str) -> None:
    reading = Reading(5000, 100, n_epochs, 128)
    text, chosen = describe_recipe(choose_recipe(RecipeSettings(), reading, LR), reading).splitlines()
    assert text.startswith(expected)
    assert chosen.startswith("recipe: drop_rate 0." if n_epochs >= MANY_EPOCHS else "recipe: adam_lr 0.0")
    assert describe_recipe(Recipe(), reading).endswith("\nrecipe: that of text which is read once")


def test_a_checkpoint_gives_its_recipe_and_a_flag_changes_it() -> None:
    chosen = choose(16)
    state = {"plan": {"recipe": dataclasses.asdict(chosen)}}
    assert recipe.saved_recipe(RecipeSettings(), state) == chosen
    assert recipe.saved_recipe(RecipeSettings(drop_rate=0.5), state) == dataclasses.replace(chosen, drop_rate=0.5)
    before = {"settings": {"weight_decay": 0.3, "drop_rate": 0, "adam_lr": 0.03, "lr": None}}  # of version 0.1
    assert recipe.saved_recipe(RecipeSettings(), before) == Recipe(weight_decay=0.3, adam_lr=0.03)
    assert recipe.saved_recipe(RecipeSettings(), {}) == Recipe()


@pytest.mark.parametrize(
    "damage",
    [{"drop_rate": "much"}, {"weight_decay": [1]}, {"embedding_decay": -1}, {"shuffle": 3}, {"drop_rate": True}],
)
def test_a_damaged_recipe_is_refused(damage: dict[str, Any]) -> None:
    state = {"plan": {"recipe": dataclasses.asdict(Recipe()) | damage}}
    with pytest.raises(UserError, match=f"damaged .*{next(iter(damage))}"):
        recipe.saved_recipe(RecipeSettings(), state)
