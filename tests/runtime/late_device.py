"""A simulated device whose copies are late: they happen when something waits for an event recorded behind them.

Its tensors are on the CPU, and its computations, which are torch's own, happen at once. So a test that forgets to wait,
or that overwrites a pinned buffer too early, gets wrong bytes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch

from runtime.host.streams import SideStream


class Event:
    """An event of the simulated device: everything that was queued before it on its stream."""

    def __init__(self, device: LateStream, stream: list[Callable[[], None]], count: int) -> None:
        self.device, self.stream, self.count = device, stream, count

    def synchronize(self) -> None:
        with self.device.lock:
            self.device.num_waits += 1
            while self.device.done[id(self.stream)] < self.count:
                self.stream[self.device.done[id(self.stream)]]()
                self.device.done[id(self.stream)] += 1


class LateStream(SideStream):
    """The main stream and the side stream of the simulated device; `marks` and copies go to the one that is active.

    Attributes:
        pinned: the number of bytes of each pinned allocation.
        num_waits: how often the host or a stream has waited.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__(torch.device("cpu"))
        self.is_real = True
        self.lock = threading.RLock()
        self.main: list[Callable[[], None]] = []
        self.side: list[Callable[[], None]] = []
        self.done = {id(self.main): 0, id(self.side): 0}
        self.pinned: list[int] = []
        self.pinned_places: set[int] = set()
        self.num_waits = 0
        self._active = threading.local()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        self._active.is_side = True
        yield
        self._active.is_side = False

    @property
    def _stream_here(self) -> list[Callable[[], None]]:
        return self.side if getattr(self._active, "is_side", False) else self.main

    def mark(self) -> Event:
        with self.lock:
            return Event(self, self._stream_here, len(self._stream_here))

    def wait_for(self, mark: Event | None) -> None:
        if mark is not None:
            mark.synchronize()

    def lend(self, tensor: torch.Tensor) -> None:
        pass

    def _known(self, tensor: torch.Tensor) -> torch.Tensor:
        self.pinned.append(tensor.nbytes)
        self.pinned_places.add(tensor.untyped_storage().data_ptr())
        return tensor

    def pinned_bytes(self, count: int) -> torch.Tensor:
        return self._known(torch.full((count,), 0xAA, dtype=torch.uint8))

    def pinned_like(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._known(torch.empty_like(tensor).fill_(7))

    def copy_(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy; a buffer of the host is read when the copy happens, a device tensor as it is now."""
        is_upload = source.untyped_storage().data_ptr() in self.pinned_places
        read = source if is_upload else source.clone()
        if is_upload:
            target.zero_()

        def happen() -> None:
            target.copy_(read)

        with self.lock:
            self._stream_here.append(happen)
