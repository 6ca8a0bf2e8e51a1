"""Describe the work of a planned subgraph, for the prediction of how it divides among workers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from runtime.algorithms.gptq_tiles import tiles_of
from runtime.algorithms.hessian import FLOAT32, FLOAT64, PANEL_WIDTH
from runtime.formats.compressed import stored_dtypes, stored_shapes
from runtime.planning.distribution import NearestWeight, FactorSearch, SharedInput, PlannedSolve, StepWork, PlannedTile
from runtime.quantize.solve_batches import solved_together

if TYPE_CHECKING:
    from runtime.planning.costs import Sums
    from runtime.planning.forecast import Workload
    from runtime.planning.shapes import Footprint
    from runtime.quantize.needs import RecipeNeeds
    from runtime.quantize.statistics import Needs
    from runtime.recipe.recipe import Assignment
    from runtime.streaming.schedule import Step


class StepDescriber:
    """Describes the work of a run's subgraphs.

    Args:
        needs: of the recipe.
        shape_of: a parameter's shape, by name.
        work: the planned workload.
    """

    def __init__(self, needs: RecipeNeeds, shape_of: Callable[[str], tuple[int, ...]], work: Workload) -> None:
        self.needs, self.shape_of, self.work = needs, shape_of, work
        self._result_bytes: dict[tuple[int, int, int], int] = {}
        self.num_batches = work.num_samples / work.batch_size
        self.rows = work.batch_size * max(work.sizes.values(), default=1)

    def describe(
        self,
        step: Step,
        measured: Mapping[str, Needs],
        sums: Sums,
        footprint: Footprint | None,
        *,
        loaded_bytes: int,
    ) -> StepWork:
        """Return the work of one subgraph.

        Args:
            step: the subgraph in the run's schedule.
            measured: what is measured of which modules.
            sums: the bytes of each sum, by the modules that share it.
            footprint: of one batch; None for a guess.
            loaded_bytes: of weights.
        """
        modules = step.modules
        shapes = [self.shape_of(f"{name}.weight") for name in modules]
        forward = self._forward(shapes, footprint)
        places = {name: place for place, names in enumerate(sums) for name in names}
        solves, roundings = self._solves(modules, places)
        return StepWork(
            measured=self._measuring(footprint, forward, modules) if measured else 0.0,
            propagated=forward if step.goes_on else 0.0,
            inputs=tuple(self._inputs(f"{step.label}.", measured, sums, footprint)),
            solves=tuple(solves),
            roundings=tuple(roundings),
            searches=tuple(self._searches(modules)),
            loaded_bytes=loaded_bytes,
            num_quantized=sum(rows * width for rows, width in shapes),
            num_modules=len(modules),
        )

    def _forward(self, shapes: Sequence[tuple[int, ...]], footprint: Footprint | None) -> float:
        """The operations of a pass over all batches; by the quantized weights, if the code does not run on shapes."""
        if footprint is not None:
            return footprint.routed * self.num_batches
        return 2.0 * sum(rows * width for rows, width in shapes) * self.rows * self.num_batches

    def _measuring(self, footprint: Footprint | None, forward: float, modules: Sequence[str]) -> float:
        """The operations of the measuring pass: without experts it ends at the last measured input."""
        if footprint is None:
            return forward
        if any(name in self.needs.experts for name in modules):
            return (footprint.routed + footprint.unrouted * self.work.all_tokens) * self.num_batches
        return footprint.ahead * self.num_batches

    def _inputs(
        self, prefix: str, measured: Mapping[str, Needs], sums: Sums, footprint: Footprint | None
    ) -> list[SharedInput]:
        rows = dict(zip(footprint.seen, footprint.seen_rows, strict=True)) if footprint is not None else {}
        routed = footprint.routed_share if footprint is not None and not self.work.all_tokens else 1.0
        has_hessian = any(need.hessian for need in measured.values())
        has_channels = any(need.channels for need in measured.values())
        found = []
        for names in sums:
            width = self.shape_of(f"{names[0].partition(' ')[0]}.weight")[1]
            count = rows.get(names, self.rows * (routed if names[0] in self.needs.experts else 1.0))
            found.append(
                SharedInput(
                    name=names[0].removeprefix(prefix),  # so that equal layers have equal work
                    width=width,
                    num_tokens=count * self.num_batches,
                    sum_bytes=panel_bytes(width) if has_hessian else 0,
                    small_bytes=width * (FLOAT64 + 6 * FLOAT32) if has_channels else 0,
                )
            )
        return found

    def _solves(
        self, modules: Sequence[str], places: Mapping[str, int]
    ) -> tuple[list[PlannedSolve], list[NearestWeight]]:
        solves, roundings = [], []
        jobs = self.needs.jobs
        for together in solved_together(modules, jobs, places):
            shapes = [self.shape_of(f"{name}.weight") for name in together]
            job = jobs[together[0]]
            if job.algorithm == "gptq" and together[0] in places:
                solves.append(self._solve(places[together[0]], shapes, job))
                continue
            own = places.get(together[0]) if job.clip or job.scheme.weights.observer == "imatrix_mse" else None
            roundings += [
                NearestWeight(source=own, num_weights=rows * width, result_bytes=self._packed(rows, width, job))
                for rows, width in shapes
            ]
        return solves, roundings

    def _solve(self, source: int, shapes: Sequence[tuple[int, ...]], job: Assignment) -> PlannedSolve:
        width = shapes[0][1]
        tiles = []
        for pieces in tiles_of(shapes, job.scheme.weights, self.work.device_type):
            counts = [piece.stop - piece.start for piece in pieces]
            size = sum(self._packed(count, width, job) for count in counts)
            tiles.append(PlannedTile(num_rows=sum(counts), result_bytes=size))
        return PlannedSolve(source=source, tiles=tuple(tiles), factor_bytes=factor_bytes(width))

    def _packed(self, num_rows: int, width: int, job: Assignment) -> int:
        """The packed bytes of some rows of a weight."""
        key = (num_rows, width, id(job.scheme))
        if key not in self._result_bytes:
            shapes, dtypes = stored_shapes((num_rows, width), job.scheme), stored_dtypes(job.scheme, self.work.dtype)
            sizes = [math.prod(shapes[name]) * dtype.itemsize for name, dtype in dtypes.items()]
            self._result_bytes[key] = sum(sizes)
        return self._result_bytes[key]

    def _searches(self, modules: Sequence[str]) -> list[FactorSearch]:
        from runtime.algorithms.awq import rows_of_each

        found = []
        for transform, rescaling in self.needs.rescaled(modules):
            if transform.algorithm == "awq":
                shapes = [self.shape_of(f"{name}.weight") for name in rescaling.group.modules]
                rows = sum(min(shape[0], rows_of_each(len(shapes))) for shape in shapes)
                tried = (transform.n_grid + 1) * (2 if transform.duo_scaling == "both" else 1) + 1
                found.append(FactorSearch(width=shapes[0][1], num_rows=rows, num_candidates=tried))
        return found


@functools.cache
def panel_bytes(width: int) -> int:
    """The bytes of the panels of H to the right of the diagonal."""
    panels = range(0, width, PANEL_WIDTH)
    return sum(min(PANEL_WIDTH, width - left) * (width - left) * FLOAT32 for left in panels)


@functools.cache
def factor_bytes(width: int) -> int:
    """The bytes of a factor as it is sent."""
    rows = range(0, width, 512)
    return width * 20 + sum(min(512, width - top) * min(top + 512, width) * FLOAT32 for top in rows)
