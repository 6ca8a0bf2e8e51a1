"""Predict the memory, traffic and disk space of a calibration, subgraph by subgraph, from the schedule of its run.

    shapes      the artifact's code runs on tensors without content (`planning.shapes`)
    costs       statistics, solves and rescaling by formula (`planning.costs`)
    peaks       of the schedule's steps, as `streaming.run` executes them

For each subgraph, with its weights W, its statistics S and the values A that wait for it and for later ones:

    while batches run    W + the next subgraph's W + S + working memory of one batch and copies of two batches' inputs
    while it is solved   W + the next subgraph's W + the solve of modules + the part of S that these and later ones need

Both are on the device; the values A, and the process itself, are on the host. If the device is the CPU, all of it is on
the host, the next subgraph's W stays on disk, and so do tables that are only looked up in; these count while batches
run. W includes what earlier subgraphs leave in memory for later ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from runtime.algorithms.hessian import FLOAT32, hessian_bytes
from runtime.experts.split import SplitArtifact
from runtime.host.transfers import CHUNK_BYTES
from runtime.planning.costs import (
    Sums,
    bounded_sums,
    original_input_bytes,
    parameter_bytes,
    quantization_bytes,
    rounding_itemsize,
    statistics_bytes,
)
from runtime.planning.distribution import Distribution, share
from runtime.planning.fit import BATCH, with_batch
from runtime.planning.forecast import Forecast, SubgraphForecast, Workload
from runtime.planning.saved_files import reading_bytes, saved_bytes
from runtime.planning.seconds import run_seconds, step_seconds
from runtime.planning.shapes import Footprint, ShapeRun, storage_bytes
from runtime.planning.step_work import StepDescriber
from runtime.planning.tuning import tuning_cost
from runtime.planning.values import ShapeValues
from runtime.planning.work import StepWork
from runtime.quantize.needs import changed_parameters
from runtime.quantize.statistics import Needs
from runtime.saved_statistics.keeper import EVERYTHING
from runtime.status import doing
from runtime.streaming.options import BFLOAT16
from runtime.weights.stream import LoadOrder

if TYPE_CHECKING:
    from runtime.chain import Artifact
    from runtime.quantize.needs import RecipeNeeds
    from runtime.saved_statistics.run import RunStatistics
    from runtime.streaming.schedule import Schedule, Step
    from runtime.weights.origins import ParameterSource

# Code and buffers of the libraries that multiply on the CPU, loaded with the first batch.
KERNEL_BYTES = 20 * 10**6
# The ring of pinned memory through which weights and values are copied from and to a GPU.
PINNED_BYTES = 6 * CHUNK_BYTES
# Code that cannot run on shapes is assumed to hold this many times its inputs, its outputs and those of its Linears.
_GUESSED_TIMES = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """A run that is not started: everything about it but its workload.

    Attributes:
        artifact: the compiled model.
        source: the origins of its parameters.
        schedule: the steps.
        needs: the statistics that the recipe needs, and the groups that it rescales.
        statistics: how it uses saved statistics; None if it does not.
    """

    artifact: Artifact
    source: ParameterSource
    schedule: Schedule
    needs: RecipeNeeds
    statistics: RunStatistics | None = None

    def forecast(self, work: Workload, shapes: ShapeRun | None = None) -> Forecast:
        """Predict the cost of the run.

        Args:
            work: the sizes of the data, and the device.
            shapes: runs the artifact's code on shapes, and caches the results for several plans; without it the
                working memory is guessed.
        """
        work = self._within_lanes(work)
        planner = _Planner(self, work, shapes)
        count = len(self.schedule.steps)
        steps = []
        for step in self.schedule.steps:
            doing(f"planning: layer {step.index + 1} of {count}")
            steps.append(planner.step(step))
        distribution = None
        if work.is_divided:
            distribution = Distribution(
                num_workers=work.workers, num_lanes=work.num_lanes, rates=work.rates, works=tuple(planner.works)
            )
        guessed = sum(step.is_estimated for step in steps)
        remarks = [f"{guessed} subgraphs depend on values, so their working memory is a guess"] if guessed else []
        rest = sum(stored.num_bytes for stored in self.schedule.rest)
        written = sum(step.written for step in steps) + rest
        read = sum(step.read for step in steps) + rest
        seconds = run_seconds(
            [step.seconds for step in steps],
            work.rates,
            num_parameters=len(self.artifact.manifest.parameters),
            passed_bytes=rest,
            read_bytes=read,
            num_bytes=written,
            rotated=sum(self.source.computed(key) for step in self.schedule.steps for key in step.reads),
        )
        return Forecast(
            work=work,
            steps=tuple(steps),
            read_bytes=read,
            output_bytes=written,
            seconds=seconds,
            remarks=tuple(remarks),
            distribution=distribution,
        )

    def _within_lanes(self, work: Workload) -> Workload:
        """Cut batches as the run does: none has samples of two lanes."""
        least = next((dim.min for dim in self.artifact.manifest.dims if dim.name == BATCH), work.batch_size)
        size = math.ceil(work.num_samples / work.num_lanes)
        return with_batch(work, size) if least <= size < work.batch_size else work


class _Planner:
    def __init__(self, run: PlannedRun, work: Workload, shapes: ShapeRun | None) -> None:
        artifact = run.artifact
        self.source, self.needs, self.work, self.shapes = run.source, run.needs, work, shapes
        self.steps = run.schedule.steps
        self.keeper = run.statistics.keeper if run.statistics is not None else None
        self.store = run.statistics.store if run.statistics is not None else None
        self.all_inputs = artifact.inputs(all_tokens=True) if isinstance(artifact, SplitArtifact) else {}
        self.parameters = artifact.manifest.parameters
        self.values = ShapeValues(artifact.manifest, work.sizes, work.dtype, run.schedule.lasting)
        self.rows = work.batch_size * max(work.sizes.values(), default=1)
        self.vocabulary = (artifact.manifest.limits.get("vocab_size"),)
        self.experts = artifact.inputs(all_tokens=work.all_tokens) if isinstance(artifact, SplitArtifact) else {}
        self.order = LoadOrder(run.source, {step.index: step.loads for step in self.steps}, work.device_type)
        self.describer = StepDescriber(run.needs, run.source, lambda name: self.parameters[name].shape, work)
        self.is_rotated = any(map(self._rotated, self.steps))
        self.works: list[StepWork] = []
        self._known: dict[Hashable, tuple[int, int, StepWork]] = {}

    def step(self, step: Step) -> SubgraphForecast:
        work = self.work
        needs = self.needs.of(step.modules, all_tokens=work.all_tokens)
        measured = {name: replace(need, drift=need.drift and step.is_split) for name, need in needs.items() if need}
        kept = dict.fromkeys(self.keeper.of(step.subgraph.entry), EVERYTHING) if self.keeper is not None else {}
        footprint, working, waiting = self._batches(step, list(kept or measured)) if step.is_run else (None, 0, 0)
        weights, tables, on_host = self._weights(step)
        statistics, solve, found = self._quantization(step, measured, kept, footprint)
        saved = self._saved_bytes(step, kept, footprint)
        tuning = tuning_cost(step, self.needs.jobs, self.parameters, self.order.tables, footprint, work)
        solve = max(solve, statistics + tuning.num_bytes) if tuning.num_bytes else solve
        found = replace(found, tuned=tuning.work)
        on_host += tuning.kept_bytes
        self.works.append(found)
        own = share(found, work.num_lanes, work.workers, work.rates)
        solve += own.buffer_bytes
        is_ahead = step.goes_on and not work.is_cpu
        following = self._bytes(self.steps[step.index + 1].loads) if is_ahead else 0
        graphs = working if work.has_graphs and step.goes_on else 0  # a graph keeps the values of a batch
        device = weights - tables + following + graphs + max(tables + working + statistics, solve)
        values_on_device, values_on_host = work.split(waiting)
        on_host += values_on_host
        kernels = KERNEL_BYTES if step.is_run else 0
        host = on_host + (device + kernels if work.is_cpu else following + PINNED_BYTES)
        return SubgraphForecast(
            label=step.label,
            weights=weights,
            statistics=statistics,
            solve=solve,
            working=working,
            activations=waiting,
            read=self._read_bytes(step),
            written=step.num_written_bytes,
            device=device + (on_host if work.is_cpu else values_on_device),
            host=work.process_bytes + max(host, self._proof_bytes(step)),
            num_modules=len(step.modules),
            runs=step.is_run,
            is_estimated=step.is_run and footprint is None,
            seconds=step_seconds(own, work.rates),
            sent=sum(own.sent_bytes),
            most_sent=max(own.sent_bytes),
            saved=saved,
        )

    def _quantization(
        self, step: Step, measured: Mapping[str, Needs], kept: Mapping[str, Needs], footprint: Footprint | None
    ) -> tuple[int, int, StepWork]:
        """The bytes of statistics and of the peak of solves, and the work; equal layers are planned once.

        Statistics that are `kept` are measured first, and those that the recipe needs are read from disk then.
        """
        kind = self._kind(step, measured, footprint), tuple(name.removeprefix(f"{step.label}.") for name in kept)
        if kind not in self._known:
            work = self.work
            sums: Sums = {**self._sums(footprint, measured, step), **self._representative_sums(step)}
            statistics, passes = bounded_sums(sums, self.experts, self._bound)
            widths = {names: self._width(names[0].partition(" ")[0]) for names in sums}
            has_drift = any(need.drift for need in measured.values())  # its lane is freed before the solves
            all_sums, needs = sums, measured
            reading = statistics + reading_bytes(list(widths.values())) if kept or self.store is not None else 0
            solve = quantization_bytes(
                step.modules,
                self.needs,
                lambda name: self.parameters[name].shape,
                {names: size - has_drift * hessian_bytes(widths[names]) for names, size in sums.items()},
                statistics,
                work.device_type,
                has_copies=work.solve_products == BFLOAT16,
                is_split=step.is_split,
            )
            if kept:
                all_sums, needs = self._sums(footprint, kept, step), kept
                statistics, passes = bounded_sums(all_sums, self.experts, self._bound)
                passes += not work.all_tokens and any(name in self.experts for name in kept)
            found = self.describer.describe(
                step,
                needs,
                all_sums,
                footprint,
                loaded_bytes=self._bytes(step.loads or [f"{name}.weight" for name in step.modules]),
                read_bytes=self._read_bytes(step),
                rotated=self._rotated(step),
                num_passes=passes,
            )
            if self.store is not None:  # nothing is summed up
                inputs = (replace(one, num_tokens=0.0, lane_bytes=0, small_bytes=0) for one in found.inputs)
                found = replace(found, inputs=tuple(inputs))
            self._known[kind] = statistics, max(solve, reading), found
        return self._known[kind]

    def _saved_bytes(self, step: Step, kept: Mapping[str, Needs], footprint: Footprint | None) -> int:
        """The bytes of the statistics of a step on disk."""
        if self.keeper is None:
            return 0
        passes = [(self.work.all_tokens, [*self._sums(footprint, kept, step)])]
        experts = [name for name in kept if name in self.experts]
        if experts and not self.work.all_tokens:
            passes.append((True, self._guessed(experts, self.all_inputs)))
        caches = self.keeper.caches_of(step.subgraph.entry)
        return saved_bytes(step.label, passes, self._width, self.experts, caches, self.work)

    def _kind(self, step: Step, measured: Mapping[str, Needs], footprint: Footprint | None) -> Hashable:
        """A value that is equal for steps with the same costs: their names differ in the first part alone."""
        prefix = f"{step.label}."

        def own(name: str) -> str:
            return name.removeprefix(prefix)

        def shape(name: str) -> tuple[int, ...] | None:
            return self.parameters[name].shape if name in self.parameters else None

        jobs = [self.needs.jobs[name] for name in step.modules]
        groups = tuple(
            (id(transform), tuple((own(name), shape(name)) for name in changed_parameters(rescaling.group)))
            for transform, rescaling in self.needs.rescaled(step.modules)
        )
        return (
            tuple((own(name), shape(f"{name}.weight"), measured.get(name)) for name in step.modules),
            tuple((own(name), need) for name, need in measured.items()),
            tuple((id(job.scheme), job.algorithm, job.options, job.clip) for job in jobs),
            groups,
            None if footprint is None else footprint.described(own),
            (step.is_measured, step.is_run, step.goes_on, step.num_written_bytes),
            (step.compares, step.is_split, step.is_split_after),
            (self._bytes(step.loads), self._read_bytes(step), self._rotated(step)),
        )

    def _rotated(self, step: Step) -> int:
        return sum(map(self.source.computed, step.reads))

    def _proof_bytes(self, step: Step) -> int:
        """The bytes of a subgraph's weights in float64, while rotations are proved before the run."""
        names = step.subgraph.entry.parameters
        return parameter_bytes(self.parameters, names, torch.float64) if self.is_rotated else 0

    def _read_bytes(self, step: Step) -> int:
        return sum(map(self.source.source_bytes, step.reads))

    def _batches(self, step: Step, measured: Sequence[str]) -> tuple[Footprint | None, int, int]:
        """Run a batch on shapes; returns its footprint, the working memory, and the values of all batches."""
        subgraph, footprint = step.subgraph, None
        inputs = self.values.take(subgraph.entry)
        before = self.values.total(self.work)
        if self.shapes is not None:
            called = step.called(self.needs.jobs)
            rounded = {name: rounding_itemsize(job, self.work.dtype) for name, job in called.items()}
            footprint = self.shapes(subgraph, inputs, measured, rounded)
        working = self._working(footprint, inputs, step)
        if step.compares and step.is_split:
            rows = [(self.rows, self._width(name)) for name in measured]
            if footprint is not None:
                seen = zip(footprint.seen, footprint.seen_rows, strict=True)
                rows = [(count, self._width(names[0])) for names, count in seen]
            working += storage_bytes(inputs) + original_input_bytes(rows, self.work.dtype)
        if step.goes_on:
            self.values.advance(subgraph.entry, footprint, is_split=step.is_split_after)
            if step.is_split_after:  # its outputs are stored before the others
                before += self.values.originals(subgraph.entry.output_names, self.work)
        return footprint, working, max(before, self.values.total(self.work))

    def _weights(self, step: Step) -> tuple[int, int, int]:
        """The bytes of weights, of the tables among them, and of checkpoint tensors that the host keeps besides."""
        if not step.is_run and self.store is not None:
            return self._together(step), 0, 0
        if not step.is_run:
            return max((self._bytes([f"{name}.weight"]) for name in step.modules), default=0), 0, 0
        own = dict.fromkeys(step.subgraph.entry.parameters)
        earlier = self.steps[step.index - 1].keeps if step.index else frozenset()
        weights = self._bytes([*own, *(name for name in earlier if name not in own)])
        # On the CPU a parameter is the kept tensor itself.
        own_keys = {key for name in own for key in self.source.origins[name].keys} if self.work.is_cpu else ()
        kept = [key for key in self.order.kept(step.index) if key not in own_keys]
        tables = self._bytes([name for name in own if name in self.order.tables])
        return weights, tables, sum(self.source.stored(key).num_bytes for key in kept)

    def _together(self, step: Step) -> int:
        """The bytes of the weights that a step from saved statistics reads at a time: of modules with one input, or all
        if they are rescaled, because searches read them and they stay until they are quantized.
        """
        if self.needs.rescaled(step.modules):
            return self._bytes([*(f"{name}.weight" for name in step.modules), *step.loads])
        measured = {name: need for name, need in self.needs.of(step.modules).items() if need}
        groups = [*self._sums(None, measured, step), *((name,) for name in step.modules)]
        return max((self._bytes([f"{name}.weight" for name in names]) for names in groups), default=0)

    def _bytes(self, names: Sequence[str]) -> int:
        return parameter_bytes(self.parameters, names, self.work.dtype)

    def _sums(self, footprint: Footprint | None, measured: Mapping[str, Needs], step: Step) -> Sums:
        """The bytes of each sum, by the modules that share it."""
        together = functools.reduce(Needs.__or__, measured.values(), Needs())  # as `statistics` shares sums
        groups: list[tuple[str, ...]] = []
        if self.store is not None and measured:
            groups = self.store.step(step.index).groups(list(measured), all_tokens=self.work.all_tokens)
        elif footprint is not None:
            groups = [tuple(name for name in names if name in measured) for names in footprint.seen]
        known = {name for names in groups for name in names}
        guessed = [
            name
            for name in measured
            if self.store is None and (footprint is None or (name not in known and name in self.experts))
        ]
        return {
            names: statistics_bytes(self._width(names[0]), together, self.work.dtype, self.work.device_type)
            for names in (*groups, *self._guessed(guessed, self.experts))
            if names
        }

    def _guessed(self, names: Iterable[str], inputs: Mapping[str, Hashable]) -> list[tuple[str, ...]]:
        """Group modules that code without shapes calls: modules of one parent and width mostly see the same tensor."""
        shared: dict[tuple[Any, int], list[str]] = {}
        for name in names:
            shared.setdefault((inputs.get(name) or name.rpartition(".")[0], self._width(name)), []).append(name)
        return [tuple(group) for group in shared.values()]

    def _representative_sums(self, step: Step) -> Sums:
        """The sums of experts that are measured on all tokens besides their own."""
        needs = {} if self.work.all_tokens else self.needs.representatives(step.modules)
        return {
            (f"{name} on all tokens",): statistics_bytes(
                self._width(name), need, self.work.dtype, self.work.device_type
            )
            for name, need in needs.items()
        }

    def _width(self, module: str) -> int:
        return self.parameters[f"{module}.weight"].shape[1]

    @property
    def _bound(self) -> int | None:
        """The bound of statistics at a time; a layer whose rounding is tuned is measured as a whole."""
        is_tuned = any(job.tuning is not None for job in self.needs.jobs.values())
        return None if is_tuned else self.work.statistics_bytes

    def _working(self, footprint: Footprint | None, inputs: Mapping[str, Any], step: Step) -> int:
        taken = storage_bytes(inputs)
        if footprint is not None:
            return footprint.working_bytes + 2 * taken
        passed = taken + storage_bytes(self.values.described(step.subgraph.entry.output_names))
        shapes = [self.parameters[name].shape for name in step.subgraph.entry.parameters]
        width = sum(shape[0] for shape in shapes if len(shape) == 2 and shape[0] not in self.vocabulary)
        return _GUESSED_TIMES * passed + self.rows * width * FLOAT32
