"""Read the weights of the next step while the current one runs, and every tensor of the checkpoint once.

For a GPU, a thread reads, converts, and copies through pinned memory on its own stream. On the CPU, the next step's
weights would take memory that the current step's statistics need. So the thread only has the operating system read them
into its page cache, from which they are copied in a hundredth of the time that a step takes, and tables that are only
looked up in stay on disk.

A tensor that is written unchanged goes to the output as it is read, and a tensor that a later step uses too (tied
embeddings, layers that share weights) is kept until then, so that neither is read twice.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from runtime.host.streams import SideStream
from runtime.host.transfers import Uploads
from runtime.weights.parameters import assign

if TYPE_CHECKING:
    from torch import nn

    from runtime.weights.origins import ParameterSource
    from runtime.weights.parameters import Weights

OnRead = Callable[[str, torch.Tensor], None]
Loads = Mapping[int, Sequence[str]]  # the parameters of each step, by its index, in order
Loaded = tuple[dict[str, torch.Tensor], Any]  # the parameters of a step, and the mark of their arrival


class LoadOrder:
    """Which parameters a sequence of steps leaves on disk, and which tensors it keeps for later steps.

    Args:
        source: the origins of the parameters.
        loads: the parameters of each step.
        device_type: of the device that parameters are loaded to.

    Attributes:
        tables: parameters that stay on disk: on the CPU those that are only looked up in, and whose tensor no step
            loads as a whole.
        uses: how often each tensor is used.
    """

    def __init__(self, source: ParameterSource, loads: Loads, device_type: str) -> None:
        names = dict.fromkeys(itertools.chain.from_iterable(loads.values()))
        tables = [name for name in names if device_type == "cpu" and source.is_table(name)]
        whole = {key for name in names if name not in tables for key in source.origins[name].keys}
        self.tables = [name for name in tables if source.plain_key(name) not in whole]
        keys = {
            index: [key for name in own if name not in self.tables for key in source.origins[name].keys]
            for index, own in loads.items()
        }
        self.uses = Counter(itertools.chain.from_iterable(keys.values()))
        last = {key: index for index, own in keys.items() for key in own}
        first = {key: index for index, own in reversed(keys.items()) for key in own}
        self._spans = {key: (first[key], last[key]) for key in first if first[key] < last[key]}

    def kept(self, index: int) -> list[str]:
        """The tensors that are kept in memory after a step was loaded, for a later one."""
        return [key for key, (first, last) in self._spans.items() if first <= index < last]


class WeightStream:
    """The weights of a sequence of steps.

    Args:
        source: the checkpoint, as parameters.
        loads: the parameters of each step, in the order in which steps will be loaded.
        device: where parameters go.
        on_read: called, from the reading thread, with each checkpoint tensor that was read, once.
    """

    def __init__(
        self,
        source: Weights,
        loads: Loads,
        device: torch.device,
        on_read: OnRead = lambda key, tensor: None,
    ) -> None:
        self.source = source
        self.device = device
        self.on_read = on_read
        self._loads = loads
        self._next = dict(itertools.pairwise(loads))
        order = LoadOrder(source, loads, device.type)
        self._tables = {name: table for name in order.tables if (table := source.table(name)) is not None}
        self._uses = order.uses
        self._kept: dict[str, torch.Tensor] = {}
        self._pending: dict[int, Future[Loaded]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._side = SideStream(device)
        self._uploads = Uploads(self._side)
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
        """Put the parameters of a step into the module tree, and start to read those of the next one."""
        tensors, mark = (self._pending.pop(index, None) or self._submit(index)).result()
        following = self._next.get(index)
        if following is not None and self._is_ahead:
            self._pending[following] = self._submit(following)
        elif following is not None:
            self._thread.submit(self._announce, following)
        self._side.wait_for(mark)
        for name, tensor in tensors.items():
            self._side.lend(tensor)
            assign(model, name, tensor)

    def reload(self, model: nn.Module, index: int) -> None:
        """Load a step again whose weights were changed; this reads tensors a second time."""
        for name in self._loads[index]:
            table = self._tables.get(name)
            assign(model, name, table if table is not None else self.source.read(name, self.device))

    def _submit(self, index: int) -> Future[Loaded]:
        return self._thread.submit(self._read_step, self._loads[index])

    def _announce(self, index: int) -> None:
        names = [name for name in self._loads[index] if name not in self._tables]
        keys = dict.fromkeys(key for name in names for key in self.source.origins[name].keys)
        waiting = itertools.takewhile(lambda key: not self._is_over, keys)
        self.source.checkpoint.announce(key for key in waiting if key not in self._kept)

    def _read_step(self, names: Sequence[str]) -> Loaded:
        tensors: dict[str, torch.Tensor] = {}
        with torch.no_grad(), self._side.active():
            tensors.update({name: self._tables[name] for name in names if name in self._tables})
            for name in names:
                if name in tensors:
                    continue
                value = self.source.read(name, torch.device("cpu"), self._read_key)
                tensors[name] = self._uploads.copy(value)
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
