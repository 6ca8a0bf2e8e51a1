"""Restore the values between subgraphs of an interrupted run: run its finished steps again.

They run with the quantized weights that they have written, so that every bit is the same as before. This takes one pass
of all batches for each step; nothing is measured or quantized again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from runtime.streaming.events import REPLAY
from runtime.streaming.schedule import ModuleTensors
from runtime.weights.origins import checkpoint_prefix, required_key
from runtime.weights.parameters import assign, unload
from runtime.weights.stream import WeightStream

if TYPE_CHECKING:
    from torch import nn

    from runtime.checkpoint.writer import ShardWriter
    from runtime.recipe.recipe import Assignment
    from runtime.streaming.passes import Passes
    from runtime.streaming.schedule import Schedule, Step
    from runtime.weights.parameters import Weights


@dataclass(frozen=True, kw_only=True)
class Written:
    """The parameters that finished steps have changed, read from the new checkpoint.

    Attributes:
        schedule: of the run.
        source: the original checkpoint.
        writer: the new one.
        jobs: the assignment of each quantized module.
        device: where parameters go.
    """

    schedule: Schedule
    source: Weights
    writer: ShardWriter
    jobs: Mapping[str, Assignment]
    device: torch.device

    @cached_property
    def _tensors(self) -> ModuleTensors:
        return ModuleTensors(self.source)

    def is_changed(self, name: str) -> bool:
        """Whether a parameter differs in the new checkpoint."""
        return name.removesuffix(".weight") in self.jobs or name in self.schedule.rewritten

    def read(self, name: str) -> torch.Tensor:
        """Read a parameter as the run continued with it, bit for bit."""
        from runtime.formats.compressed import decompress_module

        dtype = self.source.dtype
        key = required_key(self.source, name)
        module = name.removesuffix(".weight")
        if module not in self.jobs:
            return self.writer.read(key).to(self.device, dtype)
        job, prefix = self.jobs[module], key.removesuffix("weight")
        tensors = {
            stored.name.removeprefix(prefix): self.writer.read(stored.name).to(self.device)
            for stored in self._tensors.of(module, job)
        }
        return decompress_module(tensors, job.scheme).to(dtype)

    def give_input_parts(self, model: nn.Module, module: str) -> None:
        """Give a quantized module the scales of its static inputs, if it has any."""
        from runtime.formats.compressed import input_parts
        from runtime.formats.rounded_inputs import set_input_parts

        prefix = required_key(self.source, f"{module}.weight").removesuffix("weight")
        parts = {part: self.writer.read(f"{prefix}{part}") for part in input_parts(self.jobs[module].scheme)}
        set_input_parts(model.get_submodule(module), parts)

    def give_key_value_scales(self, model: nn.Module, step: Step) -> None:
        """Give the attention modules of a finished step the scales of their keys and values."""
        from runtime.formats.key_values import of_model

        key_values = of_model(model)
        if key_values is None:
            return
        for module in key_values.of_subgraph(step.subgraph.entry):
            prefix = checkpoint_prefix(self.source, module)
            for part in key_values.parts:
                key_values.scales[module, part] = self.writer.read(f"{prefix}.{part}_scale").to(self.device)


def run_again(steps: Sequence[Step], passes: Passes, written: Written) -> None:
    """Send all batches through finished steps.

    Args:
        steps: the steps after the one that the values come from, in order.
        passes: the batches.
        written: the parameters that these steps have changed.
    """
    loads = {
        step.index: [name for name in step.loads if passes.splits_after(step) or not written.is_changed(name)]
        for step in steps
    }
    with WeightStream(written.source, loads, written.device) as stream:
        for step in steps:
            names = step.subgraph.entry.parameters
            stream.load(passes.model, step.index)
            passes.begin()
            if passes.splits_after(step):
                passes.originals = {
                    name: written.source.read(name, written.device)
                    for name in names
                    if written.is_changed(name) and name not in loads[step.index]
                }
                passes.carry(step)
            for name in names:
                if written.is_changed(name):
                    original = not passes.propagate_error
                    assign(
                        passes.model,
                        name,
                        written.source.read(name, written.device) if original else written.read(name),
                    )
                module = name.removesuffix(".weight")
                if module in written.jobs and name.endswith(".weight"):
                    written.give_input_parts(passes.model, module)
            if passes.propagate_error:  # otherwise later steps got values from before anything was rounded
                written.give_key_value_scales(passes.model, step)
            passes.go_on(step, REPLAY)
            unload(passes.model, names)
