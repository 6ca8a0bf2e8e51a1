"""What a calibration will take, before it runs: memory, traffic, disk, subgraph by subgraph, without weights.

    shapes      the artifact's own code runs on tensors without content (`planning.shapes`)
    costs       statistics, solves and stored tensors by formula (`planning.costs`)
    peaks       of the steps of each subgraph, as `calibration` takes them

For each subgraph, with its weights W, its statistics S and the values A that wait for it and for later ones:

    while batches run    W + the next subgraph's W + S + working memory of one batch and copies of two batches' inputs
    while it is solved   W + the next subgraph's W + the solve of modules + what of S they and later ones need

Both on the device; on the host the values A, and the process itself. Where the device is the CPU all is the host's, the
next subgraph's W stays on disk, and so do tables that are only looked up in, which count while batches run.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from runtime.algorithms.hessian import FLOAT32
from runtime.experts.split import SplitArtifact
from runtime.planning.costs import parameter_bytes, rounding_itemsize, statistics_bytes, stored_bytes
from runtime.planning.modifying import Sums, modifying_bytes
from runtime.planning.shapes import Footprint, ShapeRun, storage_bytes
from runtime.planning.values import ShapeValues
from runtime.planning.workload import Workload
from runtime.quantize.statistics import Needs

if TYPE_CHECKING:
    from runtime.chain import Artifact, LoadedSubgraph
    from runtime.quantize.needs import RecipeNeeds
    from runtime.streaming.work import StepModifier

# What libraries that multiply on the CPU load with the first batch: their code, and buffers.
KERNEL_BYTES = 20 * 10**6
# Code that cannot run on shapes is taken to hold so many times what goes in and comes out, and what its Linear modules
# return.
_GUESSED_TIMES = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class SubgraphForecast:
    """One subgraph's share, in bytes.

    Attributes:
        label: its targets.
        weights, statistics, working: see this module's head; `working` with the copies of inputs.
        solve: the most that rescaling and solving takes, with the statistics that are there then.
        activations: values of all batches that wait while it runs.
        read, written: of the original and the new checkpoint.
        device, host: peaks.
        num_modules: how many modules are quantized.
        runs: whether batches run through it.
        is_estimated: whether its working memory is a guess, for its code needs values.
    """

    label: str
    weights: int
    statistics: int
    solve: int
    working: int
    activations: int
    read: int
    written: int
    device: int
    host: int
    num_modules: int
    runs: bool
    is_estimated: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a run will take. Totals are peaks for memory, and sums for traffic.

    Attributes:
        work: what was planned.
        steps: one for each subgraph.
        read_bytes: of the original checkpoint.
        output_bytes: of the new one.
        remarks: what the figures rest on.
        warnings: what does not fit, of a run that goes on all the same.
    """

    work: Workload
    steps: tuple[SubgraphForecast, ...]
    read_bytes: int
    output_bytes: int
    remarks: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def device_bytes(self) -> int:
        """Peak on the device that subgraphs run on; on the CPU this is part of the host's."""
        return max(step.device for step in self.steps)

    @property
    def host_bytes(self) -> int:
        """Peak resident memory of the process."""
        return max(step.host for step in self.steps)

    @property
    def activation_bytes(self) -> int:
        """The most that values between subgraphs come to, wherever they lie."""
        return max(step.activations for step in self.steps)

    @property
    def statistics_bytes(self) -> int:
        """The statistics of the subgraph that has most."""
        return max(step.statistics for step in self.steps)

    @property
    def held_bytes(self) -> int:
        """What of the values between subgraphs lies in the host's memory."""
        return _split(self.activation_bytes, self.work)[1]

    @property
    def spilled_bytes(self) -> int:
        """What of them lies on disk."""
        return self.activation_bytes - sum(_split(self.activation_bytes, self.work))

    @property
    def disk_bytes(self) -> int:
        """What the run takes on disk."""
        return self.output_bytes + self.spilled_bytes


def plan_run(
    artifact: Artifact,
    needs: RecipeNeeds,
    work: Workload,
    *,
    stored: Mapping[str, int] | None = None,
    shapes: ShapeRun | None = None,
    modifiers: Sequence[StepModifier] = (),
) -> Forecast:
    """Say what a calibration takes.

    Args:
        artifact: the compiled model.
        needs: what is done to which module, and measured for it.
        work: the data's sizes, and where it runs.
        stored: bytes of each parameter in the checkpoint that is at hand; None for what the manifest states.
        shapes: runs its code on shapes, and remembers what it found, for several plans; without it the working memory
            is guessed.
        modifiers: the user's own; what they hold nobody knows, but batches run for those that measure.
    """
    planner = _Planner(artifact, needs, work, shapes, stored, modifiers)
    steps = tuple(planner.step(index) for index in range(len(artifact.subgraphs)))
    guessed = sum(step.is_estimated for step in steps)
    remarks = [f"{guessed} subgraphs depend on values, so their working memory is a guess"] if guessed else []
    return Forecast(
        work=work,
        steps=steps,
        read_bytes=planner.total_read,
        output_bytes=planner.total_written,
        remarks=tuple(remarks),
    )


