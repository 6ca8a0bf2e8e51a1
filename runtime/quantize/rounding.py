"""Quantize the weights of a step; modules that read one input and have one scheme are solved together.

    factor     each worker the Hessians that it has
    solve      tiles of rows, divided among the workers, with factors that they get from each other
    nearest    modules that are rounded to nearest, each by one worker
    exchange   the packed rows, so that every worker continues with the quantized weights

A single worker does the same, with nothing to exchange, for one batch of modules after the other. Several workers take
many batches at a time, so that some solve while others factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from runtime.algorithms import gptq_options, grid
from runtime.quantize.packed_pieces import PackedPiece, exchanged, layouts_of
from runtime.quantize.solve_batches import may_overwrite, num_together, solved_together
from runtime.quantize.solve_division import windows
from runtime.quantize.solve_units import NEAREST, Batch
from runtime.quantize.solves import Window
from runtime.workers.group import Alone

if TYPE_CHECKING:
    from runtime.quantize.statistics import InputStatistics
    from runtime.quantize.tuned_module import TunedModule
    from runtime.recipe.recipe import Assignment
    from runtime.workers.group import Workers


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounded:
    """The quantized weight of a module.

    Attributes:
        name: the module.
        pieces: its rows, in order; without tensors if only another worker has them.
    """

    name: str
    pieces: Sequence[PackedPiece]

    @property
    def is_here(self) -> bool:
        """Whether this worker has the packed rows."""
        return all(piece.tensors for piece in self.pieces)

    @property
    def warning(self) -> str:
        """A message for the user, or ""."""
        return next((piece.warning for piece in self.pieces if piece.warning), "")

    @property
    def size(self) -> float:
        """||W X||^2 over the measured inputs X, or ||W||^2 without inputs."""
        return sum(piece.size for piece in self.pieces)

    @property
    def loss(self) -> float:
        """||W X - Q X||^2 over the same inputs, or ||W - Q||^2."""
        return sum(piece.loss for piece in self.pieces)

    @property
    def seconds(self) -> float:
        """The time that all workers together have worked on it."""
        return sum(piece.seconds for piece in self.pieces)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """The modules of a step that are quantized, and how to get their weights and statistics.

    Attributes:
        jobs: assignment of each module.
        weight_of: returns a module's weight [O, I].
        shape_of: returns its shape, without loading it; `dtype_of` its dtype.
        scale_dtype_of: returns the dtype in which the checkpoint stores a module's scales.
        statistics: input statistics of the measured modules. The caller removes an entry when it has taken the module's
            result: GPTQ overwrites a Hessian that no remaining module needs.
        siblings: equal values for modules that are known to read one tensor.
        device: where weights are.
        others: statistics that are needed later for other modules.
        workers: that share the run.
        writer_of: returns the rank of the worker that writes a module's tensors.
        goes_on: whether batches run with the quantized weights, so that every worker needs them.
        experts: the mixture and the number of each module of an expert.
        mixture_sizes: the number of experts of each mixture.
        far_dtype: see `runtime.algorithms.gptq_options.SolveOptions`.
        tuned: the results of modules that are tuned, which are only packed.
    """

    jobs: Mapping[str, Assignment]
    weight_of: Callable[[str], torch.Tensor]
    shape_of: Callable[[str], Sequence[int]]
    dtype_of: Callable[[str], torch.dtype]
    scale_dtype_of: Callable[[str], torch.dtype]
    statistics: Mapping[str, InputStatistics]
    siblings: Mapping[str, Hashable]
    device: torch.device
    others: Collection[InputStatistics] = ()
    workers: Workers = field(default_factory=Alone)
    writer_of: Callable[[str], int] = lambda name: 0
    goes_on: bool = True
    experts: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    mixture_sizes: Mapping[str, int] = field(default_factory=dict)
    far_dtype: torch.dtype = torch.float32
    tuned: dict[str, TunedModule] = field(default_factory=dict)


def round_modules(names: Sequence[str], step: Rounding) -> Iterator[Rounded]:
    """Quantize modules in order of execution.

    Raises:
        QuantizationError: naming the module.
    """
    layouts = layouts_of(step.shape_of, lambda name: step.jobs[name].scheme, step.scale_dtype_of)
    scales = GlobalScales(names, step)
    for batches in _windows(names, step):
        if step.goes_on:  # the weights of siblings are replaced when a window is done
            for name in (name for batch in batches for name in batch):
                scales.of(name)
        window = Window(
            batches=[_batch(batch, step) for batch in batches],
            weight_of=step.weight_of,
            shape_of=step.shape_of,
            dtype_of=step.dtype_of,
            scale_dtype_of=step.scale_dtype_of,
            global_scale_of=scales.of,
            device=step.device,
            workers=step.workers,
            far_dtype=step.far_dtype,
            tuned=step.tuned,
        )
        waiting: dict[str, list[PackedPiece]] = {name: [] for batch in batches for name in batch}
        for own in window.rounded():
            arrived = _collected(exchanged(own, step.workers, layouts, step.device, is_used=step.goes_on), waiting)
            del own
            for name in arrived:
                if _is_whole(waiting[name], step.shape_of(name)):
                    yield Rounded(name=name, pieces=sorted(waiting.pop(name), key=lambda piece: piece.start))


def _collected(pieces: Sequence[PackedPiece], waiting: dict[str, list[PackedPiece]]) -> list[str]:
    """Add pieces to those of their modules, and return these modules in order of execution."""
    for piece in pieces:
        if piece.algorithm == NEAREST:  # instead of rows that were solved before others failed
            waiting[piece.name].clear()
        waiting[piece.name].append(piece)
    names = {piece.name for piece in pieces}
    return [name for name in waiting if name in names]


def _is_whole(pieces: Sequence[PackedPiece], shape: Sequence[int]) -> bool:
    return sum(piece.num_rows for piece in pieces) == shape[0]


def _windows(names: Sequence[str], step: Rounding) -> Iterator[list[list[str]]]:
    """Yield the batches of modules that are solved together, as many as are quantized at a time."""

    def input_of(name: str) -> Hashable:
        """Return a value that is equal for modules that may be solved together: these also have one global scale."""
        has_own = grid.needs_global_scale(step.jobs[name].scheme.weights)
        return id(step.statistics[name]), step.scale_dtype_of(name), step.siblings.get(name, name) if has_own else None

    inputs = {name: input_of(name) for name in names if name in step.statistics}
    batches = list(solved_together(names, step.jobs, inputs))
    sizes = [sum(math.prod(step.shape_of(name)) for name in batch) for batch in batches]
    is_stacked = any(_num_stacked(batch, step) > 1 for batch in batches)
    for window in windows(sizes, are_joined=step.workers.size > 1 or is_stacked):
        yield batches[window]


def _batch(names: Sequence[str], step: Rounding) -> Batch:
    """Look up the statistics of modules that are solved together, and who has them."""
    job, found = step.jobs[names[0]], step.statistics.get(names[0])
    seen = found if found is not None and found.num_tokens else None
    users = [name for name, entry in step.statistics.items() if entry is found]
    is_free = not any(found is other for other in step.others) and may_overwrite(job, names, users)
    owner = seen.owner if seen is not None else step.writer_of(names[0])
    return Batch(
        names=names, job=job, seen=seen, owner=owner, may_overwrite=is_free, num_stacked=_num_stacked(names, step)
    )


def _num_stacked(names: Sequence[str], step: Rounding) -> int:
    """`Batch.num_stacked`."""
    if not gptq_options.is_asynchronous(step.device):
        return 1
    num_in = step.shape_of(names[0])[1]
    return num_together(names, step.jobs[names[0]], num_in, step.experts, step.mixture_sizes)


class GlobalScales:
    """NVFP4's global scales, computed when the first of a group of modules needs it.

    Engines fuse siblings into one matrix, which has one global scale.
    """

    def __init__(self, names: Sequence[str], step: Rounding) -> None:
        self._step = step
        self._groups: dict[Hashable, list[str]] = {}
        for name in names:
            if grid.needs_global_scale(step.jobs[name].scheme.weights):
                self._groups.setdefault(step.siblings.get(name, name), []).append(name)
        self._known: dict[Hashable, torch.Tensor] = {}

    def of(self, name: str) -> torch.Tensor | None:
        """Return the global scale [1] of a module; None for a scheme without global scales."""
        if not grid.needs_global_scale(self._step.jobs[name].scheme.weights):
            return None
        group = self._step.siblings.get(name, name)
        if group not in self._known:
            weights = (self._step.weight_of(one).detach() for one in self._groups[group])
            self._known[group] = grid.global_scale_of(*weights)
        return self._known[group]
