"""Round-to-nearest: against a reference in float64, to the bit, by its properties, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams

from runtime.algorithms.rtn import quantize_rtn
from runtime.errors import QuantizationError

GROUP = {"strategy": "group", "group_size": 16}
CHANNEL = {"strategy": "channel"}
TENSOR = {"strategy": "tensor"}
BLOCK = {"strategy": "block", "block_structure": [8, 16]}


def int_args(num_bits: int, symmetric: bool, **strategy: object) -> QuantizationArgs:
    return QuantizationArgs(num_bits=num_bits, type="int", symmetric=symmetric, **strategy)


def random_weight(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def reference(
    tile: torch.Tensor, num_bits: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, float, int]:
    """One tile by the definition, in float64 throughout: the integers, the scale and the zero point."""
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    smallest, largest = min(float(tile.min()), 0.0), max(float(tile.max()), 0.0)
    if symmetric:
        scale, zero = 2 * max(-smallest, largest) / (high - low), 0
    else:
        scale = (largest - smallest) / (high - low)
        zero = min(max(round(low - smallest / scale), low), high)
    scale = float(torch.tensor(scale, dtype=torch.float64).to(scale_dtype))
    return torch.round(tile.double() / scale + zero).clamp(low, high), scale, zero


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("strategy", [GROUP, CHANNEL, TENSOR, BLOCK], ids=lambda s: s["strategy"])
def test_equals_the_definition_in_float64(strategy: dict[str, object], num_bits: int, symmetric: bool) -> None:
    weight_OI = random_weight(16, 64)
    height, width = {"group": (1, 16), "channel": (1, 64), "tensor": (16, 64), "block": (8, 16)}[
        str(strategy["strategy"])
    ]
    got = quantize_rtn(weight_OI, int_args(num_bits, symmetric, **strategy), scale_dtype=torch.bfloat16)
    for row in range(0, 16, height):
        for column in range(0, 64, width):
            here = (slice(row, row + height), slice(column, column + width))
            expected, scale, zero = reference(weight_OI[here], num_bits, symmetric, torch.bfloat16)
            # Seven bits of integer and eight of scale: the product is exact in float32.
            assert torch.equal(got.weight_OI[here].double(), (expected - zero) * scale)
            at = 0 if strategy is TENSOR else (row // height, column // width)
            assert float(got.scale[at]) == scale
            assert got.zero_point is None if symmetric else int(got.zero_point[at]) == zero


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_those_of_compressed_tensors_to_the_bit(symmetric: bool, dtype: torch.dtype) -> None:
    weight_OI = random_weight(8, 32, dtype=dtype)
    args = int_args(4, symmetric, **GROUP)
    tiles = weight_OI.unflatten(1, (-1, 16))
    scale, zero_point = calculate_qparams(tiles.amin(-1), tiles.amax(-1), args)
    got = quantize_rtn(weight_OI, args, scale_dtype=dtype)
    assert torch.equal(got.scale, scale)
    assert got.zero_point is None if symmetric else torch.equal(got.zero_point, zero_point)


def test_a_row_worked_out_by_hand() -> None:
    weight_OI = torch.tensor([[-4.0, -1.5, 0.0, 0.5, 1.5, 2.5, 3.75, 1.0]])
    got = quantize_rtn(weight_OI, int_args(4, False, strategy="channel"), scale_dtype=torch.float32)
    # (3.75 + 4) / 15 = 0.51666..., z = round(-8 + 4 / 0.51666) = 0, q = round(w / s), 7 at most.
    scale = torch.tensor(7.75 / 15)
    assert got.scale.tolist() == [[scale.item()]]
    assert got.zero_point is not None and got.zero_point.tolist() == [[0]]
    assert torch.equal(got.weight_OI, torch.tensor([[-8.0, -3.0, 0.0, 1.0, 3.0, 5.0, 7.0, 2.0]]) * scale)


@pytest.mark.parametrize("strategy", [CHANNEL, TENSOR, BLOCK], ids=lambda s: s["strategy"])
def test_float8_goes_to_the_nearest_float8(strategy: dict[str, object]) -> None:
    weight_OI = random_weight(16, 64, dtype=torch.bfloat16)
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, **strategy)
    got = quantize_rtn(weight_OI, args, scale_dtype=torch.bfloat16)
    scale_OI = got.scale.float()
    if strategy is BLOCK:
        scale_OI = scale_OI.repeat_interleave(8, 0).repeat_interleave(16, 1)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    points = codes[codes.isfinite()]
    distance = ((weight_OI.float() / scale_OI)[..., None] - points).abs().amin(-1)
    assert torch.equal((weight_OI.float() / scale_OI - got.weight_OI / scale_OI).abs(), distance)
    assert got.scale.dtype == torch.bfloat16


def test_the_last_blocks_may_be_cut_off() -> None:
    weight_OI = random_weight(11, 40)
    got = quantize_rtn(weight_OI, int_args(8, True, **BLOCK), scale_dtype=torch.float32)
    assert list(got.weight_OI.shape) == [11, 40]
    assert list(got.scale.shape) == [2, 3]
    alone = quantize_rtn(weight_OI[8:, 32:].contiguous(), int_args(8, True, **TENSOR), scale_dtype=torch.float32)
    assert torch.equal(got.weight_OI[8:, 32:], alone.weight_OI)


def test_is_deterministic_and_leaves_its_input_alone() -> None:
    weight_OI = random_weight(16, 64)
    before = weight_OI.clone()
    runs = [quantize_rtn(weight_OI, int_args(4, False, **GROUP), scale_dtype=torch.float16) for _ in range(2)]
    assert torch.equal(runs[0].weight_OI, runs[1].weight_OI)
    assert torch.equal(runs[0].scale, runs[1].scale)
    assert runs[0].loss == runs[1].loss
    assert torch.equal(weight_OI, before)


def test_takes_a_parameter_and_a_transposed_weight() -> None:
    weight_OI = random_weight(32, 16)
    expected = quantize_rtn(weight_OI, int_args(4, True, **GROUP), scale_dtype=torch.float32).weight_OI
    for other in (torch.nn.Parameter(weight_OI), weight_OI.t().contiguous().t()):
        got = quantize_rtn(other, int_args(4, True, **GROUP), scale_dtype=torch.float32)
        assert torch.equal(got.weight_OI, expected)
        assert not got.weight_OI.requires_grad


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_no_weight_moves_further_than_half_a_step(num_bits: int) -> None:
    weight_OI = random_weight(8, 32)
    symmetric, asymmetric = (
        quantize_rtn(weight_OI, int_args(num_bits, flag, **CHANNEL), scale_dtype=torch.float32)
        for flag in (True, False)
    )
    assert ((weight_OI - symmetric.weight_OI).abs() <= symmetric.scale * 0.50001).all()
    # A rounded zero point moves the range by up to half a step more.
    assert ((weight_OI - asymmetric.weight_OI).abs() <= asymmetric.scale * 1.00001).all()


def test_more_bits_and_smaller_groups_lose_less() -> None:
    weight_OI = random_weight(16, 64)
    by_bits = [
        quantize_rtn(weight_OI, int_args(bits, True, **GROUP), scale_dtype=torch.float32).loss for bits in (2, 3, 4, 8)
    ]
    assert by_bits == sorted(by_bits, reverse=True)
    coarse, fine = (
        quantize_rtn(weight_OI, int_args(4, True, **strategy), scale_dtype=torch.float32).loss
        for strategy in (CHANNEL, GROUP)
    )
    assert fine < coarse


def test_loss_is_the_sum_of_squared_errors() -> None:
    weight_OI = random_weight(8, 32)
    got = quantize_rtn(weight_OI, int_args(3, True, **GROUP), scale_dtype=torch.bfloat16)
    expected = float((weight_OI.double() - got.weight_OI.double()).square().sum())
    assert got.loss == pytest.approx(expected, rel=1e-6)
    assert got.damping == 0.0


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_stays_zero(symmetric: bool) -> None:
    weight_OI = random_weight(4, 32)
    weight_OI[:, :16] = 0
    got = quantize_rtn(weight_OI, int_args(4, symmetric, **GROUP), scale_dtype=torch.float16)
    assert got.weight_OI[:, :16].abs().max() == 0
    assert (got.scale > 0).all()


def test_a_scale_that_float16_would_round_to_nothing_stays_positive() -> None:
    got = quantize_rtn(torch.full((1, 16), 1e-9), int_args(4, True, **GROUP), scale_dtype=torch.float16)
    assert got.scale.item() > 0
    assert got.weight_OI.isfinite().all()


@pytest.mark.parametrize(
    ("args", "weight_OI", "message"),
    [
        (int_args(4, True, **GROUP), torch.zeros(4, 24), r"\[4, 24\] cannot be cut into groups of 16"),
        (int_args(4, True, **GROUP), torch.full((4, 16), float("nan")), "not finite"),
        (int_args(4, True, **GROUP), torch.full((4, 16), float("inf")), "not finite"),
        (int_args(4, True, **GROUP), torch.zeros(4, 16, dtype=torch.int8), "not finite floats"),
        (int_args(4, True, **GROUP), torch.zeros(16), r"\[O, I\], not \[16\]"),
        (int_args(4, True, **GROUP), torch.zeros(0, 16), r"\[O, I\], not \[0, 16\]"),
        (int_args(1, True, **GROUP), torch.zeros(4, 16), "1 bit int"),
        (int_args(16, True, **GROUP), torch.zeros(4, 16), "16 bit int"),
        (QuantizationArgs(num_bits=8, type="int", strategy="token", dynamic=True), torch.zeros(4, 16), "'token'"),
        (QuantizationArgs(num_bits=8, type="float", symmetric=False), torch.zeros(4, 16), "8 bit float"),
        (int_args(4, True, strategy="tensor_group", group_size=16), torch.zeros(4, 16), "'tensor_group'"),
    ],
)
def test_refuses(args: QuantizationArgs, weight_OI: torch.Tensor, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        quantize_rtn(weight_OI, args, scale_dtype=torch.bfloat16)


def test_refuses_a_scale_that_overflows() -> None:
    with pytest.raises(QuantizationError, match="overflows"):
        quantize_rtn(torch.full((1, 16), 1e6), int_args(2, True, **GROUP), scale_dtype=torch.float16)
