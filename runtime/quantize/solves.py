"""The batches of modules that the workers quantize at the same time, see `runtime.quantize.rounding`."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from runtime.algorithms import grid
from runtime.algorithms.drift import corrected_rows
from runtime.algorithms.gptq import factor_hessian, joined, require_solvable, solve_tiles
from runtime.algorithms.gptq_factors import Factored
from runtime.algorithms.gptq_options import SolvedPiece, SolveOptions
from runtime.algorithms.gptq_tiles import Piece
from runtime.algorithms.refine import refine
from runtime.errors import QuantizationError
from runtime.formats.compressed import compress_rows, joined_rows
from runtime.formats.stored_scales import require_sound_weight
from runtime.quantize.nearest import output_size, round_to_nearest
from runtime.quantize.packed_pieces import PackedPiece
from runtime.quantize.solve_division import windows
from runtime.quantize.solve_errors import batch_error, named_error
from runtime.quantize.solve_stacks import StackedSolves
from runtime.quantize.solve_units import GPTQ, NEAREST, Batch, Tiling, Unit, tilings, units_of, with_next
from runtime.workers.agreement import agreed

if TYPE_CHECKING:
    from runtime.algorithms.result import QuantizedWeight
    from runtime.quantize.tuned_module import TunedModule
    from runtime.workers.group import Workers


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
    dtype_of: Callable[[str], torch.dtype]
    scale_dtype_of: Callable[[str], torch.dtype]
    global_scale_of: Callable[[str], torch.Tensor | None]
    device: torch.device
    workers: Workers
    far_dtype: torch.dtype
    tuned: dict[str, TunedModule]
    _solving: dict[int, Tiling] = field(default_factory=dict)
    _factors: dict[int, Factored] = field(default_factory=dict)
    _seconds: dict[int, float] = field(default_factory=dict)  # of factoring, until the first tile is solved
    _weights: dict[str, torch.Tensor] = field(default_factory=dict)  # of the unit that is solved
    _reasons: dict[str, str] = field(default_factory=dict)  # why a module of GPTQ is rounded to nearest
    _failed: dict[str, str] = field(default_factory=dict)  # the same, not known to other workers yet
    _stacks: StackedSolves = field(init=False)
    _error: Exception | None = None  # of this worker, raised when all workers are done with their part

    def rounded(self) -> Iterator[list[PackedPiece]]:
        """Quantize this worker's part of some modules after the other, and yield its packed rows of each.

        All workers take part in every step, also those that have nothing to yield.

        Raises:
            QuantizationError: naming the module.
        """
        with agreed(self.workers):
            self._require_inputs()
        self._solving = tilings(self.batches, self.shape_of, self.device.type, self.workers.size)
        self._factor_own()
        self._stacks = StackedSolves(
            batches=self.batches,
            tiles={index: tiling.tiles for index, tiling in self._solving.items()},
            rank=self.workers.rank,
            shape_of=self.shape_of,
            weight_of=self._weight,
            options_of=self._options,
        )
        units = list(units_of(self.batches, self._solving, self.shape_of))
        for part in windows([unit.num_numbers for unit in units], are_joined=self.workers.size > 1):
            found: list[PackedPiece] = []
            for unit, following in with_next(units, part):
                if unit.is_first and unit.tiles:
                    self._share_factors(unit.index)
                if self._error is None and self._is_possible(unit) and unit.worker == self.workers.rank:
                    with self._kept_error(unit.index, unit.names):
                        found += self._done(unit)
                self._free(unit, following)
            with agreed(self.workers):
                if self._error is not None:
                    raise self._error
            found += self._fall_back([unit.index for unit in units[part] if unit.tiles and unit.is_last])
            yield [piece for piece in found if piece.algorithm == NEAREST or piece.name not in self._reasons]
            del found

    def _is_possible(self, unit: Unit) -> bool:
        """Whether the unit's Hessian is factored or need not be."""
        return not unit.tiles or unit.index in self._factors or self.batches[unit.index].num_stacked > 1

    def _free(self, unit: Unit, following: Unit | None) -> None:
        """Free what no later unit needs."""
        if unit.is_last:
            self._factors.pop(unit.index, None)
        names = following.names if following is not None else ()
        self._weights = {name: weight for name, weight in self._weights.items() if name in names}

    @contextlib.contextmanager
    def _kept_error(self, index: int, names: Sequence[str]) -> Iterator[None]:
        """Keep an error of the block until this worker has sent all messages that others wait for."""
        try:
            yield
        except Exception as error:
            if index in self._solving and self.batches[index].has_fallback and isinstance(error, QuantizationError):
                self._failed |= dict.fromkeys(names, error.message)
            else:
                self._error = error

    def _require_inputs(self) -> None:
        for batch in self.batches:
            if batch.job.algorithm == GPTQ and batch.seen is None:
                reason = "no calibration token reached it"
                if not batch.has_fallback:
                    raise named_error(QuantizationError(reason), batch, batch.names[0])
                self._reasons |= dict.fromkeys(batch.names, reason)

    def _factor_own(self) -> None:
        """Factor the Hessians that are here."""
        for index in self._solving:
            batch = self.batches[index]
            if batch.owner == self.workers.rank and batch.num_stacked == 1 and self._error is None:
                start = time.perf_counter()
                with self._kept_error(index, batch.names):
                    self._factor(index)
                self._seconds[index] = time.perf_counter() - start

    def _factor(self, index: int) -> None:
        batch = self.batches[index]
        try:
            self._factors[index] = factor_hessian(
                batch.owned_hessian(),
                self._options(batch),
                list(self.shape_of(batch.names[0])),
                _dtype_of_factors(self.dtype_of(batch.names[0])),
                overwrite_hessian=batch.may_overwrite,
                drift_II=batch.owned_drift(),
            )
        except QuantizationError as error:
            raise error if batch.has_fallback else named_error(error, batch, batch.names[0]) from error

    def _options(self, batch: Batch) -> SolveOptions:
        assert batch.job.options is not None, "GPTQ comes with options"
        return SolveOptions(
            args=batch.job.scheme.weights,
            scale_dtype=self.scale_dtype_of(batch.names[0]),
            dampening_frac=batch.job.options.dampening_frac,
            block_size=batch.job.options.block_size,
            actorder=batch.job.options.actorder,
            global_scale=self.global_scale_of(batch.names[0]),
            far_dtype=self.far_dtype,
            range_passes=batch.job.options.range_passes,
            strength=batch.job.options.strength,
        )

    def _share_factors(self, index: int) -> None:
        """Send the factors of a batch to the workers that have tiles of it, and that have memory for them."""
        solvers, owner, rank = self._solving[index].solvers, self.batches[index].owner, self.workers.rank
        receivers = sorted({solver for solver in solvers if solver != owner})
        if rank == owner:
            if receivers:
                self._send(index, receivers)
            if owner not in solvers:
                self._factors.pop(index, None)
        elif rank in receivers:
            self._receive(index, owner)

    def _send(self, index: int, receivers: Sequence[int]) -> None:
        own, memory = self._factors.get(index), None
        if own is not None and self._error is None:
            with self._kept_error(index, self.batches[index].names):
                memory = _memory_for(own.parts())
        head = torch.tensor([float(memory is not None), 0.0 if own is None else own.damping], dtype=torch.float64)
        replies = [(torch.zeros(1, dtype=torch.uint8), receiver) for receiver in receivers]
        self.workers.swap([(head, receiver) for receiver in receivers], replies)
        ready = [receiver for reply, receiver in replies if reply]
        if own is None or memory is None or not ready:
            return
        for part in own.parts():
            dense = _dense(part, memory)
            if dense is not part:
                dense.copy_(part)
            self.workers.swap([(dense, receiver) for receiver in ready], [])

    def _receive(self, index: int, owner: int) -> None:
        batch = self.batches[index]
        names = batch.names
        num_in, dtype = self.shape_of(names[0])[1], _dtype_of_factors(self.dtype_of(names[0]))
        found, memory = None, None
        if self._error is None:
            with self._kept_error(index, names):
                found = Factored.empty(num_in, dtype, self.device, is_corrected=batch.is_corrected)
                memory = _memory_for(found.parts())
        head, reply = torch.empty(2, dtype=torch.float64), torch.tensor([memory is not None], dtype=torch.uint8)
        self.workers.swap([(reply, owner)], [(head, owner)])
        if found is None or memory is None or not head[0]:
            return
        for part in found.parts():
            dense = _dense(part, memory)
            self.workers.swap([], [(dense, owner)])
            if dense is not part:
                part.copy_(dense)
        self._factors[index] = replace(found, damping=float(head[1]))

    def _done(self, unit: Unit) -> Iterator[PackedPiece]:
        """Do a unit, and yield its packed rows."""
        batch = self.batches[unit.index]
        if not unit.tiles:
            yield self._nearest(unit.names[0], batch)
        elif batch.num_stacked > 1:
            yield from self._in_a_stack(unit)
        elif batch.is_refined:
            yield self._refined(unit.index, list(self._solved_tiles(unit)))
        else:
            yield from map(self._packed, self._solved_tiles(unit))

    def _solved_tiles(self, unit: Unit) -> Iterator[_Solved]:
        """Solve the tiles of a unit, one at a time."""
        batch, factors = self.batches[unit.index], self._factors[unit.index]
        start = time.perf_counter() - self._seconds.pop(unit.index, 0.0)
        warning = _damping_remark(batch, factors.damping) if unit.is_first else ""
        # A weight has rows in several tiles; it is read, rescaled and checked once.
        known = {name: self._weights[name] for name in unit.names if name in self._weights}
        self._weights = known | {name: self._weight(name, batch) for name in unit.names if name not in known}
        weights = [self._weights[name] for name in unit.names]
        places = {batch.names.index(name): place for place, name in enumerate(unit.names)}
        tiles = [tuple(replace(piece, weight=places[piece.weight]) for piece in tile) for tile in unit.tiles]
        pieces = solve_tiles(weights, tiles, factors, self._options(batch))
        while True:
            try:
                found = list(itertools.islice(pieces, 1))
            except QuantizationError as error:
                raise batch_error(error, batch, unit.names, weights) from error
            if not found:
                return
            name = unit.names[found[0].piece.weight]
            yield _Solved(name=name, batch=batch, solved=found.pop(), start=start, warning=warning)
            start, warning = time.perf_counter(), ""

    def _in_a_stack(self, unit: Unit) -> Iterator[PackedPiece]:
        """Solve a batch of an expert together with the next ones of its kind, and yield its packed rows."""
        batch = self.batches[unit.index]
        pieces, seconds = self._stacks.taken(unit.index)
        warning = _damping_remark(batch, pieces[0].rows.damping)
        start = time.perf_counter() - seconds
        for one in pieces:
            name = unit.names[one.piece.weight]
            yield self._packed(_Solved(name=name, batch=batch, solved=one, start=start, warning=warning))
            start, warning = time.perf_counter(), ""

    def _refined(self, index: int, parts: Sequence[_Solved]) -> PackedPiece:
        """Improve the result of a whole weight, and pack it."""
        batch = self.batches[index]
        assert batch.seen is not None and batch.job.options is not None, "only solved batches are refined"
        before = joined([part.solved for part in parts])
        result = refine(
            corrected_rows(self._weights[parts[0].name], self._factors[index].correction_II),
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
            raise named_error(error, batch, name, is_resumable=grid.is_finite(weight)) from error
        return weight

    def _packed(self, one: _Solved) -> PackedPiece:
        rows, piece = one.solved.rows, one.solved.piece
        return PackedPiece(
            name=one.name,
            start=piece.start,
            num_rows=piece.stop - piece.start,
            algorithm=GPTQ,
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
        """Round a module to nearest, unless it has been tuned."""
        start, weight = time.perf_counter(), self.weight_of(name)
        reason, tuned = self._reasons.get(name, ""), self.tuned.pop(name, None)
        try:
            size = output_size(weight, batch.seen)
            parts = (
                iter([tuned.result])
                if tuned is not None
                else round_to_nearest(
                    weight,
                    batch.job,
                    batch.seen,
                    scale_dtype=self.scale_dtype_of(name),
                    global_scale=self.global_scale_of(name),
                )
            )
        except QuantizationError as error:
            raise named_error(error, batch, name, is_resumable=grid.is_finite(weight)) from error
        loss, packed = 0.0, []
        for rows in parts:
            loss += rows.loss if batch.seen is None else batch.seen.output_square(weight, rows.weight_OI)
            packed.append(self._tensors(name, rows, batch))
        return PackedPiece(
            name=name,
            start=0,
            num_rows=len(weight),
            algorithm=NEAREST if tuned is None else batch.job.algorithm,
            damping=0.0,
            size=size,
            loss=loss,
            seconds=time.perf_counter() - start + (0.0 if tuned is None else tuned.seconds),
            solver=self.workers.rank,
            warning=f"warning: {name} rounded to nearest: {reason}" if reason else "",
            fallback=reason or (batch.reason_for_nearest if tuned is None else tuned.reason),
            tensors=joined_rows(packed, batch.job.scheme),
        )

    def _fall_back(self, ended: Sequence[int]) -> list[PackedPiece]:
        """Round to nearest the modules that any worker has failed to solve, if all tiles of their batch are done.

        The run replaces the weight of a module that is done, and a later tile may have other rows of it.
        """
        known = self.workers.exchange(list(self._failed.items()))
        fresh = {name: reason for entries in reversed(known) for name, reason in entries}
        self._reasons = fresh | self._reasons
        self._failed.clear()
        own = [self.batches[index] for index in ended if self.batches[index].owner == self.workers.rank]
        with agreed(self.workers):
            return [self._nearest(name, batch) for batch in own for name in batch.names if name in self._reasons]


def _dtype_of_factors(weights: torch.dtype) -> torch.dtype:
    return torch.float64 if weights == torch.float64 else torch.float32


def _memory_for(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Allocate contiguous memory for any of the parts of factors that is not contiguous."""
    return parts[-1].new_empty(max((part.numel() for part in parts if not part.is_contiguous()), default=0))


def _dense(part: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """The tensor to exchange for a part: itself, or memory of its shape."""
    return part if part.is_contiguous() else memory[: part.numel()].view(part.shape)


def _damping_remark(batch: Batch, damping: float) -> str:
    assert batch.job.options is not None, "GPTQ comes with options"
    is_raised = damping > batch.job.options.dampening_frac
    return f"warning: {', '.join(batch.names)}: the Hessian needed dampening {damping:g}" if is_raised else ""
