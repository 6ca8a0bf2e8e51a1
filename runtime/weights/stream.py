"""Read the weights of the next step while the current one computes, and every tensor of the checkpoint once.

For a GPU, a thread reads and converts the weights, and copies them from pinned memory on a separate stream. On the CPU
the next step's weights would take memory that the current step's statistics need: there the thread only asks the
operating system to read them into its page cache, from which they are copied in a hundredth of a step's time. Lookup
tables stay on disk.

Tensors that are copied unchanged are written when they are read, and a tensor that a later step uses too (tied
embeddings, layers that share weights) is kept until then.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import torch

from runtime.host.streams import SideStream
from runtime.weights.parameters import assign

if TYPE_CHECKING:
    from torch import nn

    from runtime.weights.parameters import Weights

OnRead = Callable[[str, torch.Tensor], None]
Loaded = tuple[dict[str, torch.Tensor], Any]  # the parameters of a step, and the mark of their arrival


class Loading(Protocol):
    """A set of parameters that is loaded at a time: those of a step, or of a subgraph that is evaluated."""

    @property
    def index(self) -> int:
        """Its position in the chain."""

    @property
    def loads(self) -> Sequence[str]:
        """Names of its parameters."""


class WeightStream:
    """The weights of a sequence of steps.

    Args:
        source: reads parameters.
        steps: in the order in which they will be loaded.
        device: of the parameters.
        on_read: called once with each checkpoint tensor that was read, in the reading thread.
    """

    def __init__(
        self,
        source: Weights,
        steps: Sequence[Loading],
        device: torch.device,
        on_read: OnRead = lambda key, tensor: None,
    ) -> None:
        self.source = source
        self.device = device
        self.on_read = on_read
        self._steps = {step.index: step for step in steps}
        self._next = {step.index: after.index for step, after in itertools.pairwise(steps)}
        names = [name for step in steps for name in step.loads]
        self._tables = self._left_on_disk(names) if device.type == "cpu" else {}
        # The number of reads of each tensor that are still to come.
        self._uses = Counter(key for name in names if name not in self._tables for key in source.origins[name].keys)
        self._kept: dict[str, torch.Tensor] = {}
        self._pending: dict[int, Future[Loaded]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._side = SideStream(device)
        self._is_ahead = device.type != "cpu"
        self._is_over = False

    def __enter__(self) -> WeightStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        self._kept.clear()

    def load(self, model: nn.Module, index: int) -> None:
        """Load the parameters of a step into the module tree, and start reading those of the next one."""
        tensors, mark = (self._pending.pop(index, None) or self._submit(index)).result()
        following = self._next.get(index)
        if following is not None and self._is_ahead:
            self._pending[following] = self._submit(following)
        elif following is not None:
            self._thread.submit(self._announce, self._steps[following])
        self._side.wait_for(mark)
        for name, tensor in tensors.items():
            self._side.lend(tensor)
            assign(model, name, tensor)

    def reload(self, model: nn.Module, index: int) -> None:
        """Load a step again whose weights were modified; this reads its tensors a second time."""
        for name in self._steps[index].loads:
            table = self._tables.get(name)
            assign(model, name, table if table is not None else self.source.read(name, self.device))

    def _submit(self, index: int) -> Future[Loaded]:
        return self._thread.submit(self._read_step, self._steps[index])

    def _announce(self, step: Loading) -> None:
        names = [name for name in step.loads if name not in self._tables]
        keys = dict.fromkeys(key for name in names for key in self.source.origins[name].keys)
        waiting = itertools.takewhile(lambda key: not self._is_over, keys)
        self.source.checkpoint.announce(key for key in waiting if key not in self._kept)

    def _read_step(self, step: Loading) -> Loaded:
        tensors: dict[str, torch.Tensor] = {}
        with torch.no_grad(), self._side.active():
            tensors.update({name: self._tables[name] for name in step.loads if name in self._tables})
            for name in step.loads:
                if name in tensors:
                    continue
                value = self.source.read(name, torch.device("cpu"), self._read_key)
                if self._side.is_real:
                    value = value.pin_memory().to(self.device, non_blocking=True)
                tensors[name] = value.to(self.device)
            return tensors, self._side.mark()

    def _read_key(self, key: str) -> torch.Tensor:
        tensor = self._kept.pop(key, None)
        if tensor is None:
            tensor = self.source.checkpoint.read(key)
            self.source.checks.require_finite(key, tensor)
            self.on_read(key, tensor)
        self._uses[key] -= 1
        if self._uses[key]:
            self._kept[key] = tensor
        return tensor

    def _left_on_disk(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the lookup tables among these parameters whose tensor no other parameter needs."""
        tables: dict[str, torch.Tensor] = {
            name: table for name in names if (table := self.source.table(name)) is not None
        }
        others = {key for name in names if name not in tables for key in self.source.origins[name].keys}
        return {name: tensor for name, tensor in tables.items() if self.source.plain_key(name) not in others}
