"""Targets of a recipe other than Linear modules: embeddings, and attention.

Readers of checkpoints support quantized weights of Linear modules and, where a target names them, of embeddings.
Attention has no weights of its own: a group for it rounds queries, keys and values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from runtime.errors import RecipeError
from runtime.recipe.recipe import some

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest
    from runtime.recipe.modifiers import Group
    from runtime.recipe.recipe import Recipe


def targeted_modules(model: nn.Module, manifest: Manifest, recipe: Recipe) -> dict[str, type]:
    """Return the classes of all modules that a recipe can quantize, by name: all Linear modules, and embeddings that a
    target matches on its own. A target that also matches Linear modules, such as `re:.*`, does not select embeddings.

    Raises:
        RecipeError: readers do not support the scheme of an embedding, or a group with weights targets attention.
    """
    modules = dict(model.named_modules())
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    tables = {name: module for name, module in modules.items() if isinstance(module, nn.Embedding)}
    kinds = {entry.module: entry.kind for entry in manifest.cached}
    meant: dict[str, None] = {}
    for group, pattern in ((entry, target) for entry in recipe.groups for target in entry.targets):
        if any(means(pattern, name, module) for name, module in linears.items()):
            continue
        where = f"{recipe.source}:{pattern.line}: the target {str(pattern)!r}"
        found = [name for name, module in tables.items() if means(pattern, name, module)]
        if found:
            _require_table_scheme(group, f"{where} matches {some(found)}")
        meant.update(dict.fromkeys(found))
        keepers = [name for name, kind in kinds.items() if means_attention(pattern, name, kind)]
        if keepers and not found:
            raise RecipeError(
                f"{where} matches {some(keepers)}, whose only weights are those of their Linear modules",
                hint="target these, or leave weights out of the group to round queries, keys and values",
            )
    return {name: type(module) for name, module in modules.items() if name in linears or name in meant}


def _require_table_scheme(group: Group, what: str) -> None:
    """Require a scheme whose rows can be unpacked one by one, as readers do for lookups: that of symmetric integers."""
    args = group.scheme.weights
    strategy = str(getattr(args.strategy, "value", args.strategy))
    fits = args.type == "int" and args.symmetric and strategy in ("group", "channel")
    if group.modifier.algorithm != "rtn" or args.observer == "imatrix_mse":
        raise RecipeError(
            f"{what}, but embeddings have no inputs to measure", hint="quantize them with a QuantizationModifier"
        )
    if not fits or group.scheme.input_activations is not None:
        raise RecipeError(
            f"{what}, but readers support only symmetric integer weights by group or channel for embeddings",
            hint="put them into a group of their own, with W4A16 or W8A16",
        )


def require_attention(model: nn.Module, manifest: Manifest, recipe: Recipe) -> None:
    """Check that groups for attention target all attention modules that have a cache, and nothing else: readers round
    queries, keys and values of every layer or of none.

    Raises:
        RecipeError: a target matches another module or none, or a module is not targeted.
    """
    kinds = {entry.module: entry.kind for entry in manifest.cached}
    targets = [pattern for group in recipe.attention for pattern in group.targets]
    weighty = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))}
    for pattern in targets:
        where = f"{recipe.source}:{pattern.line}: the target {str(pattern)!r}"
        other = next((name for name, module in weighty.items() if means(pattern, name, module)), None)
        if other is not None:
            raise RecipeError(
                f"{where} matches {other}, but its group has no weights",
                hint="a group without weights is only for attention modules, such as re:.*self_attn$",
            )
        if kinds and not any(means_attention(pattern, name, kind) for name, kind in kinds.items()):
            raise RecipeError(
                f"{where} matches no attention module",
                hint=f"the model has {some(kinds)} of class {some(dict.fromkeys(kinds.values()))}",
            )
    missed = [name for name, kind in kinds.items() if not any(means_attention(text, name, kind) for text in targets)]
    if targets and missed:
        raise RecipeError(
            f"{recipe.source}:{targets[0].line}: {some(missed)} is not targeted, but readers round attention in all "
            "layers or in none",
            hint=f"target the class, {some(dict.fromkeys(kinds.values()))}",
        )


def means(target: str, name: str, module: nn.Module) -> bool:
    """Whether a target matches a module by name or class."""
    from runtime.formats.targets import class_names, matches_name

    return matches_name(target, name) or target in class_names(type(module))


def means_attention(target: str, name: str, kind: str) -> bool:
    """Whether a target matches an attention module, of whose class an artifact has only the name."""
    from runtime.formats.targets import matches_name

    return target == kind or matches_name(target, name)
