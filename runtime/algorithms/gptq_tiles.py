"""The rows that GPTQ solves at a time: rows do not depend on each other once the Hessian is factored.

The siblings' rows are stacked and cut into tiles of a fixed height. Products of other shapes may add numbers in another
order, so a tile depends only on the shapes, the scheme and the type of device, and not on the process that solves it.
Lower tiles would call torch more often for the same arithmetic. On a GPU the kernel of `gptq_cuda` takes as long for a
few rows as for all that fill its processors.

Shapes: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compressed_tensors.quantization import QuantizationArgs

BLOCKS_AT_A_TIME = 4  # blocks of columns that share one product with earlier errors: a taller product is faster
_HEIGHT, _HEIGHT_OF_LONG_ROWS = 1024, 512
_HEIGHT_ON_CUDA, _HEIGHT_OF_LONG_ROWS_ON_CUDA = 4096, 1024
_LONG_ROW = 8192  # columns: more tiles of the widest weights, which take the longest, can be solved at a time


@dataclass(frozen=True, slots=True)
class Piece:
    """The rows of one weight in a tile.

    Args:
        weight: its index among the siblings.
        start: the first row.
        stop: the row after the last.
    """

    weight: int
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        """The rows as a slice."""
        return slice(self.start, self.stop)


Tile = tuple[Piece, ...]


def tiles_of(shapes: Sequence[Sequence[int]], args: QuantizationArgs, device_type: str) -> list[Tile]:
    """Cut the stacked rows of weights that share an input into tiles.

    A tile ends inside a weight only where a row of blocks ends, so that each tile fits its own grids.

    Args:
        shapes: [O, I] each.
        args: the weights' half of a quantization scheme.
        device_type: "cpu" or "cuda".
    """
    is_long = shapes[0][1] > _LONG_ROW
    if device_type == "cpu":
        height = _HEIGHT_OF_LONG_ROWS if is_long else _HEIGHT
    else:
        height = _HEIGHT_OF_LONG_ROWS_ON_CUDA if is_long else _HEIGHT_ON_CUDA
    step = args.block_structure[0] if args.block_structure else 1
    height = max(height, step)
    tiles: list[Tile] = []
    open_tile: list[Piece] = []
    room = height
    for weight, (num_rows, _) in enumerate(shapes):
        start = 0
        while start < num_rows:
            stop = num_rows if num_rows - start <= room else start + room // step * step
            if stop > start:
                open_tile.append(Piece(weight, start, stop))
                room -= stop - start
                start = stop
            if start < num_rows or not room:
                tiles.append(tuple(open_tile))
                open_tile, room = [], height
    return [*tiles, tuple(open_tile)] if open_tile else tiles
