"""A second CUDA stream for copies that overlap with the computation; on other devices it does nothing."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


class SideStream:
    """A second stream of a CUDA device; for other devices all methods do nothing, and copies are done at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_real = device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if self.is_real else None  # type: ignore[no-untyped-call]

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """Run the operations inside the block on the side stream."""
        if not self.is_real:
            return contextlib.nullcontext()
        stream: contextlib.AbstractContextManager[Any] = torch.cuda.stream(self._stream)
        return stream

    def mark(self) -> Any:
        """Record an event after the operations queued on the current stream so far; None on a CPU."""
        if not self.is_real:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait_for(self, mark: Any) -> None:
        """Make the current stream, but not the host, wait for the event `mark`."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def lend(self, tensor: torch.Tensor) -> None:
        """Keep the memory of a tensor allocated until the current stream has finished using it."""
        if self.is_real and tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(self.device))

    def pinned_bytes(self, count: int) -> torch.Tensor:
        """Allocate host memory, pinned if the device is real."""
        return torch.empty(count, dtype=torch.uint8, pin_memory=self.is_real)

    def pinned_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Allocate host memory of a tensor's shape and strides, pinned if the device is real."""
        return torch.empty_like(tensor, device="cpu", pin_memory=self.is_real)

    def copy_(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy on the current stream; one of both tensors is in pinned memory."""
        target.copy_(source, non_blocking=self.is_real)
