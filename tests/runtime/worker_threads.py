"""Workers of one run as threads of this process: the same messages without torch.distributed."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")
_TIMEOUT_S = 20


class _Meeting:
    """Where threads exchange messages: all bring one, and all leave with every message."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=_TIMEOUT_S)
        self.brought: list[Any] = [None] * size

    def exchange(self, rank: int, message: Any) -> list[Any]:
        self.brought[rank] = message
        self.barrier.wait()
        found = list(self.brought)
        self.barrier.wait()
        return found


class ThreadWorkers:
    """The workers as one thread sees them."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self.rank = rank
        self.size = meeting.barrier.parties
        self.bytes_sent = 0
        self.step = ""
        self._meeting = meeting

    def exchange(self, facts: Any) -> list[Any]:
        return [json.loads(text) for text in self._meeting.exchange(self.rank, json.dumps(facts))]

    def swap(self, sends: Sequence[tuple[torch.Tensor, int]], receives: Sequence[tuple[torch.Tensor, int]]) -> None:
        assert all(tensor.is_contiguous() for tensor, _ in (*sends, *receives))
        self.bytes_sent += sum(tensor.nbytes for tensor, _ in sends)
        outgoing = [(tensor.clone(), receiver) for tensor, receiver in sends]
        found = self._meeting.exchange(self.rank, outgoing)
        queues = {
            sender: [tensor for tensor, receiver in messages if receiver == self.rank]
            for sender, messages in enumerate(found)
        }
        for target, sender in receives:
            tensor = queues[sender].pop(0)
            assert (tensor.shape, tensor.dtype) == (target.shape, target.dtype)
            target.copy_(tensor)
        assert not any(queues.values()), "a tensor was sent and not received"

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        assert tensor.is_contiguous() and tensor.numel()
        self.bytes_sent += tensor.nbytes * (self.size - 1) if source == self.rank else 0
        found = self._meeting.exchange(self.rank, (source, copy.deepcopy(tensor)))
        assert {one for one, _ in found} == {source}, "the workers disagree about the source"
        assert {(other.shape, other.dtype) for _, other in found} == {(tensor.shape, tensor.dtype)}
        tensor.copy_(found[source][1])


def outcomes(size: int, function: Callable[[ThreadWorkers], _T]) -> list[_T | BaseException]:
    """Run a function in one thread for each worker; its result or exception, by rank.

    A worker that raises stops those that wait for it.
    """
    meeting = _Meeting(size)
    found: list[_T | BaseException] = [AssertionError("it did not end")] * size

    def run(rank: int) -> None:
        try:
            found[rank] = function(ThreadWorkers(rank, meeting))
        except BaseException as error:
            found[rank] = error
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_TIMEOUT_S)
    return found


def in_threads(size: int, function: Callable[[ThreadWorkers], _T]) -> list[_T]:
    """Run a function in one thread for each worker; its results by rank.

    Raises:
        BaseException: that of a worker that failed by itself, and not because another did.
    """
    found = outcomes(size, function)
    errors = [one for one in found if isinstance(one, BaseException)]
    if errors:
        raise next((one for one in errors if not isinstance(one, threading.BrokenBarrierError)), errors[0])
    return [one for one in found if not isinstance(one, BaseException)]
