"""Divide the batches of a window into units of work for one worker each; every worker makes the same division."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from runtime.algorithms.gptq_tiles import Tile, tiles_of
from runtime.quantize.solve_division import Solve, divided

if TYPE_CHECKING:
    import torch

    from runtime.quantize.statistics import InputStatistics
    from runtime.recipe.recipe import Assignment

NEAREST, GPTQ = "rtn", "gptq"


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Modules that are solved together; one that is rounded to nearest is alone.

    Attributes:
        names: of the modules.
        job: their assignment.
        seen: the statistics of their input, if any token reached it.
        owner: the worker that has these statistics, or without any the one that rounds the modules.
        may_overwrite: whether nothing reads the Hessian afterwards.
        num_stacked: the number of batches of a full stack, of which this one is a part; 1 if it is solved alone.
    """

    names: Sequence[str]
    job: Assignment
    seen: InputStatistics | None
    owner: int
    may_overwrite: bool
    num_stacked: int = 1

    @property
    def is_solved(self) -> bool:
        """Whether GPTQ applies. If all inputs are zero, every rounding has the same loss."""
        return self.job.algorithm == GPTQ and self.seen is not None and not self.seen.is_zero()

    @property
    def reason_for_nearest(self) -> str:
        """Why GPTQ, AutoRound or the search for ranges does not apply, apart from errors; "" if the recipe has none."""
        if self.job.algorithm == NEAREST and not self.job.clip:
            return ""
        if self.seen is None:
            return "no calibration token reached it"
        return "all its inputs are zero" if self.seen.is_zero() else ""

    @property
    def has_fallback(self) -> bool:
        """Whether modules that cannot be solved are rounded to nearest."""
        return self.job.options is not None and self.job.options.fallback == NEAREST

    @property
    def is_refined(self) -> bool:
        """Whether results are improved, which requires the Hessian."""
        return self.job.options is not None and bool(self.job.options.refine)

    @property
    def is_corrected(self) -> bool:
        """Whether the weights are corrected by the drift of their inputs."""
        return self.job.is_error_aware and self.seen is not None and self.seen.needs.drift

    def owned_drift(self) -> torch.Tensor | None:
        """Return the drift, which is freed with the result if nothing else reads it; None if it is not used."""
        if not self.is_corrected:
            return None
        assert self.seen is not None, "its inputs were measured"
        return self.seen.take_drift() if self.may_overwrite else self.seen.drift_II

    def owned_hessian(self) -> torch.Tensor:
        """Return the Hessian, which the caller owns if it may overwrite it."""
        assert self.seen is not None, "only batches with statistics are solved"
        return self.seen.take_hessian() if self.may_overwrite else self.seen.hessian_II


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """A batch that GPTQ solves: its tiles, and the worker of each."""

    tiles: Sequence[Tile]
    solvers: Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A piece of work for one worker: a tile, or a module that is rounded to nearest or refined.

    Attributes:
        index: of its batch.
        worker: that does it.
        tiles: to solve; none for a module that is rounded to nearest.
        names: of the modules that have rows in it.
        num_numbers: of its weights.
        is_first, is_last: whether it is the first or the last of its batch.
    """

    index: int
    worker: int
    tiles: Sequence[Tile]
    names: Sequence[str]
    num_numbers: int
    is_first: bool
    is_last: bool


def tilings(
    batches: Sequence[Batch], shape_of: Callable[[str], Sequence[int]], device_type: str, num_workers: int
) -> dict[int, Tiling]:
    """Cut the batches that GPTQ solves into tiles, and assign these to workers.

    Returns:
        By index of the batch, in the order in which all workers solve them.
    """
    tiles = {}
    solves = []
    for index, batch in enumerate(batches):
        if batch.is_solved:
            shapes = [shape_of(name) for name in batch.names]
            tiles[index] = _tiles(batch, shapes, device_type)
            rows = [sum(piece.stop - piece.start for piece in tile) for tile in tiles[index]]
            num_in, is_divided = shapes[0][1], not batch.is_refined and batch.num_stacked == 1
            solves.append(Solve(num_in_features=num_in, owner=batch.owner, rows=rows, is_divided=is_divided))
    found = divided(solves, num_workers)
    indices = list(tiles)
    return {indices[place]: Tiling(tiles=tiles[indices[place]], solvers=found.workers[place]) for place in found.order}


def units_of(
    batches: Sequence[Batch], solving: dict[int, Tiling], shape_of: Callable[[str], Sequence[int]]
) -> Iterator[Unit]:
    """Yield the units of all batches: tiles first, in their order, and then modules that are rounded to nearest."""
    others = [index for index in range(len(batches)) if index not in solving]
    for index in (*solving, *others):
        parts = _parts(batches[index], solving.get(index))
        for place, (worker, tiles, names) in enumerate(parts):
            num_rows = sum(piece.stop - piece.start for tile in tiles for piece in tile)
            num_out, num_in = shape_of(names[0])
            yield Unit(
                index=index,
                worker=worker,
                tiles=tiles,
                names=names,
                num_numbers=(num_rows or num_out) * num_in,
                is_first=place == 0,
                is_last=place == len(parts) - 1,
            )


def _parts(batch: Batch, solving: Tiling | None) -> list[tuple[int, Sequence[Tile], list[str]]]:
    """The worker, the tiles and the modules of each unit of a batch."""
    if solving is None:
        return [(batch.owner, (), [name]) for name in batch.names]
    if batch.is_refined:
        own = itertools.groupby(solving.tiles, key=lambda tile: tile[0].weight)
        return [(batch.owner, tuple(tiles), [batch.names[weight]]) for weight, tiles in own]
    if batch.num_stacked > 1:
        return [(batch.owner, tuple(solving.tiles), list(batch.names))]
    return [
        (solver, (tile,), list(dict.fromkeys(batch.names[piece.weight] for piece in tile)))
        for tile, solver in zip(solving.tiles, solving.solvers, strict=True)
    ]


def _tiles(batch: Batch, shapes: Sequence[Sequence[int]], device_type: str) -> list[Tile]:
    """Cut weights into tiles; weights that are refined are whole, so no tile has rows of two."""
    args = batch.job.scheme.weights
    if not batch.is_refined:
        return tiles_of(shapes, args, device_type)
    return [
        tuple(replace(piece, weight=weight) for piece in tile)
        for weight, shape in enumerate(shapes)
        for tile in tiles_of([shape], args, device_type)
    ]


def with_next(units: Sequence[Unit], part: slice) -> Iterator[tuple[Unit, Unit | None]]:
    """Yield the units of a part, each with the one that follows."""
    for place in range(part.start, part.stop):
        yield units[place], units[place + 1] if place + 1 < len(units) else None
