"""A tensor in a file: bytes in the order in which they lay in memory, so that it comes back with the same strides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from runtime.checkpoint.dtypes import bytes_of, empty_bytes

_PIECE_BYTES = 2**30  # what one call to the operating system is asked for at most


@dataclass(frozen=True, slots=True)
class DiskTensor:
    """A tensor in a file, bytes in the order in which they lay in memory.

    Attributes:
        path: the file.
        dtype: of the numbers.
        shape: after the dimensions were put into that order.
        order: where each dimension has gone.
        offset: of the first byte.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    order: tuple[int, ...]
    offset: int = field(default=0)

    @classmethod
    def write(cls, path: Path, base: torch.Tensor) -> DiskTensor:
        """Write a tensor to a new file.

        Raises:
            OSError: where the operating system says why.
        """
        order = memory_order(base)
        ordered = base.permute(order)
        with path.open("wb", buffering=0) as file:
            write_all(file.write, bytes_of(ordered.contiguous()))
        return cls(path, base.dtype, tuple(ordered.shape), order)

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own."""
        count = torch.Size(self.shape).numel() * self.dtype.itemsize
        data = empty_bytes(count)
        view, done = bytes_of(data), 0
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            while done < count:
                read = file.readinto(view[done : done + _PIECE_BYTES])
                if not read:
                    raise OSError(f"{self.path} was cut short")
                done += read
        inverse = sorted(range(len(self.order)), key=lambda dim: self.order[dim])
        return data.view(self.dtype).reshape(self.shape).permute(inverse)


def write_all(write: Callable[[memoryview], int | None], data: memoryview) -> None:
    """Write everything, by as many calls as it takes: one call may take less than it was given."""
    done = 0
    while done < len(data):
        done += write(data[done : done + _PIECE_BYTES]) or 0


def memory_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """The dimensions by falling stride."""
    strides: Sequence[int] = tensor.stride()
    return tuple(sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim)))
