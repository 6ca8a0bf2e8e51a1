"""Modifiers that are created in Python: they equal those of a file, and errors name the modifier instead of a line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import (
    ActivationOrdering,
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    preset_name_to_scheme,
)

from runtime.errors import RecipeError
from runtime.recipe.modifiers import GPTQModifier, QuantizationModifier
from runtime.recipe.recipe import Recipe
from runtime.recipe.rescaling_modifiers import AWQModifier, SmoothQuantModifier
from runtime.recipe.yaml import in_one_line

W4 = QuantizationArgs(num_bits=4, strategy=QuantizationStrategy.GROUP, group_size=16)
GROUP = QuantizationScheme(targets=["Linear"], weights=W4)
MAPPING = {"smooth_layer": "re:.*norm", "balance_layers": ["re:.*q_proj"]}

SAME: dict[str, tuple[Any, str]] = {
    "a preset": (
        GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"], dampening_frac=0.00001),
        "GPTQModifier: {targets: Linear, scheme: W4A16, ignore: [lm_head], dampening_frac: 0.00001}",
    ),
    "numbers of numpy": (
        GPTQModifier(scheme="W4A16", dampening_frac=np.float64(0.02), block_size=np.int32(64)),
        "GPTQModifier: {scheme: W4A16, dampening_frac: 0.02, block_size: 64}",
    ),
    "presets": (
        QuantizationModifier(scheme={"W8A8": ["re:.*q_proj"], "W4A16": ("re:.*k_proj",)}),
        "QuantizationModifier: {scheme: {W8A8: ['re:.*q_proj'], W4A16: ['re:.*k_proj']}}",
    ),
    "objects of compressed-tensors": (
        GPTQModifier(config_groups={"a": GROUP}, actorder=ActivationOrdering.WEIGHT),
        "GPTQModifier: {actorder: weight, config_groups: {a: {targets: [Linear], "
        "weights: {num_bits: 4, strategy: group, group_size: 16}}}}",
    ),
    "a preset of compressed-tensors": (
        QuantizationModifier(config_groups={"a": preset_name_to_scheme("W4A16_ASYM", ["Linear"])}),
        "QuantizationModifier: {config_groups: {a: {targets: [Linear], weights: {num_bits: 4, type: int, "
        "symmetric: false, strategy: group, group_size: 128, dynamic: false}}}}",
    ),
    "a cache": (
        QuantizationModifier(scheme="FP8_DYNAMIC", kv_cache_scheme={"num_bits": 8, "type": "float", "dynamic": False}),
        "QuantizationModifier: {scheme: FP8_DYNAMIC, kv_cache_scheme: {num_bits: 8, type: float, dynamic: false}}",
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_a_modifier_equals_that_of_a_file(name: str) -> None:
    modifier, text = SAME[name]
    made, read = Recipe.from_modifiers([modifier]), Recipe.from_text(text, "file")
    assert [group.scheme.model_dump() for group in made.groups] == [group.scheme.model_dump() for group in read.groups]
    assert [(group.targets, group.options) for group in made.groups] == [
        (group.targets, group.options) for group in read.groups
    ]
    assert made.cache == read.cache
    assert [modifier.ignore for modifier in made.modifiers] == [modifier.ignore for modifier in read.modifiers]


def test_modifiers_stay_in_order_and_text_can_be_read_again() -> None:
    device = torch.device("cpu")
    modifiers = [
        SmoothQuantModifier(smoothing_strength=0.8, mappings=[[["re:.*q_proj"], "re:.*norm"]]),
        AWQModifier(mappings=[MAPPING], duo_scaling="both", offload_device=device),
        GPTQModifier(scheme="W8A8", targets=["re:.*q_proj"]),
        QuantizationModifier(scheme="W4A16", targets=["re:.*v_proj"], ignore=["it's: a 'name'\nof two lines", "é"]),
    ]
    recipe = Recipe.from_modifiers(modifiers)
    assert [type(one) for one in (*recipe.transforms, *recipe.modifiers)] == [type(one) for one in modifiers]
    assert repr(recipe.transforms[0].mappings) == repr(recipe.transforms[1].mappings)
    assert recipe.modifiers[1].ignore == modifiers[3].ignore
    again = Recipe.from_modifiers([*recipe.transforms, *recipe.modifiers])
    assert again.text == recipe.text


def test_an_older_awq_modifier_rescales_and_rounds() -> None:
    older = AWQModifier(scheme="W4A16_ASYM", targets=["Linear"], ignore=["lm_head"], n_grid=10)
    recipe = Recipe.from_modifiers([older])
    assert recipe.transforms[0].n_grid == 10
    assert [modifier.scheme for modifier in recipe.modifiers] == ["W4A16_ASYM"]
    assert recipe.modifiers[0].ignore == ("lm_head",)


def test_a_modifier_shows_what_was_given() -> None:
    shown = "GPTQModifier(block_size=64, targets=('Linear',), scheme='W4A16')"
    assert repr(GPTQModifier(scheme="W4A16", targets="Linear", block_size=64)) == shown


WRONG: dict[str, tuple[type, dict[str, Any], str]] = {
    "misspelled": (GPTQModifier, {"scheme": "W4A16", "dampening_frc": 0.1}, "did you mean dampening_frac"),
    "number": (GPTQModifier, {"scheme": "W4A16", "dampening_frac": 7}, "GPTQModifier: dampening_frac must be a number"),
    "nothing": (GPTQModifier, {}, "^GPTQModifier has neither scheme nor config_groups"),
    "preset": (QuantizationModifier, {"scheme": "W4A17"}, "QuantizationModifier: unknown scheme 'W4A17'"),
    "pattern": (QuantizationModifier, {"scheme": "W4A16", "ignore": "re:("}, "not a valid regular expression"),
    "targets": (QuantizationModifier, {"scheme": "W4A16", "targets": 3}, "targets must be a string, not 3"),
    "group": (QuantizationModifier, {"config_groups": {"a": 3}}, "QuantizationModifier: a must be a mapping, not 3"),
    "arguments": (
        QuantizationModifier,
        {"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": "4"}}}},
        "QuantizationModifier: num_bits must be an integer, not '4'",
    ),
    "part of an older form": (AWQModifier, {"targets": "Linear"}, "AWQModifier has no scheme"),
    "rounding of an older form": (AWQModifier, {"scheme": "W4A17"}, "AWQModifier: unknown scheme"),
    "state": (SmoothQuantModifier, {"initialized_": True}, "it is the state of a modifier"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_field_is_one_error_without_a_line(name: str) -> None:
    kind, fields, message = WRONG[name]
    with pytest.raises(RecipeError, match=message) as caught:
        kind(**fields)
    assert ":0" not in str(caught.value)


def test_modifiers_that_do_not_fit_together_are_named_by_number() -> None:
    gptq, smooth = GPTQModifier(scheme="W4A16"), SmoothQuantModifier()
    with pytest.raises(RecipeError, match="recipe:2: SmoothQuantModifier comes after GPTQModifier"):
        Recipe.from_modifiers([gptq, smooth])
    with pytest.raises(RecipeError, match="recipe:1: SmoothQuantModifier rescales weights"):
        Recipe.from_modifiers([smooth])
    both = Recipe.from_modifiers([gptq, QuantizationModifier(scheme="W8A16")])
    with pytest.raises(RecipeError, match="recipe:2: QuantizationModifier and the GPTQModifier on line 1 both match"):
        both.assign({"model.layers.0.q_proj": torch.nn.Linear})
    with pytest.raises(RecipeError, match=r"object.* cannot be part of a recipe"):
        in_one_line({"scheme": object()})
