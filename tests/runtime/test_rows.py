"""Weights that are rounded and packed by rows: the same bytes as whole, in less memory, and as the compressors pack."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme
from torch.utils._pytree import tree_leaves

from runtime.algorithms import grid
from runtime.algorithms.output_squares import plain_square
from runtime.algorithms.result import QuantizedWeight
from runtime.algorithms.rtn import quantize_rtn
from runtime.formats import compressed
from runtime.formats.compressed import compress_rows, joined_rows
from runtime.formats.packing import pack_rows
from runtime.formats.presets import checked, scheme_from_preset
from runtime.host.dispatch_modes import LeanDispatchMode
from runtime.quantize.nearest import output_size, round_to_nearest
from runtime.recipe.recipe import Assignment
from tests.sweep import sweep

STRATEGIES: dict[str, dict[str, Any]] = {
    "tensor": {"strategy": "tensor"},
    "channel": {"strategy": "channel"},
    "group": {"strategy": "group", "group_size": 32},
    "block": {"strategy": "block", "block_structure": [8, 24]},
}
TYPES: dict[str, dict[str, Any]] = {
    "int4": {"num_bits": 4, "type": "int", "symmetric": True},
    "int3 asymmetric": {"num_bits": 3, "type": "int", "symmetric": False},
    "int8 asymmetric": {"num_bits": 8, "type": "int", "symmetric": False},
    "float8": {"num_bits": 8, "type": "float", "symmetric": True},
    "float6": {"num_bits": 6, "type": "float", "symmetric": True},
    "float4": {"num_bits": 4, "type": "float", "symmetric": True},
}
OBSERVERS = ("memoryless_minmax", "percentile", "mse", "imatrix_mse")
PACKED = ("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "NVFP4", "MXFP4A16", "W4A16", "W4A16_ASYM")
ODD = (37, 160)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Numbers of many sizes, with zeros of both signs and an outlier."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.02
    made[0], made[1, ::2], made[1, 1::2], made[2, 5] = 0.0, 1e-7, -0.0, 3.0
    return made.to(dtype)


def assert_equal_bits(got: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    assert (got is None) == (expected is None)
    if got is not None and expected is not None:
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        assert torch.equal(got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def in_parts_and_whole(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Let parts have three rows, then all rows."""
    for numbers in (3 * ODD[1], 2**30):
        monkeypatch.setattr(grid, "NUMBERS_IN_CACHE", numbers)
        yield numbers


@pytest.mark.parametrize(
    ("strategy", "kind", "observer"),
    sweep(
        [(strategy, kind, observer) for strategy in STRATEGIES for kind in TYPES for observer in OBSERVERS],
        *((strategy, "int4", observer) for strategy in STRATEGIES for observer in OBSERVERS),
        *((strategy, kind, "memoryless_minmax") for strategy in STRATEGIES for kind in TYPES),
    ),
)
def test_parts_equal_the_whole(monkeypatch: pytest.MonkeyPatch, strategy: str, kind: str, observer: str) -> None:
    weights: dict[str, Any] = {**STRATEGIES[strategy], **TYPES[kind], "observer": observer}
    args = QuantizationScheme(targets=["Linear"], weights=weights).weights
    assert args is not None
    importance_I = torch.rand(ODD[1], generator=torch.Generator().manual_seed(1)) + 0.1
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        weight_OI = normal(*ODD, dtype=dtype)
        parts, whole = (
            quantize_rtn(weight_OI, args, scale_dtype=torch.float32, importance_I=importance_I)
            for _ in in_parts_and_whole(monkeypatch)
        )
        for part in ("weight_OI", "scale", "zero_point"):
            assert_equal_bits(getattr(parts, part), getattr(whole, part))
        assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
        assert parts.loss == pytest.approx(float((weight_OI.double() - whole.weight_OI).square().sum()), rel=1e-5)


@pytest.mark.parametrize("preset", [*PACKED, "W8A8", "W8A16", "MXFP8"])
def test_packed_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch, preset: str) -> None:
    job = assignment(preset)
    weight_OI = normal(ODD[0], 256)
    whole = compress_rows("m", quantize_rtn(weight_OI, job.scheme.weights, scale_dtype=torch.bfloat16), job.scheme)
    monkeypatch.setattr(grid, "NUMBERS_IN_CACHE", 3 * 256)
    parts = list(round_to_nearest(weight_OI, job, None, scale_dtype=torch.bfloat16, global_scale=None))
    assert len(parts) == (1 if preset == "FP8_BLOCK" else 13)
    packed = joined_rows([compress_rows("m", part, job.scheme) for part in parts], job.scheme)
    assert list(packed) == list(whole)
    for name, tensor in whole.items():
        assert_equal_bits(packed[name], tensor)


def assignment(preset: str) -> Assignment:
    scheme = checked(scheme_from_preset(preset, ["Linear"]))
    return Assignment(scheme=scheme, algorithm="rtn", options=None, group=0)


