"""Send all batches through a subgraph: once to measure, and once more to go on with what it returns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from runtime.formats.rounded_inputs import input_quantization
from runtime.host.half_precision import quick_halves
from runtime.host.memory import trim_heap
from runtime.streaming.work import EnoughSeenError

if TYPE_CHECKING:
    from torch import nn

    from runtime.recipe.recipe import Assignment
    from runtime.streaming.activations import Activations
    from runtime.streaming.events import Watcher
    from runtime.streaming.steps import Step


@dataclass(kw_only=True)
class Passes:
    """The batches, and the module tree that they pass through.

    Attributes:
        model: the module tree; the step's parameters are loaded when it runs.
        activations: values of all batches, as the step before has left them.
        jobs: whose input activations are rounded when a pass goes on.
        propagate_error: whether later subgraphs see what the quantized ones return. If not, one pass serves to measure
            and to go on, and later subgraphs see what the original ones return.
        watcher: is told of every batch.
        tokens: of each batch.
        is_running: whether a batch is on its way; what runs out of memory then fits with fewer samples.
        num_tokens: how many have passed since the step began.
    """

    model: nn.Module
    activations: Activations
    jobs: Mapping[str, Assignment]
    propagate_error: bool
    watcher: Watcher
    tokens: list[int]
    is_running: bool = False
    num_tokens: int = 0
    _went_on: bool = field(default=False)

    def begin(self) -> None:
        """Be ready for the next step."""
        self.is_running = self._went_on = False
        self.num_tokens = 0

    def measure(self, step: Step, before: Callable[[int], None] = lambda batch: None) -> None:
        """Run all batches and forget what they return; hooks see what passes, and `before` which batch comes.

        Where nothing of it is kept (`forgets`), a hook may end a batch by `EnoughSeenError`.
        """
        keeps = not self.forgets(step) and not self._went_on
        with self._running():
            for batch, inputs in self.activations.stream(step.subgraph.input_names, private=True):
                before(batch)
                try:
                    outputs = step.subgraph.forward(self.model, **inputs)
                except EnoughSeenError:
                    assert not keeps, "what is needed has ended early"
                    outputs = {}
                del inputs
                if keeps:
                    self.activations.store(batch, outputs)
                del outputs  # or it would lie beside what the next batch computes
                self._passed(step, batch)
        self._went_on |= keeps

    def forgets(self, step: Step) -> bool:
        """Whether nobody needs what the step returns while it is measured."""
        return self.propagate_error or not step.goes_on

    def first(self, step: Step) -> Any:
        """What the subgraph returns for the first batch, which stays as it was."""
        for _, inputs in self.activations.stream(step.subgraph.input_names, private=True):
            with self._quick_halves():
                return step.subgraph.forward(self.model, **inputs)
        return {}

    def go_on(self, step: Step) -> None:
        """Put what the subgraph returns in the place of what nobody needs any more."""
        consumed = step.subgraph.consumed_names
        if self._went_on:
            for batch in range(len(self.activations)):
                self.activations.drop(batch, consumed)
            return
        with self._running(), self._rounded_inputs(step):
            for batch, inputs in self.activations.stream(step.subgraph.input_names):
                outputs = step.subgraph.forward(self.model, **inputs)
                del inputs
                self.activations.drop(batch, consumed)
                self.activations.store(batch, outputs)
                self._passed(step, batch)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        self.is_running = True
        with self._quick_halves():
            yield
        self.is_running = False  # not after an exception: it says where that came from
        trim_heap()

    def _quick_halves(self) -> contextlib.AbstractContextManager[None]:
        return quick_halves(self.activations.device.type)

    def _rounded_inputs(self, step: Step) -> contextlib.AbstractContextManager[None]:
        used = dict.fromkeys(step.subgraph.entry.parameters)
        schemes = {name: job.scheme for name, job in self.jobs.items() if f"{name}.weight" in used}
        return input_quantization(self.model, schemes if self.propagate_error else {})

    def _passed(self, step: Step, batch: int) -> None:
        self.num_tokens += self.tokens[batch]
        self.watcher.tell("batch", index=step.index, tokens=self.tokens[batch])
