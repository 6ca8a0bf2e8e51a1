"""Compute a region of an artifact's code by parts of rows that stay in the processor's cache.

The parts are slices of the leading dimensions, in which every tensor of the region has the same size or 1. Results are
copied into tensors of the recorded layout. Bits are those of the whole tensors:

- an operator that rounds once, or that reads rows, computes a number from its operands in one way;
- exp, silu and similar operators treat numbers in whole vectors and those that remain differently. Regions with such
  operators are computed by parts only where nothing remains: not in the whole tensor, its parts, or those of a thread.

Everything else runs as recorded: small tensors, other devices than the CPU, gradients, shapes that do not match.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.language.regions import Region

if TYPE_CHECKING:
    import torch

Part = Callable[..., tuple[Any, ...]]
Tile = tuple[tuple[int, int, int], ...]  # of each dimension that is cut, the first index and the length

NUMBERS_AT_A_TIME = 2**18  # of the largest tensor of a part, for each thread: 1 MiB in float32
SMALLEST = 2**22  # numbers of the largest tensor; smaller ones stay in the last cache anyway
_FEWEST_ROWS = 4
_VECTOR = 64  # numbers that torch's loops treat at once, at most
_GRAIN = 32768  # numbers of one thread, at least


@dataclass(frozen=True, slots=True)
class WholeLayout:
    """The layout that a result has if it is computed from the whole tensors."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Tiles:
    """Runs the regions of one program.

    Args:
        regions: of the program.
    """

    def __init__(self, regions: Sequence[Region]) -> None:
        self._regions = regions
        self._layouts: dict[Any, list[WholeLayout] | None] = {}

    def __call__(self, index: int, part: Part, run: Any, values: tuple[Any, ...]) -> list[torch.Tensor] | None:
        """Return the results of a region, or None if its statements must run as recorded.

        Args:
            index: of the region.
            part: its code, as a function of `run` and its arguments.
            run: of the program.
            values: its arguments.
        """
        import torch

        if run.device_type != "cpu" or torch.is_grad_enabled():
            return None
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        num_threads = torch.get_num_threads()
        numbers = NUMBERS_AT_A_TIME * num_threads
        if all(tensor.numel() < max(SMALLEST, 2 * numbers) for tensor in tensors) or not _are_plain(values, tensors):
            return None
        rows = [tensor for tensor in tensors if tensor.dim() > 1]
        sizes = _sizes(self._regions[index], rows)
        layouts = self._layout(index, part, run, values, sizes) if sizes else None
        if layouts is None or not all(_is_cut(layout.shape, sizes) for layout in layouts):
            return None
        widest = max(
            _row_numbers(shape, sizes) for shape in (*(row.shape for row in rows), *(one.shape for one in layouts))
        )
        tiles = _tiles(sizes, max(numbers // max(widest, 1), _FEWEST_ROWS))
        if self._regions[index].is_approximated and not _is_even(rows[0].shape, tiles, num_threads):
            return None
        return _run(part, run, values, layouts, tiles)

    def _layout(
        self, index: int, part: Part, run: Any, values: tuple[Any, ...], sizes: Sequence[int]
    ) -> list[WholeLayout] | None:
        """Find the shapes, strides and dtypes of the results from those of two rows; None if the code fails,
        or if parts could have other bits or layouts.
        """
        import torch

        from runtime.language.twice_rounded import TwiceRounded

        described = tuple(
            (value.shape, value.stride(), value.dtype) if isinstance(value, torch.Tensor) else (type(value), value)
            for value in values
        )
        key = (index, run.dtype, described)
        if key not in self._layouts:
            pair = tuple((dim, 0, 2) for dim, size in enumerate(sizes) if size > 1)
            with TwiceRounded() as twice:
                try:
                    found = part(run, *(_cut(value, pair) for value in values))
                except (RuntimeError, TypeError, ValueError, LookupError):  # which the recorded statements will raise
                    found = (None,)
            is_known = bool(pair) and not twice.is_used
            is_known = is_known and all(
                isinstance(one, torch.Tensor) and one.dim() == len(sizes) + 1 and _is_dense(one) for one in found
            )
            self._layouts[key] = [_whole_layout(one, sizes) for one in found] if is_known else None
        return self._layouts[key]


def _is_dense(pair: torch.Tensor) -> bool:
    """Whether a tensor has no gaps, which a slice has."""
    span = 1 + sum(stride * (size - 1) for stride, size in zip(pair.stride(), pair.shape, strict=True))
    return pair.numel() in (0, span)


def _whole_layout(pair: torch.Tensor, sizes: Sequence[int]) -> WholeLayout:
    """The layout of a whole result whose part of two rows is `pair`: dense, with the same order of dimensions."""
    shape = [size if own == 2 and size > 1 else own for own, size in zip(pair.shape, sizes, strict=False)]
    shape.append(pair.shape[-1])
    stride, step = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=lambda dim: (pair.stride(dim), -dim)):
        stride[dim] = step
        step *= shape[dim]
    return WholeLayout(tuple(shape), tuple(stride), pair.dtype)


def _are_plain(values: Sequence[Any], tensors: Sequence[torch.Tensor]) -> bool:
    """Whether values are numbers and dense tensors, all on the CPU or all without content."""
    import torch

    devices = {tensor.device.type for tensor in tensors}
    return (
        all(type(value) in (torch.Tensor, torch.nn.Parameter, int, float, bool) for value in values)
        and all(tensor.layout == torch.strided for tensor in tensors)
        and devices in ({"cpu"}, {"meta"})
    )


def _sizes(region: Region, rows: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """The sizes of the leading dimensions in which tensors can be cut; 1 for others. Empty if the region cannot be
    computed by parts of these tensors.
    """
    num_dims = rows[0].dim() if rows else 0
    if any(row.dim() != num_dims for row in rows) or any(dim not in (-1, num_dims - 1) for dim in region.last):
        return ()
    found: list[int] = []
    for dim in range(num_dims - 1):
        several = {row.shape[dim] for row in rows} - {1}
        if len(several) > 1 and (region.has_rows or region.is_approximated):
            return ()
        found.append(several.pop() if len(several) == 1 else 1)
    if region.has_rows or region.is_approximated:
        is_alike = not region.is_approximated or all(row.shape == rows[0].shape for row in rows)
        if not is_alike or not all(row.is_contiguous() for row in rows):
            return ()
    return tuple(found)


def _is_cut(shape: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether a result has the full size in every dimension that is cut."""
    return len(shape) == len(sizes) + 1 and all(size in (1, own) for own, size in zip(shape, sizes, strict=False))


def _row_numbers(shape: Sequence[int], sizes: Sequence[int]) -> int:
    """The numbers of a tensor for one row of the dimensions that are cut."""
    return math.prod(own for own, size in zip(shape, (*sizes, 1), strict=True) if size == 1)


def _tiles(sizes: Sequence[int], num_rows: int) -> list[Tile]:
    """Cut the leading dimensions into parts of at most `num_rows` rows, as even as possible; inner ones stay whole."""
    inner = 1
    for dim in reversed(range(len(sizes))):
        if inner * sizes[dim] > num_rows:
            break
        inner *= sizes[dim]
    else:
        return [()]
    num_parts = -(-sizes[dim] // max(num_rows // inner, 1))
    borders = [sizes[dim] * part // num_parts for part in range(num_parts + 1)]
    outer = [[(before, place, 1) for place in range(sizes[before])] for before in range(dim) if sizes[before] > 1]
    own = [(dim, first, last - first) for first, last in itertools.pairwise(borders)]
    return list(itertools.product(*outer, own))


def _is_even(shape: Sequence[int], tiles: Sequence[Tile], num_threads: int) -> bool:
    """Whether torch's loops treat all numbers of a contiguous tensor and of its parts in whole vectors."""
    counts = {math.prod(shape)}
    for tile in tiles:
        cut = {dim: length for dim, _, length in tile}
        counts.add(math.prod(cut.get(dim, size) for dim, size in enumerate(shape)))
    return shape[-1] % _VECTOR == 0 and all(
        count % (_VECTOR * threads) == 0
        for count in counts
        for threads in {num_threads, min(num_threads, max(-(-count // _GRAIN), 1))}
    )


def _run(
    part: Part, run: Any, values: Sequence[Any], layouts: Sequence[WholeLayout], tiles: Sequence[Tile]
) -> list[torch.Tensor]:
    import torch

    device = next(value.device for value in values if isinstance(value, torch.Tensor))
    results = [torch.empty_strided(one.shape, one.stride, dtype=one.dtype, device=device) for one in layouts]
    # On shapes, one part takes as much memory as each.
    for tile in tiles[:1] if device.type == "meta" else tiles:
        found = part(run, *(_cut(value, tile) for value in values))
        for result, own in zip(results, found, strict=True):
            _cut(result, tile).copy_(own)
        del found
    return results


def _cut(value: Any, tile: Tile) -> Any:
    import torch

    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return value
    for dim, first, length in tile:
        if value.shape[dim] > 1:
            value = value.narrow(dim, first, length)
    return value
