"""The group of workers over torch.distributed: gloo for tensors on the CPU and for JSON, NCCL for those on CUDA.

A thread waits for gloo, which does not return before its message is done, so that the main thread can be interrupted,
and can stop when another worker fails. NCCL's messages are queued on the device; the main thread asks whether they are
done. Tensors travel as bytes, so that their dtype does not matter.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from runtime.errors import WorkerError

if TYPE_CHECKING:
    from runtime.workers.watch import Watch

_LARGEST_MESSAGE = 2**30  # bytes of JSON from one worker
_POLL_S = 0.2
_DEVICE_POLL_S = 50e-6


class TorchGroup:
    """The workers of the default process group, which is initialized before the first message.

    Args:
        rank: of this worker.
        size: the number of workers.
        timeout_s: the longest time to wait for another worker.
        on_cpu: the process group for tensors on the CPU, with the backend gloo; None for the default one.

    Attributes:
        watch: knows which workers have failed; None if the caller has initialized the process group.
        num_messages: how many messages this worker has begun.
    """

    def __init__(self, rank: int, size: int, timeout_s: float, on_cpu: Any = None) -> None:
        self.rank, self.size, self._timeout_s, self._on_cpu = rank, size, timeout_s, on_cpu
        self.watch: Watch | None = None
        self.bytes_sent = self.num_messages = 0
        self._step = ""
        self._others = [other for other in range(size) if other != rank]
        self._thread = CallThread()

    @property
    def step(self) -> str:
        """The present work of this worker."""
        return self._step

    @step.setter
    def step(self, text: str) -> None:
        self._step = text
        if self.watch is not None:
            self.watch.wake()

    def exchange(self, facts: Any) -> list[Any]:
        """Give a JSON value to every worker, and return those of all workers by rank."""
        sent = json.dumps(facts, separators=(",", ":")).encode()
        assert len(sent) <= _LARGEST_MESSAGE, f"a message of {len(sent)} bytes"
        sizes = [int(size) for size in self._gather(torch.tensor([len(sent)]))]
        if not all(0 < size <= _LARGEST_MESSAGE for size in sizes):
            raise WorkerError(f"a worker announced a message of {max(sizes)} bytes; all must run the same version")
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(sent)] = torch.frombuffer(bytearray(sent), dtype=torch.uint8)
        received = self._gather(padded)
        texts = [tensor[:size].numpy().tobytes() for tensor, size in zip(received, sizes, strict=True)]
        return [_parsed(rank, text) for rank, text in enumerate(texts)]

    def swap(self, sends: Sequence[tuple[torch.Tensor, int]], receives: Sequence[tuple[torch.Tensor, int]]) -> None:
        """Send and receive contiguous tensors at the same time."""
        peers = sorted({peer for _, peer in (*sends, *receives)})
        assert self.rank not in peers, "a worker sends nothing to itself"
        for_cpu: list[Any] = []
        for_device: list[Any] = []
        for start, messages in ((dist.isend, sends), (dist.irecv, receives)):
            for tensor, peer in messages:
                if tensor.numel():  # an empty message would never arrive
                    operations = for_device if tensor.is_cuda else for_cpu
                    operations.append(dist.P2POp(start, _bytes_of(tensor), peer, self._group_of(tensor)))
        self.bytes_sent += sum(tensor.nbytes for tensor, _ in sends)
        self.num_messages += 1
        if for_device:
            self._wait_on_device(dist.batch_isend_irecv(for_device), peers)
        if for_cpu:
            self.call(lambda: [work.wait() for work in dist.batch_isend_irecv(for_cpu)], peers)

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Overwrite a contiguous tensor with that of the worker `source`."""
        if not tensor.numel():
            return
        is_source = source == self.rank
        self.bytes_sent += tensor.nbytes * len(self._others) if is_source else 0
        self.num_messages += 1
        peers = self._others if is_source else [source]
        group, data = self._group_of(tensor), _bytes_of(tensor)
        if tensor.is_cuda:
            self._wait_on_device([dist.broadcast(data, source, group=group, async_op=True)], peers)
        else:
            self.call(lambda: dist.broadcast(data, source, group=group), peers)

    def call(self, function: Callable[[], Any], peers: Sequence[int]) -> Any:
        """Call a function that waits for other workers, in the thread, and return its result.

        Raises:
            WorkerError: when one of them fails, or does not answer in time.
        """
        done = self._thread.start(function)
        self._wait_until(lambda: done.wait(_POLL_S), peers)
        if done.error is not None:
            raise self._failed(peers, done.error) from None
        return done.result

    def close(self) -> None:
        """End the thread, after the last message of every worker."""
        self._thread.close()

    def _gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all workers by rank; all have the same shape."""
        received = [torch.empty_like(tensor) for _ in range(self.size)]
        self.bytes_sent += tensor.nbytes * len(self._others)
        self.num_messages += 1
        self.call(lambda: dist.all_gather(received, tensor, group=self._on_cpu), self._others)
        return received

    def _group_of(self, tensor: torch.Tensor) -> Any:
        return None if tensor.is_cuda else self._on_cpu

    def _wait_on_device(self, works: Sequence[Any], peers: Sequence[int]) -> None:
        def is_done() -> bool:
            if all(work.is_completed() for work in works):
                return True
            time.sleep(_DEVICE_POLL_S)
            return False

        try:
            self._wait_until(is_done, peers)
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise self._failed(peers, error) from None

    def _wait_until(self, is_done: Callable[[], bool], peers: Sequence[int]) -> None:
        """Wait for a message to be done.

        Raises:
            WorkerError: when another worker has failed, or the time is over.
        """
        settle_s = 0.0 if self.watch is None else self.watch.settle_s
        end = time.monotonic() + self._timeout_s - settle_s
        while not is_done():
            if self.watch is not None and self.watch.failure is not None:
                raise self.watch.error()
            if time.monotonic() > end:
                raise self._failed(peers, TimeoutError(f"no answer for {self._timeout_s:.0f} s"), is_late=True)

    def _failed(self, peers: Sequence[int], error: BaseException, *, is_late: bool = False) -> WorkerError:
        """The error to raise for a message that failed."""
        problem = str(error).partition(". ")[0].rpartition("] ")[2]
        if self.watch is not None:
            return self.watch.suspect(peers, problem, is_late=is_late)
        names = ", ".join(f"worker {peer}" for peer in peers)
        where = f" in {self.step}" if self.step else ""
        return WorkerError(f"lost the connection to {names}{where}: {problem}", is_resumable=True)


class CallThread:
    """A thread for calls that block without end when another process does not answer; it does not keep the process."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[PendingCall | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="messages", daemon=True).start()

    def start(self, call: Callable[[], Any]) -> PendingCall:
        """Begin a call after all earlier ones."""
        pending = PendingCall(call)
        self._calls.put(pending)
        return pending

    def close(self) -> None:
        """End the thread after the last call."""
        self._calls.put(None)

    def _run(self) -> None:
        while (pending := self._calls.get()) is not None:
            pending.run()


class PendingCall:
    """A call in another thread.

    Attributes:
        result: what it returned.
        error: what it raised.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call: Callable[[], Any] | None = call
        self._is_done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Call it, in the present thread."""
        assert self._call is not None
        try:
            self.result = self._call()
        except BaseException as error:  # the thread that waits raises it
            self.error = error
        self._call = None  # it refers to tensors
        self._is_done.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is done; False if the time is over before."""
        return self._is_done.wait(timeout_s)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.is_contiguous(), "only contiguous tensors are exchanged"
    return tensor.detach().reshape(-1).view(torch.uint8)


def _parsed(rank: int, text: bytes) -> Any:
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise WorkerError(f"worker {rank} sent a message that is not JSON: {error}") from None
