"""How a worker finds out which other one has failed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.distributed import DistNetworkError, HashStore  # type: ignore[attr-defined]

import runtime
from runtime.workers.start import Launch, _roll
from runtime.workers.watch import Failure, Peer, Watch

Start = Callable[..., list[Watch]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start the watches of some workers in this process; of ranks in `dead` there is only the last heartbeat."""
    watches: list[Watch] = []

    def make(
        size: int, timeout_s: float = 0.8, dead: tuple[int, ...] = (), peers: dict[int, Peer] | None = None
    ) -> list[Watch]:
        store = HashStore()
        all_peers = [Peer(host=f"node-{rank}", pid=os.getpid(), machine="") for rank in range(size)]
        for rank, peer in (peers or {}).items():
            all_peers[rank] = peer
        for rank in range(size):
            if rank in dead:
                store.set(f"beat/{rank}", f'{{"number": 7, "step": "layer {rank}", "messages": 3}}')
            else:
                state = (f"layer {rank}", size - rank)
                watches.append(Watch(store, rank, all_peers, timeout_s, lambda state=state: state))
        return watches

    yield make
    for watch in watches:
        watch.close()


def failure_of(watch: Watch, timeout_s: float = 5) -> Failure:
    end = time.monotonic() + timeout_s
    while watch.failure is None and time.monotonic() < end:
        time.sleep(0.02)
    assert watch.failure is not None
    return watch.failure


def test_a_worker_without_a_heartbeat_is_found_by_the_one_before_it(start: Start) -> None:
    begin = time.monotonic()
    first, third = start(3, dead=(1,))
    for watch in (first, third):
        failure = failure_of(watch)
        assert (failure.rank, failure.text) == (1, "worker 1 on node-1 has not responded for 1 s in layer 1")
        assert failure.error().is_resumable
    assert time.monotonic() - begin > 0.7


def test_a_process_of_this_machine_that_ended_is_found_at_once(start: Start) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = Peer.here()
    peers = {0: here, 1: Peer(host="here", pid=ended.pid, machine=here.machine)}
    if not here.machine:
        pytest.skip("this system does not tell about processes")
    (watch,) = start(2, timeout_s=60, dead=(1,), peers=peers)
    assert failure_of(watch).text == "worker 1 on here died in layer 1"


def test_after_a_failed_message_a_silent_worker_is_the_reason(start: Start) -> None:
    first, third = start(3, timeout_s=2, dead=(1,))
    error = first.suspect([1, 2], "Connection reset by peer")
    assert str(error) == "worker 1 on node-1 died or cannot be reached in layer 1"
    assert failure_of(third).rank == 1


@pytest.mark.parametrize(
    ("is_late", "text"),
    [
        (
            True,
            "worker 2 on node-2 has not answered for 4 s in layer 2",
        ),
        (False, "lost the connection to worker 2 on node-2 in layer 2: no route"),
    ],
)
def test_if_all_are_alive_the_one_with_the_fewest_messages_is_the_reason(
    start: Start, is_late: bool, text: str
) -> None:
    first = start(3, timeout_s=4)[0]
    error = first.suspect([1, 2], "no route", is_late=is_late)
    assert (error.message, "--worker-timeout" in error.hint) == (text, is_late)


def test_the_first_of_two_errors_counts(start: Start) -> None:
    first, second, third = start(3, timeout_s=60)
    second.report(runtime.DataError("no such column", hint="name another"))
    third.report(ValueError("a bug"))
    for watch in (first, second, third):
        failure = failure_of(watch)
        expected = "worker 1 on node-1 stopped in layer 1: no such column (name another)"
        assert (failure.rank, failure.text, failure.is_resumable) == (1, expected, False)


def test_an_interruption_is_told(start: Start) -> None:
    first, second = start(2, timeout_s=60)
    second.report(KeyboardInterrupt())
    failure = failure_of(first)
    assert (failure.text, failure.is_interrupt) == ("worker 1 on node-1 was interrupted in layer 1", True)


def test_a_store_that_is_gone_is_a_failure_of_its_machine() -> None:
    class Gone:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("Broken pipe. Did the server crash?")

    peers = [Peer(host=f"node-{rank}", pid=1, machine="") for rank in range(2)]
    watch = Watch(Gone(), 1, peers, 60, lambda: ("layer 1", 0))
    assert (
        failure_of(watch).text
        == "worker 0 on node-0 cannot be reached in layer 1: its store does not answer: Broken pipe"
    )
    watch.close()


@pytest.mark.parametrize("record", [b"", b"\xff", b"[]", b"{}", b'{"rank": "0", "text": 1}', b"[" * 10_000])
def test_a_record_that_no_worker_writes_is_a_failure_without_details(record: bytes) -> None:
    assert Failure.parse(record).text == "another worker has failed"


def test_workers_that_start_again_ignore_what_earlier_ones_have_announced() -> None:
    store, here = HashStore(), torch.device("cpu")

    def start_all(size: int) -> set[str]:
        with ThreadPoolExecutor(size) as threads:
            places = [Launch(rank=rank, size=size) for rank in range(size)]
            started = list(threads.map(lambda place: _roll(store, place, here, 20), reversed(places)))
        assert all(len(peers) == size for _, peers in started)
        return {name for name, _ in started}

    names = [start_all(size) for size in (3, 3, 2)]
    assert [len(found) for found in names] == [1, 1, 1]
    assert len(set.union(*names)) == 3
    with pytest.raises(runtime.WorkerError, match="1 of 2 workers have not started within 0 s: 1"):
        _roll(store, Launch(rank=0, size=2), here, 0.2)
    with pytest.raises(runtime.WorkerError, match="1 of 4 workers have not started within 0 s: 3"):
        _roll(store, Launch(rank=0, size=4), here, 0.2)


def test_a_store_that_is_gone_before_all_have_started_is_an_error_about_its_worker() -> None:
    class Gone:
        def set(self, key: str, value: str) -> None:
            raise DistNetworkError("Connection reset by peer\nException raised from recv")

    with pytest.raises(runtime.WorkerError, match=r"^worker 0 has ended or cannot be .*: Connection reset by peer$"):
        _roll(Gone(), Launch(rank=1, size=2), torch.device("cpu"), 0.2)
