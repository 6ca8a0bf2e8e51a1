"""recipe.yaml means what ran, states defaults, and is the same when it is written again."""

from __future__ import annotations

import pytest
import yaml

import runtime
from runtime.formats.presets import PRESETS
from runtime.provenance.complete_recipe import complete_recipe
from runtime.recipe.examples import EXAMPLES, RECIPE_FILES
from runtime.recipe.named import recipe_of
from seqbuild.modifiers import AWQModifier, GPTQModifier, QuantizationModifier, SmoothQuantModifier
from tests.runtime.workshop import DENSE, MIXTURE

Recipe = runtime.Recipe
TEXTS = {
    **DENSE,
    **MIXTURE,
    "an older AWQModifier": "a_stage: {b_modifiers: {AWQModifier: {scheme: W4A16, ignore: [lm_head], n_grid: 10}}}",
    "numbers as text": "GPTQModifier: {scheme: W4A16, dampening_frac: 1e-2, targets: 're:.*q_proj', min_tokens: 9}",
    "an order in the scheme": (
        "GPTQModifier: {config_groups: {a: {targets: [Linear], weights: {num_bits: 4, type: int, strategy: group, "
        "group_size: 32, symmetric: true, actorder: weight}}}}"
    ),
    "two of a class": (
        "a_stage: {m_modifiers: {GPTQModifier: {scheme: W4A16, targets: ['re:.*q_proj'], ignore: lm_head}}}\n"
        "b_stage: {m_modifiers: {GPTQModifier: {scheme: {W8A8: ['re:.*k_proj', 're:.*ünï']}, actorder: null}}}"
    ),
    "no effect": "QuantizationModifier: {scheme: FP8, start: null, requires_calibration_data: false}",
}
PYTHON = [
    [SmoothQuantModifier(), GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"], fallback="rtn")],
    [AWQModifier(mappings=[["re:.*q_proj", "re:.*norm"]]), QuantizationModifier(scheme="W4A16", targets=["Linear"])],
]


def recipes() -> dict[str, Recipe]:
    named = {name: recipe_of(name) for name in (*PRESETS, *EXAMPLES, *RECIPE_FILES)}
    texts = {name: Recipe.from_text(text, name) for name, text in TEXTS.items()}
    return named | texts | {f"python {number}": Recipe.from_modifiers(some) for number, some in enumerate(PYTHON)}


def meaning(recipe: Recipe) -> object:
    transforms = [(type(entry).__name__, entry.model_dump()) for entry in recipe.transforms]
    rest = [(entry.algorithm, entry.ignore, entry.min_tokens) for entry in recipe.modifiers]
    return recipe.groups, recipe.cache, transforms, rest, recipe.sequential_targets


@pytest.mark.parametrize("name", recipes())
def test_the_text_means_the_same_and_is_written_again(name: str) -> None:
    recipe = recipes()[name]
    text = complete_recipe(recipe)
    again = Recipe.from_text(text, "recipe.yaml")
    assert meaning(again) == meaning(recipe)
    assert complete_recipe(again) == text
    stages = yaml.safe_load(text)
    assert all(stage.endswith("_stage") for stage in stages)
    for stage in stages.values():
        for table in stage["default_modifiers"].values():
            assert isinstance(table.get("targets", []), list) and isinstance(table.get("ignore", []), list)


def test_defaults_are_stated() -> None:
    expected = {
        "targets": ["Linear"],
        "scheme": "W4A16",
        "ignore": [],
        "dampening_frac": 0.01,
        "block_size": 128,
        "actorder": "static",
    }
    text = complete_recipe(Recipe.from_text("GPTQModifier: {scheme: W4A16}", "mine"))
    assert yaml.safe_load(text) == {"default_stage": {"default_modifiers": {"GPTQModifier": expected}}}
    assert yaml.safe_load(complete_recipe(Recipe.from_modifiers(PYTHON[0])))["default_stage"]["default_modifiers"][
        "SmoothQuantModifier"
    ] == {"smoothing_strength": 0.5}
    # The order of columns that the scheme states is not stated twice.
    in_scheme = complete_recipe(Recipe.from_text(TEXTS["an order in the scheme"], "mine"))
    assert in_scheme.count("actorder") == 1


def test_a_text_that_would_change_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "GPTQModifier: {scheme: W4A16}"
    monkeypatch.setattr("runtime.provenance.complete_recipe.in_blocks", lambda _: text.replace("W4A16", "W8A16"))
    assert complete_recipe(Recipe.from_text(text, "mine")) == text
