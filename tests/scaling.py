"""Scale a model as its scale groups say, to see whether it stays the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from runtime.artifact.manifest import ScaleGroup
from runtime.artifact.scale_groups import numbers_of


def scaled(
    tensors: Mapping[str, torch.Tensor], group: ScaleGroup, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """The tensors that change when the producer's channels are divided by random powers of two."""
    weight = tensors[group.producer]
    powers_C = 2.0 ** torch.randint(-2, 3, (weight.shape[0],), generator=generator)
    column = powers_C.to(weight).reshape(-1, *[1] * (weight.dim() - 1))
    changed = {group.producer: (weight + group.offset) / column - group.offset}
    if group.bias:
        changed[group.bias] = tensors[group.bias] / powers_C.to(weight)
    # A channel that no feature is proportional to stays as it is.
    channels = torch.tensor(numbers_of(group.channels))
    untouched = torch.ones(weight.shape[0], dtype=torch.bool)
    untouched[channels] = False
    for name in changed:
        changed[name][untouched] = tensors[name][untouched]
    takers = [(f"{name}.weight", 1) for name in group.modules] + [(other.name, other.axis) for other in group.others]
    for name, axis in takers:
        shape = [1] * tensors[name].dim()
        shape[axis] = -1
        changed[name] = changed.get(name, tensors[name]) * powers_C[channels].to(tensors[name]).reshape(shape)
    return changed
