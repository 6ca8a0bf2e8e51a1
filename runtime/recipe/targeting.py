"""What a recipe's targets can mean besides Linear modules: tables of embeddings, and attention.

Readers give quantized weights to Linear modules and, where a target names them, to embeddings. Attention has no weights
of its own: a group for it rounds queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import nn

from runtime.errors import RecipeError
from runtime.recipe.recipe import some

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest
    from runtime.recipe.dialect import Group
    from runtime.recipe.fields import Pattern
    from runtime.recipe.recipe import Modifier, Recipe


def targeted_modules(model: nn.Module, manifest: Manifest, recipe: Recipe) -> dict[str, type]:
    """The modules that a recipe may quantize, with their classes: all Linear ones, and the embeddings that a target
    means by itself. One that matches Linear modules as well, such as `re:.*`, does not mean embeddings.

    Raises:
        RecipeError: for embeddings that are to be quantized in a way that readers do not know, and for attention
            modules that are to have weights.
    """
    modules = dict(model.named_modules())
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    tables = {name: module for name, module in modules.items() if isinstance(module, nn.Embedding)}
    kinds = {entry.module: entry.kind for entry in manifest.cached}
    meant: dict[str, None] = {}
    for modifier, group, pattern in _weight_targets(recipe):
        if any(means(pattern.text, name, module) for name, module in linears.items()):
            continue
        where = f"{recipe.source}:{pattern.line}: the target {pattern.text!r}"
        found = [name for name, module in tables.items() if means(pattern.text, name, module)]
        if found:
            _require_table_scheme(modifier, group, f"{where} means {some(found)}")
        meant.update(dict.fromkeys(found))
        keepers = [name for name, kind in kinds.items() if means_attention(pattern.text, name, kind)]
        if keepers and not found:
            raise RecipeError(
                f"{where} means {some(keepers)}, which have no weights but those of their Linear modules",
                hint="target these, or leave weights out of the group to round queries, keys and values",
            )
    return {name: type(module) for name, module in modules.items() if name in linears or name in meant}


def _weight_targets(recipe: Recipe) -> Iterator[tuple[Modifier, Group, Pattern]]:
    for modifier in recipe.modifiers:
        for group in modifier.groups:
            for pattern in group.targets:
                yield modifier, group, pattern


def _require_table_scheme(modifier: Modifier, group: Group, what: str) -> None:
    """Embeddings are looked up in, so that readers unpack the rows that they need; they can do that to integers."""
    args = group.scheme.weights
    strategy = str(getattr(args.strategy, "value", args.strategy))
    fits = args.type == "int" and args.symmetric and strategy in ("group", "channel")
    if modifier.algorithm != "rtn" or args.observer == "imatrix_mse":
        raise RecipeError(
            f"{what}, and embeddings have no inputs to measure", hint="quantize them with a QuantizationModifier"
        )
    if not fits or group.scheme.input_activations is not None:
        raise RecipeError(
            f"{what}, and readers take embeddings with symmetric integer weights by group or channel alone",
            hint="use W4A16 or W8A16 for them, in a group of their own",
        )


def require_attention(model: nn.Module, manifest: Manifest, recipe: Recipe) -> None:
    """Refuse groups for attention that do not target just the attention modules that keep a cache, all of them: their
    readers round queries, keys and values of every layer or of none.

    Raises:
        RecipeError: naming the target, and a module that it misses or should not match.
    """
    kinds = {entry.module: entry.kind for entry in manifest.cached}
    targets = [pattern for group in recipe.attention for pattern in group.targets]
    weighty = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))}
    for pattern in targets:
        where = f"{recipe.source}:{pattern.line}: the target {pattern.text!r}"
        other = next((name for name, module in weighty.items() if means(pattern.text, name, module)), None)
        if other is not None:
            raise RecipeError(
                f"{where} matches {other}, and its group has no weights",
                hint="input_activations without weights are for attention modules alone, such as re:.*self_attn$",
            )
        if kinds and not any(means_attention(pattern.text, name, kind) for name, kind in kinds.items()):
            raise RecipeError(
                f"{where} matches no attention module",
                hint=f"the model has {some(kinds)} of class {some(dict.fromkeys(kinds.values()))}",
            )
    missed = _missed(kinds, [pattern.text for pattern in targets])
    if targets and missed:
        raise RecipeError(
            f"{recipe.source}:{targets[0].line}: attention of {some(missed)} is not targeted, and readers round it in "
            "all layers or in none",
            hint=f"target the class, {some(dict.fromkeys(kinds.values()))}",
        )


def _missed(kinds: Mapping[str, str], targets: list[str]) -> list[str]:
    return [name for name, kind in kinds.items() if not any(means_attention(text, name, kind) for text in targets)]


def means(target: str, name: str, module: nn.Module) -> bool:
    """Whether a target matches a module by name or class."""
    from runtime.formats.targets import class_names, matches_name

    return matches_name(target, name) or target in class_names(type(module))


def means_attention(target: str, name: str, kind: str) -> bool:
    """The same of an attention module, of whose class an artifact has the name alone."""
    from runtime.formats.targets import matches_name

    return target == kind or matches_name(target, name)
