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

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # of the tensors of a piece
Layouts = Callable[[str, int], Layout]  # by module and number of rows
_ALIGNMENT = 8  # bytes: views of a message in other dtypes require it


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedPiece:
    """Rows of a rounded weight.

    Attributes:
        name: the module.
        start: the first row; `num_rows` is their number.
        algorithm: that rounded them.
        warning: a message for the user, or "".
        fallback: as in `runtime.streaming.report.ModuleReport`.
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
    fallback: str = ""
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
    found: list[tuple[int, PackedPiece]] = []
    for rank, facts in enumerate(workers.exchange([piece.facts() for piece in own])):
        pieces = own if rank == workers.rank else [PackedPiece(**entry) for entry in facts]
        found += [(rank, piece) for piece in pieces]
    if not is_used:
        return [piece for _, piece in found]
    with agreed(workers):  # between broadcasts, an error would leave other workers waiting
        messages = [_FlatPiece.of(piece, layouts(piece.name, piece.num_rows), device) for _, piece in found]
    for (rank, _), message in zip(found, messages, strict=True):
        workers.broadcast(message.data, rank)
    return [
        dataclasses.replace(piece, tensors=message.tensors) for (_, piece), message in zip(found, messages, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _FlatPiece:
    """The tensors of a piece as one tensor of bytes.

    Attributes:
        data: the bytes.
        tensors: views of them.
    """

    data: torch.Tensor
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, piece: PackedPiece, layout: Layout, device: torch.device) -> _FlatPiece:
        """Allocate the bytes of a piece, and copy its tensors into them if they are here."""
        sizes = {part: math.prod(shape) * dtype.itemsize for part, (shape, dtype) in layout.items()}
        padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes.values()]
        data = torch.zeros(sum(padded), dtype=torch.uint8, device=device)
        tensors = {
            part: own[: sizes[part]].view(dtype).view(shape)
            for own, (part, (shape, dtype)) in zip(torch.split(data, padded), layout.items(), strict=True)
        }
        if piece.tensors:
            assert set(piece.tensors) == set(tensors), f"{piece.name}: its packed rows have other parts than planned"
            for part, tensor in tensors.items():
                own = piece.tensors[part]
                is_planned = (own.shape, own.dtype) == (tensor.shape, tensor.dtype)
                assert is_planned, f"{piece.name}: {part} differs from its layout"
                tensor.copy_(own)
        return cls(data, tensors)


def layouts_of(
    shape_of: Callable[[str], Sequence[int]],
    scheme_of: Callable[[str], QuantizationScheme],
    scale_dtype_of: Callable[[str], torch.dtype],
) -> Layouts:
    """Return the function that `exchanged` needs; results are cached, because experts are many and alike."""
    known: dict[Any, Layout] = {}

    def layout(name: str, num_rows: int) -> Layout:
        scheme, dtype, num_in = scheme_of(name), scale_dtype_of(name), shape_of(name)[1]
        key = (num_rows, num_in, id(scheme), dtype)
        if key not in known:
            known[key] = rows_layout((num_rows, num_in), scheme, dtype)
        return known[key]

    return layout
