"""Bring the values between subgraphs to where an interrupted run had them.

Either they were saved, or finished subgraphs run again: with the quantized weights that they have written, so that
every bit comes out as before. That costs one pass of all batches for each, and no measuring and no solving.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from runtime.weights.parameters import assign, unload
from runtime.weights.stream import WeightStream

if TYPE_CHECKING:
    from torch import nn

    from runtime.checkpoint.writer import ShardWriter
    from runtime.recipe.recipe import Assignment
    from runtime.streaming.passes import Passes
    from runtime.streaming.steps import Schedule, Step
    from runtime.weights.parameters import Weights


class Written:
    """The parameters that finished steps have changed, as they stand in the new checkpoint.

    Args:
        plan: of the run.
        source: the original checkpoint.
        writer: the new one.
        jobs: what was done to each module.
        device: where parameters go.
    """

    def __init__(
        self, plan: Schedule, source: Weights, writer: ShardWriter, jobs: Mapping[str, Assignment], device: torch.device
    ) -> None:
        self.plan = plan
        self.source = source
        self.writer = writer
        self.jobs = jobs
        self.device = device

    def is_changed(self, name: str) -> bool:
        """Whether a parameter is another one in the new checkpoint."""
        return name.removesuffix(".weight") in self.jobs or name in self.plan.rewritten

    def read(self, name: str) -> torch.Tensor:
        """A parameter as the run went on with it, to the bit."""
        from runtime.formats.compressed import decompress_module
        from runtime.streaming.steps import module_tensors

        dtype = self.source.dtype
        key = self.source.plain_key(name)
        assert key is not None, f"{name} is not one tensor of the checkpoint"
        module = name.removesuffix(".weight")
        if module not in self.jobs:
            return self.writer.read(key).to(self.device, dtype)
        job, prefix = self.jobs[module], key.removesuffix("weight")
        tensors = {
            stored.name.removeprefix(prefix): self.writer.read(stored.name).to(self.device)
            for stored in module_tensors(module, self.source, job)
        }
        return decompress_module(tensors, job.scheme).to(dtype)

    def give_input_parts(self, model: nn.Module, module: str) -> None:
        """Give a quantized module the scales of its static inputs, if it has any."""
        from runtime.formats.compressed import input_parts
        from runtime.formats.rounded_inputs import set_input_parts

        job, key = self.jobs[module], self.source.plain_key(f"{module}.weight")
        assert key is not None, f"{module} is not one tensor of the checkpoint"
        prefix = key.removesuffix("weight")
        parts = {part: self.writer.read(f"{prefix}{part}") for part in input_parts(job.scheme)}
        set_input_parts(model.get_submodule(module), parts)

    def give_key_value_scales(self, model: nn.Module, step: Step) -> None:
        """Round keys and values of a finished step as the run did."""
        from runtime.formats.key_values import of_model

        key_values = of_model(model)
        for module in key_values.of_subgraph(step.subgraph.entry) if key_values is not None else ():
            assert key_values is not None, "it has modules"
            prefix = self.source.checkpoint_prefix(module)
            for part in key_values.parts:
                key_values.scales[module, part] = self.writer.read(f"{prefix}.{part}_scale").to(self.device)


def run_again(steps: Sequence[Step], passes: Passes, written: Written) -> None:
    """Send all batches through finished steps.

    Args:
        steps: those that come after where the values are, in order.
        passes: the batches.
        written: has the weights of finished steps.
    """
    again = [
        replace(step, loads=tuple(name for name in step.loads if not written.is_changed(name)), passes=())
        for step in steps
    ]
    with WeightStream(written.source, again, written.device) as stream:
        for step in again:
            names = step.subgraph.entry.parameters
            stream.load(passes.model, step.index)
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
            if passes.propagate_error:  # otherwise the run went on with values from before anything was rounded
                written.give_key_value_scales(passes.model, step)
            passes.begin()
            passes.go_on(step)
            unload(passes.model, names)
