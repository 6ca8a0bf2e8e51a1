"""Digests are those of sha256sum, a change of a file is an error, and the thread ends when it is told to."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.errors import WeightsError
from runtime.provenance import hashing
from runtime.provenance.hashing import Hasher, WatchedFile, plain_pieces


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 1000])
def test_digests_are_those_of_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(hashing, "_PIECE_BYTES", 100)
    path = tmp_path / "file"
    path.write_bytes(bytes(number % 251 for number in range(size)))
    with Hasher() as hasher:
        hasher.add("watched", WatchedFile(path).pieces)
        hasher.add("plain", lambda: plain_pieces(path))
        assert hasher.wait(20)
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert hasher.digests == {"watched": expected, "plain": expected}
    assert hasher.bytes_done == 2 * size


def replaced(path: Path) -> None:
    other = path.with_suffix(".other")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


def rewritten(path: Path) -> None:
    path.write_bytes(b"2" * 250)


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"3")


# A file that is replaced after it was opened is still read to its end.
CHANGES = [(replaced, 0), (Path.unlink, 0), *((change, at) for change in (rewritten, longer) for at in (0, 1, 3))]


@pytest.mark.parametrize(("change", "at"), CHANGES)
def test_a_changed_file_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], at: int
) -> None:
    monkeypatch.setattr(hashing, "_PIECE_BYTES", 100)
    path = tmp_path / "file"
    path.write_bytes(b"1" * 250)
    os.utime(path, (1, 1))
    pieces = WatchedFile(path).pieces()
    with pytest.raises(
        WeightsError, match=r"file (was changed while it was read|cannot be read: No such file)"
    ) as caught:
        for number in range(9):
            if number == at:
                change(path)
            next(pieces)
    assert caught.value.is_resumable


def test_an_error_ends_the_thread_and_is_raised_by_all(tmp_path: Path) -> None:
    with Hasher() as hasher:
        hasher.add("missing", lambda: plain_pieces(tmp_path / "missing"))
        for _ in range(2):
            with pytest.raises(FileNotFoundError):
                hasher.wait(20)
        with pytest.raises(FileNotFoundError):
            hasher.require_sound()


def test_the_thread_ends_within_a_piece_and_waiting_ends_in_time() -> None:
    def endless() -> Iterator[memoryview]:
        while True:
            time.sleep(0.001)
            yield memoryview(b"0")

    before, begin = threading.active_count(), time.perf_counter()
    with Hasher() as hasher:
        hasher.add("endless", endless)
        assert not hasher.wait(0.01)
    assert time.perf_counter() - begin < 5
    assert threading.active_count() == before and not hasher.digests
