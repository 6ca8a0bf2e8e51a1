"""The group of workers: processes that share one run, and the messages that they exchange.

Only tensors and JSON texts are exchanged. Every worker calls the same methods in the same order; a method returns when
this worker's part of the message is done. Without torchrun there is one worker, and torch.distributed is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Workers(Protocol):
    """The workers of a run, as one of them sees the group.

    Attributes:
        step: the present work of this worker, such as `model.layers.3 (measure)`; errors of the others name it.
    """

    step: str

    @property
    def rank(self) -> int:
        """The number of this worker, from 0."""

    @property
    def size(self) -> int:
        """The number of workers."""

    @property
    def bytes_sent(self) -> int:
        """The bytes that this worker has sent so far; a broadcast counts once for each receiver."""

    def exchange(self, facts: Any) -> list[Any]:
        """Give a JSON value to every worker, and return those of all workers by rank."""

    def swap(self, sends: Sequence[tuple[torch.Tensor, int]], receives: Sequence[tuple[torch.Tensor, int]]) -> None:
        """Send and receive contiguous tensors at the same time.

        Args:
            sends: each tensor with the rank of its receiver.
            receives: each tensor to overwrite, with the rank of its sender. Between two workers, tensors arrive in the
                order in which they are sent; shape and dtype must be the same on both sides.
        """

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Overwrite a contiguous tensor with that of the worker `source`."""


class Alone:
    """The only worker of a run."""

    rank, size, bytes_sent = 0, 1, 0

    def __init__(self) -> None:
        self.step = ""

    def exchange(self, facts: Any) -> list[Any]:
        """Return the value itself."""
        return [facts]

    def swap(self, sends: Sequence[tuple[torch.Tensor, int]], receives: Sequence[tuple[torch.Tensor, int]]) -> None:
        """Do nothing: there is no other worker."""
        assert not sends and not receives, "there is no other worker"

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Do nothing."""
