"""Measure by forwards with errors how much the model's predictions depend on the outputs of its modules.

For models that torch cannot differentiate. Noise stands for the error of a scheme: each output channel of a group's
modules gets as much as the scheme's error has there. How far the model's predictions diverge follows from a run of a
few samples for each group, beside the original one: all runs pass through a subgraph while its weights are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from runtime.errors import QuantizationError
from runtime.host.half_precision import quick_halves
from runtime.search.sensitivity_pass import LOGITS, NO_LOGITS
from runtime.search.watched_outputs import Index, joined_places, watched_outputs
from runtime.streaming.activations import Activations
from runtime.streaming.schedule import lasting_values

if TYPE_CHECKING:
    from runtime.quantize.preparation import Prepared
    from runtime.streaming.activations import Budget
    from runtime.streaming.schedule import Step

_ROWS = 256  # positions whose predictions are compared at a time


@dataclass(kw_only=True)
class StandInErrors:
    """The original run of some samples, and one with errors for each group of modules.

    Attributes:
        prepared: the model.
        groups: the modules of each group.
        noise: the standard deviation of the errors of each module's output channels [O].
        samples: the model's inputs, each a batch.
        device: where subgraphs run.
        budget: the memory of all values between subgraphs.
    """

    prepared: Prepared
    groups: Sequence[Sequence[str]]
    noise: Mapping[str, torch.Tensor]
    samples: Sequence[Mapping[str, Any]]
    device: torch.device
    budget: Budget | None
    _original: Activations = field(init=False)
    _runs: dict[int, Activations] = field(init=False, default_factory=dict)  # by group, from its first error on
    _sums: list[float] = field(init=False)

    def __post_init__(self) -> None:
        """Start at the model's inputs."""
        self._places = joined_places(self.prepared.artifact)
        self._sums = [0.0 for _ in self.groups]
        taken = {entry.name for entry in self.prepared.artifact.manifest.inputs}
        self._original = self._started(
            [{name: value for name, value in sample.items() if name in taken} for sample in self.samples]
        )

    def _started(self, values: Sequence[Mapping[str, Any]]) -> Activations:
        lasting = frozenset(lasting_values([one.entry for one in self.prepared.artifact.subgraphs]))
        share = None if self.budget is None else self.budget.share(len(self.groups) + 1)
        return Activations(values, self.device, share, None, lasting)

    def run(self, step: Step) -> None:
        """Run all samples through a subgraph whose parameters are loaded.

        Raises:
            QuantizationError: the model has no logits.
        """
        own = {name.removesuffix(".weight") for name in step.subgraph.entry.parameters}
        new = [index for index, names in enumerate(self.groups) if index not in self._runs and own & set(names)]
        for index in new:
            self._runs[index] = self._started(
                [self._original.fetch(sample, self._original.values(sample)) for sample in range(len(self._original))]
            )
        originals = self._outputs(step, self._original, ())
        for index, run in self._runs.items():
            found = self._outputs(step, run, [name for name in self.groups[index] if name in own])
            if step.goes_on:
                self._go_on(step, run, found)
            else:
                self._sums[index] += sum(_divergence(*pair) for pair in zip(originals, found, strict=True))
                run.close()
        if step.goes_on:
            self._go_on(step, self._original, originals)

    def close(self) -> None:
        """Free the values of the original run; those of the others are freed at their end."""
        self._original.close()

    @property
    def divergences(self) -> list[float]:
        """The mean divergence from the original predictions that each group's errors cause, in nats for each token."""
        return [total / len(self.samples) for total in self._sums]

    def _outputs(self, step: Step, run: Activations, noisy: Sequence[str]) -> list[dict[str, Any]]:
        model, subgraph = self.prepared.model, step.subgraph
        generator = torch.Generator().manual_seed(step.index)

        def add_noise(name: str, output: torch.Tensor, index: Index) -> torch.Tensor | None:
            own = output[index]
            part = self._places[name].columns(own) if name in self._places else own
            drawn = torch.randn(part.shape, generator=generator).to(part.device) * self.noise[name].to(part.device)
            part.add_(drawn.to(part.dtype))
            if index:
                output[index] = own
            return None

        outputs = []
        with (
            watched_outputs(model, noisy, self._places, add_noise),
            quick_halves(self.device.type, subgraph.halves(model)),
        ):
            for sample in range(len(run)):
                outputs.append(subgraph.forward(model, **run.fetch(sample, subgraph.input_names, private=True)))
        return outputs

    def _go_on(self, step: Step, run: Activations, outputs: Sequence[dict[str, Any]]) -> None:
        for sample, values in enumerate(outputs):
            run.drop(sample, step.subgraph.consumed_names)
            run.store(sample, values)


def _divergence(outputs: Mapping[str, Any], others: Mapping[str, Any]) -> float:
    """Return the mean divergence of predictions, in nats."""
    if not isinstance(outputs.get(LOGITS), torch.Tensor):
        raise QuantizationError(NO_LOGITS, hint="set sensitivity: none")
    flat_TV, other_TV = (one[LOGITS].reshape(-1, one[LOGITS].shape[-1]) for one in (outputs, others))
    total = 0.0
    for top in range(0, len(flat_TV), _ROWS):
        log_TV, other_log_TV = (
            torch.log_softmax(one[top : top + _ROWS].to(torch.float32), dim=-1) for one in (flat_TV, other_TV)
        )
        total += float((log_TV.exp() * (log_TV - other_log_TV)).sum())
    return max(total, 0.0) / len(flat_TV)
