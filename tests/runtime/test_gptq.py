"""GPTQ: against the paper's algorithm in float64, to the bit, by its properties, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms.gptq import quantize_siblings
from runtime.algorithms.hessian import HessianAccumulator
from runtime.algorithms.refine import refine
from runtime.algorithms.result import QuantizedWeight
from runtime.algorithms.rtn import quantize_rtn
from runtime.errors import QuantizationError

NUM_OUT, NUM_IN, GROUP_SIZE = 24, 96, 32


def int_args(num_bits: int = 4, *, symmetric: bool = True, strategy: str = "group") -> QuantizationArgs:
    group_size = GROUP_SIZE if strategy == "group" else None
    return QuantizationArgs(
        num_bits=num_bits, type="int", symmetric=symmetric, strategy=strategy, group_size=group_size
    )


def quantize_gptq(
    weight_OI: torch.Tensor, hessian_II: torch.Tensor, args: QuantizationArgs, **options: Any
) -> QuantizedWeight:
    """Quantize a weight that has no siblings."""
    (result,) = quantize_siblings([weight_OI], hessian_II, args, **options)
    return result


FLOAT8 = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel")


def correlated(num_in: int = NUM_IN, num_tokens: int = 400, seed: int = 0) -> torch.Tensor:
    """Inputs [T, I] in float64 whose features depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(num_in, num_in, generator=generator, dtype=torch.float64)
    size = 3 * torch.rand(num_in, generator=generator, dtype=torch.float64)
    return torch.randn(num_tokens, num_in, generator=generator, dtype=torch.float64) @ (mix * size)


