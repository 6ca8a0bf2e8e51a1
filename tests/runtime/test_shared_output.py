"""Several workers write one checkpoint, in a shared directory or in parts, and resume it with another number."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime.checkpoint.dtypes import bytes_of, dtype_name
from runtime.checkpoint.layout import Layout
from runtime.checkpoint.parts import join_parts, write_part
from runtime.checkpoint.stored import Stored
from runtime.checkpoint.writer import ShardWriter
from runtime.errors import OutputError, SeqbuildError, WorkerError
from runtime.streaming import journal
from runtime.streaming.activations import Activations
from runtime.streaming.committer import Committer
from runtime.streaming.events import Watchers
from runtime.streaming.identity import run_digest
from runtime.streaming.output_place import require_startable
from runtime.streaming.saved_values import load_boundary
from runtime.streaming.workplace import open_workplace
from runtime.workers.agreement import agreed
from runtime.workers.comparison import FILE_TIMES
from runtime.workers.group import Alone, Workers
from tests.runtime.small import Stop, directory_bytes
from tests.runtime.worker_threads import in_threads, outcomes

CPU = torch.device("cpu")
IDENTITY = {"recipe": "a" * 64, "dtype": "float32", FILE_TIMES: "host 1"}
STEPS, LANES, BATCHES = 5, 5, 2
MASK = torch.ones(3, dtype=torch.bool)


def step_tensors(index: int) -> dict[str, torch.Tensor]:
    """What a step writes: tensors of several sizes and dtypes, and an empty one."""
    generator = torch.Generator().manual_seed(index)
    sizes = {"q": (7, 5), "k": (3, 5), "scale": (9,), "one": ()}
    tensors = {f"{index}.{name}": torch.randn(size, generator=generator) for name, size in sizes.items()}
    return tensors | {f"{index}.half": torch.ones(3, 2).bfloat16() * index, f"{index}.empty": torch.empty(0, 4)}


TENSORS = {name: tensor for index in range(STEPS) for name, tensor in step_tensors(index).items()}


def layout(max_shard_bytes: int = 500) -> Layout:
    stored = (Stored(name, dtype_name(one.dtype), tuple(one.shape)) for name, one in TENSORS.items())
    return Layout(stored, max_shard_bytes)


def values(index: int, lane: int, position: int) -> torch.Tensor:
    return torch.full((2, 3), 100.0 * index + 10 * lane + position)


def requested(writer: ShardWriter, name: str) -> Iterator[memoryview]:
    assert writer.is_mine(name), f"{name} was requested by a worker that does not write it"
    yield bytes_of(TENSORS[name].contiguous())


Fail = Callable[[Workers, int], None]


def run(workers: Workers, out: Path, *, resume: bool = False, parts: bool = False, fail: Fail | None = None) -> int:
    """A run whose steps write known tensors, and compute known values; returns the first step that it has run."""
    fail = fail or (lambda workers, index: None)
    require_startable(out, resume=resume, workers=workers, parts=parts)
    with open_workplace(out, resume=resume, identity=IDENTITY, workers=workers, parts=parts) as place:
        writer = ShardWriter(place.checkpoint, layout(), workers, parts=parts)
        place.require_space(writer.files.file_bytes)
        lanes = range(workers.rank, LANES, workers.size)
        places = [(lane, position) for lane in lanes for position in range(BATCHES)]
        activations = Activations([{} for _ in places], CPU, folder=place.values, lasting={"mask"})
        first = len(place.journal.of_kind(journal.STEP))
        written: list[int] = []
        alongside: Any = SimpleNamespace(written=written.append)
        with Committer(writer, place, 2, Watchers([]), alongside) as committer:
            for index in range(first):
                writer.take_as_written(step_tensors(index))
            take_values(committer, activations, first, places)
            for name in [name for index in range(first) for name in step_tensors(index)]:
                assert torch.equal(writer.read(name), TENSORS[name])
            for index in range(first, STEPS):
                run_step(writer, index, activations, places)
                fail(workers, index)
                step = SimpleNamespace(index=index, goes_on=index < STEPS - 1)
                work: Any = SimpleNamespace(reports=[], warnings=[f"warning {index}"])
                committer.commit(step, work, activations, places, {})  # type: ignore[arg-type]
            committer.wait()
            assert [entry["index"] for entry in place.journal.of_kind(journal.STEP)] == list(range(STEPS))
            assert written == list(range(first, STEPS))  # on every worker
            writer.finish()
        with agreed(workers):
            if not workers.rank:
                (place.checkpoint / "config.json").write_text("{}")
            if parts:
                write_part(place.checkpoint, writer, run_digest(IDENTITY))
        fail(workers, STEPS)
        place.publish()
        fail(workers, STEPS + 1)
    return first


def take_values(committer: Committer, activations: Activations, first: int, places: list[tuple[int, int]]) -> None:
    """Load the values that were saved last, and compare them."""
    saved = committer.last_saved(first, places)
    assert (saved is not None) == (first >= 2)
    if saved is None:
        return
    assert saved == (first - 2) // 2 * 2 + 1
    load_boundary(activations, committer.folder, saved, places)
    for batch, (lane, position) in enumerate(places):
        found = activations.fetch(batch, ["x", "mask", "pair"])
        assert torch.equal(found["x"], values(saved, lane, position)) and torch.equal(found["mask"], MASK)
        assert torch.equal(found["pair"][0], values(saved, lane, position) + 1)
    assert len({id(activations.values(batch)["mask"]) for batch in range(len(places))}) == min(len(places), 1)


def run_step(writer: ShardWriter, index: int, activations: Activations, places: Iterable[tuple[int, int]]) -> None:
    for batch, (lane, position) in enumerate(places):
        x = values(index, lane, position)
        activations.store(batch, {"x": x, "pair": (x + 1, index), "mask": MASK.clone()})
    for number, (name, tensor) in enumerate(step_tensors(index).items()):
        assert not writer.is_written(name)
        size = writer.write(name, tensor) if number % 2 else writer.write_bytes(name, requested(writer, name))
        assert size == tensor.nbytes and writer.is_written(name)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("alone") / "out"
    run(Alone(), out)
    found = directory_bytes(out)
    assert len(found) == 3 + 2  # several files, their index and the config
    return found


def joined(out: Path, size: int) -> dict[str, bytes]:
    """The bytes of a checkpoint, joined from parts if there is no shared one."""
    parts = [out.parent / f"{out.name}.part-{rank}-of-{size}" for rank in reversed(range(size))]
    if parts[0].exists():
        join_parts(parts, out)
    return directory_bytes(out)


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_any_number_of_workers_write_the_same_bytes(
    tmp_path: Path, expected: dict[str, bytes], size: int, parts: bool
) -> None:
    in_threads(size, lambda workers: run(workers, tmp_path / "out", parts=parts))
    count = size if parts else 1
    assert len(list(tmp_path.iterdir())) == count
    assert joined(tmp_path / "out", size) == expected


def fails(rank: int, at: int, error: BaseException) -> Fail:
    def fail(workers: Workers, index: int) -> None:
        if (workers.rank, index) == (rank, at):
            raise error

    return fail


@pytest.mark.parametrize("seed", range(12))
def test_an_interrupted_run_is_resumed_by_any_number_of_workers(
    tmp_path: Path, expected: dict[str, bytes], seed: int
) -> None:
    choose, out, parts = random.Random(seed), tmp_path / "out", seed % 2 == 1
    size, at = choose.randint(1, 3), 0
    for _ in range(2):
        at = choose.randint(at, STEPS - 1 + parts)  # the step `at` is not finished; STEPS is between two publications
        fail = fails(choose.randrange(size), at, Stop())
        found = outcomes(size, lambda workers, fail=fail: run(workers, out, resume=True, parts=parts, fail=fail))
        assert all(isinstance(one, BaseException) for one in found)
        size = size if parts else choose.randint(1, 3)
    starts = in_threads(size, lambda workers: run(workers, out, resume=True, parts=parts))
    assert len(set(starts)) == 1 and starts[0] >= at - 2  # the last step is recorded with the next one
    assert joined(out, size) == expected
    assert not list(tmp_path.glob(".*"))


def stopped(out: Path, size: int, at: int, **options: Any) -> None:
    """Leave an interrupted run."""
    fail = fails(size - 1, at, Stop())
    found = outcomes(size, lambda workers: run(workers, out, fail=fail, **options))
    assert isinstance(found[-1], Stop)


def assert_all_fail(found: list[Any], message: str, culprit: int = 0) -> None:
    """Assert that one worker has this error, and the others one that names it."""
    for rank, error in enumerate(found):
        assert isinstance(error, OutputError if rank == culprit else WorkerError), error
        assert message in str(error) and (rank == culprit or f"worker {culprit} on " in str(error))


def not_empty(out: Path) -> str:
    out.mkdir()
    (out / "file").touch()
    return "is not empty"


def interrupted(out: Path) -> str:
    stopped(out, 2, 3)
    return "an interrupted run has left 2 finished subgraphs of"


def complete(out: Path) -> str:
    run(Alone(), out)
    return "is not empty"


@pytest.mark.parametrize("prepare", [not_empty, interrupted, complete])
def test_all_workers_fail_if_the_first_cannot_begin(tmp_path: Path, prepare: Callable[[Path], str]) -> None:
    message = prepare(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    assert_all_fail(outcomes(3, lambda workers: run(workers, tmp_path / "out")), message)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("parts", [False, True])
def test_two_runs_of_several_workers_at_once_are_refused(
    tmp_path: Path, expected: dict[str, bytes], parts: bool
) -> None:
    found: list[Any] = []

    def begin_another(workers: Workers, index: int) -> None:
        if (workers.rank, index) == (0, 3):
            found.extend(outcomes(2, lambda one: run(one, tmp_path / "out", parts=parts, resume=True)))

    in_threads(2, lambda workers: run(workers, tmp_path / "out", parts=parts, fail=begin_another))
    assert "another run is writing" in str(found[0]) and all(isinstance(one, SeqbuildError) for one in found)
    assert joined(tmp_path / "out", 2) == expected


def test_directories_that_are_not_shared_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.streaming.output_place._VISIBLE_S", 0.2)
    found = outcomes(2, lambda workers: run(workers, tmp_path / str(workers.rank) / "out"))
    assert_all_fail(found, f"does not see the directory {tmp_path / '1'}", culprit=1)
    assert "pass --parts" in str(found[0])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_directory_that_appears_later_is_waited_for(
    tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, late = os.listdir, []

    def listdir(path: Any) -> list[str]:
        if str(path).endswith(".run.partial") and len(late) < 3:
            late.append(path)
            return []
        return real(path)

    monkeypatch.setattr("runtime.streaming.workplace.os.listdir", listdir)
    in_threads(2, lambda workers: run(workers, tmp_path / "out"))
    assert len(late) == 3 and directory_bytes(tmp_path / "out") == expected


def test_parts_are_resumed_by_as_many_workers(tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    stopped(out, 2, 3, parts=True)
    for size in (1, 3):
        for resume in (False, True):
            found = outcomes(size, lambda one, resume=resume: run(one, out, parts=True, resume=resume))
            assert "an interrupted run of 2 workers has left parts of" in str(found[0])
            assert "continue it with --resume and 2 workers" in str(found[0])
    assert in_threads(2, lambda workers: run(workers, out, parts=True, resume=True)) == [2, 2]
    assert joined(out, 2) == expected


def test_a_step_that_only_some_parts_have_is_repeated(tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    stopped(out, 2, 4, parts=True)
    path = tmp_path / ".out.part-1-of-2.run.partial" / "journal"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert in_threads(2, lambda workers: run(workers, out, parts=True, resume=True)) == [2, 2]
    assert joined(out, 2) == expected


def test_a_part_that_is_gone_begins_all_again(tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    stopped(out, 2, 4, parts=True)
    shutil.rmtree(tmp_path / ".out.part-1-of-2.run.partial")
    assert in_threads(2, lambda workers: run(workers, out, parts=True, resume=True)) == [0, 0]
    assert joined(out, 2) == expected


def test_parts_that_are_all_published_are_complete(tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    stopped(out, 3, STEPS + 1, parts=True)
    found = outcomes(3, lambda workers: run(workers, out, parts=True, resume=True))
    assert all("is already complete; nothing to resume" in str(error) for error in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"out.part-{rank}-of-3" for rank in range(3)]
    assert joined(out, 3) == expected


@pytest.mark.parametrize("parts", [False, True])
def test_a_shard_that_changed_since_the_interruption_ends_all_workers(tmp_path: Path, parts: bool) -> None:
    stopped(tmp_path / "out", 2, 4, parts=parts)
    for path in tmp_path.rglob(f"{'part' if parts else 'model'}-00001-of-*.safetensors"):
        if not parts or "part-1-of-2" in str(path):
            os.truncate(path, 10)
    found = outcomes(2, lambda workers: run(workers, tmp_path / "out", parts=parts, resume=True))
    assert all("has changed since the interrupted run" in str(error) for error in found)


def test_data_that_one_worker_cannot_flush_is_no_finished_step(
    tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = ShardWriter.sync, []

    def sync(self: ShardWriter) -> None:
        real(self)
        calls.append(self.workers.rank)
        if self.workers.rank and calls.count(1) == 3:
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(ShardWriter, "sync", sync)
    found = outcomes(2, lambda workers: run(workers, tmp_path / "out"))
    assert [type(error) for error in found] == [WorkerError, OutputError]
    assert "the disk is full (2 finished subgraphs are kept, continue with --resume)" in str(found[1])
    monkeypatch.undo()
    assert in_threads(3, lambda workers: run(workers, tmp_path / "out", resume=True)) == [2, 2, 2]
    assert directory_bytes(tmp_path / "out") == expected


def test_values_that_exceed_memory_are_each_workers_own(tmp_path: Path) -> None:
    root = tmp_path / ".out.run.partial"
    stopped(tmp_path / "out", 2, 4)
    (root / "values" / "rank-7").mkdir()
    (root / "values" / "rank-7" / "1.safetensors").touch()

    def look(workers: Workers, index: int) -> None:
        if index == STEPS - 1 and not workers.rank:
            folders = sorted(path.name for path in (root / "values").iterdir() if path.is_dir())
            assert folders == [f"rank-{rank}" for rank in range(3)]

    in_threads(3, lambda workers: run(workers, tmp_path / "out", resume=True, fail=look))