@pytest.mark.parametrize("preset", PACKED)
@pytest.mark.parametrize("size", [1.0, 2.0**-60, 2.0**60])
def test_packs_as_the_compressor_does(preset: str, size: float) -> None:
    scheme = assignment(preset).scheme
    weight_OI = normal(130, 256, dtype=torch.float32) * size
    result = quantize_rtn(weight_OI, scheme.weights, scale_dtype=torch.float32)
    found, expected = pack_rows(result, scheme), compressed._compressed(result, scheme)
    assert found is not None
    assert list(found) == list(expected)
    for name in expected.keys() - {"weight_zero_point"}:  # packed when all rows are joined
        assert_equal_bits(found[name], expected[name])


@pytest.mark.parametrize("preset", ["W4A16", "W8A16", "W8A8", "MXFP8"])
def test_other_formats_and_ragged_rows_are_left_to_the_compressor(preset: str) -> None:
    scheme = scheme_from_preset("W4A16", ["Linear"]) if preset == "W4A16" else assignment(preset).scheme
    if preset == "W4A16":  # words of eight numbers would have to be padded
        args = scheme.weights.model_copy(update={"strategy": "channel", "group_size": None})
        scheme = checked(scheme.model_copy(update={"weights": args}))
    width = 100 if preset == "W4A16" else 128
    result = quantize_rtn(normal(8, width), scheme.weights, scale_dtype=torch.bfloat16)
    assert pack_rows(result, scheme) is None
    assert "weight_scale" in compress_rows("m", result, scheme)


def points(num_bits: int) -> list[float]:
    """The numbers of a small float that are not negative, by its definition: E2M1, E2M3 and E4M3."""
    exponent_bits, mantissa_bits, bias = {4: (2, 1, 1), 6: (2, 3, 1), 8: (4, 3, 7)}[num_bits]
    found = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits + (exponent > 0)
            found.append(fraction * 2.0 ** (max(exponent, 1) - bias))
    return found[:-1] if num_bits == 8 else found  # the last one of E4M3 is NaN


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_bits", [4, 6, 8])
def test_small_floats_are_nearest_with_ties_to_even(num_bits: int, dtype: torch.dtype) -> None:
    known = torch.tensor(points(num_bits), dtype=torch.float64)
    middles = (known[1:] + known[:-1]) / 2
    beside = torch.cat([torch.nextafter(middles.float(), torch.tensor(end)) for end in (0.0, torch.inf)]).double()
    tried = torch.cat([known, middles, beside, known[-1:] * 3, torch.rand(500, dtype=torch.float64) * known[-1]])
    distances = (tried[:, None] - known).abs()
    is_nearest = distances == distances.amin(dim=1, keepdim=True)
    is_even = torch.arange(len(known)) % 2 == 0
    place = (is_nearest * (1 + is_even.int())).argmax(dim=1)
    for sign in (1.0, -1.0):
        values = (sign * tried).to(dtype)
        grid._snap_to_float_(values, num_bits)
        assert torch.equal(values.double(), sign * known[place])
        assert torch.equal(torch.signbit(values), torch.signbit(sign * tried))


class NewMemory(LeanDispatchMode):
    """Records the size of each tensor that operators allocate, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and leaf.untyped_storage().data_ptr() not in given:
                self.sizes.append(leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("preset", [*PACKED, "W8A8"])
def test_no_copy_of_a_whole_weight_is_made(monkeypatch: pytest.MonkeyPatch, preset: str) -> None:
    job, weight_OI = assignment(preset), normal(512, 256)
    monkeypatch.setattr(grid, "NUMBERS_IN_CACHE", 2**13)
    rows = max(2**13 // 256, grid.tile_height(job.scheme.weights))
    with NewMemory() as memory:
        output_size(weight_OI, None)
        parts = round_to_nearest(weight_OI, job, None, scale_dtype=torch.bfloat16, global_scale=None)
        packed = joined_rows([compress_rows("m", part, job.scheme) for part in parts], job.scheme)
    largest = max(tensor.nbytes for tensor in packed.values())
    assert largest <= math.prod(weight_OI.shape)
    assert max(memory.sizes) <= max(largest, rows * 256 * 4)


def test_squares_that_float32_cannot_represent_are_summed_up_in_float64() -> None:
    for size in (1e-30, 1.0, 1e25):
        rows = torch.full((3, 7), size)
        assert plain_square(rows) == pytest.approx(21 * size**2, rel=1e-6)
    assert plain_square(torch.zeros(2, 2)) == 0.0


def test_a_result_has_the_grid_of_its_rows() -> None:
    job = assignment("W4A16_ASYM")
    parts: list[QuantizedWeight] = list(
        round_to_nearest(normal(*ODD)[:, :128], job, None, scale_dtype=torch.bfloat16, global_scale=None)
    )
    assert sum(len(part.weight_OI) for part in parts) == ODD[0]
    assert all(len(part.scale) == len(part.weight_OI) for part in parts)
