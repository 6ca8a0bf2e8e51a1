"""Find a recipe by the path of a file, or by the name of a preset or an algorithm."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from runtime.errors import RecipeError, UsageError
from runtime.recipe.examples import EXAMPLES, RECIPE_FILES, default_algorithm, example, recipe_text
from runtime.recipe.recipe import Recipe

ALGORITHMS = ("rtn", "gptq", "awq", "smoothquant", "spinquant", "quip")
_LISTED = "the command recipes lists presets and algorithms"


def recipe_of(given: str | os.PathLike[str]) -> Recipe:
    """Return the recipe with this path or name. A file takes precedence; a name may be in upper or lower case.

    Raises:
        RecipeError: there is no such recipe, or the file is not a valid one.
    """
    from runtime.formats.presets import PRESETS

    name = os.fspath(given)
    is_path = os.path.isfile(name) or os.sep in name or Path(name).suffix in (".yaml", ".yml", ".json", ".txt")
    if not is_path and (name.lower() in (*EXAMPLES, *RECIPE_FILES) or name.upper() in PRESETS):
        return Recipe.from_text(example(name), name)
    if is_path or os.path.exists(name):
        return Recipe.from_file(name)
    near = _nearest(name, (*PRESETS, *EXAMPLES, *RECIPE_FILES))
    raise RecipeError(
        f"there is no recipe {name!r}: no such file, preset or algorithm",
        hint=f"did you mean {near}? {_LISTED}" if near else _LISTED,
    )


def recipe_from_scheme(
    scheme: str,
    algorithm: str | None = None,
    *,
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = ("lm_head",),
) -> Recipe:
    """Make the recipe that quantizes to a preset with an algorithm, by default that of `default_algorithm`.

    Raises:
        RecipeError: the preset is unknown or not supported.
        UsageError: the algorithm is unknown.
    """
    preset, name = known_scheme(scheme), known_algorithm(algorithm)
    name = name or default_algorithm(preset)
    return Recipe.from_text(recipe_text(preset, name, targets=targets, ignore=ignore), f"{name} {preset}")


def known_scheme(name: str) -> str:
    """Check the name of a preset, and return it in upper case.

    Raises:
        RecipeError: it is unknown or not supported; the message suggests the nearest one.
    """
    from runtime.formats.presets import scheme_from_preset

    scheme_from_preset(name, ["Linear"])
    return name.upper()


def known_algorithm(name: str | None) -> str | None:
    """Check the name of an algorithm, and return it in lower case; None for None.

    Raises:
        UsageError: it is unknown.
    """
    if name is None or name.lower() in ALGORITHMS:
        return name and name.lower()
    near = _nearest(name, ALGORITHMS)
    raise UsageError(
        f"--algorithm must be one of {', '.join(ALGORITHMS)}; got {name!r}",
        hint=f"did you mean {near}?" if near else "",
    )


def _nearest(name: str, known: Sequence[str]) -> str:
    """Return the most similar known name, regardless of case; empty if none is similar."""
    by_case = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), by_case, n=1)
    return by_case[near[0]] if near else ""
