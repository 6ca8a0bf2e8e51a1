"""From what a user states to a plan: sizes, a recipe, and where it is to run; nothing of it needs weights or data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from runtime.arguments import require_count, require_counts, require_kind
from runtime.artifact.size_expressions import holds
from runtime.errors import DataError, UsageError
from runtime.experts.split import require_artifact
from runtime.host.devices import as_device_type, as_dtype
from runtime.host.memory import available_bytes, resident_bytes
from runtime.planning.fit import Limits, advice, is_ample, require_fit, shortages
from runtime.planning.forecast import Forecast, plan_run
from runtime.planning.shapes import ShapeRun
from runtime.planning.workload import Workload
from runtime.quantize.needs import RecipeNeeds
from runtime.quantize.preparation import Prepared, prepare
from runtime.recipe.recipe import Assignment, Recipe, require_recipe
from runtime.streaming.activations import Budget

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest
    from runtime.chain import Artifact
    from runtime.streaming.options import RunOptions
    from runtime.streaming.work import StepModifier
    from runtime.weights.parameters import Weights

BATCH, SEQUENCE = "batch", "sequence"
# What is planned without a recipe: of all that is offered it measures most.
_USUAL = "GPTQModifier: {targets: Linear, scheme: W4A16, ignore: [lm_head]}"


class Planned(NamedTuple):
    """A plan, and how it compares with what there is.

    Attributes:
        plan: what the run takes, subgraph by subgraph and in all.
        shortages: what does not fit, a sentence each; empty where all does, or no limits were given.
        advice: options that would make it fit.
    """

    plan: Forecast
    shortages: list[str]
    advice: list[str]

    @property
    def fits(self) -> bool:
        """Whether a run would go through."""
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
    limits: Limits | None = None,
) -> Planned:
    """Plan a calibration by the artifact alone: nothing runs, and no weights are needed.

        planned = runtime.plan_artifact(runtime.load(path), num_samples=128, seq_len=2048, batch_size=8,
                                        limits=runtime.Limits(device=24 * 2**30))
        planned.fits, planned.plan.device_bytes, planned.advice

    Args:
        artifact: the compiled model.
        num_samples, seq_len, batch_size: samples, tokens of each, and samples that run at a time.
        recipe: what is to be done; None for GPTQ of all Linear modules that can be packed, but the head.
        dtype: of weights and activations; None for the model's own.
        device_type: where subgraphs run, `cpu` or an accelerator's kind.
        budget: what values between subgraphs may take in memory; None for all they need, on the host.
        statistics_bytes: what the statistics of a layer's experts may take at a time; None for no bound.
        sizes: of dims that are neither samples nor tokens, by the manifest's names.
        limits: what there is.

    Raises:
        UsageError, DeviceError: for sizes that the artifact does not hold for, and arguments of the wrong type.
        RecipeError: for a recipe that does not fit the model.
    """
    artifact, dtype, device_type = require_artifact(artifact), as_dtype(dtype), as_device_type(device_type)
    for name, number in (("num_samples", num_samples), ("seq_len", seq_len), ("batch_size", batch_size)):
        require_count(name, number)
    _require_kinds(budget, limits, sizes, statistics_bytes)
    recipe = None if recipe is None else require_recipe(recipe)
    found, assumed = dim_sizes(artifact.manifest, batch_size, seq_len, sizes or {})
    run_dtype = artifact.run_dtype(dtype)
    if recipe is not None:
        prepared, remarks = prepare(artifact, None, recipe, run_dtype), assumed
    else:
        recipe = Recipe.from_text(_USUAL, "the usual recipe")
        prepared = prepare(artifact, None, recipe, run_dtype, assign=_usual_jobs)
        remarks = [*assumed, f"without --recipe: {_USUAL}"]
    work = Workload(
        num_samples=num_samples,
        batch_size=batch_size,
        sizes=found,
        dtype=run_dtype,
        device_type=device_type,
        budget=budget or Budget(),
        statistics_bytes=statistics_bytes,
        process_bytes=resident_bytes(),
    )
    return _planned(prepared, recipe, work, limits or Limits(), remarks)


def _require_kinds(budget: Any, limits: Any, sizes: Any, statistics_bytes: Any) -> None:
    require_counts(statistics_bytes=statistics_bytes)
    require_kind("budget", budget, Budget, "it must be a runtime.Budget, in bytes")
    require_kind("limits", limits, Limits, "it must be runtime.Limits, in bytes")
    require_kind("sizes", sizes, Mapping, "it must be a dict from the manifest's names to sizes")


def _planned(prepared: Prepared, recipe: Recipe, work: Workload, limits: Limits, remarks: Sequence[str]) -> Planned:
    artifact = prepared.artifact
    needs = RecipeNeeds(artifact, None, recipe, prepared.jobs)
    with ShapeRun(artifact, prepared.model, work.dtype, work.device_type) as shapes:
        plan = plan_run(artifact, needs, work, shapes=shapes)
        missing = shortages(plan, limits)
        mended = advice(plan, limits, lambda w: plan_run(artifact, needs, w, shapes=shapes)) if missing else []
    return Planned(plan=replace(plan, remarks=(*plan.remarks, *remarks)), shortages=missing, advice=mended)


def require_plan(
    prepared: Prepared,
    needs: RecipeNeeds,
    batches: Sequence[Mapping[str, Any]],
    options: RunOptions,
    *,
    dtype: torch.dtype,
    limits: Limits,
    modifiers: Sequence[StepModifier] = (),
) -> Forecast:
    """Plan a run that is about to begin, and refuse it when it does not fit.

    With ample memory the subgraphs are not run on shapes: that takes part of a second, and imports much of torch.

    Args:
        prepared: the model, its parameters on the meta device.
        needs: what is done to which module, and measured for it.
        batches: of the run.
        options: of the run; with `force`, shortages become warnings of the plan.
        dtype: of weights and activations.
        limits: available memory; the host's includes what the process has already.
        modifiers: the user's own.

    Raises:
        PlanError: when it does not fit, without `force`.
    """
    work = Workload(
        num_samples=sum(_samples(batch) for batch in batches),
        batch_size=max((_samples(batch) for batch in batches), default=1),
        sizes=batch_sizes(prepared.artifact.manifest, batches),
        dtype=dtype,
        device_type=options.device.type,
        budget=options.activation_memory or Budget.default(options.device),
        statistics_bytes=options.statistics_memory,
        all_tokens=options.moe_calibrate_all_experts,
        process_bytes=resident_bytes(),
        is_padded=any("attention_mask" in batch and not batch["attention_mask"].all() for batch in batches),
    )
    stored = stored_sizes(prepared.weights)
    guess = plan_run(prepared.artifact, needs, work, stored=stored, modifiers=modifiers)
    if is_ample(guess, limits):
        return guess
    with ShapeRun(prepared.artifact, prepared.model, dtype, options.device.type) as shapes:

        def again(other: Workload) -> Forecast:
            return plan_run(prepared.artifact, needs, other, stored=stored, shapes=shapes, modifiers=modifiers)

        plan = again(work)
        if not options.force:
            require_fit(plan, limits, again)
    return replace(plan, warnings=tuple(f"warning: it may not fit: {text}" for text in shortages(plan, limits)))


def memory_here(device: torch.device) -> Limits:
    """What this machine has for this process. Its disk is looked at where the output's size is known to the byte."""
    available = available_bytes()
    return Limits(
        device=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None,
        host=None if available is None else available + resident_bytes(),
    )


