"""Plan a run from the user's options: the artifact, a recipe, the sizes of the data and a device."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from runtime.arguments import as_path, require_count, require_counts, require_kind, shown
from runtime.artifact.size_expressions import holds
from runtime.data.inputs import DECODER_IDS, IDS
from runtime.errors import DataError, UsageError
from runtime.experts.split import require_artifact
from runtime.host.devices import as_device_type, as_dtype
from runtime.host.limits import available_bytes, resident_bytes
from runtime.host.own_process import settle
from runtime.planning.fit import BATCH, SEQUENCE, Limits, advice, is_ample, require_fit, shortages
from runtime.planning.forecast import Forecast, Workload
from runtime.planning.predict import PlannedRun
from runtime.planning.shapes import ShapeRun
from runtime.quantize.block_tuning import require_tunable
from runtime.quantize.preparation import Prepared, prepare
from runtime.quantize.recipe_modifier import RecipeModifier
from runtime.recipe.recipe import Assignment, Recipe, require_recipe
from runtime.saved_statistics.keeper import StatisticsKeeper
from runtime.saved_statistics.run import RunStatistics
from runtime.saved_statistics.store import StatisticsStore
from runtime.status import doing
from runtime.streaming.activations import Budget
from runtime.streaming.schedule import plan_steps
from runtime.workers.start import launch

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest
    from runtime.chain import Artifact
    from runtime.checkpoint.reader import Checkpoint
    from runtime.planning.machine import Machine
    from runtime.streaming.options import RunOptions
    from runtime.weights.origins import ParameterSource

# The recipe of a plan without one: of all supported recipes, it measures most.
_USUAL = "GPTQModifier: {targets: Linear, scheme: W4A16, ignore: [lm_head]}"
_SEARCHED = (
    "the plan counts the largest candidate; the search before the run measures one subgraph at a time as well, and "
    "keeps the values between all subgraphs for its samples"
)


class Planned(NamedTuple):
    """A plan, compared with the available memory.

    Attributes:
        plan: the predicted cost of the run, by subgraph and in total.
        shortages: a sentence for each resource that is too small; empty if none is, or no limits were given.
        advice: options with which the run fits.
    """

    plan: Forecast
    shortages: list[str]
    advice: list[str]

    @property
    def fits(self) -> bool:
        """Whether the run fits."""
        return not self.shortages


def plan_artifact(  # noqa: D417 - several are described in one line
    artifact: Artifact,
    *,
    num_samples: int,
    seq_len: int,
    batch_size: int,
    recipe: Recipe | None = None,
    dtype: torch.dtype | None = None,
    device_type: str = "cpu",
    budget: Budget | None = None,
    statistics_bytes: int | None = None,
    sizes: Mapping[str, int] | None = None,
    batches: Sequence[Mapping[str, Any]] = (),
    limits: Limits | None = None,
    workers: int = 1,
    bandwidth: float | None = None,
    machine: Machine | None = None,
    weights: Checkpoint | None = None,
    keep_statistics: bool = False,
    statistics: str | os.PathLike[str] | None = None,
) -> Planned:
    """Plan a calibration from the artifact alone, without weights or data, and without running it.

        planned = runtime.plan_artifact(runtime.load(path), num_samples=128, seq_len=2048, batch_size=8, limits=limits)

    Args:
        artifact: the compiled model.
        num_samples, seq_len, batch_size: samples, tokens per sample, and samples that run at a time.
        recipe: what to quantize, and how; None for GPTQ of all Linear modules that can be packed, except the head.
        dtype, device_type: of weights and activations, None for the model's own; `cpu`, or the type of an accelerator.
        budget: memory for the values between subgraphs; None for no bound, on the host.
        statistics_bytes: the largest size of the statistics of a layer's experts at a time; None for no bound.
        sizes, batches: sizes of other dims by the manifest's names; batches whose largest sizes replace all sizes.
        limits: the available memory and disk space, for each worker.
        workers, bandwidth: the processes that share the run, and bytes per second between two; None for a usual link.
        machine, weights: measured rates, and the open checkpoint for the bytes that are read; None to assume both.
        keep_statistics, statistics: whether the run keeps statistics, and the directory of those it is solved from.

    Raises:
        UsageError, DeviceError, RecipeError: for unsupported sizes, wrong types, and a recipe that does not fit.
    """
    artifact, dtype, device_type = require_artifact(artifact), as_dtype(dtype), as_device_type(device_type)
    counts = {"num_samples": num_samples, "seq_len": seq_len, "batch_size": batch_size, "workers": workers}
    _require_options(budget, limits, sizes, statistics_bytes, bandwidth, **counts)
    found, remarks = dim_sizes(artifact.manifest, batch_size, seq_len, sizes or {}, batches)
    work = Workload(
        num_samples=num_samples,
        batch_size=batch_size,
        sizes=found,
        dtype=artifact.run_dtype(dtype),
        device_type=device_type,
        budget=budget or Budget(),
        statistics_bytes=statistics_bytes,
        process_bytes=resident_bytes(),
        workers=workers,
        is_divided=workers > 1,
        bandwidth=bandwidth,
        machine=machine,
    )
    return _planned(artifact, weights, recipe, work, limits or Limits(), remarks, keep_statistics, statistics)


def _prepared(
    artifact: Artifact, weights: Checkpoint | None, recipe: Recipe | None, dtype: torch.dtype
) -> tuple[Recipe, Prepared, list[str]]:
    """Prepare the model for the recipe, or for the usual one with a remark that names it."""
    if recipe is not None:
        recipe = require_recipe(recipe)
        return recipe, prepare(artifact, weights, recipe, dtype), [_SEARCHED] if recipe.search is not None else []
    recipe = Recipe.from_text(_USUAL, "the usual recipe")
    prepared = prepare(artifact, weights, recipe, dtype, assign=_usual_jobs)
    return recipe, prepared, [f"without --recipe: {_USUAL}"]


def _require_options(
    budget: Any, limits: Any, sizes: Any, statistics_bytes: Any, bandwidth: Any, **counts: Any
) -> None:
    for name, number in counts.items():
        require_count(name, number)
    if bandwidth is not None and not (isinstance(bandwidth, (int, float)) and bandwidth > 0):
        raise UsageError(f"bandwidth is {shown(bandwidth)}", hint="it must be bytes per second, above 0")
    require_counts(statistics_bytes=statistics_bytes)
    require_kind("budget", budget, Budget, "it must be a runtime.Budget, in bytes")
    require_kind("limits", limits, Limits, "it must be runtime.Limits, in bytes")
    require_kind("sizes", sizes, Mapping, "it must be a dict from the manifest's names to sizes")


def _saved(prepared: Prepared, is_kept: bool, directory: str | os.PathLike[str] | None) -> RunStatistics:
    """Describe how the planned run uses saved statistics; whether they are of this model is checked by the run."""
    if directory is not None:
        if is_kept:
            raise UsageError("--keep-statistics and --statistics exclude each other", hint="pass one of them")
        return RunStatistics(identity={}, store=StatisticsStore.open(as_path("statistics", directory)))
    return RunStatistics(identity={}, keeper=StatisticsKeeper(prepared.artifact, prepared.model) if is_kept else None)


def _planned(
    artifact: Artifact,
    weights: Checkpoint | None,
    given: Recipe | None,
    work: Workload,
    limits: Limits,
    remarks: Sequence[str],
    is_kept: bool,
    directory: str | os.PathLike[str] | None,
) -> Planned:
    """Plan the work of a run; `is_kept` and `directory` are its saved statistics."""
    recipe, prepared, about_recipe = _prepared(artifact, weights, given, work.dtype)
    saved = _saved(prepared, is_kept, directory)
    settle()
    doing("planning")
    artifact, source, jobs = prepared.artifact, prepared.source, prepared.jobs
    require_tunable(recipe, jobs, work.workers, is_measured_before=saved.store is not None)
    modifier = RecipeModifier(artifact, source, recipe, jobs, is_measured_before=saved.store is not None)
    schedule = plan_steps(artifact, source, jobs, [*saved.modifiers, modifier])
    run = PlannedRun(artifact=artifact, source=source, schedule=schedule, needs=modifier.needs, statistics=saved)
    with ShapeRun(artifact, prepared.model, work.dtype, work.device_type) as shapes:
        plan = run.forecast(work, shapes)
        missing = shortages(plan, limits)
        options = advice(plan, limits, lambda other: run.forecast(other, shapes)) if missing else []
    return Planned(
        plan=replace(plan, remarks=(*plan.remarks, *remarks, *about_recipe)), shortages=missing, advice=options
    )


def require_plan(
    run: PlannedRun,
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    options: RunOptions,
    *,
    dtype: torch.dtype,
    limits: Limits,
    workers: int = 1,
    machine: Machine | None = None,
) -> Forecast:
    """Plan a run that is about to start, and reject it if it does not fit.

    With ample memory the subgraphs are not run on shapes: this takes part of a second, and imports much of torch.

    Args:
        run: its schedule and needs.
        model: the module tree, its parameters on the meta device.
        batches: of the run.
        options: of the run; with `force`, shortages become warnings of the plan.
        dtype: of weights and activations.
        limits: the available memory; the host's includes the memory that the process has already.
        workers: the processes that share the run.
        machine: measured rates for the seconds; None to assume them.

    Raises:
        PlanError: if it does not fit, without `force`.
    """
    work = Workload(
        num_samples=sum(num_rows(batch) for batch in batches),
        batch_size=max((num_rows(batch) for batch in batches), default=1),
        sizes=batch_sizes(run.artifact.manifest, batches),
        dtype=dtype,
        device_type=options.device.type,
        budget=options.activation_memory or Budget.default(options.device),
        statistics_bytes=options.statistics_memory,
        all_tokens=options.moe_calibrate_all_experts,
        process_bytes=resident_bytes(),
        is_padded=any("attention_mask" in batch and not batch["attention_mask"].all() for batch in batches),
        workers=workers,
        machine=machine,
        solve_products=options.solve_products,
        has_graphs=options.cuda_graphs,
    )
    guess = run.forecast(work)
    if is_ample(guess, limits):
        return guess
    with ShapeRun(run.artifact, model, dtype, options.device.type) as shapes:
        plan = run.forecast(work, shapes)
        if not options.force:
            require_fit(plan, limits, lambda other: run.forecast(other, shapes))
    return replace(plan, warnings=tuple(f"warning: the run may not fit: {text}" for text in shortages(plan, limits)))


def memory_here(device: torch.device) -> Limits:
    """The memory of this machine for this process; workers of one machine share what the host has left.

    Disk space is checked later, when the output's size is exact.
    """
    available = available_bytes()
    return Limits(
        device=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None,
        host=None if available is None else available // launch().local_size + resident_bytes(),
    )


def dim_sizes(
    manifest: Manifest,
    batch_size: int,
    seq_len: int,
    given: Mapping[str, int],
    batches: Sequence[Mapping[str, Any]] = (),
) -> tuple[dict[str, int], list[str]]:
    """Return the size of each of the manifest's dims, and a remark for each size that was assumed.

    Other inputs of tokens (a decoder's) are as long as the text; of anything else, each sample has one. Those of given
    batches are known.

    Raises:
        UsageError: for a size that the artifact does not have or does not support.
    """
    if batches:
        return batch_sizes(manifest, batches), []
    dims = {dim.name: dim for dim in manifest.dims}
    for name in given:
        if name not in dims:
            raise UsageError(
                f"--size names {name!r}, which is not a size of the artifact", hint=f"it has {', '.join(dims)}"
            )
    sizes = {BATCH: batch_size, SEQUENCE: seq_len}
    assumed = []
    for entry in manifest.inputs:
        for place, size in enumerate(entry.shape):
            if isinstance(size, str) and size in dims and size not in (*sizes, *given):
                is_tokens = place == 1 and len(entry.shape) == 2 and entry.dtype.startswith(("int", "bool"))
                sizes[size] = seq_len if is_tokens else max(batch_size if place == 0 else 1, dims[size].min)
                if not is_tokens:
                    assumed.append(f"assumed {size} = {sizes[size]} (change it with --size {size}=N)")
    sizes |= given
    sizes |= {name: max(dim.min, 1) for name, dim in dims.items() if name not in sizes}
    for name, dim in dims.items():
        if sizes[name] < dim.min or 0 <= dim.max < sizes[name]:
            bounds = f"{dim.min} to {dim.max}" if dim.max >= 0 else f"{dim.min} or more"
            raise UsageError(f"the artifact supports a {name} of {bounds}, not {sizes[name]}")
    for condition in manifest.conditions:
        if not assumed and not holds(condition, sizes):
            raise UsageError(
                f"the artifact is valid only if {condition}", hint="choose another --seq-len or --batch-size"
            )
    return sizes, assumed


def batch_sizes(manifest: Manifest, batches: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return the largest size of each dim in the batches of a run."""
    sizes: dict[str, int] = {dim.name: 1 for dim in manifest.dims}
    for batch in batches:
        for entry in manifest.inputs:
            shape = batch[entry.name].shape
            if len(shape) != len(entry.shape):
                raise DataError(f"{entry.name} has shape {list(shape)}, but the artifact expects {list(entry.shape)}")
            for name, size in zip(entry.shape, shape, strict=True):
                if isinstance(name, str):
                    sizes[name] = max(sizes.get(name, 1), int(size))
    return sizes


def num_rows(batch: Mapping[str, Any]) -> int:
    """Return the number of samples of a batch; images and patches are not counted by tokens."""
    tokens = [batch[name] for name in (IDS, DECODER_IDS) if name in batch]
    found = (value for value in (*tokens, *batch.values()) if isinstance(value, torch.Tensor) and value.dim())
    return next((len(value) for value in found), 1)


def _usual_jobs(
    artifact: Artifact, model: nn.Module, _: ParameterSource, recipe: Recipe
) -> tuple[dict[str, Assignment], list[str]]:
    """Apply the usual recipe to the modules that support it; none in a model without Linear modules."""
    used = {name for subgraph in artifact.subgraphs for name in subgraph.entry.parameters}
    entries = artifact.manifest.parameters
    tied = {entry.tied_to for entry in entries.values()}
    linears = {
        name: type(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in used and not name.endswith("lm_head")
    }
    fit = {
        name: kind
        for name, kind in linears.items()
        if not entries[f"{name}.weight"].tied_to
        and f"{name}.weight" not in tied
        and entries[f"{name}.weight"].shape[1] % 128 == 0
    }
    return (recipe.assign(fit) if fit else {}), []
