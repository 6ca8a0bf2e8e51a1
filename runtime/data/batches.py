"""Split batches of model inputs into smaller ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from runtime.data.inputs import BESIDE_INPUTS, require_in_range
from runtime.errors import DataError

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest

from typing import Any

Batches = list[dict[str, Any]]


def largest_batch(manifest: Manifest, batches: Sequence[Mapping[str, Any]]) -> int:
    """How many samples the largest batch has; 1 where that cannot be told, for then it cannot be split."""
    name = manifest.inputs[0].name
    return max((batch[name].shape[0] for batch in batches if _is_splittable(manifest, batch)), default=1)


def split_batches(manifest: Manifest, batches: Sequence[Mapping[str, Any]], size: int) -> Batches | None:
    """The same samples in the same order, at most `size` at a time.

    Returns:
        None where the inputs have no batch dimension to split at, or the artifact does not hold for so few.
    """
    if not all(_is_splittable(manifest, batch) for batch in batches):
        return None
    symbol = manifest.inputs[0].shape[0]
    dims = {entry.name: entry.shape.index(symbol) for entry in manifest.inputs if symbol in entry.shape}
    dims |= {name: 0 for name in BESIDE_INPUTS if name not in dims}
    parts: Batches = []
    for batch in batches:
        count = batch[manifest.inputs[0].name].shape[0]
        for start in range(0, count, size):
            length = min(size, count - start)
            parts.append(
                {
                    name: value.narrow(dims[name], start, length) if name in dims else value
                    for name, value in batch.items()
                }
            )
    try:
        require_in_range(manifest, parts)
    except DataError:
        return None
    return parts


def _is_splittable(manifest: Manifest, batch: Mapping[str, Any]) -> bool:
    """Each input must belong to samples by the first one's first dimension, or be the same for all sizes of it.

    The number of images or sounds is another symbol: which of them belongs to which sample the shapes do not say.
    """
    first = manifest.inputs[0]
    if not first.shape or not isinstance(first.shape[0], str):
        return False
    known = {symbol for symbol in first.shape if isinstance(symbol, str)}
    for entry in manifest.inputs:
        symbols = [symbol for symbol in entry.shape if isinstance(symbol, str)]
        is_by_row = entry.shape[:1] == first.shape[:1]  # a decoder's tokens are another size
        is_foreign = not is_by_row and any(symbol not in known for symbol in symbols)
        if is_foreign or symbols.count(first.shape[0]) > 1:
            return False
        if not isinstance(batch.get(entry.name), torch.Tensor):
            return False
    return True
