"""Solve batches of a mixture's experts in stacks on a GPU, see `runtime.algorithms.gptq_stacks`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from runtime.algorithms.gptq_stacks import solve_together
from runtime.errors import QuantizationError
from runtime.quantize.solve_errors import batch_error

if TYPE_CHECKING:
    import torch

    from runtime.algorithms.gptq_options import SolvedPiece, SolveOptions
    from runtime.algorithms.gptq_tiles import Tile
    from runtime.quantize.solve_units import Batch


@dataclass(kw_only=True)
class StackedSolves:
    """The batches of a window that this worker solves in stacks.

    Attributes:
        batches: of the window.
        tiles: of each batch that GPTQ solves, by its index, in the order of solving.
        rank: of this worker.
        shape_of: returns a module's shape.
        weight_of: returns a module's checked weight.
        options_of: returns the options of a batch.
    """

    batches: Sequence[Batch]
    tiles: Mapping[int, Sequence[Tile]]
    rank: int
    shape_of: Callable[[str], Sequence[int]]
    weight_of: Callable[[str, Batch], torch.Tensor]
    options_of: Callable[[Batch], SolveOptions]
    _begun: set[int] = field(default_factory=set)
    _ahead: dict[int, tuple[list[SolvedPiece], float] | QuantizationError] = field(default_factory=dict)

    def taken(self, index: int) -> tuple[list[SolvedPiece], float]:
        """Return the pieces of a batch and the seconds that each took; the first call for a stack solves all of it.

        A result is returned once.

        Raises:
            QuantizationError: naming the module.
        """
        if index not in self._begun:
            kind = self._kind(index)
            waiting = (other for other in self.tiles if other not in self._begun and self._kind(other) == kind)
            self._solve(list(itertools.islice(waiting, self.batches[index].num_stacked)))
        found = self._ahead.pop(index)
        if isinstance(found, QuantizationError):
            raise found
        return found

    def _kind(self, index: int) -> tuple[object, ...] | None:
        """A value that is equal for batches that can be in one stack; None if the batch is not solved here."""
        batch = self.batches[index]
        if batch.num_stacked == 1 or batch.owner != self.rank:
            return None
        shapes, options = [tuple(self.shape_of(name)) for name in batch.names], self.options_of(batch)
        how = batch.job.options, batch.is_corrected
        return batch.num_stacked, shapes, options.args, options.scale_dtype, *how

    def _solve(self, indices: Sequence[int]) -> None:
        """Solve batches of one kind, and keep their results."""
        start = time.perf_counter()
        self._begun.update(indices)
        weights: dict[int, list[torch.Tensor]] = {}
        for index in indices:
            try:
                weights[index] = [self.weight_of(name, self.batches[index]) for name in self.batches[index].names]
            except QuantizationError as error:
                self._ahead[index] = error
        if not weights:
            return
        batches = [self.batches[index] for index in weights]
        hessians, drifts = [batch.owned_hessian() for batch in batches], [batch.owned_drift() for batch in batches]
        solved = solve_together(
            list(weights.values()),
            hessians,
            self.tiles[next(iter(weights))],
            [self.options_of(batch) for batch in batches],
            batches[0].num_stacked,
            [drift_II for drift_II in drifts if drift_II is not None],
        )
        num_pieces = sum(len(result) for result in solved if not isinstance(result, QuantizationError))
        seconds = (time.perf_counter() - start) / max(num_pieces, 1)
        for (index, own), batch, result in zip(weights.items(), batches, solved, strict=True):
            if isinstance(result, QuantizationError):
                self._ahead[index] = batch_error(result, batch, batch.names, own)
            else:
                self._ahead[index] = result, seconds
