"""Copies to and from a device that overlap with the computation, on a simulated device whose copies are late."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import runtime.streaming.activations
import runtime.weights.stream
from runtime.checkpoint.write_queue import WriteQueue
from runtime.errors import WeightsError
from runtime.host.streams import SideStream
from runtime.host.transfers import Download, Uploads
from runtime.streaming.activations import HOST, Activations, Budget
from runtime.streaming.committer import Committer
from runtime.streaming.saved_values import load_boundary, save_boundary
from runtime.weights.stream import WeightStream
from tests.runtime.late_device import LateStream
from tests.runtime.small import NARROW_W4, Small, calibrate, directory_bytes, recipe

CPU = torch.device("cpu")
GPTQ = recipe(NARROW_W4, modifier="GPTQModifier")


def tensors() -> list[torch.Tensor]:
    """Of many dtypes, sizes and strides: larger than the ring, empty, transposed, a single number."""
    torch.manual_seed(0)
    return [
        torch.randn(37, 11),
        torch.randn(64, 64).bfloat16(),
        torch.arange(1000).to(torch.int32),
        torch.rand(9, 3) > 0.5,
        torch.empty(0, 4),
        torch.tensor(2.5),
        torch.randn(12, 7).t(),
        torch.randn(40).to(torch.float8_e4m3fn),
    ]


@pytest.mark.parametrize("chunk_bytes", [64, 1000, 2**20])
def test_uploads_arrive_through_a_ring_of_two_buffers(chunk_bytes: int) -> None:
    side = LateStream()
    uploads = Uploads(side, chunk_bytes)
    with side.active():
        copied = [uploads.copy(tensor) for tensor in tensors()]
        mark = side.mark()
    side.wait_for(mark)
    for got, expected in zip(copied, tensors(), strict=True):
        assert (got.dtype, got.shape, got.stride()) == (expected.dtype, expected.shape, expected.stride())
        assert torch.equal(got.view(torch.uint8) if got.dtype.itemsize == 1 else got, bits(expected))
    assert side.pinned.count(chunk_bytes) == 2, "the ring does not grow"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def test_the_simulated_device_catches_a_missing_wait() -> None:
    side = LateStream()
    with side.active():
        copied = Uploads(side, 64).copy(torch.arange(100))
        assert not torch.equal(copied, torch.arange(100))

    class Hasty(Uploads):
        def _free_buffer(self, number: int) -> torch.Tensor:
            self._marks = [None] * len(self._marks)
            return super()._free_buffer(number)

    with side.active():
        copied = Hasty(side, 64).copy(torch.arange(100))
        side.wait_for(side.mark())
    assert not torch.equal(copied, torch.arange(100)), "buffers were overwritten before they were copied"


def test_a_download_is_complete_after_its_event_and_does_not_follow_later_writes() -> None:
    side, tensor = LateStream(), torch.arange(50)
    download = Download(side, tensor)
    tensor.zero_()  # later work of the same stream
    assert not torch.equal(download._host, torch.arange(50))
    assert torch.equal(download.wait(), torch.arange(50))


def test_without_a_gpu_nothing_is_copied() -> None:
    tensor = torch.randn(5)
    assert Uploads(SideStream(CPU)).copy(tensor) is tensor
    assert not WriteQueue().takes(tensor)


class LateQueue(WriteQueue):
    """A queue that treats all tensors as those of the simulated device."""

    sides: ClassVar[list[LateStream]] = []

    def takes(self, tensor: torch.Tensor) -> bool:
        return True

    def _side_of(self, tensor: torch.Tensor) -> SideStream:
        self.sides.append(LateStream())
        return self.sides[-1]


def test_tensors_are_written_in_order_and_their_bytes_are_bounded() -> None:
    queue, written, threads = LateQueue(most_bytes=1000), [], set()

    def write(host: torch.Tensor) -> None:
        threads.add(threading.current_thread().name)
        written.append(host.clone())

    for number in range(20):
        values = torch.full((50,), number)  # 400 bytes
        queue.put(values, write)
        values.zero_()  # the device goes on
        assert sum(size for size, _ in queue._waiting) <= 1000
    queue.put(torch.full((500,), 20), write)
    assert len(queue._waiting) == 1, "what is larger than the bound goes alone"
    queue.wait()
    assert [int(values[0]) for values in written] == list(range(21))
    assert all((values == values[0]).all() for values in written)
    assert threads == {"write_0"}
    queue.close()


def test_an_error_of_the_thread_is_raised_by_every_later_call() -> None:
    """The thread that commits a step must not miss it because another one has got it."""
    queue = LateQueue(most_bytes=100)

    def fail(host: torch.Tensor) -> None:
        raise OSError(28, "No space left on device", "out")

    queue.put(torch.zeros(20), fail)
    with pytest.raises(OSError, match="No space left"):
        queue.put(torch.zeros(20), fail)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            queue.wait()
    with pytest.raises(OSError, match="No space left"):
        queue.put(torch.zeros(1), lambda host: None)
    queue.close()


def test_closing_forgets_what_was_not_written() -> None:
    queue, begun, go_on, written = LateQueue(), threading.Event(), threading.Event(), []

    def slow(host: torch.Tensor) -> None:
        begun.set()
        go_on.wait(10)
        written.append(1)

    queue.put(torch.zeros(1), slow)
    queue.put(torch.zeros(1), lambda host: written.append(2))
    begun.wait(10)
    threading.Timer(0.05, go_on.set).start()
    queue.close()
    assert written == [1]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[LateStream]]:
    """Runs copy everything as for a GPU, on the simulated device."""
    LateQueue.sides = made = []

    def side(device: torch.device) -> LateStream:
        made.append(LateStream())
        return made[-1]

    monkeypatch.setattr(runtime.weights.stream, "SideStream", side)
    monkeypatch.setattr(runtime.streaming.activations, "SideStream", side)
    monkeypatch.setattr("runtime.checkpoint.writer.WriteQueue", LateQueue)
    monkeypatch.setattr(WeightStream, "_is_ahead", property(lambda self: True, lambda self, value: None), raising=False)
    yield made


def test_a_run_on_a_late_device_has_the_same_bytes(
    narrow_llama: Small, late: list[LateStream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a step is recorded only after its tensors are written."""
    with monkeypatch.context() as patch:
        patch.setattr("runtime.checkpoint.writer.WriteQueue", WriteQueue)
        patch.setattr(runtime.weights.stream, "SideStream", SideStream)
        patch.setattr(runtime.streaming.activations, "SideStream", SideStream)
        calibrate(narrow_llama, GPTQ, tmp_path / "plain")
    record, put, recorded = Committer._record_step, LateQueue.put, []

    def slowly(self: LateQueue, tensor: torch.Tensor, write: Callable[[torch.Tensor], object]) -> None:
        put(self, tensor, lambda host: (time.sleep(0.01), write(host)))

    def checked(self: Committer, facts: dict[str, Any]) -> None:
        recorded.extend(module["name"] for module in facts["modules"])
        assert all(self.writer.is_written(f"{name}.weight_packed") for name in recorded)
        record(self, facts)

    monkeypatch.setattr(LateQueue, "put", slowly)
    monkeypatch.setattr(Committer, "_record_step", checked)
    calibrate(narrow_llama, GPTQ, tmp_path / "late", checkpoint_activations=1)
    assert directory_bytes(tmp_path / "late") == directory_bytes(tmp_path / "plain")
    assert len(recorded) == 21
    assert any(side.pinned for side in late)


