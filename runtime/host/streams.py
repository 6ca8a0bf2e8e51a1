"""Copies that run beside the computation, on a GPU: a stream of their own, and marks to wait for. Nothing, on a CPU."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


class SideStream:
    """A second stream of a device.

    Args:
        device: for any but a CUDA device all of this does nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_real = device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if self.is_real else None  # type: ignore[no-untyped-call]

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """Work inside the block goes to the side stream."""
        if not self.is_real:
            return contextlib.nullcontext()
        stream: contextlib.AbstractContextManager[Any] = torch.cuda.stream(self._stream)
        return stream

    def mark(self) -> Any:
        """The end of what was begun on the current stream, or None on a CPU."""
        if not self.is_real:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait_for(self, mark: Any) -> None:
        """Let the current stream go on when `mark` is reached; the host does not wait."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def lend(self, tensor: torch.Tensor) -> None:
        """Keep the memory of a tensor until what the current stream does with it is done."""
        if self.is_real and tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(self.device))
