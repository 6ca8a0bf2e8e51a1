"""The batches of modules that the workers quantize at the same time, see `runtime.quantize.rounding`."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from runtime.algorithms import grid
from runtime.algorithms.gptq import SolvedPiece, SolveOptions, factor_hessian, joined, require_solvable, solve_tiles
from runtime.algorithms.gptq_factors import Factored
from runtime.algorithms.gptq_tiles import Piece, Tile, tiles_of
from runtime.algorithms.refine import refine
from runtime.errors import QuantizationError
from runtime.formats.compressed import compress_rows
from runtime.formats.stored_scales import require_sound_weight
from runtime.quantize.nearest import output_square, round_to_nearest
from runtime.quantize.packed_pieces import PackedPiece
from runtime.quantize.solve_division import Solve, tile_workers
from runtime.workers.agreement import agreed

if TYPE_CHECKING:
    from runtime.algorithms.result import QuantizedWeight
    from runtime.quantize.statistics import InputStatistics
    from runtime.recipe.recipe import Assignment
    from runtime.workers.group import Workers

_NEAREST, _GPTQ = "rtn", "gptq"
NUMBERS_AT_A_TIME = 2**30  # of the weights that several workers quantize before they exchange results


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Modules that are solved together; one that is rounded to nearest is alone.

    Attributes:
        names: of the modules.
        job: their assignment.
        seen: the statistics of their input, if any token reached it.
        owner: the worker that has these statistics, or without any the one that rounds the modules.
        may_overwrite: whether nothing reads the Hessian afterwards.
    """

    names: Sequence[str]
    job: Assignment
    seen: InputStatistics | None
    owner: int
    may_overwrite: bool

    @property
    def is_solved(self) -> bool:
        """Whether GPTQ applies. If all inputs are zero, every rounding has the same loss."""
        return self.job.algorithm == _GPTQ and self.seen is not None and not self.seen.is_zero()

    @property
    def has_fallback(self) -> bool:
        """Whether modules that cannot be solved are rounded to nearest."""
        return self.job.options is not None and self.job.options.fallback == _NEAREST

    @property
    def is_refined(self) -> bool:
        """Whether results are improved, which requires the Hessian."""
        return self.job.options is not None and bool(self.job.options.refine)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Solving:
    """A batch whose Hessian is factored; the factors are elsewhere, because only some workers have them."""

    tiles: Sequence[Tile]
    solvers: Sequence[int]
    damping: float
    dtype: torch.dtype
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Unit:
    """A piece of work for one worker: a tile, or a module that is rounded to nearest or refined.

    Attributes:
        index: of its batch.
        worker: that does it.
        tiles: to solve; none for a module that is rounded to nearest.
        names: of the modules that have rows in it.
        is_first, is_last: whether it is the first or the last of its batch.
    """

    index: int
    worker: int
    tiles: Sequence[Tile]
    names: Sequence[str]
    is_first: bool
    is_last: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Solved:
    """A piece of a module that is not packed yet; `start` is the time at which work on it began."""

    name: str
    batch: Batch
    solved: SolvedPiece
    start: float
    warning: str


