"""What a modifier sees of a run while it works on one step: modules, batches, and the way to the checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from runtime.checkpoint.dtypes import DTYPES
from runtime.formats.stored_scales import require_finite, require_sound_scales, require_sound_weight
from runtime.host.memory import trim_heap
from runtime.streaming.report import ModuleReport
from runtime.weights.parameters import assign, unload

if TYPE_CHECKING:
    from torch import nn

    from runtime.algorithms.result import QuantizedWeight
    from runtime.checkpoint.writer import ShardWriter
    from runtime.data.masks import TokenMask
    from runtime.recipe.recipe import Assignment
    from runtime.streaming.steps import Schedule, Step
    from runtime.weights.parameters import Weights


@dataclass(kw_only=True)
class Work:
    """One step in the hands of the modifiers.

    Attributes:
        step: what is to be done.
        plan: of the whole run.
        model: the module tree, with the step's parameters if it is run.
        source: the checkpoint.
        writer: the new one.
        jobs: what is done to each module.
        device: where weights and batches are.
        run_batches: sends all batches through the subgraph once; what it returns is thrown away. Hooks on modules see
            what passes. What it is given, if anything, it calls with the index of each batch before that runs.
        run_first: sends the first batch through the subgraph and returns what that returns.
        masks: for each batch which of its tokens count in statistics, see `runtime.data.masks`; None for all.
        all_tokens: whether every expert of a mixture is measured on all tokens, not only on those it is chosen for.
        statistics_bytes: the most that the statistics of experts may take at a time; None for no bound.
        forgets: whether `run_batches` forgets what batches return, so that a hook may end one by
            `runtime.streaming.work.EnoughSeenError` when it has seen all it wants.
        reports: of the modules that are done.
        kept: quantized and rewritten parameters that later subgraphs use as well.
        warnings: what a user should know, a line each.
        num_bytes: what was written.
    """

    step: Step
    plan: Schedule
    model: nn.Module
    source: Weights
    writer: ShardWriter
    jobs: dict[str, Assignment]
    device: torch.device
    run_batches: Callable[..., None]
    run_first: Callable[[], Any]
    masks: Sequence[TokenMask] = ()
    all_tokens: bool = False
    statistics_bytes: int | None = None
    forgets: bool = False
    reports: list[ModuleReport] = field(default_factory=list)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    num_bytes: int = 0

    def weight(self, name: str) -> torch.Tensor:
        """The weight of a module, [O, I]; where the subgraph is not run it is read now, and gone when it is done."""
        weight = self.model.get_submodule(name).get_parameter("weight")
        if weight.is_meta:
            assign(self.model, f"{name}.weight", self.source.read(f"{name}.weight", self.device))
            weight = self.model.get_submodule(name).get_parameter("weight")
        return weight

    def scale_dtype(self, name: str) -> torch.dtype:
        """The dtype of a module's weight in the checkpoint, which its scales get too."""
        return DTYPES[self.source.checkpoint.stored(self._key(f"{name}.weight")).dtype]

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype of a parameter in the checkpoint."""
        return DTYPES[self.source.checkpoint.stored(self._key(name)).dtype]

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
        """Write a module's quantized weight, and let the model go on with what a reader of it computes with.

        Args:
            name: of the module.
            result: what an algorithm returned.
            num_tokens: how many inputs it has seen.
            error: see `ModuleReport`.
            loss: likewise; by default the result's own.
            start: the clock (`perf_counter`) when work on the module began.
            algorithm: what was used; by default what the job says.
        """
        from runtime.formats.compressed import compress_module, decompress_module
        from runtime.formats.rounded_inputs import set_input_parts

        job, key = self.jobs[name], self._key(f"{name}.weight")
        require_sound_weight(name, result, job.scheme, self.scale_dtype(name))
        tensors = compress_module(name, result, job.scheme)
        require_sound_scales(name, tensors)
        if self.step.is_run or f"{name}.weight" in self.plan.reused:
            dense = decompress_module(tensors, job.scheme).to(self.weight(name).dtype)
            self._go_on_with(f"{name}.weight", dense)
        set_input_parts(self.model.get_submodule(name), result.inputs)
        size = sum(self.writer.write(f"{key.removesuffix('weight')}{part}", t) for part, t in tensors.items())
        self.num_bytes += size
        if not self.step.is_run:
            unload(self.model, [f"{name}.weight"])
        trim_heap()
        self.reports.append(
            ModuleReport(
                name=name,
                algorithm=algorithm or job.algorithm,
                loss=result.loss if loss is None else loss,
                damping=result.damping,
                num_tokens=num_tokens,
                error=error,
                seconds=time.perf_counter() - start if start is not None else 0.0,
                num_bytes=size,
            )
        )

    def rewrite(self, name: str, tensor: torch.Tensor) -> None:
        """Change a parameter that is not quantized, in the model and in the checkpoint.

        Both get it in the checkpoint's dtype, so that the run goes on with what a reader will have. The modifier must
        have named it in `rewrites`.
        """
        key = self._key(name)
        assert name in self.plan.rewritten, f"no modifier has said that it rewrites {name}"
        stored = tensor.detach().to(DTYPES[self.source.checkpoint.stored(key).dtype])
        require_finite(name, stored)
        self.num_bytes += self.writer.write(key, stored)
        self._go_on_with(name, stored.to(tensor.dtype))

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor that the original checkpoint does not have; the modifier must have named it in `adds`."""
        require_sound_scales(name.rpartition(".")[0], {name: tensor})
        self.num_bytes += self.writer.write(name, tensor)

    def change(self, name: str, tensor: torch.Tensor) -> None:
        """Change a weight that another modifier of this step will quantize, in the model alone."""
        assign(self.model, name, tensor)

    def _go_on_with(self, name: str, tensor: torch.Tensor) -> None:
        assign(self.model, name, tensor)
        if name in self.plan.reused:
            self.kept[name] = tensor

    def _key(self, name: str) -> str:
        key = self.source.plain_key(name)
        assert key is not None, f"{name} is not one tensor of the checkpoint"
        return key


class StepModifier(Protocol):
    """One thing that is done to the modules of each step."""

    def measures(self, names: Sequence[str]) -> bool:
        """Whether batches must run to do it to these modules."""

    def rewrites(self, names: Sequence[str]) -> Sequence[str]:
        """The parameters, besides the weights of these modules, that it will change with `Work.rewrite`."""

    def apply(self, work: Work) -> None:
        """Do it to the modules of one step."""


class EnoughSeenError(Exception):
    """A batch has reached the last module that is measured: what would still be computed of it is thrown away."""
