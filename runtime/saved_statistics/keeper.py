"""Measure everything that a recipe may need of a step's inputs, and write it before the step is quantized."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from runtime.checkpoint.dtypes import dtype_name
from runtime.experts.split import expert_of
from runtime.formats.key_values import attach, of_model
from runtime.quantize.expert_groups import expert_groups, measure_once
from runtime.quantize.seen_inputs import require_finite_inputs
from runtime.quantize.statistics import InputStatistics, Needs
from runtime.saved_statistics.cache_spans import CacheSpans
from runtime.saved_statistics.records import SavedCache, SavedInput, SavedPass, SavedStep, matrix_name, sums_name
from runtime.saved_statistics.step_reader import GRAM, SAMPLE, StepReader
from runtime.saved_statistics.tensor_file import write_tensors
from runtime.workers.agreement import agreed

if TYPE_CHECKING:
    from runtime.artifact.manifest import SubgraphEntry
    from runtime.chain import Artifact
    from runtime.saved_statistics.kept_folder import KeptFolder
    from runtime.streaming.work import Work

EVERYTHING = Needs(hessian=True, channels=True, sample=True)


def measurable(artifact: Artifact, model: nn.Module) -> dict[tuple[str, ...], tuple[str, ...]]:
    """The modules whose inputs a recipe may need, by the parameters of the subgraph that is the first to use them."""
    done: dict[str, None] = {}
    found = {}
    for subgraph in artifact.subgraphs:
        owners = [name.removesuffix(".weight") for name in subgraph.entry.parameters if name.endswith(".weight")]
        names = tuple(name for name in owners if name not in done and isinstance(model.get_submodule(name), nn.Linear))
        done.update(dict.fromkeys(names))
        found[subgraph.entry.parameters] = names
    return found


class StatisticsKeeper:
    """The modifier that writes the statistics of each step; it is applied before the recipe, and changes nothing.

    Args:
        artifact: the compiled model, its experts split.
        model: the module tree.

    Attributes:
        kept: the directory; it is set when the run begins.
    """

    def __init__(self, artifact: Artifact, model: nn.Module) -> None:
        self._modules = measurable(artifact, model)
        self._experts = expert_of(artifact)
        self._spans = CacheSpans.of_manifest(artifact.manifest)
        self.kept: KeptFolder | None = None

    def measures(self, names: Sequence[str]) -> bool:
        """Whether batches must run for these modules; `measures_cache` decides for a subgraph."""
        return False

    def measures_cache(self, entry: SubgraphEntry) -> bool:
        """Whether batches must run through a subgraph."""
        return bool(self.of(entry)) or bool(self._attentions(entry))

    def rewrites(self, names: Sequence[str]) -> Sequence[str]:
        """List the parameters that it changes: none."""
        return ()

    def of(self, entry: SubgraphEntry) -> tuple[str, ...]:
        """The modules whose inputs are measured with a subgraph."""
        return self._modules.get(entry.parameters, ())

    def caches_of(self, entry: SubgraphEntry) -> list[tuple[str, str, int]]:
        """The keys, values and queries that are recorded with a subgraph: module, part and number of heads."""
        found = self._spans.entries.get(entry.parameters, ()) if self._spans is not None else ()
        return [(one.module, one.part, one.heads) for one in found]

    def _attentions(self, entry: SubgraphEntry) -> tuple[str, ...]:
        return self._spans.of_subgraph(entry) if self._spans is not None else ()

    def apply(self, work: Work) -> None:
        """Measure and write the statistics of a step, from which the recipe is solved then."""
        assert self.kept is not None, "the run has not begun"
        index, entry = work.step.index, work.step.subgraph.entry
        step = _StepFiles(kept=self.kept, work=work)
        names = self.of(entry)
        if names or self._attentions(entry):
            with self._recording(work):
                if work.all_tokens:
                    self._measure(work, step, names, all_tokens=True)
                else:
                    self._measure(work, step, names, all_tokens=False)
                    inside = [name for name in names if name in self._experts]
                    if inside:
                        self._measure(work, step, inside, all_tokens=True)
        saved = step.finish([name for name in names if name in self._experts], self._spans, self._attentions(entry))
        work.saved = StepReader(self.kept.folder, index, saved)

    def _measure(self, work: Work, step: _StepFiles, names: Sequence[str], *, all_tokens: bool) -> None:
        """Run the batches, as often as the memory for experts requires, and write what is measured."""
        needs = dict.fromkeys(names, EVERYTHING)
        groups = expert_groups(replace(work, all_tokens=all_tokens), needs)
        grouped = {name for group in groups for name in group}
        rest = [name for name in names if name not in grouped]
        calls: dict[str, int] = {}
        for number, group in enumerate(groups or [[]]):
            wanted = [*rest, *group] if not number else group
            measured = measure_once(work, dict.fromkeys(wanted, EVERYTHING), all_tokens=all_tokens)
            require_finite_inputs(measured, work.source.dtype)
            calls |= step.write(measured)
            del measured
        step.passes.append(SavedPass(all_tokens=all_tokens, measured=tuple(names), calls=calls))

    @contextlib.contextmanager
    def _recording(self, work: Work) -> Iterator[None]:
        """Also record keys and values while the block runs; each pass over the batches starts anew."""
        attentions = self._attentions(work.step.subgraph.entry)
        if self._spans is None or not attentions:
            yield
            return
        spans, own, run_batches = self._spans, of_model(work.model), work.run_batches

        def from_the_beginning(before: Any = lambda batch: None, after: Any = lambda: None) -> None:
            def ended() -> None:
                spans.end_round(work.workers, work.device)
                after()

            spans.forget(attentions)
            run_batches(before, ended)

        attach(work.model, spans)
        spans.is_measuring, work.run_batches = True, from_the_beginning
        try:
            yield
        finally:
            spans.is_measuring, work.run_batches = False, run_batches
            attach(work.model, own)


@dataclass(kw_only=True)
class _StepFiles:
    """The files of one step while they are written; every worker has the same list."""

    kept: KeptFolder
    work: Work
    inputs: list[SavedInput] = field(default_factory=list)
    passes: list[SavedPass] = field(default_factory=list)
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def write(self, measured: Mapping[str, InputStatistics]) -> dict[str, int]:
        """Write the Gram matrices that this worker owns; returns the number of the input of each module."""
        numbers: dict[int, int] = {}
        entries: list[InputStatistics] = []
        for found in measured.values():
            if id(found) not in numbers:
                numbers[id(found)] = len(self.inputs) + len(entries)
                entries.append(found)
        own: dict[str, list[Any]] = {}
        first = len(self.inputs)
        with agreed(self.work.workers), self.kept.errors():
            for number, found in enumerate(entries, start=first):
                if found.is_here and found.num_tokens:
                    own[str(number)] = self._write_matrix(number, found)
        everyone = {number: facts for one in self.work.workers.exchange(own) for number, facts in one.items()}
        for number, found in enumerate(entries, start=first):
            digest, num_sampled, dtype = everyone.get(str(number), ["", 0, ""])
            self._add(number, found, digest, num_sampled, dtype)
        return {name: numbers[id(found)] for name, found in measured.items()}

    def _write_matrix(self, number: int, found: InputStatistics) -> list[Any]:
        tensors = {GRAM: found.hessian_II}
        if found.sample is not None:
            tensors[SAMPLE] = found.sample.kept_TI
        sample = tensors.get(SAMPLE)
        digest = write_tensors(self.kept.folder / matrix_name(self.work.step.index, number), tensors, GRAM)
        return [digest, 0 if sample is None else len(sample), "" if sample is None else dtype_name(sample.dtype)]

    def _add(self, number: int, found: InputStatistics, digest: str, num_sampled: int, dtype: str) -> None:
        channels = found.channels
        assert channels is not None, "everything was measured"
        self.inputs.append(
            SavedInput(
                width=found.num_in_features,
                num_tokens=found.num_tokens,
                num_batches=channels.num_batches,
                num_sampled=num_sampled,
                sample_dtype=dtype,
                has_gram=True,
                matrix=digest,
            )
        )
        if found.num_tokens:
            self.sums[f"{number}.diagonal"] = found.diagonal_I
            self.sums[f"{number}.sum_abs"] = channels.sum_abs_I
            self.sums[f"{number}.bounds"] = channels.bounds_2I
            self.sums[f"{number}.averages"] = channels.averages_2I
            self.sums[f"{number}.spans"] = torch.stack(channels.spans)

    def finish(self, experts: Sequence[str], spans: CacheSpans | None, attentions: Sequence[str]) -> SavedStep:
        """Write the small sums, and the list of the step when all workers have written their files."""
        caches: list[SavedCache] = []
        for module in attentions:
            for part in spans.parts if spans is not None else ():
                found = spans.kept.pop((module, part), []) if spans is not None else []
                if found:
                    self.sums[f"cache.{len(caches)}"] = torch.stack(found)
                    caches.append(
                        SavedCache(module=module, part=part, num_calls=len(found), num_heads=found[0].shape[1])
                    )
        index, digest = self.work.step.index, ""
        with agreed(self.work.workers), self.kept.errors():
            if self.sums and not self.work.workers.rank:
                digest = write_tensors(self.kept.folder / sums_name(index), self.sums)
        digest = self.work.workers.exchange(digest)[0]
        saved = SavedStep(
            label=self.work.step.label,
            inputs=tuple(self.inputs),
            passes=tuple(self.passes),
            experts=tuple(experts),
            caches=tuple(caches),
            sums=digest,
        )
        with agreed(self.work.workers), self.kept.errors():
            self.kept.write_step(index, saved)
        return saved
