"""Copies between host and device that overlap with the computation, through pinned memory of a limited size.

A copy from pinned memory runs beside the computation, and the host goes on at once. So a buffer may be overwritten, and
what was copied may be read, only after the event that is recorded behind the copy. torch's allocator keeps freed pinned
memory until the copies from and to it have ended; buffers that are used again are up to this module.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from runtime.host.streams import SideStream

CHUNK_BYTES = 2**26  # 64 MiB take a millisecond to copy to a GPU, and pinning more host memory gains nothing
_NUM_BUFFERS = 2  # one is filled while the other is copied


class Uploads:
    """Copies host tensors to a device, through a ring of pinned buffers. One thread uses it.

    Args:
        side: the stream of the copies; it must be active.
        chunk_bytes: the size of a buffer.
    """

    def __init__(self, side: SideStream, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.side = side
        self.chunk_bytes = chunk_bytes
        self._buffers: list[torch.Tensor] = []
        self._marks: list[Any] = []  # behind the last copy from each buffer
        self._next = itertools.cycle(range(_NUM_BUFFERS))

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy on the device with the same strides; it has arrived when the next mark of the stream has."""
        if not self.side.is_real:
            return tensor.to(self.side.device)
        copied = torch.empty_like(tensor, device=self.side.device)
        if not tensor.is_contiguous():
            pinned = self.side.pinned_like(tensor)
            self.side.copy_(copied, pinned.copy_(tensor))
            return copied
        source, target = _as_bytes(tensor), _as_bytes(copied)
        for part, place in zip(
            torch.split(source, self.chunk_bytes), torch.split(target, self.chunk_bytes), strict=True
        ):
            number = next(self._next)
            buffer = self._free_buffer(number)[: len(part)]
            self.side.copy_(place, buffer.copy_(part))
            self._marks[number] = self.side.mark()
        return copied

    def _free_buffer(self, number: int) -> torch.Tensor:
        """Wait until the device has copied what was in a buffer."""
        if number == len(self._buffers):
            self._buffers.append(self.side.pinned_bytes(self.chunk_bytes))
            self._marks.append(None)
        elif self._marks[number] is not None:
            self._marks[number].synchronize()
        return self._buffers[number]


class Download:
    """A device tensor on its way to host memory, queued on the current stream.

    The device may overwrite the tensor in later operations of that stream.

    Args:
        side: of the device.
        tensor: contiguous or not.
    """

    def __init__(self, side: SideStream, tensor: torch.Tensor) -> None:
        self._host = side.pinned_like(tensor)
        side.copy_(self._host, tensor)
        self._mark = side.mark()

    def wait(self) -> torch.Tensor:
        """Return the tensor in host memory when all of it has arrived; any thread may wait."""
        if self._mark is not None:
            self._mark.synchronize()
        return self._host


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    flat: torch.Tensor = tensor.detach().reshape(-1).view(torch.uint8)
    return flat
