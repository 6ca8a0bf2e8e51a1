"""Describe the work of a planned subgraph, for the prediction of how it divides among workers."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms.gptq_factors import Factored
from runtime.algorithms.gptq_tiles import tiles_of
from runtime.algorithms.grid import is_grouped
from runtime.algorithms.hessian import FLOAT32, hessian_bytes, panel_width
from runtime.algorithms.output_squares import NUM_ROWS, NUM_SAMPLED, WIDEST_GRAM
from runtime.checkpoint.dtypes import DTYPES
from runtime.formats.compressed import rows_layout
from runtime.formats.presets import MSE_OBSERVERS
from runtime.planning.shapes import META
from runtime.planning.work import (
    FactorSearch,
    NearestWeight,
    PassWork,
    PlannedSolve,
    PlannedTile,
    SharedInput,
    StepWork,
)
from runtime.quantize.channel_sums import ChannelSums
from runtime.quantize.solve_batches import num_together, solved_together
from runtime.quantize.statistics import Needs
from runtime.weights.origins import required_key

if TYPE_CHECKING:
    from runtime.planning.costs import Sums
    from runtime.planning.forecast import Workload
    from runtime.planning.shapes import Footprint
    from runtime.quantize.needs import RecipeNeeds
    from runtime.streaming.schedule import Step
    from runtime.weights.origins import ParameterSource


class StepDescriber:
    """Describes the work of a run's subgraphs.

    Args:
        needs: of the recipe.
        source: the origins of parameters.
        shape_of: a parameter's shape, by name.
        work: the planned workload.
    """

    def __init__(
        self,
        needs: RecipeNeeds,
        source: ParameterSource,
        shape_of: Callable[[str], tuple[int, ...]],
        work: Workload,
    ) -> None:
        self.needs, self.source, self.shape_of, self.work = needs, source, shape_of, work
        self._packed_bytes: dict[tuple[Any, ...], int] = {}
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
        read_bytes: int,
        rotated: int,
        num_passes: int,
    ) -> StepWork:
        """Return the work of one subgraph.

        Args:
            step: the subgraph in the run's schedule.
            measured: what is measured of which modules.
            sums: the bytes of each sum, by the modules that share it.
            footprint: of one batch; None for a guess.
            loaded_bytes: of weights in the run's dtype.
            read_bytes: of the checkpoint.
            rotated: numbers of it that are rotated.
            num_passes: over the batches to measure.
        """
        modules = step.modules
        forward = self._forward(modules, footprint)
        places = {name: place for place, names in enumerate(sums) for name in names}
        solves, nearest = self._solves(step, places, measured)
        measuring = self._measuring(footprint, forward, modules) if step.is_measured else PassWork()
        if step.is_split_after and not step.is_split and step.is_measured:
            measuring = forward if measuring.calls < forward.calls else measuring  # its outputs are stored
        original, propagated = forward if step.is_split else PassWork(), forward if step.goes_on else PassWork()
        if step.compares:
            measuring, original = measuring + original, PassWork()
        elif step.is_split_after and not step.is_split and not step.is_measured:
            original = forward
        return StepWork(
            measured=measuring.times(num_passes),
            propagated=propagated + original,
            num_rounded=footprint.num_rounded * self.num_batches if footprint is not None and step.goes_on else 0.0,
            rounded_kind=self._rounded_kind(step),
            inputs=tuple(self._inputs(f"{step.label}.", measured, sums, footprint)),
            solves=tuple(solves),
            nearest=tuple(nearest),
            searches=tuple(self._searches(modules)),
            loaded_bytes=loaded_bytes,
            read_bytes=read_bytes,
            rotated=rotated,
            written_bytes=step.num_written_bytes,
            unpacked=self._unpacked(modules) if step.is_run else (),
            num_modules=len(modules),
        )

    def _forward(self, modules: Sequence[str], footprint: Footprint | None) -> PassWork:
        """A pass over all batches; by the quantized weights, if the code does not run on shapes."""
        if footprint is not None:
            return footprint.routed.times(self.num_batches)
        weights = sum(math.prod(self.shape_of(f"{name}.weight")) for name in modules)
        return PassWork(products=2.0 * weights * self.rows).times(self.num_batches)

    def _measuring(self, footprint: Footprint | None, forward: PassWork, modules: Sequence[str]) -> PassWork:
        """The measuring pass: without experts it ends at the last measured input."""
        if footprint is None:
            return forward
        if any(name in self.needs.experts for name in modules):
            return (footprint.routed + footprint.unrouted.times(self.work.all_tokens)).times(self.num_batches)
        return footprint.ahead.times(self.num_batches) if modules else forward

    def _rounded_kind(self, step: Step) -> str:
        """The kind of the grids of inputs; a recipe mostly has one."""
        kinds = (job.scheme.input_activations for job in step.called(self.needs.jobs).values())
        return next((grid_kind(args) for args in kinds if args is not None), "int8-channel")

    def _unpacked(self, modules: Sequence[str]) -> tuple[tuple[str, int], ...]:
        """The quantized weights, by kind of grid."""
        found: Counter[str] = Counter()
        for name in modules:
            found[grid_kind(self.needs.jobs[name].scheme.weights)] += math.prod(self.shape_of(f"{name}.weight"))
        return tuple(found.items())

    def _inputs(
        self, prefix: str, measured: Mapping[str, Needs], sums: Sums, footprint: Footprint | None
    ) -> list[SharedInput]:
        rows = dict(zip(footprint.seen, footprint.seen_rows, strict=True)) if footprint is not None else {}
        routed = footprint.routed_share if footprint is not None and not self.work.all_tokens else 1.0
        needs = functools.reduce(Needs.__or__, measured.values(), Needs())  # as `measuring` shares sums
        lane_batches = math.ceil(self.num_batches / self.work.num_lanes)
        found = []
        for names in sums:
            width = self.shape_of(f"{names[0].partition(' ')[0]}.weight")[1]
            count = self.num_batches * rows.get(names, self.rows * (routed if names[0] in self.needs.experts else 1.0))
            has_hessian = needs.hessian or width <= WIDEST_GRAM
            sampled = min(int(count / self.work.num_lanes), NUM_SAMPLED)
            found.append(
                SharedInput(
                    name=names[0].removeprefix(prefix),  # so that equal layers have equal work
                    width=width,
                    num_tokens=count,
                    has_hessian=has_hessian,
                    lane_bytes=panel_bytes(width, self.work.device_type) + needs.drift * hessian_bytes(width)
                    if has_hessian
                    else sampled * width * self.work.dtype.itemsize,
                    small_bytes=ChannelSums.packed_bytes(width, lane_batches) if needs.channels else 0,
                    final_bytes=width * FLOAT32 * (needs.hessian + needs.drift),
                    has_drift=needs.drift,
                )
            )
        return found

    def _solves(
        self, step: Step, places: Mapping[str, int], measured: Mapping[str, Needs]
    ) -> tuple[list[PlannedSolve], list[NearestWeight]]:
        """The solves of a subgraph, and the weights that are rounded to nearest."""
        together = functools.reduce(Needs.__or__, measured.values(), Needs())
        solves, nearest = [], []
        jobs = self.needs.jobs
        # Experts are solved before the others.
        experts, others = ([n for n in step.modules if (n in self.needs.experts) is part] for part in (True, False))
        for names in (*solved_together(experts, jobs, places), *solved_together(others, jobs, places)):
            job = jobs[names[0]]
            if job.algorithm == "gptq" and names[0] in places:
                is_corrected = job.is_error_aware and step.is_split
                solve = self._solve(names, places[names[0]], is_sent=step.is_run, is_corrected=is_corrected)
                solves.append(replace(solve, is_expert=names[0] in self.needs.experts))
                continue
            source = places.get(names[0]) if job.clip or job.scheme.weights.observer == "imatrix_mse" else None
            for name in names:
                rows, width = self.shape_of(f"{name}.weight")
                nearest.append(
                    NearestWeight(
                        source=source,
                        num_weights=rows * width,
                        result_bytes=self._packed(name, rows) if step.is_run else 0,
                        kind=grid_kind(job.scheme.weights),
                        compared=_compared(rows, width, together) if name in places else 0.0,
                        is_clipped=job.clip and name in places,
                    )
                )
        return solves, nearest

    def _solve(self, names: Sequence[str], source: int, *, is_sent: bool, is_corrected: bool) -> PlannedSolve:
        shapes = [self.shape_of(f"{name}.weight") for name in names]
        tiles = []
        for pieces in tiles_of(shapes, self.needs.jobs[names[0]].scheme.weights, self.work.device_type):
            counts = [piece.stop - piece.start for piece in pieces]
            sizes = [self._packed(names[piece.weight], piece.stop - piece.start) for piece in pieces]
            tiles.append(PlannedTile(num_rows=sum(counts), result_bytes=sum(sizes) if is_sent else 0))
        num_stacked = 1
        if self.work.device_type != "cpu":
            num_stacked = num_together(
                names, self.needs.jobs[names[0]], shapes[0][1], self.needs.experts, self.needs.mixture_sizes
            )
        weights, options = self.needs.jobs[names[0]].scheme.weights, self.needs.jobs[names[0]].options
        return PlannedSolve(
            source=source,
            tiles=tuple(tiles),
            factor_bytes=factor_bytes(shapes[0][1], is_corrected=is_corrected),
            num_stacked=num_stacked,
            is_corrected=is_corrected,
            searched_kind=grid_kind(weights) if weights.observer in MSE_OBSERVERS else "",
            num_passes=1 if options is None else options.range_passes,
        )

    def _packed(self, name: str, num_rows: int) -> int:
        """The packed bytes of some rows of a weight."""
        scheme, width = self.needs.jobs[name].scheme, self.shape_of(f"{name}.weight")[1]
        scale_dtype = DTYPES[self.source.stored(required_key(self.source, f"{name}.weight")).dtype]
        key = (num_rows, width, id(scheme), scale_dtype)
        if key not in self._packed_bytes:
            layout = rows_layout((num_rows, width), scheme, scale_dtype)
            self._packed_bytes[key] = sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())
        return self._packed_bytes[key]

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


def _compared(num_rows: int, width: int, needs: Needs) -> float:
    """The operations of ||W X||^2 and of ||W X - Q X||^2, see `algorithms.output_squares`; half of a product counts."""
    if needs.hessian or width <= WIDEST_GRAM:
        return 2.0 * min(num_rows, NUM_ROWS) * width**2
    return 2.0 * num_rows * width * NUM_SAMPLED


def grid_kind(args: QuantizationArgs) -> str:
    """Name the kind of a weight's grid: what decides how long it takes to round a weight."""
    shape = str(args.strategy) if is_grouped(args) else "channel"
    search = "-mse" if args.observer in MSE_OBSERVERS else ""
    return f"{args.type}{args.num_bits}-{shape}{search}"


@functools.cache
def panel_bytes(width: int, device_type: str = "cpu") -> int:
    """The bytes of a lane's sum, as it is sent: rows of H from the diagonal on, a panel at a time."""
    most = panel_width(device_type)
    heights = [(min(most, width - left), width - left) for left in range(0, width, most)]
    return sum(rows * columns * FLOAT32 for rows, columns in heights)


@functools.cache
def factor_bytes(width: int, *, is_corrected: bool = False) -> int:
    """The bytes of a factor, and of a correction, as they are sent."""
    return sum(part.nbytes for part in Factored.empty(width, torch.float32, META, is_corrected=is_corrected).parts())
