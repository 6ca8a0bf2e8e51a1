"""Tell the other workers that this one is alive, and find out when one of them is not.

Each worker has a thread that writes a heartbeat to the store of torchrun, and looks at

- the store's record of the first worker that failed; a worker that finds a dead one writes it as well,
- the processes of the workers on the same machine,
- the heartbeat of the worker with the next rank; those of all workers after a message failed.

The main thread reads `failure` while it waits for a message. When it does not wait, it is interrupted as by SIGTERM.
When it cannot react, for instance because it waits for its device, the thread ends the process with one line. Only this
thread uses the store, so that the main thread is never blocked by a machine that is gone.
"""

from __future__ import annotations

import _thread
import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from runtime.errors import WorkerError
from runtime.host.event_log import finish_logs
from runtime.terminal import printable
from runtime.workers.agreement import described, is_worth_resuming, stopped_text

_TICK_S = 0.25
_INTERRUPT_S = 3.0  # after a failure, until the main thread is interrupted
_EXIT_S = 20.0  # after a failure, until the process ends; torchrun kills it after 30 s
_ACKNOWLEDGE_S = 2.0  # the longest that an ending worker waits until the others know why
_LIMIT_BYTES = 10_000  # of a record
_FAILED, _SEEN = "failed", "seen"
_INTERRUPTED = 128 + signal.SIGINT


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """The process of a worker.

    Attributes:
        machine: the same for processes that see each other's process ids; empty if unknown.
    """

    host: str
    pid: int
    machine: str

    @classmethod
    def here(cls) -> Peer:
        """This process."""
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            machine = f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
        except OSError:
            machine = ""
        return cls(host=printable(socket.gethostname()), pid=os.getpid(), machine=machine)

    def is_dead(self) -> bool:
        """Whether this process of the same machine has ended."""
        try:
            # The state follows the name, which is in parentheses and may contain any character.
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return not Path(f"/proc/{self.pid}").exists()
        return state in "ZX"


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The record of what ended the run.

    Attributes:
        rank: of the worker that failed; -1 if unknown.
        text: the error message for the other workers.
        hint: see `WorkerError`.
        is_resumable: see `WorkerError`.
        is_interrupt: whether a signal interrupted or terminated the worker.
    """

    rank: int
    text: str
    hint: str = ""
    is_resumable: bool = True
    is_interrupt: bool = False

    @classmethod
    def parse(cls, data: bytes) -> Failure:
        """Read a record; one that no worker writes is a failure without details."""
        try:
            found = cls(**json.loads(data[:_LIMIT_BYTES]))
            kinds = {"rank": int, "text": str, "hint": str, "is_resumable": bool, "is_interrupt": bool}
            if all(isinstance(getattr(found, name), kind) for name, kind in kinds.items()):
                return found
        except (TypeError, ValueError, RecursionError):
            pass
        return cls(rank=-1, text="another worker has failed")

    def error(self) -> WorkerError:
        """The error of a worker that ends because of it."""
        return WorkerError(self.text, hint=self.hint, is_resumable=self.is_resumable)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Beat:
    """A heartbeat: a counter, the worker's step, how many messages it has begun, and when the counter last changed."""

    number: int
    step: str
    messages: int
    since: float = field(default_factory=time.monotonic)

    @classmethod
    def parse(cls, data: bytes) -> _Beat | None:
        """Read a heartbeat; None for anything that no worker writes."""
        try:
            found = json.loads(data[:_LIMIT_BYTES])
            return cls(number=int(found["number"]), step=str(found["step"]), messages=int(found["messages"]))
        except (KeyError, TypeError, ValueError, RecursionError):
            return None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Suspicion:
    """A message that failed (`problem`), or was not answered in time, and the workers that may have caused it."""

    peers: Sequence[int]
    problem: str
    is_late: bool
    since: float = field(default_factory=time.monotonic)


