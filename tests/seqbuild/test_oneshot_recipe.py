"""The kinds of recipes that `oneshot` takes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel

from runtime.errors import RecipeError, UsageError
from runtime.recipe.recipe import Recipe
from seqbuild.modifiers import AWQModifier, GPTQModifier, QuantizationModifier
from seqbuild.onecall.python_recipe import python_recipe

TEXT = "GPTQModifier: {scheme: W4A16, ignore: [lm_head]}"


def test_a_recipe_may_be_text_a_file_a_name_or_modifiers(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    modifier = GPTQModifier(scheme="W4A16", ignore=["lm_head"])
    expected = Recipe.from_text(TEXT, "recipe").groups
    for given in (
        TEXT,
        f"stage_stage:\n  all_modifiers:\n    {TEXT}",
        path,
        str(path),
        modifier,
        [modifier],
        [(modifier,)],
    ):
        found = python_recipe(given, ())
        assert isinstance(found, Recipe)
        assert found.groups == expected
    recipe = Recipe.from_text(TEXT, "mine")
    assert python_recipe(recipe, ()) is recipe
    assert python_recipe("w4a16", ("lm_head",)) == "W4A16"
    named = python_recipe("awq", ())
    assert isinstance(named, Recipe)
    assert isinstance(named.transforms[0], AWQModifier)


def of_llmcompressor(name: str, **fields: Any) -> Any:
    """An object that is like llm-compressor's: a pydantic model of this name in a module of that package."""
    kind = type(
        name, (BaseModel,), {"__module__": "llmcompressor.modifiers", "__annotations__": dict.fromkeys(fields, Any)}
    )
    return kind(**fields)


def test_modifiers_of_llmcompressor_are_converted() -> None:
    gptq = of_llmcompressor("GPTQModifier", scheme="W4A16", ignore=["lm_head"], targets=["Linear"])
    found = python_recipe([gptq], ())
    assert isinstance(found, Recipe)
    assert found.groups == Recipe.from_text(TEXT, "recipe").groups
    # The older AWQModifier is a function that returns two modifiers.
    older = [of_llmcompressor("AWQModifier", n_grid=5), of_llmcompressor("QuantizationModifier", scheme="W4A16")]
    found = python_recipe([older], ())
    assert isinstance(found, Recipe)
    assert [type(one) for one in (*found.transforms, *found.modifiers)] == [AWQModifier, QuantizationModifier]
    with pytest.raises(RecipeError, match=r"SparseGPTModifier of llm-compressor is not supported .supported are AWQ"):
        python_recipe(of_llmcompressor("SparseGPTModifier", sparsity=0.5), ())
    with pytest.raises(RecipeError, match="unknown key 'pruning' of GPTQModifier"):
        python_recipe(of_llmcompressor("GPTQModifier", scheme="W4A16", pruning=0.5), ())
    with pytest.raises(UsageError, match="SimpleNamespace"):
        python_recipe(SimpleNamespace(modifiers=[gptq]), ())
