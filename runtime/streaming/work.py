"""The interface of a modifier to a run: the modules and batches of one step, and the new checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from runtime.algorithms.grid import has_signed_scales
from runtime.checkpoint.dtypes import DTYPES
from runtime.formats.stored_scales import require_finite, require_sound_scales, require_sound_weight
from runtime.host.memory import trim_heap
from runtime.recipe.examples import scheme_line
from runtime.streaming.report import ModuleReport
from runtime.streaming.schedule import StepRequirements
from runtime.weights.origins import required_key
from runtime.weights.parameters import assign, unload
from runtime.workers.group import Alone

if TYPE_CHECKING:
    from torch import nn

    from runtime.algorithms.result import QuantizedWeight
    from runtime.checkpoint.writer import ShardWriter
    from runtime.data.masks import TokenMask
    from runtime.recipe.recipe import Assignment
    from runtime.streaming.events import Watcher
    from runtime.streaming.schedule import Schedule, Step
    from runtime.weights.parameters import Weights
    from runtime.workers.group import Workers


class SavedStatistics(Protocol):
    """The statistics of a step that were measured before, see `runtime.saved_statistics.step_reader`."""

    def measured(
        self,
        needs: Mapping[str, Any],
        widths: Mapping[str, int],
        *,
        all_tokens: bool,
        device: torch.device,
        workers: Workers,
        division: Any,
    ) -> dict[str, Any]:
        """Return the input statistics of modules, as a pass over the batches would."""

    def reached(self, names: Sequence[str], *, all_tokens: bool) -> list[str]:
        """Return the modules that tokens have reached."""

    def cached(self, module: str, part: str) -> torch.Tensor:
        """Return the minima and maxima [calls, 2, H] of keys, values or queries."""


ByHand = Callable[[], AbstractContextManager[Callable[[int], "dict[str, Any]"]]]
_LARGE = 2**20  # bytes; to trim the heap takes longer than to write a smaller module


def _no_batches() -> AbstractContextManager[Callable[[int], dict[str, Any]]]:
    raise AssertionError("this work has no batches")


@dataclass(kw_only=True)
class Work:
    """One step as modifiers see it.

    Attributes:
        step: the step.
        schedule: of the whole run.
        model: the module tree, with the step's parameters if it is run.
        source: the original checkpoint.
        writer: the new one.
        jobs: the assignment of each module.
        device: where weights and batches are.
        run_batches: sends all batches through the subgraph once and discards the outputs. Hooks on modules see what
            passes. Its optional arguments are called with the index of each batch before that runs, and after each
            round of lanes (`runtime.data.lanes`). A worker runs the batches of its own lanes. With a third one, if
            `is_split`, the original model's values of each batch run before it, and are announced by that.
        run_original: sends the original model's values of all batches through the subgraph, and calls its argument with
            the index of each batch, its inputs, and its outputs. Only while no weight of the step is changed, and only
            if a modifier `compares`.
        run_first: sends the first batch through the subgraph and returns its outputs; nothing on other workers than
            the one that has it.
        by_hand: a block in which a modifier runs batches itself, in any order; yields a function that copies the inputs
            of the batch with a number.
        masks: for each own batch the tokens that count in statistics, see `runtime.data.masks`; None for all.
        all_tokens: whether every expert of a mixture is measured on all tokens, not only on those routed to it.
        statistics_bytes: the largest size of the experts' statistics at a time; None for no bound.
        is_split: whether the inputs of the original model differ from those of the quantized one; not before the first
            quantized step.
        forgets: whether `run_batches` stores no outputs, so that a hook may end a batch by
            `runtime.streaming.work.EnoughSeenError`.
        watcher: receives an event for each module.
        workers: that share the run.
        reports: of the modules that are done.
        kept: changed parameters that later steps run with.
        warnings: for the user, a line each.
        saved: statistics that replace passes over the batches; None to measure.
    """

    step: Step
    schedule: Schedule
    model: nn.Module
    source: Weights
    writer: ShardWriter
    jobs: dict[str, Assignment]
    device: torch.device
    run_batches: Callable[..., None]
    run_first: Callable[[], Any]
    run_original: Callable[..., None] = lambda *_: None
    watcher: Watcher
    by_hand: ByHand = _no_batches
    workers: Workers = field(default_factory=Alone)
    masks: Sequence[TokenMask] = ()
    all_tokens: bool = False
    statistics_bytes: int | None = None
    is_split: bool = False
    forgets: bool = False
    reports: list[ModuleReport] = field(default_factory=list)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    saved: SavedStatistics | None = None

    def weight(self, name: str) -> torch.Tensor:
        """The weight of a module, [O, I]; read now if the subgraph is not run, and unloaded when it is quantized."""
        weight = self.model.get_submodule(name).get_parameter("weight")
        if weight.is_meta:
            assign(self.model, f"{name}.weight", self.source.read(f"{name}.weight", self.device))
            weight = self.model.get_submodule(name).get_parameter("weight")
        return weight

    def scale_dtype(self, name: str) -> torch.dtype:
        """The dtype of a module's scales in the checkpoint: that of its weight there."""
        return self.stored_dtype(f"{name}.weight")

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype of a parameter in the checkpoint."""
        return DTYPES[self.source.stored(required_key(self.source, name)).dtype]

    def quantized(
        self,
        name: str,
        result: QuantizedWeight,
        *,
        num_tokens: int,
        error: float = 0.0,
        loss: float | None = None,
        start: float | None = None,
        algorithm: str = "",
    ) -> None:
        """Write a quantized weight, and continue with the weight that readers of the checkpoint compute with.

        Args:
            name: of the module.
            result: of an algorithm.
            num_tokens: number of inputs that were measured.
            error: see `ModuleReport`.
            loss: see `ModuleReport`; by default the result's own.
            start: the clock (`perf_counter`) when work on the module began.
            algorithm: the algorithm that was used; by default that of the assignment.
        """
        from runtime.formats.compressed import compress_module

        job = self.jobs[name]
        require_sound_weight(name, result, job.scheme, self.scale_dtype(name))
        report = ModuleReport(
            name=name,
            algorithm=algorithm or job.algorithm,
            loss=result.loss if loss is None else loss,
            damping=result.damping,
            num_tokens=num_tokens,
            scheme=scheme_line(job.scheme),
            error=error,
            seconds=time.perf_counter() - start if start is not None else 0.0,
        )
        self.packed(report, compress_module(name, result, job.scheme))

    def packed(self, report: ModuleReport, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the packed tensors of a quantized module, and continue with the weight that readers compute with.

        Args:
            report: of the module, without the size of its tensors.
            tensors: by their name in the module, as `runtime.formats.compressed.compress_module` returns them.
        """
        from runtime.formats.compressed import decompress_module, input_parts
        from runtime.formats.rounded_inputs import set_input_parts

        name, scheme = report.name, self.jobs[report.name].scheme
        require_sound_scales(name, tensors, may_be_negative=has_signed_scales(scheme.weights))
        if self.step.is_run:
            weight = decompress_module(tensors, scheme).to(self.weight(name).dtype)
            self._continue_with(f"{name}.weight", weight)
        set_input_parts(self.model.get_submodule(name), {part: tensors[part] for part in input_parts(scheme)})
        prefix = self._prefix(name)
        self._finished(report, sum(self.writer.write(f"{prefix}{part}", tensor) for part, tensor in tensors.items()))

    def packed_elsewhere(self, report: ModuleReport, parts: Iterable[str]) -> None:
        """Take note of a module that another worker has quantized and written; no batch runs with its weight.

        Args:
            report: of the module, without the size of its tensors.
            parts: the names of its tensors in the module.
        """
        assert not self.step.is_run, "batches would run with the original weight"
        prefix = self._prefix(report.name)
        self._finished(report, sum(self.writer.write_bytes(f"{prefix}{part}", ()) for part in parts))

    def writer_of(self, name: str) -> int:
        """The rank of the worker that writes the tensors of a module."""
        return self.writer.owner_of(self._prefix(name))

    def _prefix(self, name: str) -> str:
        """The names of a module's tensors in the checkpoint, without the last part."""
        return required_key(self.source, f"{name}.weight").removesuffix("weight")

    def _finished(self, report: ModuleReport, num_bytes: int) -> None:
        if not self.step.is_run:
            unload(self.model, [f"{report.name}.weight"])  # the next weight is read into the same memory
        elif num_bytes >= _LARGE:
            trim_heap()
        self.reports.append(replace(report, num_bytes=num_bytes))
        done, count = len(self.reports), len(self.step.modules)
        self.watcher.tell("solved", index=self.step.index, name=report.name, done=done, count=count)

    def rewrite(self, name: str, tensor: torch.Tensor) -> None:
        """Change a parameter that is not quantized, in the model and in the checkpoint.

        Both get it in the checkpoint's dtype, so that the run continues with the value that a reader will have. The
        modifier must have named it in `rewrites`.
        """
        assert name in self.schedule.rewritten, f"no modifier named {name} in `rewrites`"
        stored = tensor.detach().to(self.stored_dtype(name))
        require_finite(name, stored)
        self.writer.write(required_key(self.source, name), stored)
        self._continue_with(name, stored.to(tensor.dtype))

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor that the original checkpoint does not have; the modifier must have named it in `adds`."""
        require_sound_scales(name.rpartition(".")[0], {name: tensor})
        self.writer.write(name, tensor)

    def change(self, name: str, tensor: torch.Tensor) -> None:
        """Change a weight that another modifier of this step will quantize, in the model alone."""
        assign(self.model, name, tensor)

    def _continue_with(self, name: str, tensor: torch.Tensor) -> None:
        assign(self.model, name, tensor)
        if name in self.step.keeps:
            self.kept[name] = tensor


class StepModifier(StepRequirements, Protocol):
    """A change to the modules of each step: a recipe, or one of the user's own; see docs/modifiers.md."""

    def apply(self, work: Work) -> None:
        """Change the modules of one step."""


class EnoughSeenError(Exception):
    """Ends a batch that has reached the last measured module; the rest of its computation would be discarded."""
