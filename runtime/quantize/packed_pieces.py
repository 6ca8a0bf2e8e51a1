"""Rounded rows of weights, packed as the checkpoint stores them, and their exchange between workers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from runtime.formats.compressed import rows_layout

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
    found: list[PackedPiece] = []
    for rank, facts in enumerate(workers.exchange([piece.facts() for piece in own])):
        pieces = own if rank == workers.rank else [PackedPiece(**entry) for entry in facts]
        for piece in pieces:
            if is_used:
                piece = _broadcast(piece, workers, rank, layouts(piece.name, piece.num_rows), device)
            found.append(piece)
    return found


def _broadcast(
    piece: PackedPiece,
    workers: Workers,
    source: int,
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    device: torch.device,
) -> PackedPiece:
    """Broadcast the tensors of a piece in one message of bytes."""
    sizes = {part: math.prod(shape) * dtype.itemsize for part, (shape, dtype) in layout.items()}
    if source == workers.rank:
        flat = torch.cat([piece.tensors[part].contiguous().flatten().view(torch.uint8) for part in layout])
        assert len(flat) == sum(sizes.values()), f"{piece.name}: its packed rows have another size than planned"
        workers.broadcast(flat.to(device), source)
        return piece
    flat = torch.empty(sum(sizes.values()), dtype=torch.uint8, device=device)
    workers.broadcast(flat, source)
    parts = torch.split(flat, list(sizes.values()))
    tensors = {
        part: own.clone().view(dtype).reshape(shape)  # cloned, because other dtypes require their alignment
        for own, (part, (shape, dtype)) in zip(parts, layout.items(), strict=True)
    }
    return dataclasses.replace(piece, tensors=tensors)


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
