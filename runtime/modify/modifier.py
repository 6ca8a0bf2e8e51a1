"""A recipe as a modifier of a run: on each subgraph measure once, rescale as asked, round.

Rescaling inputs by known factors changes their statistics by known factors. So whatever a recipe composes, SmoothQuant
then GPTQ or AWQ then GPTQ, the batches pass through a subgraph once to be measured, not once for each modifier.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from runtime.dtypes import DTYPES, dtype_name
from runtime.errors import DataError, RecipeError
from runtime.layout import Stored
from runtime.modify.experts import expert_groups, few_tokens, measure
from runtime.modify.needs import RecipeNeeds
from runtime.modify.proof import require_same_output
from runtime.modify.rounding import Rounded, round_modules, with_inputs
from runtime.modify.smoothing import Rescaled, find_scales
from runtime.presets import averaging_of
from runtime.recipe import some
from runtime.schemes import input_parts, static_input_parts
from runtime.statistics import InputStatistics, Needs

if TYPE_CHECKING:
    from runtime.artifact import Artifact
    from runtime.manifest import SubgraphEntry
    from runtime.recipe import Assignment, Recipe
    from runtime.streaming.work import Work
    from runtime.weights import Weights

_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class RecipeModifier:
    """What a recipe says, for the modules of any step.

    Args:
        artifact: the compiled model.
        source: the checkpoint.
        recipe: in order: modifiers that rescale, then those that round.
        jobs: what is done to each module.

    Attributes:
        needs: what of it is measured and rescaled.
        remarks: what a user should know before it begins, a line each.

    Raises:
        RecipeError: when a modifier finds nothing to do.
    """

    def __init__(self, artifact: Artifact, source: Weights, recipe: Recipe, jobs: Mapping[str, Assignment]) -> None:
        self.jobs = jobs
        self.recipe = recipe
        self.source = source
        self.needs = RecipeNeeds(artifact, source, recipe, jobs)
        self.key_values = self.needs.key_values
        self.remarks = list(self.needs.remarks)
        groups = artifact.manifest.scale_groups
        self.siblings = {name: number for number, group in enumerate(groups) for name in group.modules}
        if not groups and any(job.scheme.weights.strategy == "tensor_group" for job in jobs.values()):
            self.remarks.append(
                "warning: this artifact does not say which modules are siblings, so each has its own NVFP4 global scale"
            )

    def measures(self, names: Sequence[str]) -> bool:
        """Hessians, sizes of channels, ranges of inputs, keys and values."""
        return self.needs.measures(names)

    def measures_cache(self, entry: SubgraphEntry) -> bool:
        """Whether a subgraph keeps keys and values, whatever is quantized in it."""
        return self.needs.measures_cache(entry)

    def adds(self, entry: SubgraphEntry) -> Sequence[Stored]:
        """The scales of keys and values, in float32 where a checkpoint's own dtype is none for them."""
        found = []
        for module in self.needs.attentions(entry):
            assert self.key_values is not None, "there are attentions"
            prefix, dtype = self.source.checkpoint_prefix(module), self._cache_dtype(entry, module)
            for part in self.key_values.parts:
                shape = self.key_values.scale_shape(module, part)
                found.append(Stored(f"{prefix}.{part}_scale", dtype_name(dtype), shape))
        return found

    def _cache_dtype(self, entry: SubgraphEntry, module: str) -> torch.dtype:
        """The dtype of a module's first parameter in the checkpoint, which its scales get, too."""
        inside = (name for name in entry.parameters if name.startswith(f"{module}."))
        keys = (key for name in inside for key in self.source.origins[name].keys[:1])
        dtypes = (DTYPES[self.source.checkpoint.stored(key).dtype] for key in keys)
        return next((dtype for dtype in dtypes if dtype in _SCALE_DTYPES), torch.float32)

    def rewrites(self, names: Sequence[str]) -> Sequence[str]:
        """What makes the channels that are rescaled, and what takes them, unless it is quantized itself."""
        found: dict[str, None] = {}
        for _, rescaling in self.needs.rescaled(names):
            group = rescaling.group
            touched = [group.producer, group.bias, *(f"{name}.weight" for name in group.modules)]
            touched += [other.name for other in group.others]
            found.update(dict.fromkeys(name for name in touched if name))
        return [name for name in found if name.removesuffix(".weight") not in self.jobs or name.endswith(".bias")]

    def apply(self, work: Work) -> None:
        """Measure, rescale, round; experts first, in groups that fit into memory."""
        names = work.step.modules
        needs = {name: need for name, need in self.needs.of(names).items() if need}
        groups = expert_groups(work, needs)
        grouped = {name for group in groups for name in group}
        others = {name: need for name, need in needs.items() if name not in grouped}
        statistics: dict[str, InputStatistics] = {}
        attentions = self.needs.attentions(work.step.subgraph.entry)
        for index, group in enumerate(groups):
            first = others if index == 0 else {}  # what else there is is measured before any weight is rounded
            wanted = first | {name: needs[name] for name in group}
            measured = self._measured(work, wanted, attentions if index == 0 else ())
            statistics.update({name: measured.pop(name) for name in first if name in measured})
            self._round(work, group, {}, measured, others=list(statistics.values()))
        if not groups and (others or attentions):
            statistics = self._measured(work, others, attentions)
        self._add_key_value_scales(work, attentions)
        rescaled = Rescaled(read=lambda name: _parameter(work, name), stored_dtype=work.stored_dtype, jobs=self.jobs)
        self._rescale(work, rescaled, statistics)
        for name, tensor in rescaled.tensors.items():
            if name.removesuffix(".weight") not in self.jobs or name.endswith(".bias"):
                work.rewrite(name, tensor.to(_parameter(work, name).dtype))
        left = [name for name in names if name not in grouped]
        used = {name: statistics[name] for name in left if name in statistics}
        del statistics  # of modules that are rescaled and not rounded
        self._round(work, left, rescaled.tensors, used)

    def _measured(
        self, work: Work, needs: Mapping[str, Needs], attentions: Sequence[str]
    ) -> dict[str, InputStatistics]:
        with self._measuring(work, attentions):
            statistics = measure(work, needs, self.jobs)
        few = few_tokens(needs, statistics)
        if few:
            fewest = min(statistics[name].num_tokens for name in few)
            work.warnings.append(
                f"warning: {some(few)} saw fewer tokens than input features, {fewest} at least; more data is better"
            )
        return statistics

    @contextlib.contextmanager
    def _measuring(self, work: Work, attentions: Sequence[str]) -> Iterator[None]:
        """Keys and values are measured, too, if there are some: in each pass from the beginning."""
        if self.key_values is None or not attentions:
            yield
            return
        key_values, run_batches = self.key_values, work.run_batches

        def from_the_beginning(*before: Any) -> None:
            key_values.forget(attentions)
            run_batches(*before)

        key_values.is_measuring, work.run_batches = True, from_the_beginning
        try:
            yield
        finally:
            key_values.is_measuring, work.run_batches = False, run_batches

    def _add_key_value_scales(self, work: Work, attentions: Sequence[str]) -> None:
        for module in attentions:
            assert self.key_values is not None, "there are attentions"
            entry, prefix = work.step.subgraph.entry, self.source.checkpoint_prefix(module)
            for part in self.key_values.parts:
                if (module, part) not in self.key_values.spans:
                    raise DataError(f"{module} was never run, so its keys and values have no scale")
                scale = self.key_values.scale_of(module, part, self._cache_dtype(entry, module))
                work.add(f"{prefix}.{part}_scale", scale)
                self.key_values.scales[module, part] = scale

    def _rescale(self, work: Work, rescaled: Rescaled, statistics: Mapping[str, InputStatistics]) -> None:
        scaled: dict[str, torch.Tensor] = {}
        for transform, rescaling in self.needs.rescaled(work.step.modules):
            group = rescaling.group
            measured = {id(statistics[name]): statistics[name] for name in group.modules if name in statistics}
            if not measured or not all(entry.num_tokens for entry in measured.values()):
                work.warnings.append(f"warning: {some(group.modules)} saw no tokens and are not rescaled")
                continue
            dtypes = {name: work.scale_dtype(name) for name in group.modules if name in self.jobs}
            scale_I = find_scales(transform, group, rescaled, next(iter(measured.values())), dtypes)
            before = dict(rescaled.tensors)
            used_I = rescaled.apply(group, scale_I)
            if rescaling.is_named:
                where = (
                    f"{self.recipe.source}:{transform.line}: the mapping of {group.producer.removesuffix('.weight')}"
                )
                require_same_output(work, before, rescaled.tensors, where)
            for entry in measured.values():
                entry.scale(used_I)
            scaled[group.modules[0]] = used_I

    def _round(
        self,
        work: Work,
        names: Sequence[str],
        rescaled: dict[str, torch.Tensor],
        statistics: dict[str, InputStatistics],
        others: Collection[InputStatistics] = (),
    ) -> None:
        """Round modules in order; what nobody needs any more of rescaled weights and statistics is taken out."""

        def weight_of(name: str) -> torch.Tensor:
            tensor = rescaled.get(f"{name}.weight")
            return tensor if tensor is not None else work.weight(name)

        rounding = round_modules(names, self.jobs, weight_of, work.scale_dtype, statistics, self.siblings, others)
        for rounded in rounding:
            found = statistics.get(rounded.name)
            if rounded.warning:
                work.warnings.append(rounded.warning)
            parts = self._input_parts(rounded.name, found, work.scale_dtype(rounded.name))
            work.quantized(
                rounded.name,
                with_inputs(rounded.result, parts),
                algorithm=rounded.algorithm,
                num_tokens=found.num_tokens if found is not None else 0,
                error=_relative_error(rounded),
                start=rounded.start,
            )
            rescaled.pop(f"{rounded.name}.weight", None)
            statistics.pop(rounded.name, None)
            del found, rounded  # or the last of them would keep its weight and its sums while the next is solved

    def _input_parts(
        self, name: str, found: InputStatistics | None, scale_dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        scheme = self.jobs[name].scheme
        if not input_parts(scheme):
            return {}
        if found is None or not found.num_tokens:
            raise DataError(
                f"{name} rounds its inputs by a scale that was to be measured, and no token reached it",
                hint="calibrate with more data, or add it to ignore",
            )
        args = scheme.input_activations
        return static_input_parts(*found.span(averaging_of(args)), args, scale_dtype)


def _parameter(work: Work, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    module = work.model.get_submodule(owner)
    if leaf == "weight" and owner in work.jobs:
        return work.weight(owner).detach()
    found = module._parameters.get(leaf)
    if found is None:
        raise RecipeError(f"{name} is no parameter that can be rescaled")
    return found.detach()


def _relative_error(rounded: Rounded) -> float:
    """See `ModuleReport`."""
    size, loss = rounded.size, rounded.result.loss
    return float(loss / size) ** 0.5 if size > 0 and loss > 0 else 0.0
