"""Observers: against searches written out in float64, to the bit, by their properties, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms.gptq import quantize_siblings
from runtime.algorithms.observers import fitted_grid
from runtime.algorithms.refine import refine
from runtime.algorithms.rtn import quantize_rtn
from runtime.errors import QuantizationError, RecipeError
from runtime.formats.compressed import compress_module, decompress_module
from runtime.formats.presets import checked, scheme_from_preset

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


def signed_search(values: list[float], num_bits: int, norm: float) -> float:
    """The least error of one group over the ranges of `signed_mse`, one number after the other, in float64."""
    most, least = 2 ** (num_bits - 1), float("inf")
    outermost = max(values, key=abs)
    for step in range(17):
        scale = float(torch.tensor(-outermost * (1.1 - 0.05 * step) / most).float())
        integers = [min(max(round(value / scale), -most), most - 1) for value in values]
        pairs = zip(integers, values, strict=True)
        least = min(least, sum(abs(integer * scale - value) ** norm for integer, value in pairs))
    return least


@pytest.mark.parametrize(("num_bits", "norm"), [(2, 4), (3, 3), (4, 3), (8, 3)])
def test_signed_scales_equal_a_search_in_float64(num_bits: int, norm: int) -> None:
    weight = random_weight()
    got = quantize_rtn(weight, args(num_bits, observer="signed_mse"), scale_dtype=torch.float32)
    errors = (got.weight_OI.double() - weight).abs() ** norm
    for row in range(6):
        for left in range(0, 64, GROUP):
            part = slice(left, left + GROUP)
            expected = signed_search(weight[row, part].tolist(), num_bits, norm)
            assert float(errors[row, part].sum()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_a_weight_and_its_negative_have_opposite_signed_scales(num_bits: int) -> None:
    weight, scheme = random_weight().float(), args(num_bits, observer="signed_mse")
    one, other = (quantize_rtn(values, scheme, scale_dtype=torch.bfloat16) for values in (weight, -weight))
    assert torch.equal(one.scale, -other.scale)
    assert torch.equal(one.weight_OI, -other.weight_OI)
    again = quantize_rtn(weight, scheme, scale_dtype=torch.bfloat16)
    assert torch.equal(one.weight_OI, again.weight_OI)
    integers = one.weight_OI.view(6, -1, GROUP) / one.scale.float()[..., None]
    assert float(integers.min()) == -(2 ** (num_bits - 1))
    assert float(integers.max()) <= 2 ** (num_bits - 1) - 1


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_signed_scales_lose_less_than_ranges_of_both_signs(num_bits: int) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    losses = [
        quantize_rtn(weight, args(num_bits, observer=name, norm=2), scale_dtype=torch.bfloat16).loss
        for name in ("signed_mse", "mse")
    ]
    assert losses[0] < 0.97 * losses[1]


def test_signed_scales_of_zeros_and_of_tiny_numbers_can_be_stored() -> None:
    for value in (0.0, 1e-30, -1e-7):
        weight = torch.full((2, 32), value)
        got = quantize_rtn(weight, args(observer="signed_mse"), scale_dtype=torch.float16)
        assert bool((got.scale != 0).all())
        assert float((got.weight_OI - weight).abs().max()) <= 6e-8
    with pytest.raises(QuantizationError, match="overflows float16"):
        quantize_rtn(torch.full((1, 32), 1e6), args(observer="signed_mse"), scale_dtype=torch.float16)


def nvfp4(observer: str, **options: Any) -> QuantizationArgs:
    scheme = scheme_from_preset("NVFP4A16", ["Linear"]).weights
    return scheme.model_copy(update={"observer": observer, "observer_kwargs": options})


POINTS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def test_four_over_six_equals_the_paper_in_float64() -> None:
    """Table 3 and algorithm 1: scale to 6 and to 4, and keep the one with the smaller mean squared error."""
    weight = random_weight()
    got = quantize_rtn(weight, nvfp4("fouroversix"), scale_dtype=torch.bfloat16)
    assert got.global_scale is not None
    tensor_scale = float(got.global_scale)
    for row in range(6):
        for left in range(0, 64, GROUP):
            values = weight[row, left : left + GROUP].tolist()
            errors = []
            for outermost in (6, 4):
                wanted = torch.tensor(max(map(abs, values)) / outermost * tensor_scale)
                scale = float(wanted.clamp(max=448).to(torch.float8_e4m3fn)) / tensor_scale
                sizes = [min((abs(abs(value) / scale - point), point * scale) for point in POINTS) for value in values]
                errors.append(sum((size - abs(value)) ** 2 for (_, size), value in zip(sizes, values, strict=True)))
            own = (got.weight_OI[row, left : left + GROUP].double() - weight[row, left : left + GROUP]).square().sum()
            assert float(own) == pytest.approx(min(errors), rel=1e-3)


def test_four_over_six_loses_less_than_six_and_more_than_the_expanded_search() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    names = ("nvfp4_expanded_mse", "fouroversix", "minmax")
    expanded, adaptive, plain = (quantize_rtn(weight, nvfp4(name), scale_dtype=torch.bfloat16).loss for name in names)
    assert expanded < adaptive < 0.95 * plain
    again = quantize_rtn(weight, nvfp4("fouroversix"), scale_dtype=torch.bfloat16)
    assert again.loss == adaptive


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"observer": "signed_mse", "symmetric": False}, "signed_mse requires symmetric int weights"),
        ({"observer": "fouroversix"}, "fouroversix requires NVFP4 weights"),
        ({"observer": "signed_mse", "observer_kwargs": {"sign": 1}}, "'sign' is not supported"),
    ],
)
def test_observers_reject_other_schemes(changes: dict[str, Any], problem: str) -> None:
    scheme = scheme_from_preset("W4A16", ["Linear"])
    weights = scheme.weights.model_copy(update=changes)
    with pytest.raises(RecipeError, match=problem):
        checked(scheme.model_copy(update={"weights": weights}))


def test_signed_scales_are_rejected_beside_rounded_inputs() -> None:
    scheme = scheme_from_preset("W4A8", ["Linear"])
    weights = scheme.weights.model_copy(update={"observer": "signed_mse"})
    with pytest.raises(RecipeError, match="signed_mse cannot be combined with input_activations"):
        checked(scheme.model_copy(update={"weights": weights}))


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_gptq_solves_on_signed_scales_and_packs_them(num_bits: int) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(48, 128, generator=generator)
    inputs = torch.randn(512, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    losses = {}
    for name in ("minmax", "signed_mse"):
        scheme = scheme_from_preset(f"W{num_bits}A16", ["Linear"])
        scheme.weights.observer = name
        (got,) = quantize_siblings([weight], inputs.T @ inputs, scheme.weights, scale_dtype=torch.bfloat16)
        losses[name] = got.loss
        unpacked = decompress_module(compress_module("m", got, scheme), scheme)
        assert torch.equal(unpacked.float(), got.weight_OI.to(unpacked.dtype).float())
        refined = refine(weight, got, inputs.T @ inputs, scheme.weights, sweeps=1)
        assert refined.loss <= got.loss
        assert torch.equal(refined.scale.sign(), got.scale.sign())
    assert bool((got.scale < 0).any())
    assert bool((got.scale > 0).any())
    assert losses["signed_mse"] < 0.95 * losses["minmax"]
