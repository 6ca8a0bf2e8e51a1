"""The same artifact on CUDA: nothing of the trace's device is left in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import runtime
from tests.gpu.demo_runs import DEMO, RECIPE, demo_artifact, demo_batches

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> runtime.Artifact:
    return demo_artifact(tmp_path_factory.mktemp("artifacts"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perplexity_agrees_with_cpu(artifact: runtime.Artifact, dtype: torch.dtype) -> None:
    batches = demo_batches(artifact, "eval", num_samples=32)
    results = [
        runtime.evaluate(artifact, weights=DEMO / "model", batches=batches, device=device, dtype=dtype).perplexity
        for device in ("cpu", "cuda")
    ]
    assert results[1] == pytest.approx(results[0], rel=1e-4 if dtype is torch.float32 else 5e-3)


def test_gptq_on_cuda_is_as_good_as_on_cpu(artifact: runtime.Artifact, tmp_path: Path) -> None:
    calibration = demo_batches(artifact, "calib", num_samples=64)
    held_out = demo_batches(artifact, "eval", num_samples=64)
    recipe = runtime.Recipe.from_text(RECIPE, "test")
    perplexities = {}
    for device in ("cpu", "cuda"):
        result = runtime.calibrate(
            artifact,
            weights=DEMO / "model",
            recipe=recipe,
            batches=calibration,
            out=tmp_path / device,
            device=device,
        )
        assert all(tensor.device.type != "cuda" for batch in calibration for tensor in batch.values())
        quality = runtime.evaluate(artifact, weights=result.path, batches=held_out, device=device)
        perplexities[device] = quality.perplexity
    assert perplexities["cuda"] == pytest.approx(perplexities["cpu"], rel=5e-3)


def test_memory_of_one_layer_at_a_time(artifact: runtime.Artifact) -> None:
    """Peak device memory stays well below the whole model's weights plus one batch's logits."""
    batches = demo_batches(artifact, "eval", num_samples=1)
    largest = max(
        sum(artifact.manifest.parameters[name].bytes for name in subgraph.entry.parameters)
        for subgraph in artifact.subgraphs
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runtime.evaluate(artifact, weights=DEMO / "model", batches=batches, device="cuda")
    logits_bytes = 256 * 2048 * 4
    assert torch.cuda.max_memory_allocated() - before < 2 * largest + 8 * logits_bytes
    assert torch.cuda.memory_allocated() - before < largest
