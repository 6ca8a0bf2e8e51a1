"""Workers of one run as threads of this process: the same messages without torch.distributed."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from runtime.errors import WorkerError

_T = TypeVar("_T")
_TIMEOUT_S = 20


class _Meeting:
    """Where threads exchange messages: each brings one, and leaves with those of all."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._changed = threading.Condition()
        self._brought: list[list[Any]] = [[] for _ in range(size)]
        self._ended: dict[int, None] = {}
        self._sent: dict[tuple[int, int], list[torch.Tensor]] = {}  # by sender and receiver

    def exchange(self, rank: int, message: Any) -> list[Any]:
        with self._changed:
            number = len(self._brought[rank])
            self._brought[rank].append(message)
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._is_over(number), _TIMEOUT_S):
                raise WorkerError("another worker does not respond", is_resumable=True)
            if any(len(messages) <= number for messages in self._brought):
                raise WorkerError("another worker has ended", is_resumable=True)
            return [messages[number] for messages in self._brought]

    def send(self, tensor: torch.Tensor, sender: int, receiver: int) -> None:
        with self._changed:
            self._sent.setdefault((sender, receiver), []).append(tensor.clone())
            self._changed.notify_all()

    def receive(self, sender: int, receiver: int) -> torch.Tensor:
        with self._changed:
            tensors = self._sent.setdefault((sender, receiver), [])
            if not self._changed.wait_for(lambda: tensors or sender in self._ended, _TIMEOUT_S):
                raise WorkerError("another worker does not respond", is_resumable=True)
            if not tensors:
                raise WorkerError("another worker has ended", is_resumable=True)
            return tensors.pop(0)

    def num_unread(self) -> int:
        """How many tensors were sent and not received."""
        return sum(map(len, self._sent.values()))

    def end(self, rank: int) -> None:
        with self._changed:
            self._ended[rank] = None
            self._changed.notify_all()

    def _is_over(self, number: int) -> bool:
        missing = [rank for rank, messages in enumerate(self._brought) if len(messages) <= number]
        return not missing or any(rank in self._ended for rank in missing)


class ThreadWorkers:
    """The workers as one thread sees them."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self.rank = rank
        self.size = meeting.size
        self.bytes_sent = 0
        self.step = ""
        self._meeting = meeting

    def exchange(self, facts: Any) -> list[Any]:
        return [json.loads(text) for text in self._meeting.exchange(self.rank, json.dumps(facts))]

    def swap(self, sends: Sequence[tuple[torch.Tensor, int]], receives: Sequence[tuple[torch.Tensor, int]]) -> None:
        assert all(tensor.is_contiguous() for tensor, _ in (*sends, *receives))
        self.bytes_sent += sum(tensor.nbytes for tensor, _ in sends)
        for tensor, receiver in sends:
            self._meeting.send(tensor, self.rank, receiver)
        for target, sender in receives:
            tensor = self._meeting.receive(sender, self.rank)
            assert (tensor.shape, tensor.dtype) == (target.shape, target.dtype)
            target.copy_(tensor)

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        assert tensor.is_contiguous() and tensor.numel()
        self.bytes_sent += tensor.nbytes * (self.size - 1) if source == self.rank else 0
        found = self._meeting.exchange(self.rank, (source, copy.deepcopy(tensor)))
        assert {one for one, _ in found} == {source}, "the workers disagree about the source"
        assert {(other.shape, other.dtype) for _, other in found} == {(tensor.shape, tensor.dtype)}
        tensor.copy_(found[source][1])


def outcomes(size: int, function: Callable[[ThreadWorkers], _T]) -> list[_T | BaseException]:
    """Run a function in one thread for each worker; its result or exception, by rank.

    Workers that wait for one that has ended get a WorkerError.
    """
    meeting = _Meeting(size)
    found: list[_T | BaseException] = [AssertionError("it did not end")] * size

    def run(rank: int) -> None:
        try:
            found[rank] = function(ThreadWorkers(rank, meeting))
        except BaseException as error:
            found[rank] = error
        finally:
            meeting.end(rank)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_TIMEOUT_S)
    if not any(isinstance(one, BaseException) for one in found):
        assert not meeting.num_unread(), "a tensor was sent and not received"
    return found


def in_threads(size: int, function: Callable[[ThreadWorkers], _T]) -> list[_T]:
    """Run a function in one thread for each worker; its results by rank.

    Raises:
        BaseException: that of a worker that failed by itself, and not because another did.
    """
    found = outcomes(size, function)
    errors = [one for one in found if isinstance(one, BaseException)]
    if errors:
        raise next((one for one in errors if not isinstance(one, WorkerError)), errors[0])
    return [one for one in found if not isinstance(one, BaseException)]
