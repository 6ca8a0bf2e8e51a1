"""State in a checkpoint's config what is quantized, and which modules are not."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from runtime.checkpoint.names import checkpoint_name
from runtime.checkpoint.source_checks import numbered_list
from runtime.formats.targets import matches_name
from runtime.formats.transforms import OF_ATTENTION, TransformGroup, TransformPlace
from runtime.model.experts import Mixture
from runtime.quantize.remarks import targeted_tables

if TYPE_CHECKING:
    from runtime.quantize.preparation import Prepared
    from runtime.recipe.recipe import Recipe
    from runtime.weights.parameters import Weights


def written_config(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    """Return the quantization_config of config.json."""
    from runtime.formats.checkpoint_config import quantization_config

    groups = [group.scheme for group in recipe.groups]
    tables = targeted_tables(prepared.model, recipe, prepared.jobs)
    kinds = dict.fromkeys(entry.kind for entry in prepared.artifact.manifest.cached)
    transforms = prepared.weights.transforms
    plain = (
        not_quantized(prepared.model, prepared.weights, prepared.jobs, tables) if groups or transforms.groups else ()
    )
    return quantization_config(
        groups,
        plain if groups else (),
        recipe.cache,
        tuple(kinds) if recipe.attention else (),
        tuple(_written(group, prepared, plain) for group in transforms.groups),
    )


def _written(group: TransformGroup, prepared: Prepared, plain: Sequence[str]) -> TransformGroup:
    """Add to the `ignore` of a group what a reader could take for a Linear that it transforms, although it does not:
    quantized embeddings, and what `not_quantized` lists, such as embeddings that the head shares, and routers.
    """
    weights = prepared.weights
    own = {one.module for one in weights.transforms.transforms if one.group == group}
    own.update([name for module in own for name in _names(module, weights)])
    embeddings = [name for name in prepared.jobs if isinstance(prepared.model.get_submodule(name), nn.Embedding)]
    others = [*plain, *(name for module in embeddings for name in _names(module, weights))]

    def is_confused(name: str, place: TransformPlace) -> bool:
        if name.startswith("re:"):
            return not any(matches_name(name, other) for other in own)
        return name not in own and place.matches(name, "Linear")

    places = tuple(
        place
        if place.location in OF_ATTENTION
        else replace(place, ignore=(*place.ignore, *(name for name in others if is_confused(name, place))))
        for place in group.places
    )
    return replace(group, places=places)


def not_quantized(
    model: nn.Module, source: Weights, quantized: Container[str], tables: Sequence[str] = ()
) -> list[str]:
    """Return patterns for everything that a reader could take for a quantized Linear although it is not.

    These are the unquantized Linear modules; modules that other readers implement as Linear, such as routers, and
    experts whose matrices are separate in the checkpoint and stacked here; and parts of the checkpoint that the model
    does not use, such as DeepSeek's layers for multi-token prediction.

    Args:
        model: the module tree.
        source: states the tensors of each parameter.
        quantized: names of the quantized modules.
        tables: names of the embeddings that a target matches.
    """
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear) and name not in quantized]
    found = dict.fromkeys(other for name in (*linear, *tables) for other in _names(name, source))
    mixtures = {
        f"{name}.{own}": f"{name}.{own.rpartition('.')[2]}"
        for name, module in modules.items()
        if isinstance(module, Mixture)
        for own in module.stacked
        if own not in module.stacks
    }
    lists = _lists(key for name in modules if name in quantized for key in _names(name, source))
    for name, origin in source.origins.items():
        owner = modules.get(name.rpartition(".")[0])
        if origin.conversion >= 0:
            found.update(dict.fromkeys(_stacked(origin.keys, lists)))
        elif name.endswith(".weight") and not isinstance(owner, (nn.Linear, nn.Embedding)):
            matrices = [key for key in origin.keys if len(source.checkpoint.shape(key)) == 2]
            found.update(dict.fromkeys(key.removesuffix(".weight") for key in matrices))
        if name in mixtures and len(origin.keys) == 1:
            found["re:" + re.escape(checkpoint_name(origin.keys[0], mixtures[name])) + r"(\.|$)"] = None
    found.update(dict.fromkeys(_left_over(source)))
    return list(found)


def _left_over(source: Weights) -> Iterator[str]:
    """Yield modules with matrices that no parameter uses; experts as one regular expression."""
    used = {key for origin in source.origins.values() for key in origin.keys}
    around = {".".join(parts[:depth]) for parts in (key.split(".") for key in used) for depth in range(len(parts))}
    for key in source.unused:
        if len(source.checkpoint.shape(key)) < 2:
            continue
        module, _, own = key.rpartition(".")
        owner, number, _ = module.rpartition(".experts.")
        if own == "weight" and number:
            yield "re:" + re.escape(f"{owner}.experts") + r"\.\d+\."
        elif own == "weight":
            yield module
        elif module in around:
            yield key
        else:  # stacked experts: readers have one module for all, or one for each
            yield "re:" + re.escape(module) + r"(\.|$)"


def _names(name: str, source: Weights) -> Iterator[str]:
    """Yield a module's name in the model and its name in the checkpoint, which may differ for experts."""
    yield name
    key = source.plain_key(f"{name}.weight") if f"{name}.weight" in source.origins else None
    if key is not None:
        yield key.removesuffix(".weight")


def _lists(names: Iterable[str]) -> set[str]:
    """Return the names of module lists that contain these modules."""
    found: set[str] = set()
    for name in names:
        parts = name.split(".")
        found.update(".".join(parts[:depth]) for depth, part in enumerate(parts) if part.isdigit())
    return found


def _stacked(keys: tuple[str, ...], lists: Container[str]) -> Iterator[str]:
    """Yield the modules of several tensors; members of a list as one regular expression.

    Args:
        keys: the tensors.
        lists: module lists that also have quantized members (Ernie has experts for text and for images in one list).
    """
    owner = numbered_list(keys)
    if owner:
        numbers = "|".join(dict.fromkeys(key.removeprefix(f"{owner}.").partition(".")[0] for key in keys))
        yield "re:" + re.escape(owner) + (rf"\.({numbers})\." if owner in lists else r"\.\d+\.")
    else:
        yield from (key.rpartition(".")[0] for key in keys)
