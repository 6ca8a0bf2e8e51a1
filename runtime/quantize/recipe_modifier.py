"""Apply a recipe to each subgraph: measure once, rescale, round.

Rescaling inputs by known factors changes their statistics by known factors. So the batches pass through a subgraph only
once to be measured, even if a recipe combines modifiers such as SmoothQuant and GPTQ or AWQ and GPTQ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from runtime.checkpoint.dtypes import DTYPES, dtype_name
from runtime.checkpoint.stored import Stored
from runtime.errors import DataError, QuantizationError, RecipeError
from runtime.experts.split import siblings_of
from runtime.formats.compressed import input_parts, join_rows, static_input_parts, stored_dtypes
from runtime.formats.presets import averaging_of
from runtime.quantize.block_tuning import StepTuning, step_tuning
from runtime.quantize.expert_groups import expert_groups, few_tokens, measure, measure_once, measured_again
from runtime.quantize.needs import RecipeNeeds, changed_parameters
from runtime.quantize.proof import assigned
from runtime.quantize.rescaling import StepRescaler
from runtime.quantize.rounding import Rounded, Rounding, round_modules
from runtime.quantize.seen_inputs import only_zeros, reached_modules, require_inputs, unreached
from runtime.quantize.smoothing import Rescaled
from runtime.quantize.solve_batches import FUSED_NAMES, siblings_by_name
from runtime.quantize.statistics import InputStatistics, Needs
from runtime.recipe.examples import scheme_line
from runtime.recipe.recipe import some
from runtime.streaming.report import ModuleReport
from runtime.weights.origins import checkpoint_prefix
from runtime.workers.agreement import agreed

if TYPE_CHECKING:
    from runtime.artifact.manifest import ScaleGroup, SubgraphEntry
    from runtime.chain import Artifact
    from runtime.quantize.mappings import Rescaling
    from runtime.recipe.recipe import Assignment, Recipe
    from runtime.recipe.rescaling_modifiers import Transform
    from runtime.streaming.work import Work
    from runtime.weights.origins import ParameterSource

_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class RecipeModifier:
    """The modifier that applies a recipe; other arguments and errors are those of `RecipeNeeds`.

    Args:
        far_dtype: see `runtime.algorithms.gptq.SolveOptions`.
        is_measured_before: whether every step has saved statistics, so that no batch runs.

    Attributes:
        needs: what is measured and rescaled.
        remarks: messages to print before the run.
    """

    def __init__(
        self,
        artifact: Artifact,
        source: ParameterSource,
        recipe: Recipe,
        jobs: Mapping[str, Assignment],
        *,
        far_dtype: torch.dtype = torch.float32,
        is_measured_before: bool = False,
    ) -> None:
        self.is_measured_before = is_measured_before
        self.jobs = jobs
        self.far_dtype = far_dtype
        self.recipe = recipe
        self.source = source
        self.needs = RecipeNeeds(artifact, source, recipe, jobs)
        if is_measured_before:
            self.needs.require_no_forward(recipe.source)
        self.key_values = self.needs.key_values
        self.remarks = list(self.needs.remarks)
        self.siblings = siblings_of(artifact)
        joined = [name for name, job in jobs.items() if job.scheme.weights.strategy == "tensor_group"]
        named = siblings_by_name(name for name in joined if name not in self.siblings)
        self.siblings |= named
        if named:
            fused = ", ".join("/".join(names) for names in FUSED_NAMES)
            self.remarks.append(
                f"warning: this artifact does not state which modules read the same tensor as {some(list(named))}, so "
                f"modules that engines fuse by name ({fused}) share NVFP4's global scale"
            )

    def measures(self, names: Sequence[str]) -> bool:
        """Whether batches must run for a step that quantizes these modules."""
        return not self.is_measured_before and self.needs.measures(names)

    def compares(self, names: Sequence[str]) -> bool:
        """Whether the original activations of a step are measured, too."""
        return self.needs.compares(names)

    def measures_cache(self, entry: SubgraphEntry) -> bool:
        """Whether batches must run through a subgraph for the scales of its key-value cache."""
        return not self.is_measured_before and self.needs.measures_cache(entry)

    def adds(self, entry: SubgraphEntry) -> Sequence[Stored]:
        """List the scales of keys and values that are added to the checkpoint."""
        found = []
        for module in self.needs.attentions(entry):
            assert self.key_values is not None, "only a recipe with a cache has attentions"
            prefix, dtype = checkpoint_prefix(self.source, module), self._cache_dtype(entry, module)
            for part in self.key_values.parts:
                shape = self.key_values.scale_shape(module, part)
                found.append(Stored(f"{prefix}.{part}_scale", dtype_name(dtype), shape))
        return found

    def _cache_dtype(self, entry: SubgraphEntry, module: str) -> torch.dtype:
        """Return the dtype of a module's scales: the checkpoint's dtype of its first parameter, or float32."""
        inside = (name for name in entry.parameters if name.startswith(f"{module}."))
        keys = (key for name in inside for key in self.source.origins[name].keys[:1])
        dtypes = (DTYPES[self.source.stored(key).dtype] for key in keys)
        return next((dtype for dtype in dtypes if dtype in _SCALE_DTYPES), torch.float32)

    def rewrites(self, names: Sequence[str]) -> Sequence[str]:
        """List the parameters that rescaling changes and that are not quantized."""
        found: dict[str, None] = {}
        for _, rescaling in self.needs.rescaled(names):
            found.update(dict.fromkeys(changed_parameters(rescaling.group)))
        return [name for name in found if self._is_rewritten(name)]

    def _is_rewritten(self, name: str) -> bool:
        return name.removesuffix(".weight") not in self.jobs or name.endswith(".bias")

    def apply(self, work: Work) -> None:
        """Measure, rescale and round a step; experts first, in groups that fit into memory.

        Groups of experts are processed from last to first: no input that is measured later depends on their outputs.
        """
        names, all_tokens = work.step.modules, work.all_tokens
        needs = {name: need for name, need in self.needs.of(names, all_tokens=all_tokens).items() if need}
        tuning = step_tuning(work, self.jobs, self.needs.experts)
        groups = expert_groups(work, {name: needs[name] for name in needs if not tuning.holds(name)})[::-1]
        grouped = dict.fromkeys(name for group in groups for name in group)
        others = {name: need for name, need in needs.items() if name not in grouped}
        if groups and all_tokens:  # one expert is measured for all of its mixture
            others |= {name: need for name, need in self.needs.representatives(names).items() if name not in groups[0]}
        rescaled = Rescaled(read=lambda name: _parameter(work, name), stored_dtype=work.stored_dtype, jobs=self.jobs)
        rescaler = StepRescaler(work, rescaled, self.recipe.source)
        inside, outside = self._rescalings(names)
        attentions = self.needs.attentions(work.step.subgraph.entry)
        statistics: dict[str, InputStatistics] = {}
        tuning.remember()
        for index, group in enumerate(groups or [[]]):
            wanted = others if index == 0 else {}  # all other modules are measured before any weight is rounded
            own = {name: needs[name] for name in group}
            later = [name for name in grouped if name not in own] if index == 0 else []
            # An expert that no token reaches must end the run before other experts are solved.
            with _reached(work, later) as reached:
                measured = self._measured(work, {**own, **wanted}, attentions if index == 0 else ())
            missed = [name for name in later if name not in reached and not measured_again(name, self.jobs)]
            require_inputs(missed, self.jobs)
            if index == 0:
                rescaler.rescale(outside, measured, self._representatives(work))
                self._measure_cache_again(work, rescaled, [rescaling.group for _, rescaling in outside], attentions)
                found = {name: measured.pop(name) for name in wanted if name in measured}
                statistics = {name: entry for name, entry in found.items() if name in self.jobs and name not in grouped}
                del found  # frees the statistics of modules that are only rescaled
            else:
                rescaler.adjust(measured)
            for expert in dict.fromkeys(self.needs.experts[name] for name in group):
                rescaler.rescale(inside.get(expert, ()), measured, {})
            self._round(work, group, rescaled, measured, others=list(statistics.values()))
        for expert in tuning.own_experts:
            rescaler.rescale(inside.get(expert, ()), statistics, {})
        rescaler.warn_of_unreached()
        self._add_key_value_scales(work, attentions)
        self._rewrite(work, rescaled)
        left = [name for name in names if name not in grouped]
        used = {name: statistics[name] for name in left if name in statistics}
        del statistics  # frees those of modules that are only rescaled
        self._round(work, left, rescaled, used, tuning=tuning)

    def _rescalings(
        self, names: Sequence[str]
    ) -> tuple[dict[tuple[str, int], list[tuple[Transform, Rescaling]]], list[tuple[Transform, Rescaling]]]:
        """Split a step's rescalings into those inside of single experts, by expert, and the others."""
        inside: dict[tuple[str, int], list[tuple[Transform, Rescaling]]] = {}
        outside = []
        for transform, rescaling in self.needs.rescaled(names):
            if self.needs.is_inside(rescaling):
                inside.setdefault(self.needs.experts[rescaling.group.modules[0]], []).append((transform, rescaling))
            else:
                outside.append((transform, rescaling))
        return inside, outside

    def _representatives(self, work: Work) -> dict[str, InputStatistics]:
        """Measure representative experts on all tokens if experts are measured on their own tokens."""
        needs = {} if work.all_tokens else self.needs.representatives(work.step.modules)
        return measure_once(work, needs, all_tokens=True) if needs else {}

    def _rewrite(self, work: Work, rescaled: Rescaled) -> None:
        """Write the rescaled parameters that are not quantized."""
        for name in rescaled.changed():
            if self._is_rewritten(name):
                work.rewrite(name, rescaled.rounded(name, _parameter(work, name).dtype))
                rescaled.forget(name)

    def _measure_cache_again(
        self, work: Work, rescaled: Rescaled, groups: Sequence[ScaleGroup], attentions: Sequence[str]
    ) -> None:
        """Measure keys and values again if a projection that computes them was rescaled, as AWQ does for values."""
        inside = tuple(f"{module}." for module in attentions)
        if not any(group.producer.startswith(inside) for group in groups):
            return
        changed = dict.fromkeys(rescaled.changed())
        related = [names for names in map(changed_parameters, groups) if any(n.startswith(inside) for n in names)]
        parameters = dict.fromkeys(name for names in related for name in names if name in changed)
        with assigned(work, rescaled, parameters), self._measuring(work, attentions):
            work.run_batches()

    def _measured(
        self, work: Work, needs: Mapping[str, Needs], attentions: Sequence[str] = ()
    ) -> dict[str, InputStatistics]:
        if not needs and not attentions:
            return {}
        if work.saved is not None and self.key_values is not None:
            self.key_values.restore(attentions, work.saved.cached)
        with self._measuring(work, attentions) if work.saved is None else contextlib.nullcontext():
            statistics = measure(work, needs, self.jobs)
        missed = [name for name in unreached(needs, statistics) if name in self.jobs and self.jobs[name].clip]
        if missed:
            work.warnings.append(f"warning: no token reached {some(missed)}: rounded to nearest without a range search")
        zeros = only_zeros(statistics)
        if zeros:
            work.warnings.append(f"warning: all inputs of {some(zeros)} are zero: rounded to nearest")
        few = few_tokens(needs, statistics)
        if few:
            fewest = min(statistics[name].num_tokens for name in few)
            work.warnings.append(
                f"warning: {some(few)} saw fewer tokens than input features (minimum {fewest}); use more data"
            )
        return statistics

    @contextlib.contextmanager
    def _measuring(self, work: Work, attentions: Sequence[str]) -> Iterator[None]:
        """Also measure keys and values while the block runs; each pass over the batches starts anew."""
        if self.key_values is None or not attentions:
            yield
            return
        key_values, run_batches = self.key_values, work.run_batches

        def from_the_beginning(
            before: Callable[[int], None] = lambda batch: None,
            after: Callable[[], None] = lambda: None,
            original: Callable[[int], None] | None = None,
        ) -> None:
            def ended() -> None:
                key_values.end_round(work.workers, work.device)
                after()

            key_values.forget(attentions)
            run_batches(before, ended, original)

        key_values.is_measuring, work.run_batches = True, from_the_beginning
        try:
            yield
        finally:
            key_values.is_measuring, work.run_batches = False, run_batches

    def _add_key_value_scales(self, work: Work, attentions: Sequence[str]) -> None:
        for module in attentions:
            assert self.key_values is not None, "only a recipe with a cache has attentions"
            entry, prefix = work.step.subgraph.entry, checkpoint_prefix(self.source, module)
            for part in self.key_values.parts:
                if (module, part) not in self.key_values.spans:
                    raise DataError(
                        f"no batch ran {module}, so the scales of its keys and values are undefined",
                        hint="calibrate with more data",
                    )
                scale = self.key_values.scale_of(module, part, self._cache_dtype(entry, module))
                work.add(f"{prefix}.{part}_scale", scale)
                self.key_values.scales[module, part] = scale

    def _round(
        self,
        work: Work,
        names: Sequence[str],
        rescaled: Rescaled,
        statistics: dict[str, InputStatistics],
        others: Collection[InputStatistics] = (),
        tuning: StepTuning | None = None,
    ) -> None:
        """Round modules in order, and release rescaled weights and statistics after their last use."""

        def weight_of(name: str) -> torch.Tensor:
            return rescaled.get(f"{name}.weight") if f"{name}.weight" in rescaled.factors else work.weight(name)

        rounding = Rounding(
            jobs=self.jobs,
            weight_of=weight_of,
            shape_of=lambda name: _weight_of(work, name).shape,
            dtype_of=lambda name: _weight_of(work, name).dtype,
            scale_dtype_of=work.scale_dtype,
            statistics=statistics,
            siblings=self.siblings,
            device=work.device,
            others=others,
            workers=work.workers,
            writer_of=work.writer_of,
            goes_on=work.step.is_run or work.saved is not None,  # who has the statistics is not who writes
            experts=self.needs.experts,
            mixture_sizes=self.needs.mixture_sizes,
            far_dtype=self.far_dtype,
        )
        if tuning is not None:
            tuning.tune(names, rounding, rescaled, self._input_parts)
        failed: Exception | None = None
        for rounded in round_modules(names, rounding):
            try:
                if failed is None:
                    self._finish(work, rounded, statistics.get(rounded.name), rounding.shape_of(rounded.name)[1])
            except Exception as error:
                if work.workers.size == 1:
                    raise
                failed = error  # until the messages are over that the other workers wait for
            rescaled.forget(f"{rounded.name}.weight")
            statistics.pop(rounded.name, None)
            del rounded  # frees the packed rows and the sums before the next module is solved
        with agreed(work.workers):
            if failed is not None:
                raise failed

    def _finish(self, work: Work, rounded: Rounded, found: InputStatistics | None, num_in: int) -> None:
        """Write a module that is rounded, and report it."""
        name = rounded.name
        if rounded.warning:
            work.warnings.append(rounded.warning)
        report = ModuleReport(
            name=name,
            algorithm=rounded.pieces[0].algorithm,
            loss=rounded.loss,
            damping=rounded.pieces[0].damping,
            num_tokens=found.num_tokens if found is not None else 0,
            num_dead=found.num_dead if found is not None else 0,
            fallback=rounded.pieces[0].fallback,
            scheme=scheme_line(self.jobs[name].scheme),
            error=_relative_error(rounded),
            seconds=rounded.seconds,
        )
        scheme = self.jobs[name].scheme
        if rounded.is_here:
            parts = self._input_parts(name, found, work.scale_dtype(name))
            work.packed(report, join_rows(name, [piece.tensors for piece in rounded.pieces], num_in, scheme, parts))
        else:
            work.packed_elsewhere(report, stored_dtypes(scheme, work.scale_dtype(name)))

    def _input_parts(
        self, name: str, found: InputStatistics | None, scale_dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        scheme = self.jobs[name].scheme
        if not input_parts(scheme):
            return {}
        assert found is not None, f"{name} has static inputs and was not measured"
        args = scheme.input_activations
        try:
            return static_input_parts(*found.span(averaging_of(args)), args, scale_dtype)
        except QuantizationError as error:
            raise QuantizationError(
                f"inputs of {name}: {error.message}", hint="add it to ignore, or store the model in bfloat16"
            ) from error


def _reached(work: Work, names: Sequence[str]) -> contextlib.AbstractContextManager[Mapping[str, None]]:
    """Record which modules tokens reach while the block runs, or have reached when saved statistics were measured."""
    if work.saved is None:
        return reached_modules(work.model, names, work.workers)
    return contextlib.nullcontext(dict.fromkeys(work.saved.reached(names, all_tokens=work.all_tokens)))


def _parameter(work: Work, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    module = work.model.get_submodule(owner)
    if leaf == "weight" and owner in work.jobs:
        return work.weight(owner).detach()
    found = module._parameters.get(leaf)
    if found is None:
        raise RecipeError(f"{name} is not a parameter and cannot be rescaled", hint="correct the mapping")
    return found.detach()


def _weight_of(work: Work, name: str) -> torch.Tensor:
    """The weight of a module, which need not be loaded."""
    return work.model.get_submodule(name).get_parameter("weight")


def _relative_error(rounded: Rounded) -> float:
    """Compute `ModuleReport.error`."""
    size, loss = rounded.size, rounded.loss
    return float(loss / size) ** 0.5 if size > 0 and loss > 0 else 0.0