class Watch:
    """The heartbeat of this worker, and what is known about the others.

    Args:
        store: of the group, over a connection of its own.
        rank: of this worker.
        peers: all workers by rank.
        timeout_s: a worker without a heartbeat for so long has failed.
        state: returns the step of this worker, and how many messages it has begun.

    Attributes:
        failure: what ended the run, if anything did.
        is_ending: whether all work is done, so that workers may end.
    """

    def __init__(
        self, store: Any, rank: int, peers: Sequence[Peer], timeout_s: float, state: Callable[[], tuple[str, int]]
    ) -> None:
        self._store, self._rank, self._peers, self._timeout_s, self._state = store, rank, peers, timeout_s, state
        self._beat_s, self.settle_s = min(1.0, timeout_s / 20), min(4.0, timeout_s / 4)
        here = peers[rank]
        self._near = [
            other for other, peer in enumerate(peers) if other != rank and here.machine and peer.machine == here.machine
        ]
        self.failure: Failure | None = None
        self.is_ending = False
        self._own: Failure | None = None
        self._suspicion: _Suspicion | None = None
        self._beats: dict[int, _Beat] = {}
        self._number, self._next_beat, self._step, self._num_looks = 0, 0.0, "", 0
        self._is_closed = self._is_asked = self._is_noticed = self._is_store_lost = False
        self._null_device = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - the thread closes it
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def name(self, rank: int) -> str:
        """A worker and its machine."""
        return f"worker {rank} on {self._peers[rank].host}"

    def suspect(self, peers: Sequence[int], problem: str, *, is_late: bool = False) -> WorkerError:
        """Find out which worker made a message fail, and return the error to raise.

        Args:
            peers: the workers that this one exchanges the message with.
            problem: what happened to the message.
            is_late: whether it was not answered in time.
        """
        self._suspicion = self._suspicion or _Suspicion(peers=peers, problem=problem, is_late=is_late)
        self._wait(lambda: self.failure is not None, 2 * self.settle_s + _ACKNOWLEDGE_S)
        if self.failure is None:  # the store does not answer
            names = ", ".join(self.name(peer) for peer in peers)
            self.failure = Failure(rank=-1, text=f"lost the connection to {names}{self._in_step()}: {problem}")
        return self.error()

    def error(self) -> WorkerError:
        """The error that the main thread raises because of `failure`."""
        assert self.failure is not None
        self._is_noticed = True
        return self.failure.error()

    def report(self, error: BaseException) -> None:
        """Record that this worker ends because of an error, unless another failure came first."""
        if isinstance(error, WorkerError) and self.failure is not None:
            return
        is_interrupt = isinstance(error, (KeyboardInterrupt, SystemExit))
        if is_interrupt:
            word = "interrupted" if getattr(error, "code", _INTERRUPTED) == _INTERRUPTED else "terminated"
            text = f"{self.name(self._rank)} was {word}{self._in_step()}"
        elif isinstance(error, WorkerError):  # which names the worker that failed
            text = described(error)[: _LIMIT_BYTES // 10]
        else:
            message = described(error)[: _LIMIT_BYTES // 10]
            text = stopped_text(self._rank, self._peers[self._rank].host, self._state()[0], message)
        self._own = Failure(
            rank=self._rank, text=text, is_resumable=is_worth_resuming(error), is_interrupt=is_interrupt
        )
        self._wait(lambda: self.failure is not None, _ACKNOWLEDGE_S)

    def wake(self) -> None:
        """Let the thread look, and write a heartbeat with the present step, without a delay."""
        with self._changed:
            self._is_asked = True
            self._changed.notify_all()

    def refresh(self) -> None:
        """Look for failures now."""
        wanted = self._num_looks + 2  # one may have begun before
        self._wait(lambda: self._num_looks >= wanted, _ACKNOWLEDGE_S)

    def close(self) -> None:
        """End the heartbeat; after a failure, wait shortly until the other workers know about it."""
        self._is_closed = True
        self.wake()
        self._thread.join(timeout=2 * _ACKNOWLEDGE_S)

    def _wait(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Let the thread look without a delay until a condition is true."""
        end = time.monotonic() + timeout_s
        while not condition() and time.monotonic() < end:
            self.wake()
            with self._changed:
                self._changed.wait(timeout=_TICK_S / 5)

    def _run(self) -> None:
        failed_at = 0.0
        while not self._is_closed:
            with self._changed:
                self._changed.wait_for(lambda: self._is_asked, timeout=_TICK_S)
                self._is_asked = False
            self._look_once()
            if self.failure is None:
                continue
            failed_at = failed_at or time.monotonic()
            passed = time.monotonic() - failed_at
            if passed > _EXIT_S:
                _end(self.failure.error())
            has_handler = signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN, None)
            if passed > _INTERRUPT_S and has_handler and not self._is_noticed:
                self._is_noticed = True
                _thread.interrupt_main(signal.SIGTERM)
        self._look_once()
        self._wait_until_seen()
        faulthandler.cancel_dump_traceback_later()
        self._null_device.close()

    def _look_once(self) -> None:
        try:
            if not self._is_store_lost:
                self._beat()
                self._look()
        except RuntimeError as error:
            self._is_store_lost = True
            if not self.is_ending and self.failure is None:
                problem = str(error).partition("\n")[0].partition(". ")[0][:200]
                text = f"{self.name(0)} cannot be reached{self._in_step()}: its store does not answer: {problem}"
                self.failure = Failure(rank=0, text=text)
        with self._changed:
            self._num_looks += 1
            self._changed.notify_all()

    def _beat(self) -> None:
        now = time.monotonic()
        step, messages = self._state()
        if now < self._next_beat and step == self._step:
            return
        self._next_beat, self._step = now + self._beat_s, step
        self._guard()
        self._number += 1
        text = json.dumps({"number": self._number, "step": step[:1000], "messages": messages})
        self._store.set(f"beat/{self._rank}", text)

    def _guard(self) -> None:
        """End this process if the thread is not scheduled any more, because native code holds Python's lock."""
        faulthandler.dump_traceback_later(2 * self._timeout_s, exit=True, file=self._null_device)

    def _look(self) -> None:
        """Find a failure, if there is one that is not known yet."""
        if self.failure is not None:
            return
        if self._store.check([_FAILED]):
            self._take(self._store.get(_FAILED))
            return
        found = self._own or self._dead() or self._silent()
        if found is not None:
            self._take(self._store.compare_set(_FAILED, "", json.dumps(asdict(found))))

    def _take(self, record: bytes) -> None:
        self.failure = Failure.parse(record)
        self._store.add(_SEEN, 1)

    def _dead(self) -> Failure | None:
        """A worker on this machine whose process has ended."""
        if self.is_ending and self._suspicion is None:
            return None
        for rank in self._near:
            if self._peers[rank].is_dead():
                self._read_beats([rank])
                return Failure(rank=rank, text=f"{self.name(rank)} died{self._in_step(rank)}")
        return None

    def _silent(self) -> Failure | None:
        """A worker without a heartbeat, or after a message failed, the one that probably caused that."""
        doubt, now, size = self._suspicion, time.monotonic(), len(self._peers)
        others = [rank for rank in range(size) if rank != self._rank]
        self._read_beats(others if doubt is not None else [(self._rank + 1) % size])
        settle_s = self._timeout_s if doubt is None else self.settle_s
        start = 0.0 if doubt is None else doubt.since
        silent = [rank for rank, beat in self._beats.items() if now - max(beat.since, start) > settle_s]
        if doubt is not None and now - doubt.since > settle_s + 2 * _TICK_S and not silent:
            return self._culprit(doubt)
        for rank in silent:
            is_lost = doubt is not None and not doubt.is_late
            what = "died or cannot be reached" if is_lost else f"has not responded for {self._timeout_s:.0f} s"
            return Failure(rank=rank, text=f"{self.name(rank)} {what}{self._in_step(rank)}")
        return None

    def _culprit(self, doubt: _Suspicion) -> Failure:
        """The worker that a message failed because of, if all workers are alive."""
        rank = min(doubt.peers, key=lambda peer: (self._beats[peer].messages if peer in self._beats else -1, peer))
        if not doubt.is_late:
            text = f"lost the connection to {self.name(rank)}{self._in_step(rank)}: {doubt.problem}"
            return Failure(rank=rank, text=text)
        text = f"{self.name(rank)} has not answered for {self._timeout_s:.0f} s{self._in_step(rank)}"
        return Failure(rank=rank, text=text, hint="raise --worker-timeout if its work takes longer")

    def _read_beats(self, ranks: Iterable[int]) -> None:
        known = [rank for rank in ranks if self._store.check([f"beat/{rank}"])]
        for rank in known:
            beat = _Beat.parse(self._store.get(f"beat/{rank}"))
            before = self._beats.get(rank)
            if beat is not None and (before is None or before.number != beat.number):
                self._beats[rank] = beat

    def _in_step(self, rank: int = -1) -> str:
        """The present step of a worker: by default this one, whose step also counts if the other's is unknown."""
        step = self._beats[rank].step if rank in self._beats else ""
        step = step or self._state()[0]
        return f" in {printable(step)}" if step else ""

    def _wait_until_seen(self) -> None:
        """Keep the store's machine alive until the other workers have read the record."""
        if self.failure is None or self._is_store_lost:
            return
        num_alive = len(self._peers) - (self.failure.rank != self._rank)
        end = time.monotonic() + _ACKNOWLEDGE_S
        try:
            while self._store.add(_SEEN, 0) < num_alive and time.monotonic() < end:
                time.sleep(_TICK_S / 5)
        except RuntimeError:
            return  # the store is gone already


def _end(error: WorkerError) -> None:
    """End the process with one line: the main thread does not react."""
    text = " ".join(printable(str(error)).split())
    os.write(2, f"runtime: error: {text}\n".encode("utf-8", "backslashreplace"))
    finish_logs("failed", error=text, exit_code=2)
    os._exit(2)
