"""Rounded rows of weights, packed as the checkpoint stores them, and their exchange between workers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from runtime.formats.compressed import rows_layout
from runtime.workers.agreement import agreed

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

    from runtime.workers.group import Workers

Layouts = Callable[[str, int], "Mapping[str, tuple[tuple[int, ...], torch.dtype]]"]  # by module and number of rows


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedPiece:
    """Rows of a rounded weight.

    Attributes:
        name: the module.
        start: the first row; `num_rows` is their number.
        algorithm: that rounded them.
        warning: a message for the user, or "".
        damping: as in `QuantizedWeight`.
        size: ||W X||^2 of these rows over the measured inputs X, or ||W||^2 without inputs.
        loss: ||W X - Q X||^2 of these rows over the same inputs, or ||W - Q||^2.
        seconds: the time that they took.
        solver: the worker that rounded them.
        tensors: as `runtime.formats.compressed.compress_rows` returns them; empty if only another worker has them.
    """

    name: str
    start: int
    num_rows: int
    algorithm: str
    damping: float
    size: float
    loss: float
    seconds: float
    solver: int
    warning: str = ""
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def facts(self) -> dict[str, Any]:
        """Everything but the tensors."""
        names = [entry.name for entry in dataclasses.fields(self) if entry.name != "tensors"]
        return {name: getattr(self, name) for name in names}


def exchanged(
    own: Sequence[PackedPiece], workers: Workers, layouts: Layouts, device: torch.device, *, is_used: bool
) -> list[PackedPiece]:
    """Give the pieces of every worker to all others.

    Args:
        own: the pieces of this worker.
        workers: that share the run.
        layouts: the shapes and dtypes of a piece's tensors.
        device: of the tensors.
        is_used: whether the others need the tensors.
    """
    if workers.size == 1:
        return list(own)
    every = workers.exchange([piece.facts() for piece in own])
    found = [(rank, PackedPiece(**facts)) for rank, entries in enumerate(every) for facts in entries]
    mine = iter(own)
    if not is_used:
        return [next(mine) if rank == workers.rank else piece for rank, piece in found]
    messages = []
    with agreed(workers):  # memory may run out, and must not while others wait for a message
        for rank, piece in found:
            message = _PieceBytes(layouts(piece.name, piece.num_rows), device)
            if rank == workers.rank:
                message.fill(next(mine).tensors)
            messages.append(message)
    for (rank, _), message in zip(found, messages, strict=True):
        workers.broadcast(message.data, rank)
    return [
        dataclasses.replace(piece, tensors=message.tensors) for (_, piece), message in zip(found, messages, strict=True)
    ]


class _PieceBytes:
    """The tensors of a piece, one after the other in memory; wider dtypes come first, so that all are aligned.

    Attributes:
        data: all bytes.
        tensors: their views of it, by name.
    """

    def __init__(self, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> None:
        parts = sorted(layout, key=lambda part: -layout[part][1].itemsize)
        sizes = [math.prod(layout[part][0]) * layout[part][1].itemsize for part in parts]
        self.data = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        views = dict(zip(parts, torch.split(self.data, sizes), strict=True))
        self.tensors = {part: views[part].view(dtype).reshape(shape) for part, (shape, dtype) in layout.items()}

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy the tensors of a piece."""
        assert tensors.keys() == self.tensors.keys(), "packed rows have other tensors than planned"
        for part, target in self.tensors.items():
            assert (tensors[part].shape, tensors[part].dtype) == (target.shape, target.dtype), part
            target.copy_(tensors[part])


def layouts_of(
    shape_of: Callable[[str], Sequence[int]],
    scheme_of: Callable[[str], QuantizationScheme],
    scale_dtype_of: Callable[[str], torch.dtype],
) -> Layouts:
    """Return the function that `exchanged` needs; results are cached, because experts are many and alike."""
    known: dict[Any, Mapping[str, tuple[tuple[int, ...], torch.dtype]]] = {}

    def layout(name: str, num_rows: int) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        scheme, dtype, num_in = scheme_of(name), scale_dtype_of(name), shape_of(name)[1]
        key = (num_rows, num_in, id(scheme), dtype)
        if key not in known:
            known[key] = rows_layout((num_rows, num_in), scheme, dtype)
        return known[key]

    return layout
