"""Calibrate and quantize, subgraph by subgraph.

check       artifact, recipe, weights, data and output, before anything runs
catch up    what an interrupted run has finished is not done again
for each subgraph
    load        its weights, read while the one before it computed
    modify      measure what its modules see, over all batches, and quantize them; the model goes on with the result
    go on       all batches through it, free what nobody needs any more
    commit      its tensors are on disk, and so is the line in the journal that says so
finish      config, tokenizer, index; the output appears under its name
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from runtime.arguments import as_path, require_callable, require_counts, require_kind, require_methods
from runtime.checkpoint.companions import write_companions
from runtime.checkpoint.dequantize import open_checkpoint
from runtime.checkpoint.layout import Layout
from runtime.checkpoint.reader import Checkpoint
from runtime.checkpoint.writer import DEFAULT_SHARD_BYTES, ShardWriter, require_space
from runtime.data.checked_batches import model_batches
from runtime.data.masks import require_tokens
from runtime.errors import DataError, RecipeError
from runtime.experts.split import SplitArtifact, require_artifact, split_experts
from runtime.formats.key_values import attach
from runtime.host.devices import as_device, as_dtype
from runtime.host.memory import OWN_THREADS, require_threads
from runtime.host.publish import require_free, require_outside
from runtime.planning.request import memory_here, require_plan, stored_sizes
from runtime.quantize.assignments import assign_jobs
from runtime.quantize.needs import RecipeNeeds
from runtime.quantize.recipe_modifier import RecipeModifier
from runtime.quantize.remarks import make_remarks, targeted_tables
from runtime.quantize.unquantized import not_quantized
from runtime.recipe.recipe import Recipe, require_recipe
from runtime.streaming.activations import Budget
from runtime.streaming.events import Lines, Watcher, Watchers
from runtime.streaming.identity import run_identity
from runtime.streaming.report import Calibration, ModuleReport
from runtime.streaming.run import Options, StreamingRun
from runtime.streaming.schedule import plan_steps
from runtime.streaming.steps import output_tensors
from runtime.streaming.work import Modifier
from runtime.streaming.workplace import open_workplace, require_unfinished
from runtime.weights.parameters import Weights, place_buffers

if TYPE_CHECKING:
    from runtime.chain import Artifact
    from runtime.recipe.recipe import Assignment

__all__ = ["Calibration", "ModuleReport", "Progress", "calibrate"]

Progress = Callable[[str], None]


def calibrate(
    artifact: Artifact,
    *,
    weights: str | os.PathLike[str],
    recipe: Recipe,
    batches: Sequence[Mapping[str, torch.Tensor]],
    out: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = lambda line: None,
    resume: bool = False,
    checkpoint_activations: int = 0,
    activation_memory: Budget | None = None,
    propagate_error: bool = True,
    watchers: Sequence[Watcher] = (),
    own_modifiers: Sequence[Modifier] = (),
    moe_calibrate_all_experts: bool = True,
    statistics_memory: int | None = None,
    force: bool = False,
) -> Calibration:
    """Quantize a model by a recipe and write the checkpoint.

    Args:
        artifact: the compiled model.
        weights: directory of its safetensors checkpoint.
        recipe: what to quantize, and how.
        batches: the model's inputs, one mapping a batch, see `runtime.data.checked_batches`; may be empty when the
            recipe measures nothing. A batch may have a `loss_mask` [B, S] besides: tokens where it is zero do not
            count, nor does padding.
        out: a directory that does not exist or is empty; it appears when it is whole.
        device: where subgraphs run and weights are solved.
        dtype: of the weights and activations in the run; None for the model's own.
        max_shard_bytes: the most a shard of the checkpoint holds.
        progress: called with one line for each subgraph.
        resume: go on where an interrupted run of the same output, artifact, weights, recipe, data and options stopped;
            the result has the same bytes. Without one, begin.
        checkpoint_activations: save the values between subgraphs to disk after every so many, so that a resumed run
            need not run the finished ones again; 0 for never.
        activation_memory: what these values may take; see `runtime.streaming.activations`.
        propagate_error: let later subgraphs see what the quantized ones return. False saves a pass for each subgraph.
        moe_calibrate_all_experts: measure every expert of a mixture on all tokens, while a layer's output stays the sum
            over those that are chosen; False measures each on the tokens that are sent to it.
        statistics_memory: bytes that the statistics of a layer's experts may take at a time; more of them are measured
            in several passes, with the same result. None sets no bound.
        watchers: are told what happens, see `runtime.streaming.events`.
        own_modifiers: are applied to each subgraph before the recipe, see docs/modifiers.md.
        force: go on where the plan says that memory will not do.

    Raises:
        UsageError, DeviceError, WeightsError, RecipeError, DataError, OutputError, PlanError: before anything has run.
        QuantizationError: when a module's numbers cannot be worked with.
        OutOfMemory: a `torch.OutOfMemoryError`, when not even one sample fits.
    """
    start = time.perf_counter()
    artifact, recipe = require_artifact(artifact), require_recipe(recipe)
    path, weights, place = as_path("out", out), as_path("weights", weights), as_device(device)
    dtype = as_dtype(dtype)
    require_kind("activation_memory", activation_memory, Budget, "it must be a runtime.Budget, in bytes")
    require_counts(max_shard_bytes=max_shard_bytes, statistics_memory=statistics_memory)
    require_counts(checkpoint_activations=checkpoint_activations or None)
    require_callable("progress", progress)
    require_methods("watchers", watchers, "tell")
    require_methods("own_modifiers", own_modifiers, "measures")
    require_threads(torch.get_num_threads() - 1 + OWN_THREADS)
    batches = model_batches(artifact, batches)
    if resume:
        require_unfinished(path)
    require_free(path)
    require_outside(path, artifact.path, Path(weights))
    run_dtype = dtype if dtype is not None else getattr(torch, artifact.manifest.model.dtype)
    checkpoint = open_checkpoint(Path(weights))
    prepared = _prepare(split_experts(artifact, checkpoint), checkpoint, recipe, run_dtype, place)
    if isinstance(prepared.artifact, SplitArtifact):
        owners = _apart(prepared.artifact, prepared, recipe)
        if len(owners) < len(prepared.artifact.stacks):  # the others stay as they are: stacked experts are quicker
            fewer = split_experts(artifact, checkpoint, only=owners)
            prepared = _prepare(fewer, checkpoint, recipe, run_dtype, place)
    artifact, model, source = prepared.artifact, prepared.model, prepared.source
    jobs, unreached = prepared.jobs, prepared.unreached
    recipe_modifier = RecipeModifier(artifact, source, recipe, jobs)
    modifiers: list[Modifier] = [*own_modifiers, recipe_modifier]
    if recipe_modifier.key_values is not None:
        attach(model, recipe_modifier.key_values)
    plan = plan_steps(artifact, source, jobs, modifiers)
    if not batches and any(step.is_run for step in plan.steps):
        raise DataError(f"{recipe.source} asks for what measures calibration data", hint="give --data")
    require_tokens(batches)
    source.checks.require_outside(unless=[f"{name}.weight" for name in jobs])
    foretold = require_plan(
        artifact,
        model,
        recipe_modifier.needs,
        batches,
        dtype=run_dtype,
        device=place,
        limits=memory_here(place),
        stored=stored_sizes(source),
        budget=activation_memory,
        statistics_bytes=statistics_memory,
        all_tokens=moe_calibrate_all_experts,
        modifiers=own_modifiers,
        force=force,
    )
    layout = Layout(output_tensors(plan, source, jobs), max_shard_bytes)
    identity = run_identity(
        artifact=artifact,
        checkpoint=source.checkpoint,
        recipe=recipe,
        batches=batches if any(step.is_run for step in plan.steps) else (),
        options={
            "dtype": run_dtype,
            "device": place.type,
            "shard size": max_shard_bytes,
            "propagate_error": propagate_error,
            "moe_calibrate_all_experts": moe_calibrate_all_experts,
        },
    )
    watch = Watchers([Lines(progress), *watchers])
    # Statistics look at versions of tensors, which a caller's inference mode would take away.
    with ExitStack() as stack:
        workplace = stack.enter_context(open_workplace(path, resume=resume, identity=identity))
        require_space(path, layout.file_bytes - workplace.written_bytes)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        run = StreamingRun(
            artifact=artifact,
            model=model,
            source=source,
            jobs=jobs,
            modifiers=modifiers,
            plan=plan,
            batches=[dict(batch) for batch in batches],
            writer=ShardWriter(workplace.checkpoint, layout),
            workplace=workplace,
            options=Options(
                device=place,
                budget=activation_memory,
                checkpoint_every=checkpoint_activations,
                propagate_error=propagate_error,
                all_tokens=moe_calibrate_all_experts,
                statistics_bytes=statistics_memory,
            ),
            watch=watch,
        )
        remarks = make_remarks(artifact, model, recipe, jobs, unreached)
        for remark in (*source.remarks, *remarks, *recipe_modifier.remarks, *foretold.warnings):
            watch.tell("warning", text=remark)
        resumed_at = run.execute()
        write_companions(workplace.checkpoint, artifact, source.checkpoint, _quantization_config(recipe, run))
        workplace.publish()
    seconds = time.perf_counter() - start
    watch.tell("end", path=str(path), bytes=layout.total_bytes, seconds=seconds, warnings=watch.warnings)
    return Calibration(
        path=path,
        num_bytes=layout.total_bytes,
        modules=tuple(run.reports),
        unreached=tuple(unreached),
        remarks=tuple(watch.warnings),
        seconds=seconds,
        resumed_at=resumed_at,
        num_caches=sum(1 for _ in recipe_modifier.key_values.all_modules()) if recipe_modifier.key_values else 0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prepared:
    """What a run works with, when artifact, checkpoint and recipe fit."""

    artifact: Artifact
    model: nn.Module
    source: Weights
    jobs: dict[str, Assignment]
    unreached: list[str]


def _apart(artifact: SplitArtifact, prepared: _Prepared, recipe: Recipe) -> list[str]:
    """The modules of experts that are to be apart: those that are quantized, and those that are rescaled, unless the
    checkpoint has them stacked.
    """
    owners = dict.fromkeys(artifact.owners(prepared.jobs))
    if recipe.transforms and len(owners) < len(artifact.stacks):
        needs = RecipeNeeds(artifact, prepared.source, recipe, prepared.jobs)
        rescaled = artifact.owners(needs.rescaled_modules())
        owners |= dict.fromkeys(name for name in rescaled if name not in artifact.named_anew)
    return [name for name in artifact.stacks if name in owners]


def _prepare(
    artifact: Artifact, checkpoint: Checkpoint, recipe: Recipe, dtype: torch.dtype, device: torch.device
) -> _Prepared:
    model = artifact.empty_model(dtype)
    place_buffers(model, device)
    source = Weights(artifact, checkpoint, dtype, model)
    if source.schemes or source.cache_scheme is not None:
        raise RecipeError(f"{checkpoint.directory} is quantized already", hint="calibrate from the original checkpoint")
    jobs, unreached = assign_jobs(artifact, model, source, recipe)
    return _Prepared(artifact=artifact, model=model, source=source, jobs=jobs, unreached=unreached)


def _quantization_config(recipe: Recipe, run: StreamingRun) -> dict[str, Any]:
    """The entry for config.json."""
    from runtime.formats.checkpoint_config import quantization_config

    groups = [group.scheme for group in recipe.groups]
    tables = targeted_tables(run.model, recipe, run.jobs)
    kinds = dict.fromkeys(entry.kind for entry in run.artifact.manifest.cached)
    return quantization_config(
        groups,
        not_quantized(run.model, run.source, run.jobs, tables) if groups else (),
        recipe.cache,
        tuple(kinds) if recipe.attention else (),
    )
