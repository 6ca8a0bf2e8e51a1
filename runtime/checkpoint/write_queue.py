"""Write tensors of a GPU in a thread, next to the computation.

The device copies a tensor to pinned memory while it goes on with other work, and the thread writes it when it has
arrived. A limited number of bytes is on its way at a time. Tensors are complete only after `wait`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `join` writes a checkpoint without torch
    import torch

    from runtime.host.streams import SideStream

    Write = Callable[[torch.Tensor], object]

_BYTES_ON_THE_WAY = 2**28
_Entry = tuple[int, Future[object]]  # the bytes of a tensor, and its write


class WriteQueue:
    """Tensors that are written one after the other, in the order in which they were put.

    One thread puts tensors, and several may wait. An error of a write is raised by every later `put` and `wait`: no
    caller may take the tensor for written because another one has got the error.

    Args:
        most_bytes: on their way at a time; a larger tensor goes alone.
    """

    def __init__(self, most_bytes: int = _BYTES_ON_THE_WAY) -> None:
        self.most_bytes = most_bytes
        self._thread: ThreadPoolExecutor | None = None
        self._side: SideStream | None = None
        self._lock = threading.Lock()
        self._waiting: deque[_Entry] = deque()

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether the thread writes a tensor; the caller writes others."""
        return tensor.device.type == "cuda"

    def put(self, tensor: torch.Tensor, write: Write) -> None:
        """Start to copy a tensor to host memory; `write` gets the copy, in the thread."""
        from runtime.host.transfers import Download

        num_bytes = tensor.numel() * tensor.element_size()
        while entry := self._oldest(unless_fits=num_bytes):
            self._end(entry)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
            self._side = self._side_of(tensor)
        assert self._side is not None, "both are made together"
        download = Download(self._side, tensor.detach().contiguous())
        with self._lock:
            self._waiting.append((num_bytes, self._thread.submit(lambda: write(download.wait()))))

    def wait(self) -> None:
        """Wait until all tensors that have been put so far are written."""
        with self._lock:
            entries = list(self._waiting)
        for entry in entries:
            self._end(entry)

    def close(self) -> None:
        """Finish the write that is going on, and forget the others."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None
        with self._lock:
            self._waiting.clear()

    def _side_of(self, tensor: torch.Tensor) -> SideStream:
        from runtime.host.streams import SideStream

        return SideStream(tensor.device)

    def _oldest(self, unless_fits: int) -> _Entry | None:
        """The oldest tensor, if it is written, or if another one of `unless_fits` bytes must wait for it."""
        with self._lock:
            if not self._waiting:
                return None
            on_the_way = sum(num_bytes for num_bytes, _ in self._waiting)
            oldest = self._waiting[0]
            return oldest if oldest[1].done() or on_the_way + unless_fits > self.most_bytes else None

    def _end(self, entry: _Entry) -> None:
        entry[1].result()  # if it failed, it stays in the queue
        with self._lock:
            if entry in self._waiting:  # another thread may have removed it
                self._waiting.remove(entry)
