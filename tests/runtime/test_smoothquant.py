"""SmoothQuant: the paper's equation 4 in float64, its property, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from runtime.algorithms.smoothquant import smoothing_factors
from runtime.errors import QuantizationError


def problem() -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    inputs[:, 4] *= 40
    return inputs, [torch.randn(rows, 12, generator=generator, dtype=torch.float64) for rows in (5, 3)]


@pytest.mark.parametrize("strength", [0.0, 0.25, 0.5, 0.8, 1.0])
def test_equals_equation_4(strength: float) -> None:
    inputs, weights = problem()
    got = smoothing_factors(inputs.abs().amax(0), weights, strength=strength)
    for channel in range(12):
        largest_input = max(abs(value) for value in inputs[:, channel].tolist())
        largest_weight = max(abs(value) for weight in weights for value in weight[:, channel].tolist())
        expected = largest_input**strength / largest_weight ** (1 - strength)
        assert float(got[channel]) == pytest.approx(expected, rel=1e-5)


def test_halfway_both_are_equally_hard_to_round() -> None:
    inputs, weights = problem()
    factors = smoothing_factors(inputs.abs().amax(0), weights, strength=0.5).double()
    smoothed = (inputs / factors).abs().amax(0)
    scaled = torch.cat([weight * factors for weight in weights]).abs().amax(0)
    torch.testing.assert_close(smoothed, scaled, rtol=1e-5, atol=0)
    assert float(smoothed.max() / smoothed.min()) < float(inputs.abs().amax(0).max() / inputs.abs().amax(0).min())


def test_features_of_one_channel_get_one_factor() -> None:
    inputs, weights = problem()
    channel = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5])
    got = smoothing_factors(inputs.abs().amax(0), weights, strength=0.5, channel_I=channel)
    assert torch.equal(got[:3], got[3:6])
    assert torch.equal(got[6:9], got[9:12])
    both = inputs.abs().amax(0)[[1, 4]].max()
    most = max(float(weight[:, [1, 4]].abs().max()) for weight in weights)
    assert float(got[1]) == pytest.approx(float(both / most) ** 0.5, rel=1e-5)


def test_a_channel_that_is_always_zero_gets_a_finite_factor() -> None:
    inputs, weights = problem()
    inputs[:, 2] = 0
    weights[0][:, 3] = weights[1][:, 3] = 0
    got = smoothing_factors(inputs.abs().amax(0), weights)
    assert bool(torch.isfinite(got).all()) and bool((got > 0).all())


def test_is_deterministic() -> None:
    inputs, weights = problem()
    one, two = (smoothing_factors(inputs.abs().amax(0), weights) for _ in range(2))
    assert torch.equal(one, two)


def test_refuses() -> None:
    inputs, weights = problem()
    with pytest.raises(QuantizationError, match="between 0 and 1, not 2"):
        smoothing_factors(inputs.abs().amax(0), weights, strength=2)
    with pytest.raises(QuantizationError, match="but the weights that read them do not"):
        smoothing_factors(torch.ones(5), weights)
    with pytest.raises(QuantizationError, match="not finite"):
        smoothing_factors(torch.full((12,), torch.inf), weights)
