"""Check the tables that state how experts split and which parameters are only looked up.

A host builds module names, shapes and tensor names from them, so each must fit the parameter table.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

from runtime.artifact.manifest import (
    MIXTURES,
    ExpertLayout,
    ExpertPair,
    ExpertStack,
    Manifest,
    MixtureEntry,
    ParameterEntry,
)
from runtime.artifact.scale_groups import are_runs, numbers_of
from runtime.console import shown
from runtime.language.library_sources import LONGEST_NAME

_PART = re.compile(r"(?!__)[^\W\d]\w*(?:\.(?!__)[^\W\d]\w*)*\.(weight|bias)")
_PREFIX = re.compile(r"\w+(\.\w+)*")
_MOST_PARTS = 2**18  # of all mixtures; each becomes a parameter of the host
_MOST_KINDS = 64  # of parts that one expert has
_LARGEST_NUMBER = 2**20


def stack_shape(shape: Sequence[int], num_experts: int) -> tuple[int, ...]:
    """Return the shape of a flat parameter [E * R, ...] with an axis for experts: [E, R, ...]."""
    return (num_experts, shape[0] // num_experts, *shape[1:])


def by_expert(entry: ParameterEntry, num_experts: int, *, is_flat: bool) -> ParameterEntry:
    """Return the entry of a stacked parameter with the expert as its first axis, without rows that no expert uses."""
    shape = stack_shape(entry.shape, num_experts) if is_flat else (num_experts, *entry.shape[1:])
    return resized(entry, shape)


def resized(entry: ParameterEntry, shape: tuple[int, ...]) -> ParameterEntry:
    """Return the entry of a part of a parameter."""
    num_bytes = entry.bytes * math.prod(shape) // max(1, math.prod(entry.shape))
    return dataclasses.replace(entry, shape=shape, bytes=num_bytes)


def part_shape(stack: ExpertStack, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of each part of a stacked parameter of this shape, [E, ...]."""
    own = list(shape[1:])
    own[stack.axis] //= len(stack.parts)
    return tuple(reversed(own)) if stack.is_transposed else tuple(own)


def wrong_experts(manifest: Manifest) -> Iterator[str]:
    """Yield a sentence for each error in the expert layouts and the mixtures that they apply to."""
    for index, layout in enumerate(manifest.expert_layouts):
        wrong = _wrong_layout(layout)
        if wrong:
            yield f"expert layout {index} is invalid: {wrong}"
            return
    num_parts = 0
    for name, entry in manifest.mixtures.items():
        kind = manifest.leaf_kinds[manifest.leaves[name]] if name in manifest.leaves else None
        if kind is None or kind.kind not in MIXTURES or not 0 <= entry.layout < len(manifest.expert_layouts):
            yield f"the mixture {name!r} is not a leaf of experts, or has the unknown layout {entry.layout}"
            return
        layout = manifest.expert_layouts[entry.layout]
        num_parts += sum(layout.numbers[1::2]) * sum(len(stack.parts) for stack in layout.stacks)
        if num_parts > _MOST_PARTS:
            yield f"the experts of all mixtures have more than {_MOST_PARTS} parameters"
            return
        yield from _wrong_mixture(manifest, name, entry, layout)


def wrong_lookups(manifest: Manifest) -> Iterator[str]:
    """Yield a sentence for each lookup table that is not an embedding or a parameter that code reads directly."""
    tables = {f"{n}.weight" for n, index in manifest.leaves.items() if manifest.leaf_kinds[index].kind == "Embedding"}
    tables.update(name for entry in manifest.subgraphs for name in entry.attributes)
    seen: set[str] = set()
    for name in manifest.lookups:
        if name not in tables or name not in manifest.parameters or len(manifest.parameters[name].shape) != 2:
            yield f"the lookup table {name!r} is neither an embedding nor a matrix that the code reads"
        if name in seen:
            yield f"the lookup table {name!r} is listed twice"
        seen.add(name)


