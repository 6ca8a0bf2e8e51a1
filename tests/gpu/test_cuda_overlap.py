"""What runs beside the computation on CUDA: uploads through a ring, writes in a thread; and replayed graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from runtime.algorithms import exact_products
from runtime.checkpoint.write_queue import WriteQueue
from runtime.host.streams import SideStream
from runtime.host.transfers import Download, Uploads
from runtime.streaming.graph_replay import GraphReplay
from tests.gpu.demo_runs import demo_options
from tests.runtime.small import directory_bytes

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return demo_options(tmp_path_factory.mktemp("artifacts"), num_samples=64, seq_len=128, batch_size=4)


@pytest.mark.parametrize("dtype", exact_products.HALVES)
def test_products_of_16_bit_numbers_are_added_exactly_without_a_conversion(dtype: torch.dtype) -> None:
    assert exact_products._way(dtype, "cuda:0") is not exact_products._converted


@pytest.mark.parametrize("chunk_bytes", [4096, 2**20])
def test_uploads_arrive_while_the_device_computes(chunk_bytes: int) -> None:
    device = torch.device("cuda")
    side = SideStream(device)
    uploads = Uploads(side, chunk_bytes)
    tensors = [torch.randn(777, 513), torch.randn(64, 32).t(), torch.arange(10**6), torch.empty(0), torch.tensor(1.5)]
    busy = torch.randn(4096, 4096, device=device)
    for _ in range(5):
        busy = (busy @ busy).clamp(-1, 1)
    with side.active():
        copied = [uploads.copy(tensor) for tensor in tensors]
        mark = side.mark()
    side.wait_for(mark)
    for got, expected in zip(copied, tensors, strict=True):
        assert got.is_cuda and got.stride() == expected.stride()
        assert torch.equal(got.cpu(), expected)


def test_a_download_has_what_the_tensor_was_when_it_was_queued() -> None:
    side = SideStream(torch.device("cuda"))
    tensor = torch.arange(10**7, device="cuda")
    download = Download(side, tensor)
    tensor.zero_()
    assert torch.equal(download.wait(), torch.arange(10**7))


def test_graphs_and_writes_in_a_thread_change_no_byte(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replays: list[int] = []
    tell = GraphReplay.of

    def of(self: GraphReplay, label: str, forward: Any) -> Any:
        replays.append(self.num_replays)
        return tell(self, label, forward)

    monkeypatch.setattr(GraphReplay, "of", of)
    runtime.calibrate(**options, out=tmp_path / "thread")
    done = runtime.calibrate(**options, out=tmp_path / "graphs", cuda_graphs=True)
    assert not [remark for remark in done.remarks if "CUDA graphs" in remark]
    assert replays[-1] > 0
    monkeypatch.setattr(WriteQueue, "takes", lambda self, tensor: False)
    runtime.calibrate(**options, out=tmp_path / "plain")
    expected = directory_bytes(tmp_path / "plain")
    assert directory_bytes(tmp_path / "thread") == expected
    assert directory_bytes(tmp_path / "graphs") == expected