def random_weight(num_in: int = NUM_IN) -> torch.Tensor:
    return torch.randn(NUM_OUT, num_in, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(scope="module")
def inputs_TI() -> torch.Tensor:
    return correlated()


@pytest.fixture(scope="module")
def hessian_II(inputs_TI: torch.Tensor) -> torch.Tensor:
    return inputs_TI.T @ inputs_TI


def min_max(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each row, in float64; the scale rounded to float32 as it is stored."""
    low, high = -(2 ** (args.num_bits - 1)), 2 ** (args.num_bits - 1) - 1
    smallest, largest = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    if args.symmetric:
        scale = torch.maximum(-smallest, largest) / ((high - low) / 2)
        return scale.float().double(), torch.zeros_like(scale)
    scale = (largest - smallest) / (high - low)
    return scale.float().double(), (low - smallest / scale).round().clamp(low, high)


def algorithm_1(
    weight: torch.Tensor, hessian: torch.Tensor, args: QuantizationArgs, *, ordered: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's algorithm 1 with explicit inverse, one column after the other: integers and weights."""
    low, high = -(2 ** (args.num_bits - 1)), 2 ** (args.num_bits - 1) - 1
    num_in = weight.shape[1]
    size = args.group_size or num_in
    grids = {k: min_max(weight[:, k * size : (k + 1) * size], args) for k in range(num_in // size)}
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if ordered else torch.arange(num_in)
    work, damped = weight[:, order].clone(), hessian[order][:, order].clone()
    damped += 0.01 * damped.diagonal().mean() * torch.eye(num_in, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    integers, weights = torch.empty_like(weight), torch.empty_like(weight)
    for k in range(num_in):
        if args.group_size and not ordered and k % size == 0:
            grids[k // size] = min_max(work[:, k : k + size], args)
        scale, zero = grids[int(order[k]) // size]
        integer = (work[:, k] / scale + zero).clamp(low, high).round()
        integers[:, order[k]] = integer
        weights[:, order[k]] = (integer - zero) * scale
        error = (work[:, k] - (integer - zero) * scale) / factor[k, k]
        work[:, k:] -= torch.outer(error, factor[k, k:])
    return integers, weights


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """A scale or zero point, once for each weight."""
    if tensor.ndim == 1:
        return tensor.expand(NUM_OUT, NUM_IN)
    return tensor.repeat_interleave(NUM_IN // tensor.shape[1], dim=1)


@pytest.mark.parametrize("actorder", [None, "static", "weight"])
@pytest.mark.parametrize("strategy", ["group", "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_equals_algorithm_1_in_float64(
    hessian_II: torch.Tensor, num_bits: int, symmetric: bool, strategy: str, actorder: str | None
) -> None:
    args = int_args(num_bits, symmetric=symmetric, strategy=strategy)
    weight_OI = random_weight()
    got = quantize_gptq(weight_OI, hessian_II, args, scale_dtype=torch.float32, actorder=actorder)
    integers, weights = algorithm_1(weight_OI, hessian_II, args, ordered=actorder is not None)
    assert torch.equal(got.weight_OI, weights.float())
    zero = 0 if got.zero_point is None else spread(got.zero_point)
    assert torch.equal((got.weight_OI / spread(got.scale) + zero).round().double(), integers)


def test_a_scale_for_the_whole_tensor(hessian_II: torch.Tensor) -> None:
    weight_OI = random_weight()
    got = quantize_gptq(weight_OI, hessian_II, int_args(strategy="tensor"), scale_dtype=torch.float32)
    assert got.scale.tolist() == [torch.tensor(float(weight_OI.abs().max()) / 7.5).item()]
    assert ((got.weight_OI / got.scale).round().abs() <= 8).all()


@pytest.mark.parametrize("block_size", [1, 7, 32, 96, 1000])
def test_the_block_size_changes_nothing(hessian_II: torch.Tensor, block_size: int) -> None:
    expected = algorithm_1(random_weight(), hessian_II, int_args(), ordered=True)[1]
    got = quantize_gptq(random_weight(), hessian_II, int_args(), scale_dtype=torch.float32, block_size=block_size)
    assert torch.equal(got.weight_OI, expected.float())


def test_float32_agrees_with_float64_but_for_ties(hessian_II: torch.Tensor) -> None:
    weight_OI = random_weight()
    double = quantize_gptq(weight_OI, hessian_II, int_args(), scale_dtype=torch.bfloat16)
    single = quantize_gptq(weight_OI.float(), hessian_II.float(), int_args(), scale_dtype=torch.bfloat16)
    # A column that lands next to a tie may fall to the other side, and later columns make up for it.
    assert (double.weight_OI != single.weight_OI).float().mean() < 0.05
    assert single.loss == pytest.approx(double.loss, rel=0.01)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_weight_is_on_the_stored_grid_to_the_bit(
    hessian_II: torch.Tensor, symmetric: bool, scale_dtype: torch.dtype
) -> None:
    for actorder in (None, "static"):
        got = quantize_gptq(
            random_weight().to(torch.bfloat16),
            hessian_II.float(),
            int_args(symmetric=symmetric),
            scale_dtype=scale_dtype,
            actorder=actorder,
        )
        assert got.scale.dtype == scale_dtype
        assert list(got.scale.shape) == [NUM_OUT, NUM_IN // GROUP_SIZE]
        zero = torch.zeros(()) if got.zero_point is None else spread(got.zero_point).float()
        integers = (got.weight_OI / spread(got.scale).float() + zero).round()
        assert float(integers.min()) >= -8 and float(integers.max()) <= 7
        assert torch.equal((integers - zero) * spread(got.scale).float(), got.weight_OI)


def test_is_deterministic_and_leaves_its_inputs_alone(hessian_II: torch.Tensor) -> None:
    weight_OI, hessian = random_weight().float(), hessian_II.float()
    before = weight_OI.clone(), hessian.clone()
    for actorder in (None, "static"):
        runs = [
            quantize_gptq(weight_OI, hessian, int_args(), scale_dtype=torch.bfloat16, actorder=actorder)
            for _ in range(2)
        ]
        assert torch.equal(runs[0].weight_OI, runs[1].weight_OI)
        assert torch.equal(runs[0].scale, runs[1].scale)
        assert runs[0].loss == runs[1].loss
    assert torch.equal(weight_OI, before[0])
    assert torch.equal(hessian, before[1])


def output_error(weight: torch.Tensor, quantized: torch.Tensor, inputs_TI: torch.Tensor) -> float:
    return float((inputs_TI @ (weight - quantized.double()).T).square().sum())


@pytest.mark.parametrize("actorder", [None, "static"])
@pytest.mark.parametrize("args", [int_args(3), int_args(4), int_args(4, symmetric=False), FLOAT8])
def test_loses_less_than_rounding_to_nearest(
    inputs_TI: torch.Tensor, hessian_II: torch.Tensor, args: QuantizationArgs, actorder: str | None
) -> None:
    weight_OI = random_weight()
    solved = quantize_gptq(weight_OI, hessian_II, args, scale_dtype=torch.bfloat16, actorder=actorder)
    rounded = quantize_rtn(weight_OI, args, scale_dtype=torch.bfloat16)
    least, most = (output_error(weight_OI, q.weight_OI, inputs_TI) for q in (solved, rounded))
    assert least < 0.8 * most


@pytest.mark.parametrize("actorder", [None, "static"])
def test_loss_is_the_squared_error_of_the_output(
    inputs_TI: torch.Tensor, hessian_II: torch.Tensor, actorder: str | None
) -> None:
    weight_OI = random_weight()
    got = quantize_gptq(weight_OI, hessian_II, int_args(), scale_dtype=torch.bfloat16, actorder=actorder)
    assert got.loss == pytest.approx(output_error(weight_OI, got.weight_OI, inputs_TI), rel=1e-6)
    assert got.damping == 0.01


@pytest.mark.parametrize("actorder", [None, "static"])
@pytest.mark.parametrize("args", [int_args(), int_args(symmetric=False), int_args(strategy="tensor"), FLOAT8])
def test_equals_rounding_to_nearest_when_inputs_are_independent(args: QuantizationArgs, actorder: str | None) -> None:
    weight_OI = random_weight().to(torch.bfloat16).float()
    hessian = torch.diag(torch.rand(NUM_IN, generator=torch.Generator().manual_seed(2)) + 0.1)
    got = quantize_gptq(weight_OI, hessian, args, scale_dtype=torch.bfloat16, actorder=actorder)
    expected = quantize_rtn(weight_OI, args, scale_dtype=torch.bfloat16)
    assert torch.equal(got.weight_OI, expected.weight_OI)
    assert torch.equal(got.scale, expected.scale)


@pytest.mark.parametrize("actorder", [None, "static"])
def test_the_size_of_the_hessian_does_not_matter(hessian_II: torch.Tensor, actorder: str | None) -> None:
    weights = [
        quantize_gptq(
            random_weight(), hessian_II * factor, int_args(), scale_dtype=torch.bfloat16, actorder=actorder
        ).weight_OI
        for factor in (1.0, 2.0**-20, 2.0**20)
    ]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("actorder", [None, "static"])
def test_dead_columns_are_rounded_to_nearest(actorder: str | None) -> None:
    inputs = correlated()
    dead = [0, 5, 40, 95]
    inputs[:, dead] = 0
    weight_OI = random_weight()
    args = int_args(strategy="channel")
    hessian = inputs.T @ inputs
    got = quantize_gptq(weight_OI, hessian, args, scale_dtype=torch.float32, actorder=actorder)
    nearest = quantize_rtn(weight_OI, args, scale_dtype=torch.float32)
    assert torch.equal(got.weight_OI[:, dead], nearest.weight_OI[:, dead])
    assert got.loss == pytest.approx(output_error(weight_OI, got.weight_OI, inputs), rel=1e-6)
    # What the living columns become does not depend on the dead ones being there.
    alive = [k for k in range(NUM_IN) if k not in dead]
    alone = quantize_gptq(
        weight_OI[:, alive],
        hessian[alive][:, alive],
        int_args(strategy="channel"),
        scale_dtype=torch.float32,
        actorder=actorder,
    )
    same_scale = (alone.scale == got.scale).squeeze(1)
    assert same_scale.any()
    assert torch.equal(got.weight_OI[:, alive][same_scale], alone.weight_OI[same_scale])


def test_damping_is_raised_until_the_hessian_factors() -> None:
    hessian = torch.eye(NUM_IN, dtype=torch.float64)
    hessian[0, 0] = -0.05
    got = quantize_gptq(random_weight(), hessian, int_args(), scale_dtype=torch.bfloat16)
    assert got.damping == pytest.approx(0.1)


def test_fewer_tokens_than_features_are_enough() -> None:
    inputs = correlated(num_tokens=8)
    weight_OI = random_weight()
    got = quantize_gptq(weight_OI, (inputs.T @ inputs).float(), int_args(), scale_dtype=torch.bfloat16)
    rounded = quantize_rtn(weight_OI, int_args(), scale_dtype=torch.bfloat16)
    least, most = (output_error(weight_OI, q.weight_OI, inputs) for q in (got, rounded))
    assert least < 0.2 * most


def broken(row: int, column: int, value: float) -> torch.Tensor:
    hessian = torch.eye(NUM_IN)
    hessian[row, column] = value
    return hessian


@pytest.mark.parametrize(
    ("weight_OI", "hessian", "options", "message"),
    [
        (torch.full((4, NUM_IN), float("nan")), torch.eye(NUM_IN), {}, "not finite"),
        (torch.ones(4, NUM_IN), broken(3, 4, float("nan")), {}, r"Hessian .* \[4, 96\] is not finite"),
        (torch.ones(4, NUM_IN), broken(3, 3, float("inf")), {}, "Hessian .* is not finite"),
        (torch.ones(4, NUM_IN), torch.zeros(NUM_IN, NUM_IN), {}, "no input reached the module"),
        (torch.ones(4, NUM_IN), broken(0, 0, -5.0), {}, "does not factor with dampening 1"),
        (torch.ones(4, NUM_IN), torch.eye(64), {}, r"\[4, 96\] requires a Hessian of shape \[96, 96\]; got \[64, 64\]"),
        (torch.ones(4, 100), torch.eye(100), {}, r"\[4, 100\] cannot be cut into groups of 32"),
        (torch.ones(4, NUM_IN), torch.eye(NUM_IN), {"dampening_frac": 0.0}, "dampening_frac"),
        (torch.ones(4, NUM_IN), torch.eye(NUM_IN), {"dampening_frac": float("nan")}, "dampening_frac"),
        (torch.ones(4, NUM_IN), torch.eye(NUM_IN), {"block_size": 0}, "block_size"),
        (torch.ones(4, NUM_IN), torch.eye(NUM_IN), {"actorder": "group"}, "actorder 'group'"),
    ],
)
def test_refuses(weight_OI: torch.Tensor, hessian: torch.Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        quantize_gptq(weight_OI, hessian, int_args(), scale_dtype=torch.bfloat16, **options)


def test_the_hessian_is_the_sum_over_all_batches() -> None:
    # Small integers: every product and sum is exact in float32, so that there is one right answer.
    generator = torch.Generator().manual_seed(3)
    batches = [
        torch.randint(-8, 8, shape, generator=generator).to(torch.bfloat16)
        for shape in ((2, 5, 700), (3, 700), (1, 1, 700))
    ]
    accumulator = HessianAccumulator(700)
    for batch in batches:
        accumulator.add(batch)
        assert torch.equal(accumulator.hessian_II, accumulator.hessian_II.T)
    flat = torch.cat([batch.reshape(-1, 700) for batch in batches]).double()
    assert accumulator.num_tokens == 14
    assert accumulator.hessian_II.dtype == torch.float32
    assert torch.equal(accumulator.hessian_II.double(), flat.T @ flat)


def test_products_of_bf16_inputs_are_not_rounded() -> None:
    accumulator = HessianAccumulator(2)
    accumulator.add(torch.tensor([[1.0078125, 1.0234375]], dtype=torch.bfloat16))
    assert accumulator.hessian_II.tolist() == [
        [1.01568603515625, 1.03143310546875],
        [1.03143310546875, 1.04742431640625],
    ]


class TestSiblings:
    """Weights that see one input, solved together."""

    @pytest.mark.parametrize("actorder", [None, "static"])
    @pytest.mark.parametrize("args", [int_args(3), int_args(4, symmetric=False), int_args(strategy="channel"), FLOAT8])
    def test_equal_to_one_after_the_other(
        self, hessian_II: torch.Tensor, args: QuantizationArgs, actorder: str | None
    ) -> None:
        weights = [random_weight(), random_weight()[:7] * 3, random_weight()[5:6]]
        together = quantize_siblings(weights, hessian_II, args, scale_dtype=torch.bfloat16, actorder=actorder)
        for weight_OI, got in zip(weights, together, strict=True):
            alone = quantize_gptq(weight_OI, hessian_II, args, scale_dtype=torch.bfloat16, actorder=actorder)
            assert torch.equal(got.weight_OI, alone.weight_OI)
            assert torch.equal(got.scale, alone.scale)
            assert got.loss == pytest.approx(alone.loss, rel=1e-9)

    def test_a_scale_for_the_whole_tensor_is_each_one_s_own(self, hessian_II: torch.Tensor) -> None:
        weights = [random_weight(), random_weight() * 2]
        small, large = quantize_siblings(weights, hessian_II, int_args(strategy="tensor"), scale_dtype=torch.float32)
        assert float(large.scale) == 2 * float(small.scale)


NVFP4 = QuantizationArgs(
    num_bits=4,
    type="float",
    symmetric=True,
    strategy="tensor_group",
    group_size=16,
    scale_dtype=torch.float8_e4m3fn,
    zp_dtype=torch.float8_e4m3fn,
)
MXFP4 = NVFP4.model_copy(
    update={"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
)


@pytest.mark.parametrize("actorder", [None, "static"])
@pytest.mark.parametrize("args", [NVFP4, MXFP4])
def test_small_floats(hessian_II: torch.Tensor, args: QuantizationArgs, actorder: str | None) -> None:
    weight_OI = random_weight()
    got = quantize_gptq(weight_OI, hessian_II, args, scale_dtype=torch.bfloat16, actorder=actorder)
    rounded = quantize_rtn(weight_OI, args, scale_dtype=torch.bfloat16)
    factor = got.scale if got.global_scale is None else got.scale / got.global_scale
    numbers = (got.weight_OI / spread(factor)).abs()
    nearest = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert float((numbers[..., None] - nearest).abs().amin(-1).max()) < 1e-5
    inputs = correlated()
    assert output_error(weight_OI, got.weight_OI, inputs) < 0.8 * output_error(weight_OI, rounded.weight_OI, inputs)


def test_nvfp4_siblings_share_a_global_scale(hessian_II: torch.Tensor) -> None:
    weights = [random_weight(), random_weight() * 5]
    one, two = quantize_siblings(weights, hessian_II, NVFP4, scale_dtype=torch.bfloat16)
    assert one.global_scale is not None and two.global_scale is not None
    assert torch.equal(one.global_scale, two.global_scale)
    assert float(one.global_scale) == pytest.approx(448 * 6 / float(weights[1].abs().max()), rel=1e-6)


class TestRefine:
    """Coordinate descent on columns and scales."""

    @pytest.mark.parametrize(
        "args", [int_args(2), int_args(2, symmetric=False), int_args(3, strategy="channel"), NVFP4]
    )
    def test_loses_less_each_time_and_knows_what_it_loses(
        self, inputs_TI: torch.Tensor, hessian_II: torch.Tensor, args: QuantizationArgs
    ) -> None:
        weight_OI = random_weight()
        result = quantize_gptq(weight_OI, hessian_II, args, scale_dtype=torch.bfloat16)
        losses = [result.loss]
        for _ in range(3):
            result = refine(weight_OI, result, hessian_II, args, sweeps=1, dampening_frac=0.0)
            assert result.loss == pytest.approx(output_error(weight_OI, result.weight_OI, inputs_TI), rel=1e-5)
            losses.append(result.loss)
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < 0.98 * losses[0]

    def test_damping_counts_but_is_no_part_of_the_loss(self, inputs_TI: torch.Tensor, hessian_II: torch.Tensor) -> None:
        weight_OI, args = random_weight(), int_args(2)
        before = quantize_gptq(weight_OI, hessian_II, args, scale_dtype=torch.bfloat16)
        after = refine(weight_OI, before, hessian_II, args, dampening_frac=0.1)
        added = 0.1 * float(hessian_II.diagonal().mean())
        sizes = [float((weight_OI - result.weight_OI.double()).square().sum()) for result in (before, after)]
        assert after.loss + added * sizes[1] < before.loss + added * sizes[0]
        assert after.loss == pytest.approx(output_error(weight_OI, after.weight_OI, inputs_TI), rel=1e-5)

    def test_no_single_column_can_be_better(self, hessian_II: torch.Tensor) -> None:
        weight_OI = random_weight()
        args = int_args(3, strategy="channel")
        result = quantize_gptq(weight_OI, hessian_II, args, scale_dtype=torch.float32)
        result = refine(weight_OI, result, hessian_II, args, sweeps=40, dampening_frac=0.0)
        for step in (-1, 1):
            for column in range(0, NUM_IN, 5):
                other = result.weight_OI.double().clone()
                other[:, column] += step * result.scale[:, 0].double()
                inside = ((other / result.scale.double()).round().abs() <= 3).all()
                error = other - weight_OI
                loss_O = ((error @ hessian_II) * error).sum(1)
                before = result.weight_OI.double() - weight_OI
                least_O = ((before @ hessian_II) * before).sum(1)
                assert not inside or bool((loss_O >= least_O * (1 - 1e-6)).all())

    @pytest.mark.parametrize("args", [int_args(2), int_args(3, symmetric=False)])
    def test_the_weight_stays_on_the_stored_grid(self, hessian_II: torch.Tensor, args: QuantizationArgs) -> None:
        weight_OI = random_weight().float()
        result = quantize_gptq(weight_OI, hessian_II.float(), args, scale_dtype=torch.bfloat16)
        got = refine(weight_OI, result, hessian_II.float(), args)
        zero = torch.zeros(()) if got.zero_point is None else spread(got.zero_point).float()
        integers = (got.weight_OI / spread(got.scale).float() + zero).round()
        half = 2 ** (args.num_bits - 1)
        assert float(integers.min()) >= -half and float(integers.max()) <= half - 1
        assert torch.equal((integers - zero) * spread(got.scale).float(), got.weight_OI)
        assert not torch.equal(got.scale, result.scale)

    def test_is_deterministic_and_leaves_its_inputs_alone(self, hessian_II: torch.Tensor) -> None:
        weight_OI = random_weight().float()
        result = quantize_gptq(weight_OI, hessian_II.float(), int_args(2), scale_dtype=torch.bfloat16)
        before = result.weight_OI.clone(), hessian_II.clone()
        one, two = (refine(weight_OI, result, hessian_II.float(), int_args(2)) for _ in range(2))
        assert torch.equal(one.weight_OI, two.weight_OI)
        assert torch.equal(result.weight_OI, before[0]) and torch.equal(hessian_II, before[1])

    def test_refuses(self, hessian_II: torch.Tensor) -> None:
        result = quantize_gptq(random_weight(), hessian_II, int_args(2), scale_dtype=torch.bfloat16)
        with pytest.raises(QuantizationError, match="does not match a weight"):
            refine(random_weight(), result, hessian_II[:4, :4], int_args(2))


@pytest.mark.parametrize("actorder", [None, "static"])
def test_blocks_of_rows_and_columns_share_a_scale(hessian_II: torch.Tensor, actorder: str | None) -> None:
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="block", block_structure=[10, 32])
    weight_OI = random_weight()
    got = quantize_gptq(weight_OI, hessian_II, args, scale_dtype=torch.float32, actorder=actorder)
    nearest = quantize_rtn(weight_OI, args, scale_dtype=torch.float32)
    assert torch.equal(got.scale, nearest.scale)
    assert got.scale.shape == (3, 3)
    factor = got.scale.repeat_interleave(10, 0)[:NUM_OUT].repeat_interleave(32, 1)
    on_grid = (got.weight_OI / factor).to(torch.float8_e4m3fn).float() * factor
    assert torch.equal(on_grid, got.weight_OI)
    inputs = correlated()
    assert output_error(weight_OI, got.weight_OI, inputs) < 0.8 * output_error(weight_OI, nearest.weight_OI, inputs)
