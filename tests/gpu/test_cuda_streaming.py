"""Values on device, pinned host memory and disk, weights on a side stream, and Hessians of narrow inputs, on CUDA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from runtime.algorithms.hessian import HessianAccumulator
from runtime.chain import LoadedSubgraph
from runtime.streaming.activations import DEVICE, DISK, HOST, Activations, Budget
from tests.gpu.demo_runs import demo_options
from tests.runtime.small import directory_bytes

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return demo_options(tmp_path_factory.mktemp("artifacts"), num_samples=32)


@pytest.mark.parametrize("width", [1100, 4501])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_hessian_of_narrow_inputs_is_that_of_float64(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    inputs_TI = torch.randn(4097, width, device="cuda").to(dtype)
    accumulator = HessianAccumulator(width, device="cuda")
    for part in inputs_TI.chunk(3):
        accumulator.add(part)
        accumulator.end_lane()
    expected_II = inputs_TI.double().T @ inputs_TI.double()
    got_II = accumulator.hessian_II.double()
    assert torch.equal(got_II, got_II.T)
    error = (got_II - expected_II).abs().max() / expected_II.diagonal().max()
    assert error < 1e-5  # rounding inputs or sums to bf16 would cost 4e-3


@pytest.mark.parametrize(
    "budget",
    [
        Budget(device_bytes=None),
        Budget(device_bytes=0),
        Budget(device_bytes=0, host_bytes=0),
        Budget(device_bytes=300_000, host_bytes=300_000),
    ],
)
def test_values_come_back_wherever_they_are(tmp_path: Path, budget: Budget) -> None:
    device = torch.device("cuda")
    activations = Activations([{} for _ in range(6)], device, budget, tmp_path, lasting={"mask"})
    torch.manual_seed(0)
    hidden = torch.randn(6, 4, 64, 128, device=device)
    for batch in range(6):
        mask = torch.ones(4, 1, 64, 64, device=device, dtype=torch.bool).tril()
        activations.store(batch, {"hidden": hidden[batch] * 1, "mask": mask})
    tiers = [tier for tier in (DEVICE, HOST, DISK) if activations.used_bytes[tier]]
    assert sum(activations.used_bytes.values()) == 6 * 4 * 64 * 128 * 4 + 4 * 64 * 64
    assert len(tiers) == (3 if budget.host_bytes == 300_000 else 1)
    for _ in range(3):
        for batch, values in activations.stream(["hidden", "mask"]):
            assert values["hidden"].is_cuda
            busy = values["hidden"] @ values["hidden"].transpose(-1, -2)  # work for the stream to be late with
            assert torch.equal(values["hidden"], hidden[batch])
            activations.store(batch, {"hidden": values["hidden"] + 0 * busy.mean()})
    activations.close()


def test_where_values_are_changes_no_byte(options: dict[str, Any], tmp_path: Path) -> None:
    for name, budget in {
        "device": Budget(device_bytes=None),
        "host": Budget(device_bytes=0),
        "disk": Budget(device_bytes=0, host_bytes=0),
        "all": Budget(device_bytes=10**6, host_bytes=10**6),
    }.items():
        runtime.calibrate(**options, out=tmp_path / name, activation_memory=budget)
    expected = directory_bytes(tmp_path / "device")
    for name in ("host", "disk", "all"):
        assert directory_bytes(tmp_path / name) == expected, name


@pytest.mark.parametrize("every", [0, 1])
def test_a_resumed_run_has_the_same_bytes(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    runtime.calibrate(**options, out=tmp_path / "expected", checkpoint_activations=every)
    real, calls = LoadedSubgraph.forward, [0]

    def forward(self: LoadedSubgraph, model: Any, **inputs: Any) -> dict[str, Any]:
        calls[0] += 1
        if calls[0] == 19:
            raise KeyboardInterrupt
        return real(self, model, **inputs)

    with monkeypatch.context() as patch:
        patch.setattr(LoadedSubgraph, "forward", forward)
        with pytest.raises(KeyboardInterrupt):
            runtime.calibrate(**options, out=tmp_path / "out", checkpoint_activations=every)
    result = runtime.calibrate(**options, out=tmp_path / "out", checkpoint_activations=every, resume=True)
    assert result.resumed_at == 2
    assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "expected")


def test_when_the_device_is_full_values_leave_it_and_batches_are_halved(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory really runs out: the layer asks for more than the device has as long as batches are large."""
    real = LoadedSubgraph.forward

    def forward(self: LoadedSubgraph, model: Any, **inputs: Any) -> dict[str, Any]:
        samples = next(value for value in inputs.values() if isinstance(value, torch.Tensor)).shape[0]
        if samples > 4:
            torch.empty(10**14, dtype=torch.uint8, device="cuda")
        return real(self, model, **inputs)

    monkeypatch.setattr(LoadedSubgraph, "forward", forward)
    result = runtime.calibrate(**options, out=tmp_path / "out", activation_memory=Budget(device_bytes=None))
    assert any("from here on 4 samples at a time" in remark for remark in result.remarks)
    assert len(result.modules) == 28