def test_values_in_host_memory_are_saved_after_they_have_arrived(late: list[LateStream], tmp_path: Path) -> None:
    activations = Activations([{}, {}], CPU, Budget(device_bytes=0))
    for batch in range(2):
        activations.store(batch, {"hidden": torch.full((4,), batch + 1.0)})
    assert activations.used_bytes[HOST] == 32
    save_boundary(activations, tmp_path, 0, [(0, 0), (0, 1)])
    other = Activations([{}, {}], CPU)
    load_boundary(other, tmp_path, 0, [(0, 0), (0, 1)])
    for batch in range(2):
        assert other.fetch(batch, ["hidden"])["hidden"].tolist() == [batch + 1.0] * 4
        assert activations.fetch(batch, ["hidden"])["hidden"].tolist() == [batch + 1.0] * 4


def test_an_error_of_the_reading_thread_is_one_clear_error(
    narrow_llama: Small, late: list[LateStream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Uploads.copy
    counts = [0]

    def copy(self: Uploads, tensor: torch.Tensor) -> torch.Tensor:
        counts[0] += 1
        if counts[0] == 15:
            raise WeightsError("model.safetensors was changed while it was read", is_resumable=True)
        return real(self, tensor)

    monkeypatch.setattr(Uploads, "copy", copy)
    with pytest.raises(WeightsError, match="was changed while it was read"):
        calibrate(narrow_llama, GPTQ, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("write", "weights", "commit"))]
