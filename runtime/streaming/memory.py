"""When memory runs out: know it, and run fewer samples at a time."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from runtime.errors import DataError, SeqbuildError
from runtime.inputs import BESIDE_INPUTS, require_in_range

if TYPE_CHECKING:
    from runtime.manifest import Manifest

Batches = list[dict[str, Any]]


class OutOfMemory(SeqbuildError, torch.OutOfMemoryError):  # noqa: N818 - torch's name for it says Error
    """Not even a single sample fits. It is a `torch.OutOfMemoryError` too, for those who catch that."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the machine has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return not isinstance(error, OutOfMemory)
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


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


def trim_heap() -> None:
    """Give freed memory back to the operating system, which glibc keeps in the gaps of its heap.

    Tensors of some megabytes come from that heap, and what little outlives them lies between them; without this the
    process grows from one subgraph to the next.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other systems' libraries have none
    if trim is not None:
        trim(0)


def give_memory_back(device: torch.device) -> None:
    """Free what nobody refers to, also in torch's own cache."""
    gc.collect()
    trim_heap()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_host_bytes() -> int:
    """The most memory that this process has had so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(device: torch.device) -> int:
    """The most memory that torch has had on a device so far; 0 on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