@dataclass(kw_only=True)
class Window:
    """The batches that the workers quantize at the same time; the other attributes are those of `Rounding`."""

    batches: Sequence[Batch]
    weight_of: Callable[[str], torch.Tensor]
    shape_of: Callable[[str], Sequence[int]]
    scale_dtype_of: Callable[[str], torch.dtype]
    global_scale_of: Callable[[str], torch.Tensor | None]
    device: torch.device
    workers: Workers
    _factors: dict[int, Factored] = field(default_factory=dict)
    _solving: dict[int, _Solving] = field(default_factory=dict)
    _reasons: dict[str, str] = field(default_factory=dict)  # why a module of GPTQ is rounded to nearest

    def rounded(self) -> Iterator[list[PackedPiece]]:
        """Quantize this worker's part of some modules after the other, and yield its packed rows of each.

        All workers take part in every step, also those that have nothing to yield.

        Raises:
            QuantizationError: naming the module.
        """
        self._factor_own()
        for units in self._in_parts(list(self._units())):
            found: list[PackedPiece] = []
            failed: list[tuple[str, str]] = []
            first_error: Exception | None = None
            for unit in units:
                if unit.is_first:
                    self._share_factors(unit.index)
                if first_error is None and unit.worker == self.workers.rank:
                    try:
                        found += self._done(unit)
                    except Exception as error:
                        # Other workers wait for messages about the units that follow.
                        first_error = self._failed(unit, error, failed)
                if unit.is_last:
                    self._factors.pop(unit.index, None)
            with agreed(self.workers):
                if first_error is not None:
                    raise first_error
            found += self._fall_back(failed, units)
            yield [piece for piece in found if piece.algorithm == _NEAREST or piece.name not in self._reasons]
            del found

    def _failed(self, unit: _Unit, error: Exception, failed: list[tuple[str, str]]) -> Exception | None:
        """Note the modules of a unit that could not be solved, or return the error."""
        if not unit.tiles or not self.batches[unit.index].has_fallback or not isinstance(error, QuantizationError):
            return error
        failed += [(name, error.message) for name in unit.names]
        return None

    def _units(self) -> Iterator[_Unit]:
        for index, batch in enumerate(self.batches):
            parts: list[tuple[int, Sequence[Tile], list[str]]]
            if index not in self._solving:
                parts = [(batch.owner, (), [name]) for name in batch.names]
            elif batch.is_refined:
                own = [(batch.names[weight], tuple(tiles)) for weight, tiles in _by_weight(self._solving[index].tiles)]
                parts = [(batch.owner, tiles, [name]) for name, tiles in own]
            else:
                solving = self._solving[index]
                parts = [
                    (solver, (tile,), list(dict.fromkeys(batch.names[piece.weight] for piece in tile)))
                    for tile, solver in zip(solving.tiles, solving.solvers, strict=True)
                ]
            for place, (worker, tiles, names) in enumerate(parts):
                yield _Unit(
                    index=index,
                    worker=worker,
                    tiles=tiles,
                    names=names,
                    is_first=place == 0,
                    is_last=place == len(parts) - 1,
                )

    def _in_parts(self, units: Sequence[_Unit]) -> Iterator[list[_Unit]]:
        """Yield the units that are done before results are exchanged; a single worker hands each on at once."""
        part: list[_Unit] = []
        num_numbers = 0
        for unit in units:
            part.append(unit)
            if unit.tiles:
                num_rows = sum(piece.stop - piece.start for tile in unit.tiles for piece in tile)
                num_numbers += num_rows * self.shape_of(unit.names[0])[1]
            else:
                num_numbers += math.prod(self.shape_of(unit.names[0]))
            if self.workers.size == 1 or num_numbers >= NUMBERS_AT_A_TIME:
                yield part
                part, num_numbers = [], 0
        if part:
            yield part

    def _factor_own(self) -> None:
        """Factor the Hessians that are here, and learn how it went elsewhere."""
        outcomes: list[tuple[int, float, str, float, str]] = []
        with agreed(self.workers):
            for index, batch in enumerate(self.batches):
                if batch.job.algorithm == _GPTQ and batch.seen is None:
                    reason = "no calibration token reached it"
                    if not batch.has_fallback:
                        raise _named(QuantizationError(reason), batch, batch.names[0])
                    self._reasons |= dict.fromkeys(batch.names, reason)
                if not batch.is_solved or batch.owner != self.workers.rank:
                    continue
                start = time.perf_counter()
                try:
                    found = self._factors[index] = self._factored(batch)
                except QuantizationError as error:
                    if not batch.has_fallback:
                        raise _named(error, batch, batch.names[0]) from error
                    outcomes.append((index, 0.0, "", 0.0, error.message))
                else:
                    seconds = time.perf_counter() - start
                    outcomes.append(
                        (index, found.damping, str(found.lower_II.dtype).removeprefix("torch."), seconds, "")
                    )
        known = {index: rest for entries in self.workers.exchange(outcomes) for index, *rest in entries}
        for index, (*_, reason) in known.items():
            self._reasons |= dict.fromkeys(self.batches[index].names if reason else (), reason)
        self._divide({index: rest for index, rest in known.items() if not rest[-1]})

    def _factored(self, batch: Batch) -> Factored:
        assert batch.seen is not None, "only batches with statistics are solved"
        seen = batch.seen
        return factor_hessian(
            seen.take_hessian() if batch.may_overwrite else seen.hessian_II,
            self._options(batch),
            list(self.shape_of(batch.names[0])),
            grid.work_dtype(self.weight_of(batch.names[0])),
            overwrite_hessian=batch.may_overwrite,
        )

    def _options(self, batch: Batch) -> SolveOptions:
        assert batch.job.options is not None, "GPTQ comes with options"
        return SolveOptions(
            args=batch.job.scheme.weights,
            scale_dtype=self.scale_dtype_of(batch.names[0]),
            dampening_frac=batch.job.options.dampening_frac,
            block_size=batch.job.options.block_size,
            actorder=batch.job.options.actorder,
            global_scale=self.global_scale_of(batch.names[0]),
        )

    def _divide(self, known: Mapping[int, Sequence[object]]) -> None:
        """Cut the batches that are solved into tiles, and assign these to workers."""
        tiles = {}
        solves = []
        for index in sorted(known):
            batch = self.batches[index]
            shapes = [self.shape_of(name) for name in batch.names]
            tiles[index] = _tiles(batch, shapes, self.device.type)
            rows = [sum(piece.stop - piece.start for piece in tile) for tile in tiles[index]]
            num_in, is_divided = shapes[0][1], not batch.is_refined
            solves.append(Solve(num_in_features=num_in, owner=batch.owner, rows=rows, is_divided=is_divided))
        for (index, own), solvers in zip(tiles.items(), tile_workers(solves, self.workers.size), strict=True):
            damping, dtype, seconds, _ = known[index]
            self._solving[index] = _Solving(
                tiles=own, solvers=solvers, damping=damping, dtype=getattr(torch, dtype), seconds=seconds
            )

    def _share_factors(self, index: int) -> None:
        """Send the factors of a batch to the workers that have tiles of it."""
        if index not in self._solving:
            return
        solving, owner, rank = self._solving[index], self.batches[index].owner, self.workers.rank
        receivers = sorted({solver for solver in solving.solvers if solver != owner})
        if rank == owner:
            for part in self._factors[index].parts() if receivers else ():
                dense = part.contiguous()
                self.workers.swap([(dense, receiver) for receiver in receivers], [])
            if owner not in solving.solvers:
                del self._factors[index]
        elif rank in receivers:
            num_in = self.shape_of(self.batches[index].names[0])[1]
            found = self._factors[index] = Factored.empty(num_in, solving.dtype, self.device, solving.damping)
            for part in found.parts():
                dense = part if part.is_contiguous() else torch.empty_like(part, memory_format=torch.contiguous_format)
                self.workers.swap([], [(dense, owner)])
                if dense is not part:
                    part.copy_(dense)

    def _done(self, unit: _Unit) -> Iterator[PackedPiece]:
        """Do a unit, and yield its packed rows."""
        batch = self.batches[unit.index]
        if not unit.tiles:
            yield self._nearest(unit.names[0], batch)
        elif batch.is_refined:
            yield self._refined(batch, list(self._solved_tiles(unit)))
        else:
            yield from map(self._packed, self._solved_tiles(unit))

    def _solved_tiles(self, unit: _Unit) -> Iterator[_Solved]:
        """Solve the tiles of a unit, one at a time."""
        batch, solving = self.batches[unit.index], self._solving[unit.index]
        start = time.perf_counter() - (solving.seconds if unit.is_first else 0.0)
        warning = _damping_remark(batch, solving.damping) if unit.is_first else ""
        weights = [self._weight(name, batch) for name in unit.names]
        places = {batch.names.index(name): place for place, name in enumerate(unit.names)}
        tiles = [tuple(replace(piece, weight=places[piece.weight]) for piece in tile) for tile in unit.tiles]
        pieces = solve_tiles(weights, tiles, self._factors[unit.index], self._options(batch))
        while True:
            try:
                found = [next(pieces, None)]
            except QuantizationError as error:
                raise _named(error, batch, unit.names[0]) from error
            if found[0] is None:
                return
            name = unit.names[found[0].piece.weight]
            yield _Solved(name=name, batch=batch, solved=found.pop(), start=start, warning=warning)
            start, warning = time.perf_counter(), ""

    def _refined(self, batch: Batch, parts: Sequence[_Solved]) -> PackedPiece:
        """Improve the result of a whole weight, and pack it."""
        assert batch.seen is not None and batch.job.options is not None, "only solved batches are refined"
        before = joined([part.solved for part in parts])
        result = refine(
            self.weight_of(parts[0].name),
            before,
            batch.seen.hessian_II,
            batch.job.scheme.weights,
            sweeps=batch.job.options.refine,
            dampening_frac=before.damping,
        )
        whole = Piece(weight=0, start=0, stop=len(result.weight_OI))
        size = sum(part.solved.size for part in parts)
        return self._packed(replace(parts[0], solved=SolvedPiece(piece=whole, rows=result, size=size)))

    def _weight(self, name: str, batch: Batch) -> torch.Tensor:
        weight = self.weight_of(name)
        assert batch.seen is not None, "only batches with statistics are solved"
        try:
            require_solvable(weight, batch.seen.num_in_features, batch.job.scheme.weights)
        except QuantizationError as error:
            raise _named(error, batch, name, is_resumable=grid.is_finite(weight)) from error
        return weight

    def _packed(self, one: _Solved) -> PackedPiece:
        rows, piece = one.solved.rows, one.solved.piece
        return PackedPiece(
            name=one.name,
            start=piece.start,
            num_rows=piece.stop - piece.start,
            algorithm=_GPTQ,
            damping=rows.damping,
            size=one.solved.size,
            loss=rows.loss,
            seconds=time.perf_counter() - one.start,
            solver=self.workers.rank,
            warning=one.warning,
            tensors=self._tensors(one.name, rows, one.batch),
        )

    def _tensors(self, name: str, rows: QuantizedWeight, batch: Batch) -> dict[str, torch.Tensor]:
        require_sound_weight(name, rows, batch.job.scheme, self.scale_dtype_of(name))
        return compress_rows(name, rows, batch.job.scheme)

    def _nearest(self, name: str, batch: Batch) -> PackedPiece:
        """Round a module to nearest."""
        start, weight = time.perf_counter(), self.weight_of(name)
        reason = self._reasons.get(name, "")
        try:
            size = output_square(weight, batch.seen)
            result = round_to_nearest(
                weight,
                batch.job,
                batch.seen,
                scale_dtype=self.scale_dtype_of(name),
                global_scale=self.global_scale_of(name),
            )
        except QuantizationError as error:
            raise _named(error, batch, name, is_resumable=grid.is_finite(weight)) from error
        return PackedPiece(
            name=name,
            start=0,
            num_rows=len(weight),
            algorithm=_NEAREST,
            damping=result.damping,
            size=size,
            loss=output_square(weight, batch.seen, result.weight_OI),
            seconds=time.perf_counter() - start,
            solver=self.workers.rank,
            warning=f"warning: {name} rounded to nearest: {reason}" if reason else "",
            tensors=self._tensors(name, result, batch),
        )

    def _fall_back(self, failed: Sequence[tuple[str, str]], units: Sequence[_Unit]) -> list[PackedPiece]:
        """Round to nearest the modules with rows that any worker has failed to solve."""
        fresh = {name: reason for entries in self.workers.exchange(failed) for name, reason in entries}
        fresh = {name: reason for name, reason in fresh.items() if name not in self._reasons}
        self._reasons |= fresh
        owners = {name: self.batches[unit.index] for unit in units for name in unit.names if name in fresh}
        with agreed(self.workers):
            own = [(name, batch) for name, batch in owners.items() if batch.owner == self.workers.rank]
            return [self._nearest(name, batch) for name, batch in own]


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


def _by_weight(tiles: Sequence[Tile]) -> Iterator[tuple[int, list[Tile]]]:
    for weight, own in itertools.groupby(tiles, key=lambda tile: tile[0].weight):
        yield weight, list(own)


def _damping_remark(batch: Batch, damping: float) -> str:
    assert batch.job.options is not None, "GPTQ comes with options"
    is_raised = damping > batch.job.options.dampening_frac
    return f"warning: {', '.join(batch.names)}: the Hessian needed dampening {damping:g}" if is_raised else ""


def _named(error: QuantizationError, batch: Batch, name: str, *, is_resumable: bool = True) -> QuantizationError:
    """Add the module to an error; unless weights are the reason, another recipe may finish a run that GPTQ ends."""
    is_resumable = is_resumable and batch.job.algorithm == _GPTQ
    return QuantizationError(f"{name}: {error.message}", hint=error.hint, is_resumable=is_resumable)
