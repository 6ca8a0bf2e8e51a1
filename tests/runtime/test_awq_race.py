"""AWQ's race of candidates: it ends as an exhaustive search in float64 does, and multiplies less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms import awq
from runtime.algorithms.awq import ScaleSearch, search_scales
from runtime.algorithms.products import has_quick_bfloat16
from runtime.algorithms.rtn import quantize_rtn
from runtime.host.dispatch_modes import LeanDispatchMode

WIDTH, ROWS = 64, 4500  # so many rows that the race has four parts
BF16, F32 = torch.bfloat16, torch.float32
INT4 = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=32)
FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn}
SCHEMES = {
    "group": INT4,
    "channel": QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="channel"),
    "tensor": QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="tensor"),
    "block": QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="block", block_structure=[24, 32]),
    "tensor_group": QuantizationArgs(**FP4, symmetric=True, zp_dtype=None),
}
needs_bf16 = pytest.mark.skipif(not has_quick_bfloat16(), reason="this processor has no bf16 products")
Problem = tuple[torch.Tensor, torch.Tensor]


def outliers(generator: torch.Generator) -> Problem:
    """A few channels are far larger: a curve with one deep minimum."""
    inputs = torch.randn(400, WIDTH, generator=generator)
    inputs[:, ::7] *= 20
    return inputs, torch.randn(ROWS, WIDTH, generator=generator)


def even(generator: torch.Generator) -> Problem:
    """All channels are alike: a flat curve with many minima, of which chance decides."""
    return torch.randn(400, WIDTH, generator=generator), torch.randn(ROWS, WIDTH, generator=generator)


def common(generator: torch.Generator) -> Problem:
    """All inputs share one direction: the errors of a row's weights do not average out."""
    inputs = torch.randn(400, WIDTH, generator=generator) + 5 * torch.randn(WIDTH, generator=generator)
    return inputs, torch.randn(ROWS, WIDTH, generator=generator)


def large_rows(generator: torch.Generator) -> Problem:
    """Few rows have most of the loss, and are like no others."""
    inputs, weight = outliers(generator)
    weight[::500, ::7] *= 30
    return inputs, weight


PROBLEMS: list[Callable[[torch.Generator], Problem]] = [outliers, even, common, large_rows]


def losses(
    weights: Sequence[torch.Tensor], gram: torch.Tensor, scales: Sequence[torch.Tensor], args: QuantizationArgs
) -> list[float]:
    """The loss of all rows with each scale, in float64."""
    found = []
    for scale in (one.double() for one in scales):
        total = 0.0
        for weight in (one.double() for one in weights):
            rounded = quantize_rtn(weight * scale, args, scale_dtype=BF16).weight_OI.double()
            error = rounded / scale - weight
            total += float(((error @ gram.double()) * error).sum())
        found.append(total)
    return found