def stored_sizes(source: Weights) -> dict[str, int]:
    """Bytes of each parameter in a checkpoint; what several are made from counts with the first."""
    sizes: dict[str, int] = {}
    counted: dict[str, None] = {}
    for name, origin in source.origins.items():
        fresh = [key for key in origin.keys if key not in counted]
        counted.update(dict.fromkeys(fresh))
        if fresh:
            sizes[name] = sum(source.checkpoint.num_bytes(key) for key in fresh)
    return sizes


def dim_sizes(
    manifest: Manifest, batch_size: int, seq_len: int, given: Mapping[str, int]
) -> tuple[dict[str, int], list[str]]:
    """The size of each of the manifest's dims, and what was assumed of those that nobody stated.

    Tokens of other inputs (a decoder's) are as many as those of the text; of anything else one is taken a sample.

    Raises:
        UsageError: for a size that the artifact does not have or does not hold for.
    """
    dims = {dim.name: dim for dim in manifest.dims}
    for name in given:
        if name not in dims:
            raise UsageError(
                f"--size names {name!r}, and the artifact has no such size", hint=f"it has {', '.join(dims)}"
            )
    sizes = {BATCH: batch_size, SEQUENCE: seq_len}
    assumed = []
    for entry in manifest.inputs:
        for place, size in enumerate(entry.shape):
            if isinstance(size, str) and size in dims and size not in (*sizes, *given):
                is_tokens = place == 1 and len(entry.shape) == 2 and entry.dtype.startswith(("int", "bool"))
                sizes[size] = seq_len if is_tokens else max(batch_size if place == 0 else 1, dims[size].min)
                if not is_tokens:
                    assumed.append(f"{size} = {sizes[size]} was assumed (--size {size}=N states another)")
    sizes |= given
    sizes |= {name: max(dim.min, 1) for name, dim in dims.items() if name not in sizes}
    for name, dim in dims.items():
        if sizes[name] < dim.min or 0 <= dim.max < sizes[name]:
            bounds = f"{dim.min} to {dim.max}" if dim.max >= 0 else f"{dim.min} or more"
            raise UsageError(f"the artifact holds for a {name} of {bounds}, not {sizes[name]}")
    for condition in manifest.conditions:
        if not assumed and not holds(condition, sizes):
            raise UsageError(
                f"the artifact holds only where {condition}", hint="choose another --seq-len or --batch-size"
            )
    return sizes, assumed


def batch_sizes(manifest: Manifest, batches: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The largest size that each dim has in the batches of a run."""
    sizes: dict[str, int] = {dim.name: 1 for dim in manifest.dims}
    for batch in batches:
        for entry in manifest.inputs:
            shape = batch[entry.name].shape
            if len(shape) != len(entry.shape):
                raise DataError(f"{entry.name} has shape {list(shape)}, and the artifact takes {list(entry.shape)}")
            for name, size in zip(entry.shape, shape, strict=True):
                if isinstance(name, str):
                    sizes[name] = max(sizes.get(name, 1), int(size))
    return sizes


def _samples(batch: Mapping[str, Any]) -> int:
    return next((len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.dim()), 1)


def _usual_jobs(
    artifact: Artifact, model: nn.Module, _: Weights | None, recipe: Recipe
) -> tuple[dict[str, Assignment], list[str]]:
    """The usual recipe, for modules that it can be applied to; none for a model without Linear modules."""
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
