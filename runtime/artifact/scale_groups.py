"""Check the manifest's scale groups, and encode which producer channel each feature is proportional to."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import TYPE_CHECKING

from runtime.artifact.manifest import MIXTURES
from runtime.console import shown

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest, ScaleGroup


def wrong_groups(manifest: Manifest) -> Iterator[str]:
    """Yield a sentence for each error in the scale groups of a manifest.

    Rescaling by a group that names a parameter outside of its subgraph, or a missing channel, would change the output
    of the model.
    """
    seen: set[str] = set()
    used = [frozenset(entry.parameters) for entry in manifest.subgraphs]
    for group in manifest.scale_groups:
        if not group.modules or not 0 <= group.subgraph < len(manifest.subgraphs):
            yield f"a scale group has the modules {shown(list(group.modules))} in subgraph {group.subgraph}"
            continue
        twice = [name for name in group.modules if name in seen]
        if twice:
            yield f"{twice[0]} is in two scale groups"
        seen.update(group.modules)
        yield from _wrong_group(manifest, group, used[group.subgraph])
    stacked = {
        f"{name}.{own}"
        for name, kind in manifest.leaves.items()
        if 0 <= kind < len(manifest.leaf_kinds) and manifest.leaf_kinds[kind].kind in MIXTURES
        for own in manifest.leaf_kinds[kind].options.get("stacked", ())
    }
    for group in manifest.mixture_groups:
        experts = [other.name for other in group.others if other.name in stacked]
        if group.modules or not group.producer or not experts or not 0 <= group.subgraph < len(manifest.subgraphs):
            yield f"a mixture group has modules, or no producer or experts, in subgraph {group.subgraph}"
            continue
        twice = [name for name in experts if name in seen]
        if twice:
            yield f"{twice[0]} is in two mixture groups"
        seen.update(experts)
        yield from _wrong_group(manifest, group, used[group.subgraph])


def _wrong_group(manifest: Manifest, group: ScaleGroup, used: Container[str]) -> Iterator[str]:
    first = (*group.modules, group.others[0].name if group.others else "")[0]
    weights = [f"{name}.weight" for name in group.modules]
    named = [*weights, *(other.name for other in group.others), group.producer, group.bias]
    missing = [name for name in named if name and (name not in used or name not in manifest.parameters)]
    if missing:
        yield f"the scale group of {first} names {missing[0]!r}, which its subgraph does not use"
        return
    if not group.producer:
        if group.others or group.channels or group.bias or group.offset:
            yield f"the scale group of {first} has channels and no producer"
        return
    shape = manifest.parameters[group.producer].shape
    if len(shape) not in (1, 2) or (group.offset and len(shape) == 2):
        yield f"the scale group of {first} has a producer of shape {shown(list(shape))}"
        return
    if not are_runs(group.channels, shape[0]):
        yield f"the scale group of {first} names channels that {group.producer} does not have"
        return
    num_channels = sum(group.channels[1::2])
    if group.bias and manifest.parameters[group.bias].shape != shape[:1]:
        yield f"the scale group of {first} has the bias {group.bias}, which does not fit its producer"
    if group.producer in weights or len(set(named) - {""}) != len([name for name in named if name]):
        yield f"the scale group of {first} names a parameter twice"
    for name, axis in [*((weight, 1) for weight in weights), *((other.name, other.axis) for other in group.others)]:
        taken = manifest.parameters[name].shape
        if not 0 <= axis < len(taken) or taken[axis] != num_channels:
            yield f"the scale group of {first} has {num_channels} channels, and {name} the shape {shown(list(taken))}"


def are_runs(runs: Sequence[int], size: int) -> bool:
    """Return whether these are runs of numbers below `size`: start, length, start, length."""
    pairs = zip(runs[::2], runs[1::2], strict=False)
    return len(runs) % 2 == 0 and all(start >= 0 and 0 < length <= size - start for start, length in pairs)


def numbers_of(runs: Sequence[int]) -> list[int]:
    """Decode runs, for instance the producer's channel for each feature of a group's tensor."""
    pairs = zip(runs[::2], runs[1::2], strict=True)
    return [number for start, length in pairs for number in range(start, start + length)]


def runs_of(numbers: Sequence[int]) -> tuple[int, ...]:
    """Encode numbers as runs of consecutive ones."""
    runs: list[int] = []
    for number in numbers:
        if runs and runs[-2] + runs[-1] == number:
            runs[-1] += 1
        else:
            runs += [number, 1]
    return tuple(runs)
