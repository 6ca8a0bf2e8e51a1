"""Make the recipe of `oneshot` from text, a file, a name, or modifiers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.arguments import shown
from runtime.errors import RecipeError, UsageError
from runtime.recipe.named import known_scheme, recipe_of
from runtime.recipe.recipe import Recipe

_HINT = "pass YAML text, a file, the name of a preset, a Recipe, or modifiers of seqbuild.modifiers"


def python_recipe(value: Any, ignore: tuple[str, ...]) -> Recipe | str:
    """Return a recipe, or the name of a preset, for which a recipe is made once the model is known.

    Args:
        value: what the caller passed.
        ignore: modules that a preset does not apply to.

    Raises:
        RecipeError, UsageError: it is none of these, or not valid.
    """
    from runtime.formats.presets import PRESETS

    is_preset = isinstance(value, str) and value.upper() in PRESETS and not Path(value).is_file()
    if is_preset:
        return known_scheme(value)
    if ignore:
        raise UsageError("ignore applies to the name of a preset only", hint="state it in the recipe's modifiers")
    if isinstance(value, Recipe):
        return value
    if isinstance(value, str) and _is_yaml(value):
        return Recipe.from_text(value, "recipe")
    if isinstance(value, (str, os.PathLike)):
        return recipe_of(value)
    modifiers = list(_modifiers(value))
    if not modifiers:
        raise RecipeError("the recipe has no modifier", hint=_HINT)
    return Recipe.from_modifiers(modifiers)


def _is_yaml(text: str) -> bool:
    return "\n" in text or ": " in text or text.lstrip().startswith("{")


def _modifiers(value: Any) -> Iterator[Any]:
    """Yield the modifiers of a list, or of a list in it: an older AWQModifier of llm-compressor is a list of two."""
    import seqbuild.modifiers

    kind = type(value)
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _modifiers(one)
        return
    ours = getattr(seqbuild.modifiers, kind.__name__, None) if kind.__name__ in seqbuild.modifiers.__all__ else None
    if ours is kind:
        yield value
    elif kind.__module__.partition(".")[0] == "llmcompressor" and hasattr(kind, "model_fields"):
        if hasattr(value, "modifiers"):
            yield from _modifiers(list(value.modifiers))
        elif ours is None:
            raise RecipeError(
                f"{kind.__name__} of llm-compressor is not supported",
                hint=f"supported are {', '.join(seqbuild.modifiers.__all__)}",
            )
        else:
            yield ours(**{name: getattr(value, name) for name in sorted(value.model_fields_set)})
    else:
        raise UsageError(f"recipe is {shown(value)}", hint=_HINT)
