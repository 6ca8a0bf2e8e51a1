"""Calibrate and quantize, subgraph by subgraph.

check       artifact, recipe, weights, data and output, before anything runs
for each subgraph
    load        its weights, and no others
    measure     what its Linear modules see, over all batches
    quantize    them, and let the subgraph go on with the quantized weights
    propagate   all batches through it, free what nobody needs any more
    write       its tensors, drop its weights
finish      config, tokenizer, index; the output appears under its name
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from runtime.activations import Activations, cloned
from runtime.algorithms.result import QuantizedWeight
from runtime.checkpoint import Checkpoint
from runtime.errors import DataError, QuantizationError, RecipeError
from runtime.finish import not_quantized, write_companions
from runtime.jobs import assign_jobs, least_bytes, make_remarks
from runtime.plan_request import limits_here, require_plan, stored_sizes
from runtime.publish import publish_directory, require_free, require_outside
from runtime.quantized import input_quantization
from runtime.recipe import Assignment, Recipe
from runtime.statistics import collect_hessians
from runtime.weights import Weights, assign, place_buffers, unload
from runtime.writer import DEFAULT_SHARD_BYTES, ShardWriter, require_space

if TYPE_CHECKING:
    from runtime.algorithms.gptq import HessianAccumulator
    from runtime.artifact import Artifact, LoadedSubgraph

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleReport:
    """What happened to one module: `loss` as in `QuantizedWeight`, `num_tokens` its Hessian's."""

    name: str
    algorithm: str
    loss: float
    damping: float
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The result of a run.

    Attributes:
        path: the checkpoint's directory.
        num_bytes: size of its tensors.
        modules: those that were quantized, in order.
        unreached: modules that the recipe targets and the model's forward never comes to, so they stay as they are.
        remarks: what a user should know about the result, a line each.
        seconds: the time it took.
    """

    path: Path
    num_bytes: int
    modules: tuple[ModuleReport, ...]
    unreached: tuple[str, ...]
    remarks: tuple[str, ...]
    seconds: float


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
    force: bool = False,
    progress: Progress = lambda line: None,
) -> Calibration:
    """Quantize a model by a recipe and write the checkpoint.

    Args:
        artifact: the compiled model.
        weights: directory of its safetensors checkpoint.
        recipe: what to quantize, and how.
        batches: the model's inputs, one mapping a batch, on the CPU; may be empty when the recipe measures nothing.
        out: a directory that does not exist or is empty; it appears when it is whole.
        device: where subgraphs run and weights are solved.
        dtype: of the weights and activations in the run; None for the model's own.
        max_shard_bytes: the most a shard of the checkpoint holds.
        force: go on where the plan says that it does not fit.
        progress: called with one line for each subgraph.

    Raises:
        WeightsError, RecipeError, DataError, OutputError, PlanError: before anything has run.
        QuantizationError: when a module's numbers cannot be worked with.
    """
    start = time.perf_counter()
    path = Path(out)
    require_free(path)
    require_outside(path, artifact.path, Path(weights))
    run_dtype = dtype if dtype is not None else getattr(torch, artifact.manifest.model.dtype)
    model = artifact.empty_model(run_dtype)
    place_buffers(model, torch.device(device))
    source = Weights(artifact, Checkpoint(Path(weights)), run_dtype, model)
    if source.schemes:
        raise RecipeError(f"{weights} is quantized already", hint="calibrate from the original checkpoint")
    jobs, unreached = assign_jobs(artifact, model, source, recipe)
    _require_means(path, source, recipe, jobs, batches)
    plan = require_plan(
        artifact,
        model,
        jobs,
        batches,
        dtype=run_dtype,
        device=torch.device(device),
        limits=limits_here(torch.device(device), path),
        stored=stored_sizes(source),
        force=force,
    )
    remarks = (*make_remarks(artifact, jobs, unreached), *plan.remarks)
    for remark in remarks:
        progress(remark)
    # Statistics look at versions of tensors, which a caller's inference mode would take away.
    with publish_directory(path) as partial, torch.inference_mode(False), torch.no_grad():
        run = _Run(
            artifact=artifact,
            model=model,
            source=source,
            jobs=jobs,
            activations=Activations(batches, torch.device(device)),
            writer=ShardWriter(partial, max_shard_bytes),
            device=torch.device(device),
            progress=progress,
        )
        run.execute()
        write_companions(partial, artifact, source.checkpoint, _quantization_config(recipe, run))
    return Calibration(
        path=path,
        num_bytes=run.writer.total_bytes,
        modules=tuple(run.reports),
        unreached=tuple(unreached),
        remarks=remarks,
        seconds=time.perf_counter() - start,
    )


def _require_means(
    path: Path, source: Weights, recipe: Recipe, jobs: Mapping[str, Assignment], batches: Sequence[Any]
) -> None:
    """Refuse a run that lacks data or disk."""
    if not batches and any(job.algorithm == "gptq" for job in jobs.values()):
        raise DataError(f"{recipe.source} asks for GPTQ, which measures calibration data", hint="give --data")
    require_space(path, least_bytes(source, jobs))


@dataclass(kw_only=True)
class _Run:
    artifact: Artifact
    model: nn.Module
    source: Weights
    jobs: dict[str, Assignment]
    activations: Activations
    writer: ShardWriter
    device: torch.device
    progress: Progress
    reports: list[ModuleReport] = field(default_factory=list)
    done: dict[str, torch.Tensor] = field(default_factory=dict)
    replaced: dict[str | None, None] = field(init=False)
    uses: Counter[str] = field(init=False)

    def __post_init__(self) -> None:
        self.uses = Counter(name for subgraph in self.artifact.subgraphs for name in subgraph.entry.parameters)
        self.replaced = dict.fromkeys(self.source.plain_key(f"{name}.weight") for name in self.jobs)

    def execute(self) -> None:
        """All subgraphs, then whatever of the checkpoint no subgraph uses."""
        subgraphs = self.artifact.subgraphs
        last_measured = max((i for i, s in enumerate(subgraphs) if self._measured(s)), default=-1)
        for index, subgraph in enumerate(subgraphs):
            begin = time.perf_counter()
            self.source.load(self.model, subgraph.entry.parameters, self.device)
            self._restore_quantized(subgraph)
            hessians = self._measure(subgraph)
            modules = self._modules_of(subgraph)
            for name in modules:
                self._quantize(name, hessians.get(name))
            del hessians
            if index < last_measured:
                self._propagate(subgraph)
            self._write(subgraph)
            unload(self.model, subgraph.entry.parameters)
            label = ", ".join(subgraph.entry.targets) or "no target"
            seconds = time.perf_counter() - begin
            self.progress(f"[{index + 1}/{len(subgraphs)}] {label}: {len(modules)} modules, {seconds:.1f} s")
        for key in self.source.checkpoint:
            self._pass_through(key)
        self.writer.finish()

    def _modules_of(self, subgraph: LoadedSubgraph) -> list[str]:
        """The modules to be quantized that this subgraph is the first to use, in its order."""
        weights = [name.removesuffix(".weight") for name in subgraph.entry.parameters if name.endswith(".weight")]
        return [name for name in weights if name in self.jobs and name not in self.done]

    def _measured(self, subgraph: LoadedSubgraph) -> list[str]:
        return [name for name in self._modules_of(subgraph) if self.jobs[name].algorithm == "gptq"]

    def _measure(self, subgraph: LoadedSubgraph) -> dict[str, HessianAccumulator]:
        names = self._measured(subgraph)
        if not names:
            return {}

        def run_batches() -> None:
            for batch in range(len(self.activations)):
                inputs = cloned(self.activations.fetch(batch, subgraph.input_names))
                subgraph.forward(self.model, **inputs)

        return collect_hessians({name: self.model.get_submodule(name) for name in names}, run_batches, self.device)

    def _quantize(self, name: str, hessian: HessianAccumulator | None) -> None:
        from runtime.schemes import compress_module, decompress_module

        job = self.jobs[name]
        weight = self.model.get_submodule(name).get_parameter("weight")
        key = self.source.plain_key(f"{name}.weight")
        assert key is not None, f"{name} was let through without a tensor of its own"
        try:
            result = _solve(weight, job, hessian, self.source.checkpoint.read(key).dtype)
        except QuantizationError as error:
            raise QuantizationError(f"{name}: {error.message}", hint=error.hint) from error
        tensors = compress_module(name, result.weight_OI, result.scale, result.zero_point, job.scheme)
        dense = decompress_module(tensors, job.scheme).to(weight.dtype)
        assign(self.model, f"{name}.weight", dense)
        self.done[name] = dense if self._is_reused(name) else torch.empty(0)
        for suffix, tensor in tensors.items():
            self.writer.add(f"{key.removesuffix('weight')}{suffix}", tensor)
        self.reports.append(
            ModuleReport(
                name=name,
                algorithm=job.algorithm,
                loss=result.loss,
                damping=result.damping,
                num_tokens=hessian.num_tokens if hessian is not None else 0,
            )
        )

    def _is_reused(self, name: str) -> bool:
        """Whether several subgraphs use the module, so that its quantized weight must be kept."""
        return self.uses[f"{name}.weight"] > 1

    def _restore_quantized(self, subgraph: LoadedSubgraph) -> None:
        for name in self.done:
            if f"{name}.weight" in subgraph.entry.parameters:
                assign(self.model, f"{name}.weight", self.done[name])

    def _propagate(self, subgraph: LoadedSubgraph) -> None:
        schemes = {name: job.scheme for name, job in self.jobs.items()}
        with input_quantization(self.model, schemes):
            for batch in range(len(self.activations)):
                inputs = self.activations.fetch(batch, subgraph.input_names)
                outputs = subgraph.forward(self.model, **inputs)
                del inputs
                self.activations.drop(batch, subgraph.consumed_names)
                self.activations.store(batch, outputs)

    def _write(self, subgraph: LoadedSubgraph) -> None:
        for name in subgraph.entry.parameters:
            for key in self.source.origins[name].keys:
                self._pass_through(key)

    def _pass_through(self, key: str) -> None:
        """Write a tensor as it was read, unless it was quantized or is written already."""
        if key not in self.writer and key not in self.replaced:
            self.writer.add(key, self.source.checkpoint.read(key))


def _quantization_config(recipe: Recipe, run: _Run) -> dict[str, Any]:
    """The entry for config.json."""
    from runtime.schemes import quantization_config

    return quantization_config(
        [group.scheme for group in recipe.groups], not_quantized(run.model, run.source, run.jobs)
    )


def _solve(
    weight: torch.Tensor, job: Assignment, hessian: HessianAccumulator | None, scale_dtype: torch.dtype
) -> QuantizedWeight:
    from runtime.algorithms.gptq import quantize_gptq
    from runtime.algorithms.rtn import quantize_rtn

    if job.algorithm == "rtn":
        return quantize_rtn(weight, job.scheme.weights, scale_dtype=scale_dtype)
    if hessian is None:
        raise QuantizationError(
            "GPTQ was asked for, but no calibration batch reached the module",
            hint="add it to ignore, or quantize it with QuantizationModifier",
        )
    assert job.options is not None, "GPTQ comes with options"
    return quantize_gptq(
        weight,
        hessian.hessian_II,
        job.scheme.weights,
        scale_dtype=scale_dtype,
        dampening_frac=job.options.dampening_frac,
        block_size=job.options.block_size,
        actorder=job.options.actorder,
    )