def _wrong_layout(layout: ExpertLayout) -> str:
    """Return what is wrong with a layout, whatever it applies to."""
    num_parts = sum(len(stack.parts) for stack in layout.stacks)
    parts = [part for stack in layout.stacks for part in stack.parts[:_MOST_KINDS]]
    if not 0 < num_parts <= _MOST_KINDS:
        return f"it has {num_parts} parts, and 1 to {_MOST_KINDS} are allowed"
    if max(map(len, parts)) > LONGEST_NAME:
        return f"a part has a name of more than {LONGEST_NAME} characters"
    for stack in layout.stacks:
        kinds = {match[1] for part in stack.parts if (match := _PART.fullmatch(part))}
        if len(kinds) != 1 or not all(map(_PART.fullmatch, stack.parts)):
            return f"the parts of {stack.name} are not names of weights, or of biases: {shown(list(stack.parts))}"
        last_axis = 0 if kinds == {"bias"} else 1
        if not 0 <= stack.axis <= last_axis or (stack.is_transposed and not last_axis):
            return f"{stack.name} is joined along axis {stack.axis}, which its parts do not have"
        if not 0 <= stack.input < len(layout.stacks):
            return f"{stack.name} has the input {stack.input}"
    if len(set(parts)) < num_parts:
        return "it has a part twice"
    modules = dict.fromkeys(part.removesuffix(".weight") for part in parts if part.endswith(".weight"))
    alone = [part for part in parts if part.endswith(".bias") and part.removesuffix(".bias") not in modules]
    if alone:
        return f"{alone[0]} belongs to no weight"
    nested = [name for name in modules for other in modules if name.startswith(f"{other}.")]
    if nested:
        return f"the module {nested[0]} lies inside of another"
    if not are_runs(layout.numbers, _LARGEST_NUMBER) or len(layout.pairs) > 1:
        return "its numbers are not runs, or it has more than one pair"
    for pair in layout.pairs:
        if pair.module == pair.producer or not {pair.module, pair.producer} <= modules.keys():
            return f"its pair is {pair.producer!r} and {pair.module!r}"
        if pair.bias and (pair.bias != f"{pair.producer}.bias" or pair.bias not in parts):
            return f"its pair has the bias {pair.bias!r}"
    return ""


def _wrong_mixture(manifest: Manifest, name: str, entry: MixtureEntry, layout: ExpertLayout) -> Iterator[str]:
    """Yield a sentence for each reason why a sound layout does not fit a mixture."""
    options = manifest.leaf_kinds[manifest.leaves[name]].options
    stacked, flat, num_experts = options["stacked"], options.get("flat", ()), int(options["num_experts"][0])
    if tuple(stack.name for stack in layout.stacks) != tuple(stacked):
        yield f"the layout of {name} is for the parameters {shown([stack.name for stack in layout.stacks])}"
        return
    if sum(layout.numbers[1::2]) != num_experts or len(set(numbers_of(layout.numbers))) != num_experts:
        yield f"the layout of {name} does not have a number for each of {num_experts} experts"
        return
    if len(entry.prefix) > LONGEST_NAME or _PREFIX.fullmatch(entry.prefix) is None:
        yield f"the checkpoint's name {shown(entry.prefix)} for {name} is invalid"
    shapes: dict[str, tuple[int, ...]] = {}
    for stack in layout.stacks:
        own = manifest.parameters[f"{name}.{stack.name}"]
        shape = by_expert(own, num_experts, is_flat=stack.name in flat).shape
        num_dims = 3 if stack.parts[0].endswith(".weight") else 2
        if len(shape) != num_dims or shape[1 + stack.axis] % len(stack.parts):
            parts = shown(list(stack.parts))
            yield f"{name}.{stack.name} of shape {shown(list(own.shape))} does not split into {parts}"
            return
        if stack.name in flat and own.conversion >= 0:
            yield f"{name}.{stack.name} is made by a conversion and has no axis for experts"
        shapes.update(dict.fromkeys(stack.parts, part_shape(stack, shape)))
        yield from _wrong_names(manifest, name, entry, layout, stack)
    for part, shape in shapes.items():
        if part.endswith(".bias") and shape != shapes[f"{part.removesuffix('.bias')}.weight"][:1]:
            yield f"the bias {part} of the experts {name} does not fit its weight"
    for pair in layout.pairs:
        yield from _wrong_pair(name, pair, shapes)


def _wrong_names(
    manifest: Manifest, name: str, entry: MixtureEntry, layout: ExpertLayout, stack: ExpertStack
) -> Iterator[str]:
    """Yield a sentence if the parts of a stack would take names of other parameters, or are not in the checkpoint."""
    parts = [f"{number}.{part}" for number in numbers_of(layout.numbers) for part in stack.parts]
    sources = manifest.parameters[f"{name}.{stack.name}"].sources
    inside = f"{entry.prefix}."
    if layout.is_named and not {inside + part for part in parts} <= set(sources):
        yield f"the tensors that {name}.{stack.name} is made from are not named as its layout states"
    elif layout.is_named:
        others = [key.removeprefix(inside) for key in sources if key.startswith(inside)]
        odd = [other for other in others if _PART.fullmatch(other.partition(".")[2]) is None]
        if len(others) < len(sources) or odd:
            yield f"{name}.{stack.name} is also made from tensors that do not belong to an expert"
        parts = others
    taken = [part for part in parts if f"{name}.{part}" in manifest.parameters]
    if taken:
        yield f"the experts {name} would have a second parameter {taken[0]}"


def _wrong_pair(name: str, pair: ExpertPair, shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    rows, (_, columns) = shapes[f"{pair.producer}.weight"][0], shapes[f"{pair.module}.weight"]
    if not are_runs(pair.channels, rows) or sum(pair.channels[1::2]) != columns:
        yield f"the pair of the experts {name} does not have a row of {pair.producer} for each column of {pair.module}"
