"""AWQ: the paper's search with explicit outputs in float64, its properties, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms.awq import search_scales
from runtime.errors import QuantizationError

WIDTH, GROUP = 48, 16
SCHEME = QuantizationArgs(num_bits=3, type="int", symmetric=True, strategy="group", group_size=GROUP)


def problem() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Inputs of which a few channels are far larger, and two weights that read them; float64."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, WIDTH, generator=generator, dtype=torch.float64)
    inputs[:, ::7] *= 20
    return inputs, [torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64) for rows in (10, 6)]


def nearest(weight: torch.Tensor) -> torch.Tensor:
    """Round to nearest in groups, in float64 with scales rounded to float32."""
    groups = weight.reshape(len(weight), -1, GROUP)
    scale = (groups.abs().amax(-1, keepdim=True) / 3.5).float().double()
    return ((groups / scale).clamp(-4, 3).round() * scale).reshape(weight.shape)


def candidates(inputs: torch.Tensor, weights: list[torch.Tensor], n_grid: int, duo: bool) -> list[torch.Tensor]:
    sizes = torch.cat([w.reshape(len(w), -1, GROUP).abs() for w in weights])
    relative = (sizes / sizes.amax(-1, keepdim=True)).reshape(-1, WIDTH).mean(0)
    found = []
    for step in range(n_grid + 1):
        scale = inputs.abs().mean(0) ** (step / n_grid)
        if duo:
            scale = scale / (relative ** (1 - step / n_grid) + 1e-4)
        found.append(scale / (scale.max() * scale.min()).sqrt())
    return found


@pytest.mark.parametrize("duo", [True, False])
def test_equals_the_search_over_outputs_in_float64(duo: bool) -> None:
    inputs, weights = problem()
    losses = [
        sum(float((inputs @ (nearest(w * s) / s - w).T).square().sum()) for w in weights)
        for s in candidates(inputs, weights, 20, duo)
    ]
    best = min(range(21), key=losses.__getitem__)
    got = search_scales(
        weights,
        inputs.T @ inputs,
        inputs.abs().mean(0),
        [SCHEME, SCHEME],
        scale_dtype=torch.float32,
        duo_scaling=duo,
    )
    assert got.ratio == best / 20
    assert got.loss == pytest.approx(losses[best], rel=1e-4)
    torch.testing.assert_close(got.scale_I.double(), candidates(inputs, weights, 20, duo)[best], rtol=1e-4, atol=0)


def test_never_loses_more_than_without_and_less_with_outliers() -> None:
    inputs, weights = problem()
    got = search_scales(
        weights, inputs.T @ inputs, inputs.abs().mean(0), [SCHEME] * 2, scale_dtype=torch.bfloat16, duo_scaling="both"
    )
    assert got.loss < 0.85 * got.loss_before
    even = torch.ones(WIDTH, dtype=torch.float64)
    plain = search_scales(weights, torch.eye(WIDTH).double(), even, [SCHEME] * 2, scale_dtype=torch.bfloat16)
    assert plain.loss <= plain.loss_before


def test_features_of_one_channel_get_one_factor() -> None:
    inputs, weights = problem()
    channel = torch.arange(WIDTH) // 16 * 8 + torch.arange(WIDTH) % 8
    got = search_scales(
        weights, inputs.T @ inputs, inputs.abs().mean(0), [SCHEME] * 2, scale_dtype=torch.bfloat16, channel_I=channel
    )
    assert torch.equal(got.scale_I[:8], got.scale_I[8:16])
    assert len(got.scale_I.unique()) <= 24


def test_a_sample_of_rows_chooses_as_all_of_them() -> None:
    inputs, _ = problem()
    weight = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    given = (inputs.T @ inputs, inputs.abs().mean(0), [SCHEME])
    some, most = (
        search_scales([weight], *given, scale_dtype=torch.bfloat16, num_rows=rows).ratio for rows in (100, 400)
    )
    assert abs(some - most) <= 0.1


def test_is_deterministic_and_leaves_its_inputs_alone() -> None:
    inputs, weights = problem()
    before = [weight.clone() for weight in weights]
    runs = [
        search_scales(weights, inputs.T @ inputs, inputs.abs().mean(0), [SCHEME] * 2, scale_dtype=torch.bfloat16)
        for _ in range(2)
    ]
    assert torch.equal(runs[0].scale_I, runs[1].scale_I)
    assert all(torch.equal(weight, copy) for weight, copy in zip(weights, before, strict=True))


def test_refuses() -> None:
    inputs, weights = problem()
    gram, mean = inputs.T @ inputs, inputs.abs().mean(0)
    with pytest.raises(QuantizationError, match="but the weights that read them do not"):
        search_scales(weights, gram[:5, :5], mean, [SCHEME] * 2, scale_dtype=torch.float32)
    with pytest.raises(QuantizationError, match="not finite"):
        search_scales(weights, gram * torch.nan, mean, [SCHEME] * 2, scale_dtype=torch.float32)
    with pytest.raises(QuantizationError, match="at least 1"):
        search_scales(weights, gram, mean, [SCHEME] * 2, scale_dtype=torch.float32, n_grid=0)
