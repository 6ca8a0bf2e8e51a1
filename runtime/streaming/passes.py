"""Send all batches through a subgraph: once to measure, and once more to compute the inputs of later subgraphs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from runtime.formats.rounded_inputs import input_quantization
from runtime.host.half_precision import quick_halves
from runtime.host.memory import trim_heap
from runtime.streaming.events import MEASURE, PROPAGATE, QUANTIZE
from runtime.streaming.work import EnoughSeenError
from runtime.workers.agreement import agreed
from runtime.workers.group import Alone

if TYPE_CHECKING:
    from torch import nn

    from runtime.recipe.recipe import Assignment
    from runtime.streaming.activations import Activations
    from runtime.streaming.events import Watchers
    from runtime.streaming.graph_replay import Forward, GraphReplay
    from runtime.streaming.schedule import Step
    from runtime.workers.group import Workers


@dataclass(kw_only=True)
class Passes:
    """The batches, and the module tree that they pass through.

    Attributes:
        model: the module tree; the step's parameters are loaded when it runs.
        activations: values of the batches of this worker, as the previous step left them.
        jobs: the modules whose inputs are rounded when batches go on.
        propagate_error: whether later subgraphs get the outputs of quantized ones. If not, one pass both measures and
            goes on, and later subgraphs get the outputs of the original ones.
        watcher: receives an event for every batch.
        tokens: of each batch.
        rounds: the number of batches of each round of lanes (`runtime.data.lanes`); 0 if this worker has no lane in it.
        workers: that share the run.
        graphs: replays the forwards that compute the inputs of later subgraphs; None for ordinary calls.
        is_running: whether a batch is running; if memory runs out then, fewer samples may fit.
        num_tokens: how many have passed since the step began.
    """

    model: nn.Module
    activations: Activations
    jobs: Mapping[str, Assignment]
    propagate_error: bool
    watcher: Watchers
    tokens: list[int]
    rounds: Sequence[int]
    workers: Workers = field(default_factory=Alone)
    graphs: GraphReplay | None = None
    is_running: bool = False
    num_tokens: int = 0
    _went_on: bool = field(default=False)

    def begin(self) -> None:
        """Reset the counts for the next step."""
        self.is_running = self._went_on = False
        self.num_tokens = 0

    def expected(self, step: Step) -> int:
        """Number of passes that a step takes, if no modifier takes more than one."""
        goes_on = step.goes_on and (self.propagate_error or not step.is_measured)
        return step.is_measured + goes_on

    def measure(
        self,
        step: Step,
        before: Callable[[int], None] = lambda batch: None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Run all batches and discard their outputs; modules have hooks.

        If nothing is stored (`forgets`), a hook may end a batch by `EnoughSeenError`.

        Args:
            step: whose subgraph runs.
            before: gets the index of each batch.
            after: is called after each round of lanes, on every worker and at the same time.
        """
        keeps = not self.forgets(step) and not self._went_on
        self._begin_phase(step, MEASURE)
        with self._running(step):
            batches = self.activations.stream(step.subgraph.input_names, private=True)
            for count in self.rounds:
                with agreed(self.workers):
                    for batch, inputs in itertools.islice(batches, count):
                        before(batch)
                        self._measure_batch(step, batch, inputs, keeps=keeps)
                after()
                self.watcher.share()
        self._went_on |= keeps
        self._begin_phase(step, QUANTIZE)

    def _measure_batch(self, step: Step, batch: int, inputs: dict[str, Any], *, keeps: bool) -> None:
        try:
            outputs = step.subgraph.forward(self.model, **inputs)
        except EnoughSeenError:
            assert not keeps, "a batch ended early whose outputs are needed"
            outputs = {}
        inputs.clear()
        if keeps:
            self.activations.store(batch, outputs)
        del outputs  # or they stay in memory while the next batch runs
        self._passed(step, batch)

    def forgets(self, step: Step) -> bool:
        """Whether the outputs of a measuring pass are discarded."""
        return self.propagate_error or not step.goes_on

    def first(self, step: Step) -> Any:
        """Return the outputs of the first batch, whose stored values stay unchanged; nothing on workers without it."""
        if self.workers.rank:
            return {}
        for _, inputs in self.activations.stream(step.subgraph.input_names, private=True):
            with self._quick_halves(step):
                return step.subgraph.forward(self.model, **inputs)
        return {}

    @contextlib.contextmanager
    def by_hand(self, step: Step) -> Iterator[Callable[[int], dict[str, Any]]]:
        """Let a modifier run batches itself, in any order; yield a function that copies a batch's inputs."""
        with self._running(step):
            yield lambda batch: self.activations.fetch(batch, step.subgraph.input_names, private=True)

    def go_on(self, step: Step, phase: str = PROPAGATE) -> None:
        """Store the step's outputs, and drop the values that no later step needs."""
        consumed = step.subgraph.consumed_names
        if self._went_on:
            for batch in range(len(self.activations)):
                self.activations.drop(batch, consumed)
            return
        self._begin_phase(step, phase)
        schemes = {name: job.scheme for name, job in step.called(self.jobs).items()} if self.propagate_error else {}
        with (
            self._running(step),
            agreed(self.workers),
            input_quantization(self.model, schemes),
            self._forward(step) as forward,
        ):
            for batch, inputs in self.activations.stream(step.subgraph.input_names):
                outputs = forward(inputs)
                del inputs
                self.activations.drop(batch, consumed)
                self.activations.store(batch, outputs)
                self._passed(step, batch)

    def _forward(self, step: Step) -> contextlib.AbstractContextManager[Forward]:
        def forward(values: dict[str, Any]) -> dict[str, Any]:
            return step.subgraph.forward(self.model, **values)

        return contextlib.nullcontext(forward) if self.graphs is None else self.graphs.of(step.label, forward)

    @contextlib.contextmanager
    def _running(self, step: Step) -> Iterator[None]:
        self.is_running = True
        with self._quick_halves(step):
            yield
        self.is_running = False  # but not after an exception, so that it tells where memory ran out
        trim_heap()

    def _quick_halves(self, step: Step) -> contextlib.AbstractContextManager[None]:
        return quick_halves(self.activations.device.type, step.subgraph.halves(self.model))

    def _begin_phase(self, step: Step, phase: str) -> None:
        self.workers.step = f"{step.label} ({phase})"
        self.watcher.tell("phase", index=step.index, label=step.label, phase=phase)

    def _passed(self, step: Step, batch: int) -> None:
        self.num_tokens += self.tokens[batch]
        self.watcher.tell("batch", index=step.index, tokens=self.tokens[batch])
