"""Split batches of model inputs into smaller ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from runtime.data.inputs import BESIDE_INPUTS, require_in_range
from runtime.errors import DataError

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest

Batches = list[dict[str, Any]]


def largest_batch(manifest: Manifest, batches: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of samples of the largest batch that can be split; 1 if no batch can."""
    name = manifest.inputs[0].name
    return max((batch[name].shape[0] for batch in batches if _is_splittable(manifest, batch)), default=1)


def split_batches(manifest: Manifest, batches: Sequence[Mapping[str, Any]], size: int) -> Batches | None:
    """Split batches into parts of at most `size` samples, in the same order.

    Returns:
        None if the inputs have no batch dimension, or the artifact is not valid for so few samples.
    """
    return cut_batches(manifest, batches, lambda first, last: range(first + size, last, size))


def num_samples(manifest: Manifest, batch: Mapping[str, Any]) -> int | None:
    """Return the number of samples of a batch; None if it cannot be split."""
    return int(batch[manifest.inputs[0].name].shape[0]) if _is_splittable(manifest, batch) else None


def cut_batches(
    manifest: Manifest, batches: Sequence[Mapping[str, Any]], cuts: Callable[[int, int], Iterable[int]]
) -> Batches | None:
    """Split batches before some samples.

    Args:
        manifest: states which dimensions of the inputs are samples.
        batches: in file order.
        cuts: returns the samples at which a batch is split, given its first sample and the one after its last. Samples
            are numbered through all batches.

    Returns:
        None if the inputs have no batch dimension, or the artifact is not valid for so few samples.
    """
    if not all(_is_splittable(manifest, batch) for batch in batches):
        return None
    symbol = manifest.inputs[0].shape[0]
    dims = {entry.name: entry.shape.index(symbol) for entry in manifest.inputs if symbol in entry.shape}
    dims |= {name: 0 for name in BESIDE_INPUTS if name not in dims}
    parts: Batches = []
    first = 0
    for batch in batches:
        last = first + batch[manifest.inputs[0].name].shape[0]
        for start, end in itertools.pairwise((first, *cuts(first, last), last)):
            cut = {
                name: value.narrow(dims[name], start - first, end - start)
                for name, value in batch.items()
                if name in dims
            }
            parts.append(dict(batch) | cut)
        first = last
    try:
        require_in_range(manifest, parts)
    except DataError:
        return None
    return parts


def _is_splittable(manifest: Manifest, batch: Mapping[str, Any]) -> bool:
    """Whether each input has one dimension for samples, that of the first input, or does not depend on their number.

    The number of images or sounds is another symbol: shapes do not state which of them belongs to which sample.
    """
    first = manifest.inputs[0]
    if not first.shape or not isinstance(first.shape[0], str):
        return False
    known = {symbol for symbol in first.shape if isinstance(symbol, str)}
    for entry in manifest.inputs:
        symbols = [symbol for symbol in entry.shape if isinstance(symbol, str)]
        is_by_row = entry.shape[:1] == first.shape[:1]  # tokens of a decoder have a size of their own
        is_foreign = not is_by_row and any(symbol not in known for symbol in symbols)
        if is_foreign or symbols.count(first.shape[0]) > 1:
            return False
        if not isinstance(batch.get(entry.name), torch.Tensor):
            return False
    return True
