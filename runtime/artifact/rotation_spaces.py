"""Check the manifest's rotation spaces."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from runtime.console import shown

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest
    from runtime.artifact.rotation_table import RotationSpace

ROTATIONS = ("R1", "R2")
_LONGEST_REASON = 10_000


def wrong_rotations(manifest: Manifest) -> Iterator[str]:
    """Yield a sentence for each error in the rotation spaces of a manifest.

    These are checks of form: whether a rotation leaves the model's function unchanged is proved by execution before a
    run starts.
    """
    table = manifest.rotations
    if table is None:
        return
    rotated: set[tuple[str, int]] = set()
    names: set[str] = set()
    biases: set[str] = set()
    for number, space in enumerate(table.spaces):
        where = f"rotation space {number}"
        wrong = next(_wrong_space(manifest, space), "")
        if wrong:
            yield f"{where} {wrong}"
            continue
        for parameter in (*space.writers, *space.readers):
            if (parameter.name, parameter.axis) in rotated:
                yield f"{where} rotates {parameter.name} along axis {parameter.axis} twice"
            rotated.add((parameter.name, parameter.axis))
            names.add(parameter.name)
        own = [norm.bias for norm in space.norms if norm.bias]
        if len(set(own)) < len(own) or not biases.isdisjoint(own):
            yield f"{where} folds a norm's bias twice"
        biases.update(own)
    for space in table.spaces:
        for norm in space.norms:
            folded = [name for name in (norm.weight, norm.bias) if name in names]
            if folded or norm.weight in biases:
                yield f"the norm weight {norm.weight} or its bias is rotated, too"
    if any(len(text) > _LONGEST_REASON for text in table.missing):
        yield f"a reason for missing rotations has more than {_LONGEST_REASON} characters"
    for name in table.untied:
        if name not in names or not manifest.parameters[name].tied_to:
            yield f"{name} is listed as untied, and is not a tied parameter that is rotated"


def _wrong_space(manifest: Manifest, space: RotationSpace) -> Iterator[str]:
    if space.rotation not in ROTATIONS or space.block < 2:
        yield f"has the rotation {shown(space.rotation)} of {space.block} channels"
        return
    if not space.writers or not space.readers:
        yield "has no parameter that writes, or none that reads"
    starts = space.starts
    if not starts or starts[0] < 0 or any(b - a < space.block for a, b in pairwise(starts)):
        yield f"has blocks of {space.block} channels that overlap or are in no order: {shown(list(starts[:8]))}"
        return
    named = [entry.name for entry in (*space.writers, *space.readers)]
    named += [name for norm in space.norms for name in (norm.weight, norm.bias) if name]
    missing = [name for name in named if name not in manifest.parameters]
    if missing:
        yield f"names {shown(missing[0])}, which is not a parameter"
        return
    gains = {norm.weight for norm in space.norms}
    if len(gains) < len(space.norms) or {entry.gain for entry in space.readers} - {""} != gains:
        yield "has norms that none of its readers names, or readers that name another norm"
    if any(entry.gain for entry in space.writers):
        yield "has a writer with a gain"
    yield from _wrong_shapes(manifest, space)


def _wrong_shapes(manifest: Manifest, space: RotationSpace) -> Iterator[str]:
    for entry in (*space.writers, *space.readers):
        shape = manifest.parameters[entry.name].shape
        length = shape[entry.axis] if 0 <= entry.axis < len(shape) <= 3 else 0
        is_whole = space.rotation == "R1" or bool(entry.gain)
        fits = length == space.block if is_whole else length >= space.block
        if entry in space.readers:
            fits = fits and length % space.block == 0
        else:
            fits = fits and length >= space.starts[-1] + space.block
        if not fits:
            yield f"has blocks of {space.block} channels, which do not fit axis {entry.axis} of {entry.name}"
    for norm in space.norms:
        for name in (norm.weight, norm.bias):
            if name and manifest.parameters[name].shape != (space.block,):
                yield f"has {space.block} channels, and the norm's {name} has another size"