class _Planner:
    def __init__(
        self,
        artifact: Artifact,
        needs: RecipeNeeds,
        work: Workload,
        shapes: ShapeRun | None,
        stored: Mapping[str, int] | None,
        modifiers: Sequence[StepModifier],
    ) -> None:
        self.artifact, self.needs, self.work, self.shapes = artifact, needs, work, shapes
        self.jobs, self.modifiers = needs.jobs, modifiers
        self.parameters = artifact.manifest.parameters
        self.stored = stored or {name: entry.bytes for name, entry in self.parameters.items() if not entry.tied_to}
        self.values = ShapeValues(artifact.manifest, work.sizes, work.dtype)
        self.dtype: torch.dtype = artifact.run_dtype(None)
        self.sizes: dict[tuple[tuple[int, ...], int], int] = {}
        self.rows = work.batch_size * max(work.sizes.values(), default=1)
        self.vocabulary = (artifact.manifest.limits.get("vocab_size"),)
        self._experts = artifact.inputs(all_tokens=work.all_tokens) if isinstance(artifact, SplitArtifact) else {}
        self.read: dict[str, None] = {}
        self.done: dict[str, None] = {}
        measured = [index for index, subgraph in enumerate(artifact.subgraphs) if self._measures(subgraph)]
        self.last_measured = max(measured, default=-1)
        self.looked_up = self._left_on_disk() if work.device_type == "cpu" else frozenset()
        self.done.clear()
        self.total_read = sum(self.stored.values())
        self.total_written = sum(self._written(name) for name in self.stored)

    def step(self, index: int) -> SubgraphForecast:
        subgraph, work = self.artifact.subgraphs[index], self.work
        modules = self._new(subgraph)
        measured = {name: need for name, need in self.needs.of(modules).items() if need}
        together = functools.reduce(Needs.__or__, measured.values(), Needs())  # as `statistics` shares sums
        runs = index <= self.last_measured
        inputs = self.values.take(subgraph.entry)
        footprint = None
        if runs and self.shapes is not None:
            rounded = {name: rounding_itemsize(self.jobs[name], work.dtype) for name in self._called(subgraph)}
            footprint = self.shapes(subgraph, inputs, measured, rounded)
        before = self.values.total(work)
        working = self._working(footprint, inputs, subgraph) if runs else 0
        if index < self.last_measured:
            self.values.advance(subgraph.entry, footprint)
        waiting = max(before, self.values.total(work)) if runs else 0
        sums = self._sums(footprint, list(measured), together)
        statistics = self._bounded(sums)
        solve = modifying_bytes(modules, self.needs, lambda name: self.parameters[name].shape, sums, statistics)
        tables = self._tables(index) if runs else 0
        weights = self._weights(index) if runs else max((self._weight(name) for name in modules), default=0)
        is_ahead = work.device_type != "cpu" and index < self.last_measured
        following = self._weights(index + 1) if is_ahead else 0
        device = weights - tables + following + max(tables + working + statistics, solve)
        on_device, on_host = _split(waiting, work)
        is_cpu = work.device_type == "cpu"
        fresh = [name for name in subgraph.entry.parameters if name in self.stored and name not in self.read]
        self.read.update(dict.fromkeys(fresh))
        return SubgraphForecast(
            label=", ".join(subgraph.entry.targets) or "no target",
            weights=weights,
            statistics=statistics,
            solve=solve,
            working=working,
            activations=waiting,
            read=sum(self.stored[name] for name in fresh),
            written=sum(self._written(name) for name in fresh),
            device=device + (on_host if is_cpu else on_device),
            host=work.process_bytes + on_host + (device + (KERNEL_BYTES if runs else 0) if is_cpu else following),
            num_modules=len(modules),
            runs=runs,
            is_estimated=runs and footprint is None,
        )

    def _new(self, subgraph: LoadedSubgraph) -> list[str]:
        """The modules that are quantized with this subgraph, each once."""
        names = [name.removesuffix(".weight") for name in subgraph.entry.parameters if name.endswith(".weight")]
        new = [name for name in names if name in self.jobs and name not in self.done]
        self.done.update(dict.fromkeys(new))
        return new

    def _measures(self, subgraph: LoadedSubgraph) -> bool:
        modules = self._new(subgraph)
        own = bool(modules) and any(modifier.measures(modules) for modifier in self.modifiers)
        return own or self.needs.measures(modules) or self.needs.measures_cache(subgraph.entry)

    def _called(self, subgraph: LoadedSubgraph) -> list[str]:
        """All modules of a subgraph that something is done to, be it with this one or an earlier one."""
        names = (name.removesuffix(".weight") for name in subgraph.entry.parameters)
        return [name for name in names if name in self.jobs]

    def _shape(self, module: str) -> tuple[int, ...]:
        return self.parameters[f"{module}.weight"].shape

    def _weight(self, module: str) -> int:
        return parameter_bytes(self.parameters, [f"{module}.weight"], self.work.dtype)

    def _weights(self, index: int) -> int:
        return parameter_bytes(self.parameters, self.artifact.subgraphs[index].entry.parameters, self.work.dtype)

    def _left_on_disk(self) -> frozenset[str]:
        """The tables that the checkpoint has in the dtype of the run, as far as its size tells, and that nobody loads
        as a whole under another name.
        """
        tables = self.artifact.manifest.lookups
        loaded = (name for part in self.artifact.subgraphs[: self.last_measured + 1] for name in part.entry.parameters)
        whole = {self.parameters[name].tied_to or name for name in loaded if name not in tables}
        used = {name: parameter_bytes(self.parameters, [name], self.work.dtype) for name in tables}
        return frozenset(name for name in tables if name not in whole and self.stored.get(name) == used[name])

    def _tables(self, index: int) -> int:
        """What of a subgraph's weights stays on disk."""
        names = [name for name in self.artifact.subgraphs[index].entry.parameters if name in self.looked_up]
        return parameter_bytes(self.parameters, names, self.work.dtype)

    def _sums(self, footprint: Footprint | None, measured: Sequence[str], together: Needs) -> Sums:
        """The bytes of each sum, by the modules that share it."""

        def size(name: str) -> int:
            return statistics_bytes(self._shape(name)[1], together, self.work.dtype)

        seen = {} if footprint is None else {names: size(names[0]) for names, _ in footprint.seen}
        known = {name for names in seen for name in names}
        shared: dict[tuple[Any, int], list[str]] = {}
        for name in measured:
            if footprint is None or (name not in known and name in self._experts):
                # Modules of one parent and width mostly see the same tensor.
                owner = self._experts.get(name) or name.rpartition(".")[0]
                shared.setdefault((owner, self._shape(name)[1]), []).append(name)
        return seen | {tuple(names): size(names[0]) for names in shared.values()}

    def _bounded(self, hessians: Sums) -> int:
        """What is held at a time: experts are measured in groups, of one at least."""
        experts = {names: size for names, size in hessians.items() if names[0] in self._experts}
        total = sum(experts.values())
        others = sum(hessians.values()) - total
        bound = self.work.statistics_bytes
        if bound is None:
            return others + total
        largest: dict[tuple[str, int], int] = {}
        for names, size in experts.items():
            module, position, _ = self._experts[names[0]]
            largest[module, position] = max(size, largest.get((module, position), 0))
        return others + min(total, max(bound, sum(largest.values())))

    def _working(self, footprint: Footprint | None, inputs: Mapping[str, Any], subgraph: LoadedSubgraph) -> int:
        taken = storage_bytes(inputs)
        if footprint is not None:
            return footprint.working_bytes + 2 * taken
        passed = taken + storage_bytes(self.values.described(subgraph.entry.output_names))
        shapes = [self.parameters[name].shape for name in subgraph.entry.parameters]
        width = sum(shape[0] for shape in shapes if len(shape) == 2 and shape[0] not in self.vocabulary)
        return _GUESSED_TIMES * passed + self.rows * width * FLOAT32

    def _written(self, name: str) -> int:
        module, _, own = name.rpartition(".")
        if own != "weight" or module not in self.jobs:
            return self.stored[name]
        shape = self.parameters[name].shape
        key = (shape, id(self.jobs[module].scheme))
        if key not in self.sizes:
            self.sizes[key] = stored_bytes(shape, self.jobs[module].scheme, self.dtype)
        return self.sizes[key]


def _split(activations: int, work: Workload) -> tuple[int, int]:
    """What of the values between subgraphs lies on the device, and what on the host."""
    budget = work.budget
    on_device = 0 if work.device_type == "cpu" else _within(activations, budget.device_bytes)
    return on_device, _within(activations - on_device, budget.host_bytes)


def _within(size: int, limit: int | None) -> int:
    return size if limit is None else min(size, limit)
