"""Write the recipe that ran, complete: every setting that llm-compressor has a field for is stated, defaults included.

The text is canonical, so that a run of this recipe writes the same one again. Settings of which llm-compressor knows
nothing are stated if the recipe states them. Mappings of AWQ and SmoothQuant that the compiler found stay out: they
belong to the artifact, and the recipe fits other models as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtime.recipe.auto_bits_modifier import AutoBitsModifier
from runtime.recipe.modifiers import GPTQModifier, QuantizationModifier
from runtime.recipe.recipe import Recipe
from runtime.recipe.rescaling_modifiers import Transform
from runtime.recipe.rotation_modifiers import Rotation
from runtime.recipe.yaml import in_blocks

_FIRST = ("targets", "scheme", "config_groups", "kv_cache_scheme", "ignore")
# By class, the fields whose defaults are stated. That of `actorder` depends on the scheme.
_STATED = {
    "QuantizationModifier": ("ignore",),
    "GPTQModifier": ("ignore", "dampening_frac", "block_size"),
    "AutoRoundModifier": ("ignore", "iters", "batch_size"),
    "AutoBitsModifier": ("targets", "candidates", "ignore", "algorithm"),
    "AWQModifier": ("duo_scaling", "n_grid"),
    "SmoothQuantModifier": ("smoothing_strength",),
    "SpinQuantModifier": ("rotations", "transform_type"),
    "QuIPModifier": ("rotations", "transform_type", "targets", "ignore"),
}
_STAGE, _MODIFIERS = "default_stage", "default_modifiers"


def complete_recipe(recipe: Recipe) -> str:
    """Return the text of a recipe with all settings; as it was written, if that would change what it means."""
    quantizing: Sequence[AutoBitsModifier | QuantizationModifier] = recipe.modifiers
    if recipe.search is not None:  # the first modifier stands for its result
        quantizing = (recipe.search, *recipe.modifiers[1:])
    entries = (*recipe.rotations, *recipe.transforms, *quantizing)
    tables = [(type(entry).__name__, _stated(entry)) for entry in entries]
    names = [name for name, _ in tables]
    if len(dict.fromkeys(names)) == len(names):
        text = in_blocks({_STAGE: {_MODIFIERS: dict(tables)}})
    else:  # a mapping has one modifier of each class
        stages = {f"stage_{number}_stage": {_MODIFIERS: {name: table}} for number, (name, table) in enumerate(tables)}
        text = in_blocks(stages)
    return text if _meaning(Recipe.from_text(text, recipe.source)) == _meaning(recipe) else recipe.text


def _stated(modifier: AutoBitsModifier | QuantizationModifier | Transform | Rotation) -> dict[str, Any]:
    """Return the fields of a modifier as values of YAML: those that were given, and defaults."""
    given = dict(modifier.table)
    if isinstance(modifier, GPTQModifier) and "actorder" not in given and not _has_order(given):
        given["actorder"] = modifier.actorder
    if isinstance(modifier, GPTQModifier) and modifier.target == "original":
        given.setdefault("strength", modifier.strength)
    for field in _STATED[type(modifier).__name__]:
        given.setdefault(field, getattr(modifier, field))
    fields = dict.fromkeys((*_FIRST, *type(modifier).model_fields))
    stated = {field: _value(modifier, field, given[field]) for field in fields if field in given}
    return {"targets": ["Linear"], **stated} if isinstance(given.get("scheme"), str) else stated


def _has_order(given: dict[str, Any]) -> bool:
    """Whether a scheme states the order of columns itself."""
    groups = given.get("config_groups") or {}
    return any((group.get("weights") or {}).get("actorder") is not None for group in groups.values())


def _value(modifier: AutoBitsModifier | QuantizationModifier | Transform | Rotation, field: str, given: Any) -> Any:
    """Return the value of a field as it was understood: names as lists, numbers as numbers."""
    value = getattr(modifier, field)
    if isinstance(value, tuple) and all(isinstance(entry, str) for entry in value):
        return [str(entry) for entry in value]
    return value if isinstance(value, (bool, int, float, str)) else given


def _meaning(recipe: Recipe) -> tuple[Any, ...]:
    """Return everything that a run reads of a recipe."""
    transforms = [(type(entry), entry.model_dump()) for entry in (*recipe.rotations, *recipe.transforms)]
    modifiers = [(type(entry), entry.algorithm, entry.min_tokens, entry.ignore) for entry in recipe.modifiers]
    search = None if recipe.search is None else recipe.search.model_dump()
    return search, recipe.groups, recipe.cache, transforms, modifiers, recipe.sequential_targets, len(recipe.attention)
