"""Observers: against searches written out in float64, to the bit, by their properties, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms.observers import fitted_grid
from runtime.algorithms.rtn import quantize_rtn
from runtime.errors import QuantizationError

GROUP = 16


def args(num_bits: int = 4, *, symmetric: bool = True, observer: str = "mse", **options: Any) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=num_bits,
        type="int",
        symmetric=symmetric,
        strategy="group",
        group_size=GROUP,
        observer=observer,
        observer_kwargs=options,
    )


def random_weight(rows: int = 6, columns: int = 64) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[0, 3] = 9.0  # an outlier that a wide grid would be spent on
    return weight


def searched(
    values: list[float], importance: list[float], num_bits: int, symmetric: bool, steps: int, grid: float, norm: float
) -> float:
    """The least error of one group over all ranges, one number after the other."""
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    least = float("inf")
    for step in range(steps + 1):
        factor = 1 - step / grid
        smallest, largest = min(factor * min(values), 0.0), max(factor * max(values), 0.0)
        scale = max(-smallest, largest) / ((high - low) / 2) if symmetric else (largest - smallest) / (high - low)
        scale = float(torch.tensor(scale).float())
        zero = 0 if symmetric else min(max(round(low - smallest / ((largest - smallest) / (high - low))), low), high)
        error = 0.0
        for value, weight in zip(values, importance, strict=True):
            integer = round(min(max(value / scale + zero, low), high))
            error += weight * abs((integer - zero) * scale - value) ** norm
        least = min(least, error)
    return least


@pytest.mark.parametrize("observer", ["mse", "imatrix_mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_equals_a_search_in_float64(num_bits: int, symmetric: bool, observer: str) -> None:
    weight = random_weight()
    importance = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    scheme = args(num_bits, symmetric=symmetric, observer=observer, maxshrink=0.5, grid=20, norm=2.0, patience=100)
    got = quantize_rtn(weight, scheme, scale_dtype=torch.float32, importance_I=importance)
    counted = importance if observer == "imatrix_mse" else torch.ones(64, dtype=torch.float64)
    errors = (got.weight_OI.double() - weight).square() * counted
    for row in range(6):
        for left in range(0, 64, GROUP):
            part = slice(left, left + GROUP)
            expected = searched(weight[row, part].tolist(), counted[part].tolist(), num_bits, symmetric, 10, 20.0, 2.0)
            assert float(errors[row, part].sum()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_loses_no_more_than_min_max_and_less_with_outliers(num_bits: int) -> None:
    weight = random_weight()
    searched_loss, plain_loss = (
        quantize_rtn(
            weight,
            args(num_bits, observer=name, norm=2.0) if name == "mse" else args(num_bits, observer=name),
            scale_dtype=torch.bfloat16,
        ).loss
        for name in ("mse", "minmax")
    )
    assert searched_loss < 0.97 * plain_loss


def test_percentiles_by_hand() -> None:
    weight = torch.arange(16.0).reshape(1, 16) - 5
    found = fitted_grid(
        weight, args(8, symmetric=False, observer="percentile", percentile=80), scale_dtype=torch.float32
    )
    # The 80th percentile of 0..15 is 12, the 20th is 3: from -2 to 7.
    assert float(found.scale_RC) == pytest.approx(9 / 255)
    assert int(found.zero_point_RC) == round(-128 + 2 / (9 / 255))  # type: ignore[arg-type]


def test_is_deterministic_and_leaves_the_weight_alone() -> None:
    weight = random_weight().float()
    before = weight.clone()
    runs = [quantize_rtn(weight, args(3), scale_dtype=torch.bfloat16) for _ in range(2)]
    assert torch.equal(runs[0].weight_OI, runs[1].weight_OI)
    assert torch.equal(weight, before)


def test_rows_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight()
    whole = quantize_rtn(weight, args(3), scale_dtype=torch.bfloat16)
    monkeypatch.setattr("runtime.algorithms.grid.NUMBERS_IN_CACHE", 128)
    parts = quantize_rtn(weight, args(3), scale_dtype=torch.bfloat16)
    assert torch.equal(whole.weight_OI, parts.weight_OI)


def test_nothing_but_zeros() -> None:
    got = quantize_rtn(torch.zeros(2, 32), args(4, symmetric=False), scale_dtype=torch.float32)
    assert got.weight_OI.tolist() == torch.zeros(2, 32).tolist()


def test_importance_must_be_there() -> None:
    with pytest.raises(QuantizationError, match="imatrix_mse weighs errors by the inputs"):
        quantize_rtn(random_weight(), args(observer="imatrix_mse"), scale_dtype=torch.float32)