def candidates(inputs: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """The scales of `duo_scaling: both` for a scheme with groups of 32, with s = 1 first."""
    size, mean = weight.abs().reshape(len(weight), -1, 32), inputs.abs().mean(0)
    relative = (size / size.amax(-1, keepdim=True)).reshape(len(weight), -1).mean(0)
    found = [torch.ones(WIDTH)]
    for step in range(21):
        plain = mean ** (step / 20)
        found += [one / (one.max() * one.min()).sqrt() for one in (plain, plain / (relative ** (1 - step / 20) + 1e-4))]
    return found


def searched(problem: Problem, **options: Any) -> ScaleSearch:
    inputs, weight = problem
    given: dict[str, Any] = {"scale_dtype": BF16, "num_rows": ROWS, "duo_scaling": "both"} | options
    return search_scales([weight], inputs.T @ inputs, inputs.abs().mean(0), [INT4], **given)


@pytest.mark.parametrize("make", PROBLEMS)
def test_ends_as_an_exhaustive_search_in_float64(make: Callable[[torch.Generator], Problem]) -> None:
    inputs, weight = problem = make(torch.Generator().manual_seed(0))
    gram = inputs.T @ inputs
    everything = losses([weight], gram, candidates(*problem), INT4)
    for dtype in (F32, BF16):
        got = searched(problem, race_dtype=dtype)
        own = losses([weight], gram, [got.scale_I], INT4)[0]
        assert own == pytest.approx(min(everything), rel=1e-6)
        assert own <= everything[0] * (1 + 1e-6)
        assert got.loss == pytest.approx(own, rel=1e-3)
        assert got.loss_before == pytest.approx(everything[0], rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_finds_one_of_the_best_of_candidates_that_have_nothing_in_common(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its curve is noise, so that no shape of the curve helps: the loss is at most 0.1 % above the least."""
    generator = torch.Generator().manual_seed(seed)
    inputs, weight = problem = PROBLEMS[seed](generator)
    scales = [torch.ones(WIDTH)] + [torch.exp(0.2 * torch.randn(WIDTH, generator=generator)) for _ in range(30)]
    made = [awq._Candidate(scale_I=scale, ratio=place / 30, is_duo=False) for place, scale in enumerate(scales)]
    monkeypatch.setattr(awq, "_candidates", lambda *_: made)
    got = searched(problem)
    everything = losses([weight], inputs.T @ inputs, scales, INT4)
    assert everything[round(got.ratio * 30)] <= min(min(everything) * 1.001, everything[0])


@pytest.mark.parametrize("name", SCHEMES)
def test_all_schemes_and_many_weights(name: str) -> None:
    """Weights of a group are joined, apart, or rounded whole, depending on what their rows share."""
    generator = torch.Generator().manual_seed(1)
    inputs, weight = outliers(generator)
    weights, gram = list(weight[:4500].split(450)), inputs.T @ inputs
    args = SCHEMES[name]
    got = search_scales(
        weights, gram, inputs.abs().mean(0), [args] * 10, scale_dtype=BF16, duo_scaling=False, num_rows=450
    )
    scales = candidates(inputs, weight)[1::2]
    everything = losses(weights, gram, scales, args)
    assert got.ratio == min(range(21), key=everything.__getitem__) / 20
    assert got.loss == pytest.approx(min(everything), rel=1e-3)


def test_sums_that_overflow_choose_no_scale() -> None:
    inputs, weight = outliers(torch.Generator().manual_seed(0))
    got = search_scales([weight * 1e4], inputs.T @ inputs * 1e30, inputs.abs().mean(0), [INT4], scale_dtype=BF16)
    assert torch.equal(got.scale_I, torch.ones(WIDTH))


@pytest.mark.parametrize(
    ("num_tokens", "size", "num_rows"),
    [(1, 1.0, 1), (1, 1.0, 16), (300, 1e-20, 4), (300, 1e-20, 600)],  # squares of the smaller inputs are subnormal
)
def test_bfloat16_chooses_as_float32_where_it_is_too_coarse(num_tokens: int, size: float, num_rows: int) -> None:
    for seed in range(6):
        inputs, weight = outliers(torch.Generator().manual_seed(seed))
        problem = inputs[:num_tokens] * size, weight[:num_rows]
        exact, coarse = (searched(problem, race_dtype=dtype) for dtype in (F32, BF16))
        assert torch.equal(exact.scale_I, coarse.scale_I)
        assert coarse.loss <= coarse.loss_before


def test_losses_that_rounding_makes_negative_end_the_race() -> None:
    inputs, weight = outliers(torch.Generator().manual_seed(0))
    gram = -inputs.T @ inputs
    for dtype in (F32, BF16):
        given: dict[str, Any] = {"scale_dtype": BF16, "num_rows": ROWS, "race_dtype": dtype}
        got = search_scales([weight], gram, inputs.abs().mean(0), [INT4], **given)
        assert got.loss <= got.loss_before < 0


def test_is_deterministic() -> None:
    first, second = (searched(even(torch.Generator().manual_seed(0)), race_dtype=F32) for _ in range(2))
    assert torch.equal(first.scale_I, second.scale_I)
    assert (first.loss, first.loss_before) == (second.loss, second.loss_before)


@pytest.mark.parametrize("dtype", [F32, torch.float64])
def test_parts_of_a_sum_change_no_bit(dtype: torch.dtype) -> None:
    weight = torch.randn(5001, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    groups = weight.abs().reshape(5001, 3, 32)
    whole = (groups / groups.amax(-1, keepdim=True).clamp(min=1e-8)).reshape(5001, 96).sum(dim=0)
    assert torch.equal(awq._relative_sum(weight, INT4), whole)


class _Products(LeanDispatchMode):
    """Counts the multiplications of products, by the dtype of their operands."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.mkldnn._linear_pointwise.default):
            count = self.counts.get(args[0].dtype, 0)
            self.counts[args[0].dtype] = count + result.numel() * args[0].shape[-1]
        return result


@pytest.mark.parametrize("dtype", [F32, pytest.param(BF16, marks=needs_bf16)])
def test_multiplies_less_than_a_third_of_an_exhaustive_search(dtype: torch.dtype) -> None:
    width, rows = 2048, 512
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, width, generator=generator)
    inputs[:, ::50] *= 20
    weight = torch.randn(rows, width, generator=generator)
    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=128)
    with _Products() as products:
        search_scales([weight], inputs.T @ inputs, inputs.abs().mean(0), [args], scale_dtype=BF16, race_dtype=dtype)
    counts = products.counts
    counts[F32] -= len(inputs) * width**2  # the Gram matrix
    exhaustive = 22 * rows * width**2
    assert 0 < sum(counts.values()) < exhaustive / 3
    if dtype == BF16:
        assert counts[F32] < 3 * rows * width**2  # those that are close at the end
        assert counts[BF16] > counts[F32]
