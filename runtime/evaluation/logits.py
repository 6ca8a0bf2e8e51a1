"""Run all batches through the subgraphs of one or two checkpoints, and hand over the logits of each batch.

One subgraph of each checkpoint is in memory at a time, and every tensor is read once. The values between subgraphs stay
in memory as far as the budget allows, the rest goes to disk. Logits are never kept: whoever takes those of a batch
reduces them to a small value.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from runtime.evaluation.progress import SavedProgress
from runtime.formats.rounded_inputs import input_quantization
from runtime.host.half_precision import quick_halves
from runtime.host.limits import peak_host_bytes
from runtime.host.memory import peak_device_bytes, trim_heap
from runtime.host.own_process import settle
from runtime.streaming.activations import Activations
from runtime.streaming.events import PROPAGATE, READ
from runtime.streaming.schedule import lasting_values
from runtime.weights.parameters import unload
from runtime.weights.stream import WeightStream
from runtime.workers.agreement import agreed

if TYPE_CHECKING:
    from runtime.chain import LoadedSubgraph
    from runtime.quantize.preparation import Prepared
    from runtime.streaming.activations import Budget
    from runtime.streaming.events import Watchers
    from runtime.workers.group import Workers

LOGITS = "logits"
Take = Callable[[int, tuple[torch.Tensor, ...]], Any]


@dataclass(kw_only=True, slots=True)
class LogitsPass:
    """One pass of all batches through all subgraphs.

    Attributes:
        sides: the checkpoints, prepared for the same artifact.
        batches: the model's inputs; each worker runs every N-th batch.
        device: where subgraphs run.
        workers: that share the batches.
        watch: receives the events of the pass.
        budget: the memory for values between subgraphs, of all sides together.
        saved: saves these values for a resumed run; None to save nothing.
    """

    sides: Sequence[Prepared]
    batches: Sequence[Mapping[str, torch.Tensor]]
    device: torch.device
    workers: Workers
    watch: Watchers
    budget: Budget | None = None
    saved: SavedProgress | None = None
    _running: list[_Side] = field(init=False, default_factory=list)

    def run(self, take: Take) -> list[Any]:
        """Run the pass, and return what `take` returns for each batch, in the order of the batches.

        Args:
            take: gets the number of a batch and its logits of each side, on the device; returns a JSON value.
        """
        settle()
        own = range(self.workers.rank, len(self.batches), self.workers.size)
        subgraphs = self.sides[0].artifact.subgraphs
        with torch.no_grad(), ExitStack() as stack:
            saved = None if self.saved is None else self.saved.last()
            first = 0 if saved is None else saved + 1
            self._running = [_Side(side, self, own, first, stack) for side in self.sides]
            if self.saved is not None and saved is not None:
                with agreed(self.workers):
                    self.saved.load(saved, own, [side.activations for side in self._running])
            self._tell_begin(first)
            for index in range(first, len(subgraphs) - 1):
                self._step(index, partial(self._go_on, index))
                if self.saved is not None:
                    self.saved.save(index, own, [side.activations for side in self._running])
            results: list[Any] = []
            self._step(len(subgraphs) - 1, lambda: results.extend(self._taken(own, take)))
        self.watch.tell("evaluated", batches=len(self.batches) * len(self.sides))
        of_workers = self.workers.exchange(results)
        size = self.workers.size
        return [of_workers[number % size][number // size] for number in range(len(self.batches))]

    def _tell_begin(self, first: int) -> None:
        tokens = sum(map(_num_tokens, self.batches))
        count = len(self.sides[0].artifact.subgraphs)
        self.watch.tell(
            "begin",
            subgraphs=count,
            modules=0,
            batches=len(self.batches) * len(self.sides),
            tokens=tokens * len(self.sides),
            total_tokens=tokens * len(self.sides) * (count - first),
            resumed_at=first,
            device=str(self.device),
            workers=self.workers.size,
        )

    def _step(self, index: int, work: Callable[[], None]) -> None:
        """Do the work of one subgraph on this worker, and tell about it."""
        subgraph = self.sides[0].artifact.subgraphs[index]
        begin, sent = time.perf_counter(), self.workers.bytes_sent
        read = sum(side.weights.checkpoint.bytes_read for side in self.sides)
        self._begin_phase(index, subgraph.label, READ)
        with agreed(self.workers):
            work()
        trim_heap()
        own = range(self.workers.rank, len(self.batches), self.workers.size)
        self.watch.tell(
            "subgraph",
            index=index,
            label=subgraph.label,
            seconds=time.perf_counter() - begin,
            tokens=sum(_num_tokens(self.batches[number]) for number in own) * len(self.sides),
            bytes_read=sum(side.weights.checkpoint.bytes_read for side in self.sides) - read,
            bytes_written=0,
            bytes_sent=self.workers.bytes_sent - sent,
            peak_host_bytes=peak_host_bytes(),
            peak_device_bytes=peak_device_bytes(self.device),
        )
        self.watch.share()

    def _go_on(self, index: int) -> None:
        """Run all batches of one side after the other, and store the values that later subgraphs need."""
        for side in self._running:
            side.load(index)
            self._begin_phase(index, side.subgraphs[index].label, PROPAGATE)
            for position, outputs in side.outputs(index):
                side.activations.store(position, outputs)
                self._passed(index, position)
            side.unload(index)

    def _taken(self, own: Sequence[int], take: Take) -> Iterator[Any]:
        """Run the last subgraph of all sides on each batch, and yield what `take` returns."""
        index = len(self._running[0].subgraphs) - 1
        for side in self._running:
            side.load(index)
        self._begin_phase(index, self._running[0].subgraphs[index].label, PROPAGATE)
        for turns in zip(*(side.outputs(index) for side in self._running), strict=True):
            position = turns[0][0]
            yield take(own[position], tuple(outputs[LOGITS] for _, outputs in turns))
            for _, outputs in turns:  # or logits stay in memory while those of the next batch are computed
                outputs.clear()
                self._passed(index, position)
        for side in self._running:
            side.unload(index)

    def _begin_phase(self, index: int, label: str, phase: str) -> None:
        self.workers.step = label
        self.watch.tell("phase", index=index, label=label, phase=phase)

    def _passed(self, index: int, position: int) -> None:
        number = self.workers.rank + position * self.workers.size
        self.watch.tell("batch", index=index, tokens=_num_tokens(self.batches[number]))


class _Side:
    """One checkpoint during a pass: its module tree, its weights, and the values of this worker's batches."""

    def __init__(self, side: Prepared, of: LogitsPass, own: Sequence[int], first: int, stack: ExitStack) -> None:
        self.model, self.source, self.device = side.model, side.weights, of.device
        self.subgraphs: Sequence[LoadedSubgraph] = side.artifact.subgraphs
        folder = None if of.saved is None else of.saved.folder(of.sides.index(side))
        entries = [subgraph.entry for subgraph in self.subgraphs]
        self.activations = Activations(
            [of.batches[number] for number in own],
            of.device,
            of.budget and of.budget.share(len(of.sides)),
            folder,
            frozenset(lasting_values(entries)),
        )
        stack.callback(self.activations.close)
        stack.enter_context(input_quantization(self.model, self.source.schemes))
        loads = {index: entry.parameters for index, entry in enumerate(entries) if index >= first}
        self.stream = stack.enter_context(WeightStream(self.source, loads, of.device))

    def load(self, index: int) -> None:
        self.stream.load(self.model, index)
        for name in self.subgraphs[index].entry.parameters:
            self.source.load_input_parts(self.model, name)

    def unload(self, index: int) -> None:
        unload(self.model, self.subgraphs[index].entry.parameters)

    def outputs(self, index: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the position of each batch and what the subgraph makes of it, and free what it consumes."""
        subgraph = self.subgraphs[index]
        for position, inputs in self.activations.stream(subgraph.input_names):
            yield position, self._outputs_of(subgraph, position, inputs)

    def _outputs_of(self, subgraph: LoadedSubgraph, position: int, inputs: dict[str, Any]) -> dict[str, Any]:
        with quick_halves(self.device.type, subgraph.halves(self.model)):
            outputs = subgraph.forward(self.model, **inputs)
        inputs.clear()
        self.activations.drop(position, subgraph.consumed_names)
        return outputs


def _num_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    """The size of a batch's first input: its number of tokens, in a model of text."""
    return next(iter(batch.values())).numel()
