"""Send all batches through a subgraph: once to measure, and once more to compute the inputs of later subgraphs.

If modifiers compare with the original model, its values of each batch go through the subgraph, too, while no weight is
changed: during the first pass that measures them, or in a pass of their own.
"""

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
from runtime.streaming.original_model import original_model
from runtime.streaming.work import EnoughSeenError
from runtime.workers.agreement import agreed
from runtime.workers.group import Alone

if TYPE_CHECKING:
    import torch
    from torch import nn

    from runtime.recipe.recipe import Assignment
    from runtime.streaming.activations import Activations
    from runtime.streaming.events import Watchers
    from runtime.streaming.graph_replay import Forward, GraphReplay
    from runtime.streaming.schedule import Step
    from runtime.workers.group import Workers

# Gets the index of a batch, its inputs and its outputs.
Receive = Callable[[int, Mapping[str, Any], Mapping[str, Any]], None]


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
        originals: the original parameters that the original model runs with, where the step has changed ones.
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
    originals: Mapping[str, torch.Tensor] = field(default_factory=dict)
    is_running: bool = False
    num_tokens: int = 0
    _went_on: bool = field(default=False)
    _original_went_on: bool = field(default=False)

    def begin(self) -> None:
        """Reset the counts for the next step."""
        self.is_running = self._went_on = self._original_went_on = False
        self.num_tokens = 0

    def expected(self, step: Step) -> int:
        """Number of passes that a step takes, if no modifier takes more than one."""
        goes_on = step.goes_on and (self.propagate_error or not step.is_measured)
        is_original = self.is_split(step) or (self.splits_after(step) and not step.is_measured)
        return step.is_measured + goes_on + is_original

    def is_split(self, step: Step) -> bool:
        """Whether the step runs for the original model's values as well."""
        return self.propagate_error and step.is_split

    def splits_after(self, step: Step) -> bool:
        """Whether the original model's outputs of a step are stored."""
        return self.propagate_error and step.is_split_after

    def measure(
        self,
        step: Step,
        before: Callable[[int], None] = lambda batch: None,
        after: Callable[[], None] = lambda: None,
        original: Callable[[int], None] | None = None,
    ) -> None:
        """Run all batches and discard their outputs; modules have hooks.

        If nothing is stored (`forgets`), a hook may end a batch by `EnoughSeenError`.

        Args:
            step: whose subgraph runs.
            before: gets the index of each batch.
            after: is called after each round of lanes, on every worker and at the same time.
            original: gets the index of each batch before the original model's values of it run, which come before the
                batch; None if they do not run.
        """
        keeps = not self.propagate_error and step.goes_on and not self._went_on
        is_split, names = self.is_split(step), step.subgraph.input_names
        runs_original = original if is_split else None
        keeps_original = self._keeps_original(step) and (not is_split or original is not None)
        self._begin_phase(step, MEASURE)
        with self._running(step):
            batches = self.activations.stream(names, private=True)
            originals = self.activations.stream(names, private=True, of_original=is_split)
            for count in self.rounds:
                with agreed(self.workers):
                    for batch, inputs in itertools.islice(batches, count):
                        if runs_original is not None:
                            runs_original(batch)
                            self._original_batch(step, batch, next(originals)[1], keeps=keeps_original)
                        before(batch)
                        places = [batch] if keeps else []
                        places += [self.activations.original(batch)] if keeps_original and not is_split else []
                        self._measure_batch(step, batch, inputs, places)
                after()
                self.watcher.share()
        self._went_on |= keeps
        self._original_went_on |= keeps_original
        self._begin_phase(step, QUANTIZE)

    def _measure_batch(self, step: Step, batch: int, inputs: dict[str, Any], places: Sequence[int]) -> None:
        try:
            outputs = step.subgraph.forward(self.model, **inputs)
        except EnoughSeenError:
            assert not places, "a batch ended early whose outputs are needed"
            outputs = {}
        inputs.clear()
        for place in places:
            self.activations.store(place, outputs)
        del outputs  # or they stay in memory while the next batch runs
        self._passed(step, batch)

    def _original_batch(self, step: Step, batch: int, inputs: dict[str, Any], *, keeps: bool) -> None:
        with original_model(self.model, self.originals):
            outputs = step.subgraph.forward(self.model, **inputs)
        inputs.clear()
        if keeps:
            self.activations.store(self.activations.original(batch), outputs)
        self._passed(step, batch)

    def _keeps_original(self, step: Step) -> bool:
        """Whether a pass stores the original model's outputs; makes room for them."""
        if not self.splits_after(step) or self._original_went_on:
            return False
        if not self.activations.is_split:
            self.activations.split(step.subgraph.consumed_names)
        return True

    def carry(self, step: Step, receive: Receive | None = None) -> None:
        """Send the original model's values through a step while its weights are the original ones.

        Args:
            step: whose subgraph runs.
            receive: gets the index of each batch, its inputs, and the outputs.
        """
        is_split, names = self.is_split(step), step.subgraph.input_names
        keeps = self._keeps_original(step)
        is_private = step.compares or not is_split  # values that are read again
        self._begin_phase(step, PROPAGATE)
        with (
            self._running(step),
            agreed(self.workers),
            original_model(self.model, self.originals),
            self._forward(step) as forward,
        ):
            for batch, inputs in self.activations.stream(names, private=is_private, of_original=is_split):
                outputs = forward(inputs)
                del inputs
                if receive is not None:  # the code may have changed its inputs in place
                    place = self.activations.original(batch) if is_split else batch
                    receive(batch, self.activations.fetch(place, names, private=True), outputs)
                if keeps:
                    self.activations.store(self.activations.original(batch), outputs)
                self._passed(step, batch)
        self._original_went_on |= keeps

    def forgets(self, step: Step) -> bool:
        """Whether the outputs of a measuring pass are discarded."""
        is_of_original = self.splits_after(step) and not self.is_split(step)
        return (self.propagate_error or not step.goes_on) and not is_of_original

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
        self._end_original(step, consumed)
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

    def _end_original(self, step: Step, consumed: Sequence[str]) -> None:
        """Drop the original model's values that no later step needs."""
        if not self.activations.is_split:
            return
        if not step.carries:
            self.activations.join()
            return
        assert self._original_went_on, f"no modifier of {step.label} has run the original model's values"
        for place in map(self.activations.original, range(len(self.activations))):
            values = self.activations.values(place)
            self.activations.drop(place, [name for name in consumed if name in values])

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
