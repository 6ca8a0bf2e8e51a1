"""Send all batches through the original model once, and compute the losses of all candidates, subgraph by subgraph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from runtime.checkpoint.dtypes import DTYPES
from runtime.data.masks import token_mask
from runtime.errors import DataError
from runtime.experts.split import expert_of
from runtime.host.memory import trim_heap
from runtime.quantize.measuring import collect_statistics
from runtime.quantize.statistics import Needs
from runtime.search.row_losses import MeasuredStep, RowLosses
from runtime.search.sensitivity_pass import NoGradientError, SensitivityPass
from runtime.search.watched_outputs import joined_places
from runtime.streaming.activations import Activations
from runtime.streaming.events import Watchers
from runtime.streaming.passes import Passes
from runtime.streaming.schedule import Step, lasting_values, plan_steps
from runtime.weights.origins import required_key
from runtime.weights.parameters import unload
from runtime.weights.stream import WeightStream

if TYPE_CHECKING:
    from runtime.algorithms.output_fisher import OutputGradients
    from runtime.artifact.manifest import SubgraphEntry
    from runtime.data.lanes import Lanes
    from runtime.quantize.preparation import Prepared
    from runtime.quantize.statistics import InputStatistics
    from runtime.recipe.recipe import Assignment
    from runtime.saved_statistics.step_reader import StepReader
    from runtime.saved_statistics.store import StatisticsStore
    from runtime.streaming.activations import Budget


class _RunsEverything:
    """A modifier that needs all batches in all subgraphs, and changes nothing."""

    def measures(self, names: Sequence[str]) -> bool:
        return True

    def measures_cache(self, entry: SubgraphEntry) -> bool:
        return True

    def rewrites(self, names: Sequence[str]) -> Sequence[str]:
        return ()


@dataclass(kw_only=True)
class LossPass:
    """The passes of a search.

    Attributes:
        prepared: the model.
        candidates: the assignments of each candidate.
        lanes: the model's inputs.
        device: where subgraphs run.
        samples: for sensitivities by gradients, each a batch; none for no gradients.
        budget: the memory of values between subgraphs.
        progress: called with one line for each subgraph.
        saved: saved statistics, instead of a pass of the batches; None to measure.
        all_tokens: the experts' modules whose saved statistics are of all tokens, not of those routed to them.
        tokens: that each module has received.
    """

    prepared: Prepared
    candidates: Sequence[Mapping[str, Assignment]]
    lanes: Lanes
    device: torch.device
    samples: Sequence[Mapping[str, Any]]
    budget: Budget | None
    progress: Callable[[str], None]
    saved: StatisticsStore | None = None
    all_tokens: list[str] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)
    steps: tuple[Step, ...] = field(init=False)
    _sensitivity: SensitivityPass | None = field(init=False, default=None)
    _no_gradient: NoGradientError | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Plan the steps."""
        prepared = self.prepared
        self.steps = plan_steps(prepared.artifact, prepared.source, prepared.jobs, [_RunsEverything()]).steps
        if self.samples:
            self._sensitivity = SensitivityPass(
                prepared.model,
                tuple(prepared.jobs),
                joined_places(prepared.artifact),
                self.samples,
                [entry.name for entry in prepared.artifact.manifest.inputs],
                self.device,
                self._lasting,
                self.budget,
            )

    @property
    def num_tokens(self) -> int:
        """The most tokens that any module has received: experts receive some of them."""
        return max(self.tokens.values(), default=0)

    @property
    def _lasting(self) -> frozenset[str]:
        return frozenset(lasting_values([step.subgraph.entry for step in self.steps]))

    def forward(self) -> RowLosses:
        """Measure all modules, and return their losses.

        Raises:
            QuantizationError: inputs that are not finite, or a module that cannot be quantized.
        """
        taken = {entry.name for entry in self.prepared.artifact.manifest.inputs}
        batches = self.lanes.batches() if self.saved is None else []
        inputs = [{name: value for name, value in batch.items() if name in taken} for batch in batches]
        passes = Passes(
            model=self.prepared.model,
            activations=Activations(inputs, self.device, self.budget, None, self._lasting),
            jobs={},
            propagate_error=False,
            watcher=Watchers([]),
            tokens=[0 for _ in batches],
            rounds=self.lanes.rounds(0, 1),
        )
        masks = [token_mask(batch) for batch in batches]
        rows: RowLosses = {}
        for step in self.loaded(self.steps, "losses"):
            if step.modules:
                rows.update(self._step_losses(step, passes, masks))
            if step.goes_on and self.saved is None:
                passes.go_on(step)
            self._sense(step)
        passes.activations.close()
        return rows

    def _step_losses(self, step: Step, passes: Passes, masks: Sequence[Any]) -> RowLosses:
        model, source = self.prepared.model, self.prepared.weights
        if self.saved is not None:
            statistics = self._saved(self.saved.step(step.index), step.modules)
        else:
            passes.begin()
            modules = {name: model.get_submodule(name) for name in step.modules}
            needs = dict.fromkeys(modules, Needs(hessian=True))
            statistics = collect_statistics(modules, needs, partial(passes.measure, step), self.device, masks)
        self.tokens |= {name: entry.num_tokens for name, entry in statistics.items()}
        measured = MeasuredStep(
            weight_of=lambda name: model.get_submodule(name).get_parameter("weight").detach(),
            scale_dtype_of=lambda name: DTYPES[source.stored(required_key(source, f"{name}.weight")).dtype],
            statistics=statistics,
            candidates=self.candidates,
        )
        return measured.row_losses(step.modules)

    def _saved(self, reader: StepReader, names: Sequence[str]) -> dict[str, InputStatistics]:
        """Read the statistics of a step; those of experts on the tokens that are routed to them, if they were saved."""
        model, experts = self.prepared.model, expert_of(self.prepared.artifact)
        widths = {name: model.get_submodule(name).get_parameter("weight").shape[1] for name in names}
        needs = dict.fromkeys(names, Needs(hessian=True))
        try:
            return reader.measured(needs, widths, all_tokens=False, device=self.device)
        except DataError:
            self.all_tokens += [name for name in names if name in experts]
            return reader.measured(needs, widths, all_tokens=True, device=self.device)

    def _sense(self, step: Step) -> None:
        if self._sensitivity is None:
            return
        try:
            self._sensitivity.forward(step.subgraph, is_last=not step.goes_on)
        except NoGradientError as error:
            self._sensitivity, self._no_gradient = None, error

    def backward(self) -> dict[str, OutputGradients]:
        """Return the sensitivities of modules.

        Raises:
            NoGradientError: torch cannot differentiate a subgraph.
        """
        if self._sensitivity is None:
            raise self._no_gradient or NoGradientError("there are no samples")
        for step in self.loaded(self.steps[::-1], "gradients"):
            self._sensitivity.backward(step.subgraph, step.index, is_last=not step.goes_on)
        self._sensitivity.activations.close()
        return self._sensitivity.found

    def loaded(self, steps: Sequence[Step], what: str) -> Iterator[Step]:
        """Yield steps with their weights loaded."""
        loads = {step.index: step.subgraph.entry.parameters for step in steps}
        with _inference_off(), WeightStream(self.prepared.weights, loads, self.device) as stream:
            for number, step in enumerate(steps, start=1):
                stream.load(self.prepared.model, step.index)
                yield step
                unload(self.prepared.model, step.subgraph.entry.parameters)
                trim_heap()
                self.progress(f"[{number}/{len(steps)}] {what}: {step.label}")


@contextmanager
def _inference_off() -> Iterator[None]:
    """As `calibrate`: statistics compare versions of tensors, which a caller's inference mode would disable."""
    with torch.inference_mode(False), torch.no_grad():
        yield
