"""Calibrate and quantize a model, subgraph by subgraph.

check       artifact, recipe, weights, data and output, before anything runs
schedule    the work of each subgraph, and the plan of its cost
resume      take over the subgraphs that an interrupted run has finished
for each subgraph
    load        its weights, read while the previous one ran
    modify      measure its modules' inputs over all batches, and quantize the modules
    go on       run all batches with the quantized weights, and free values that no later subgraph needs
    commit      flush its tensors to disk, then record it in the journal
publish     config, tokenizer, index; the output appears under its name
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from runtime.arguments import as_path, require_callable, require_methods
from runtime.calibration_request import CalibrationRequest, checked_request
from runtime.checkpoint.companions import write_companions
from runtime.checkpoint.dequantize import open_checkpoint
from runtime.checkpoint.layout import Layout
from runtime.checkpoint.parts import write_part
from runtime.checkpoint.reader import Checkpoint
from runtime.checkpoint.writer import DEFAULT_SHARD_BYTES, ShardWriter
from runtime.data.lanes import Lanes
from runtime.data.masks import require_tokens
from runtime.errors import DataError
from runtime.formats.key_values import attach
from runtime.host.devices import as_device, as_dtype, resolve_dtype
from runtime.host.own_process import settle
from runtime.planning.predict import PlannedRun
from runtime.planning.report import plan_event
from runtime.planning.request import memory_here, require_plan
from runtime.provenance.complete_recipe import complete_recipe
from runtime.provenance.digests import RunDigests
from runtime.provenance.facts import data_facts, decoded_facts, encoded_facts
from runtime.provenance.origin import RunOrigin
from runtime.provenance.write import FinishedRun, write_provenance
from runtime.quantize.block_tuning import require_tunable
from runtime.quantize.preparation import Prepared, prepare
from runtime.quantize.recipe_modifier import RecipeModifier
from runtime.quantize.remarks import make_remarks, source_remarks
from runtime.quantize.transform_proof import prove_function
from runtime.quantize.unquantized import written_config
from runtime.recipe.recipe import Recipe
from runtime.saved_statistics.run import RunStatistics, begin
from runtime.search.resolve import keep_choice, plain_recipe_of
from runtime.status import doing
from runtime.streaming.activations import Budget
from runtime.streaming.events import Watcher, Watchers
from runtime.streaming.identity import run_digest, run_identity
from runtime.streaming.lines import Lines
from runtime.streaming.options import FLOAT32, RunOptions
from runtime.streaming.output_place import require_startable
from runtime.streaming.report import Calibration, ModuleReport
from runtime.streaming.run import StreamingRun
from runtime.streaming.schedule import Schedule, plan_steps
from runtime.streaming.work import StepModifier
from runtime.streaming.workplace import open_workplace
from runtime.workers.agreement import agreed
from runtime.workers.comparison import require_same, require_same_options
from runtime.workers.start import current

if TYPE_CHECKING:
    from runtime.chain import Artifact
    from runtime.planning.machine import Machine
    from runtime.provenance.record import DataFacts
    from runtime.quantize.needs import RecipeNeeds
    from runtime.workers.group import Workers

__all__ = ["Calibration", "ModuleReport", "Progress", "calibrate"]

Progress = Callable[[str], None]
# These decide which messages workers exchange, and what they compute before their identities are compared.
_ALIKE = ("resume", "parts", "checkpoint_activations", "statistics_memory", "solve_products")


def calibrate(  # noqa: D417 - `RunOptions` describes the other arguments
    artifact: Artifact,
    *,
    weights: str | os.PathLike[str] | Checkpoint,
    recipe: Recipe,
    batches: Sequence[Mapping[str, torch.Tensor]] = (),
    out: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = lambda line: None,
    resume: bool = False,
    parts: bool = False,
    checkpoint_activations: int = 0,
    activation_memory: Budget | None = None,
    propagate_error: bool = True,
    watchers: Sequence[Watcher] = (),
    own_modifiers: Sequence[StepModifier] = (),
    moe_calibrate_all_experts: bool = True,
    statistics_memory: int | None = None,
    solve_products: str = FLOAT32,
    force: bool = False,
    cuda_graphs: bool = False,
    machine: Machine | None = None,
    hash_weights: bool = True,
    keep_statistics: str | os.PathLike[str] | None = None,
    statistics: str | os.PathLike[str] | None = None,
    origin: RunOrigin | None = None,
    workers: Workers | None = None,
) -> Calibration:
    """Quantize a model by a recipe and write the checkpoint. See `RunOptions` for the other arguments.

    Args:
        artifact: the compiled model.
        weights: directory of its safetensors checkpoint, a hub id in the local cache, or an open checkpoint.
        batches: the model's inputs, one mapping for each batch, see `runtime.data.checked_batches`; may be empty for a
            recipe without statistics. Padding, and tokens where a `loss_mask` [B, S] is zero, do not count.
        out: a directory that does not exist or is empty; it appears when it is complete.
        progress: called with one line for each subgraph; `watchers` receive all events, see `runtime.streaming.events`.
        own_modifiers: applied to each subgraph before the recipe, see docs/modifiers.md; they require one worker.
        origin: what the caller knows about data and weights, for seqbuild.json.
        workers: that share the run, see docs/distributed.md; None for those of torch.distributed, if it is initialized.

    Raises:
        SeqbuildError: before anything runs, or when values cannot be quantized or memory runs out (OutOfMemory).
    """
    start, values = time.perf_counter(), dict(locals())
    values |= {"device": as_device(device), "dtype": as_dtype(dtype)}
    paths = {"keep_statistics": keep_statistics, "statistics": statistics}
    values |= {name: None if path is None else as_path(name, path) for name, path in paths.items()}
    options = RunOptions(**{entry.name: values[entry.name] for entry in fields(RunOptions)})
    group = current() if workers is None else workers
    watch = _watchers(progress, watchers, group)
    origin = RunOrigin() if origin is None else origin
    given = partial(
        checked_request, artifact, weights, recipe, batches, out, own_modifiers, origin, machine, workers=group
    )
    return _run(_scheduled_alike(given, options, group), watch, start)


def _watchers(progress: Progress, watchers: Sequence[Watcher], workers: Workers) -> Watchers:
    require_callable("progress", progress)
    require_methods("watchers", watchers, "tell")
    return Watchers([] if workers.rank else [Lines(progress), *watchers], workers)


def _scheduled_alike(
    given: Callable[[RunOptions], CalibrationRequest], options: RunOptions, workers: Workers
) -> _Scheduled:
    """Check the arguments on all workers, and schedule the same run on each."""
    require_same_options(workers, {name: getattr(options, name) for name in _ALIKE})
    options = options.decided(workers)
    with agreed(workers):
        request = given(options)
    require_startable(request.out, resume=options.resume, workers=workers, parts=options.parts)
    with agreed(workers):
        scheduled = _scheduled(replace(request, recipe=plain_recipe_of(request)))
    differences = require_same(workers, scheduled.identity, options.device)
    return replace(scheduled, warnings=[*scheduled.warnings, *differences])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scheduled:
    """A calibration that is ready to run: everything is checked, and every step is known.

    `stated` is the prepared model without the experts that are split only to keep their statistics: config and remarks
    do not depend on these.
    """

    request: CalibrationRequest
    prepared: Prepared
    stated: Prepared
    recipe_modifier: RecipeModifier
    statistics: RunStatistics
    schedule: Schedule
    layout: Layout
    identity: Mapping[str, str]
    recipe_text: str
    data: DataFacts | None
    warnings: Sequence[str]
    plan: Mapping[str, Any]
    saved_bytes: int

    @property
    def modifiers(self) -> list[StepModifier]:
        return [*self.request.own_modifiers, *self.statistics.modifiers, self.recipe_modifier]

    @property
    def num_caches(self) -> int:
        """The number of attention modules with scales for their key-value cache."""
        key_values = self.recipe_modifier.key_values
        return sum(1 for _ in key_values.all_modules()) if key_values is not None else 0


def _scheduled(request: CalibrationRequest) -> _Scheduled:
    """Prepare the model, decide every step, and check that the run fits this machine."""
    recipe, batches, options = request.recipe, request.batches, request.options
    run_dtype = request.artifact.run_dtype(options.dtype)
    doing("checking the weights")
    prepared = _prepared(request, splits_named=options.keep_statistics is not None)
    artifact, source, jobs = prepared.artifact, prepared.weights, prepared.jobs
    if all(job.algorithm != "gptq" for job in jobs.values()):
        options = replace(options, solve_products=FLOAT32)  # there are no solves
    far_dtype = resolve_dtype(options.solve_products) or torch.float32
    statistics = RunStatistics.of(options, request.artifact, request.weights, recipe, prepared)
    is_measured_before = statistics.store is not None
    require_tunable(recipe, jobs, request.workers.size, is_measured_before=is_measured_before)
    recipe_modifier = RecipeModifier(
        artifact, source, recipe, jobs, far_dtype=far_dtype, is_measured_before=is_measured_before
    )
    if recipe_modifier.key_values is not None:
        attach(prepared.model, recipe_modifier.key_values)
    schedule = plan_steps(artifact, source, jobs, [*request.own_modifiers, *statistics.modifiers, recipe_modifier])
    is_run = any(step.is_run for step in schedule.steps)
    if not batches and is_run:
        raise DataError(f"{recipe.source} needs calibration data", hint="pass --data")
    require_tokens(batches)
    source.checks.require_outside(unless=[f"{name}.weight" for name in jobs])
    planned = PlannedRun(
        artifact=artifact, source=source, schedule=schedule, needs=recipe_modifier.needs, statistics=statistics
    )
    doing("planning")
    limits = memory_here(options.device)
    num, machine = request.workers.size, request.machine
    predicted = require_plan(
        planned, prepared.model, batches, options, dtype=run_dtype, limits=limits, workers=num, machine=machine
    )
    prove_function(request.artifact, prepared, recipe, batches, request.workers)
    identity = (
        run_identity(
            artifact=artifact,
            checkpoint=source.checkpoint,
            recipe=recipe,
            batches=batches if is_run else (),
            options=options.deciding(run_dtype),
        )
        | statistics.ingredients
    )
    return _Scheduled(
        request=request,
        prepared=prepared,
        stated=prepared if options.keep_statistics is None else _prepared(request),
        recipe_modifier=recipe_modifier,
        statistics=statistics,
        schedule=schedule,
        layout=Layout(schedule.outputs(source.checkpoint.directory), options.max_shard_bytes),
        identity=identity,
        data=_data_facts(request, statistics, recipe_modifier.needs, schedule, identity["data"]),
        recipe_text=complete_recipe(recipe),
        warnings=predicted.warnings,
        plan=plan_event(predicted),
        saved_bytes=predicted.saved_bytes,
    )


def _prepared(request: CalibrationRequest, *, splits_named: bool = False) -> Prepared:
    options, checkpoint = request.options, open_checkpoint(request.weights, plain=True)
    dtype = request.artifact.run_dtype(options.dtype)
    return prepare(request.artifact, checkpoint, request.recipe, dtype, options.device, splits_named=splits_named)


def _run(scheduled: _Scheduled, watch: Watchers, start: float) -> Calibration:
    """Run every step, write the checkpoint, and publish it under its name."""
    request, prepared, layout = scheduled.request, scheduled.prepared, scheduled.layout
    settle()
    doing("calibrating")
    watch.tell("inputs", **request.facts())
    with ExitStack() as stack:
        options, identity = request.options, scheduled.identity
        kept = scheduled.statistics.keep(
            stack, request.out, options, request.workers, (identity["data"], encoded_facts(scheduled.data))
        )
        place = open_workplace(
            request.out, resume=options.resume, identity=identity, workers=request.workers, parts=options.parts
        )
        workplace = stack.enter_context(place)
        writer = ShardWriter(workplace.checkpoint, layout, request.workers, parts=options.parts)
        workplace.require_space(writer.files.file_bytes)
        begin(kept, workplace, scheduled.saved_bytes)
        keep_choice(workplace.root, request.recipe)
        digests = stack.enter_context(_digests(scheduled, writer, workplace.root))
        # Statistics compare versions of tensors, which a caller's inference mode would disable.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        run = StreamingRun(
            artifact=prepared.artifact,
            model=prepared.model,
            source=prepared.weights,
            jobs=prepared.jobs,
            modifiers=scheduled.modifiers,
            schedule=scheduled.schedule,
            lanes=Lanes.of(prepared.artifact.manifest, request.batches),
            writer=writer,
            workplace=workplace,
            options=options,
            watch=watch,
            workers=request.workers,
            alongside=digests,
            plan=scheduled.plan,
            saved_of=scheduled.statistics.saved_of,
        )
        for warning in (*_facts_to_know(scheduled), *scheduled.warnings):
            watch.tell("warning", text=warning)
        resumed_at = run.execute()
        if kept is not None:
            kept.publish(len(scheduled.schedule.steps))
        _write_companions(scheduled, run, digests)
        workplace.publish()
    seconds = time.perf_counter() - start
    watch.tell("published", path=str(workplace.out), bytes=layout.total_bytes, seconds=seconds, warnings=watch.warnings)
    return Calibration(
        path=workplace.out,
        num_bytes=layout.total_bytes,
        modules=tuple(run.reports),
        unreached=tuple(prepared.unreached),
        remarks=tuple(watch.warnings),
        seconds=seconds,
        resumed_at=resumed_at,
        num_caches=scheduled.num_caches,
    )


def _write_companions(scheduled: _Scheduled, run: StreamingRun, digests: RunDigests) -> None:
    """Write all files of the checkpoint besides its tensors."""
    request, prepared, folder = scheduled.request, scheduled.prepared, run.workplace.checkpoint
    weights, written = digests.finish(run.watch)
    config = written_config(request.recipe, scheduled.stated)
    with agreed(request.workers):
        if not request.workers.rank:
            write_companions(folder, prepared.artifact, prepared.weights.checkpoint, config)
            facts = _finished(scheduled, run, weights=weights, written=written, unquantized=config["ignore"])
            write_provenance(folder, facts)
        if request.options.parts:
            write_part(folder, run.writer, run_digest(scheduled.identity))


def _digests(scheduled: _Scheduled, writer: ShardWriter, folder: Path) -> RunDigests:
    checkpoint, workers = scheduled.prepared.weights.checkpoint, scheduled.request.workers
    are_hashed = {"hash_weights": scheduled.request.options.hash_weights, "hash_output": writer.files is writer.layout}
    return RunDigests(checkpoint, writer, scheduled.schedule, workers, folder, **are_hashed)


def _finished(scheduled: _Scheduled, run: StreamingRun, **found: Any) -> FinishedRun:
    """Collect the facts of a run that has written all tensors; `found` are those that were found last."""
    request, artifact = scheduled.request, scheduled.request.artifact
    of_steps = (text for entry in run.workplace.journal.entries for text in entry.get("warnings", ()))
    return FinishedRun(
        origin=request.origin,
        artifact=artifact,
        prepared=scheduled.prepared,
        recipe=request.recipe,
        recipe_text=scheduled.recipe_text,
        own_modifiers=request.own_modifiers,
        data=scheduled.data,
        options=request.options.deciding(artifact.run_dtype(request.options.dtype)),
        has_files=run.writer.files is run.writer.layout,
        reports=run.reports,
        warnings=[*_facts_to_know(scheduled), *of_steps],
        num_caches=scheduled.num_caches,
        num_bytes=scheduled.layout.total_bytes,
        **found,
    )


def _data_facts(
    request: CalibrationRequest, statistics: RunStatistics, needs: RecipeNeeds, schedule: Schedule, digest: str
) -> DataFacts | None:
    """Describe the calibration data, also of statistics that were measured before; None if no batch was needed."""
    if statistics.store is not None:
        is_used = any(
            needs.measures(step.modules) or needs.measures_cache(step.subgraph.entry) for step in schedule.steps
        )
        return decoded_facts(statistics.store.index.data, statistics.store.folder) if is_used else None
    if not any(step.is_run for step in schedule.steps):
        return None
    return data_facts(request.artifact.manifest, request.batches, digest, request.origin.data)


def _facts_to_know(scheduled: _Scheduled) -> Iterator[str]:
    """Yield the warnings about the result that are known before the first step."""
    prepared, recipe = scheduled.prepared, scheduled.request.recipe
    yield from source_remarks(prepared)
    stated, transforms = scheduled.stated, prepared.source.transforms
    yield from make_remarks(stated.artifact, stated.model, recipe, stated.jobs, stated.unreached, transforms)
    yield from scheduled.recipe_modifier.remarks
    yield from scheduled.statistics.remarks(scheduled.request.options.device)
