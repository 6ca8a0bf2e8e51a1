"""The parts of a solve that make it fast on a CPU: permutation, rounding by NumPy, and products in bf16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

import runtime
from runtime.algorithms import gptq_columns, products
from runtime.algorithms.gptq import SolvedPiece, SolveOptions, factor_siblings, solve_tiles
from runtime.algorithms.gptq_columns import Grids
from runtime.algorithms.gptq_factors import _reordered_in_place
from runtime.algorithms.gptq_tiles import tiles_of
from runtime.algorithms.grid import shared_global_scale
from runtime.streaming.options import RunOptions
from runtime.workers.group import Alone
from tests.runtime.test_gptq import FLOAT8, NVFP4, correlated, int_args

NUM_IN, HEIGHTS = 224, (70, 5)
SCHEMES = {
    "group": int_args(),
    "group asymmetric": int_args(3, symmetric=False),
    "channel": int_args(8, strategy="channel"),
    "tensor": int_args(2, strategy="tensor", symmetric=False),
    "float by channel": FLOAT8,
    "NVFP4": NVFP4,
}


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 700, 1409])
def test_a_hessian_is_permuted_in_place(size: int) -> None:
    values_II = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
    hessian_II = values_II + values_II.t()
    order_I = torch.randperm(size, generator=torch.Generator().manual_seed(1))
    expected_II = hessian_II[order_I][:, order_I]
    found_II = next(_reordered_in_place(hessian_II, order_I))
    assert found_II.data_ptr() == hessian_II.data_ptr()
    assert torch.equal(found_II, expected_II)


def solved(
    args: QuantizationArgs, dtype: torch.dtype = torch.float32, actorder: str | None = "static", **options: Any
) -> list[SolvedPiece]:
    """Solve two weights with blocks of 16 columns, so that products with earlier blocks are most of the work."""
    inputs_TI = correlated(NUM_IN, 600).to(dtype)
    weights = [torch.randn(h, NUM_IN, generator=torch.Generator().manual_seed(h)).to(dtype) for h in HEIGHTS]
    chosen = SolveOptions(args=args, scale_dtype=torch.float32, block_size=16, actorder=actorder, **options)
    found = factor_siblings(weights, inputs_TI.T @ inputs_TI, chosen)
    chosen = replace(chosen, global_scale=shared_global_scale(args, None, weights))
    return list(solve_tiles(weights, tiles_of([w.shape for w in weights], args, "cpu"), found, chosen))


def assert_same(first: Sequence[SolvedPiece], second: Sequence[SolvedPiece]) -> None:
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.rows.weight_OI.view(torch.int32), other.rows.weight_OI.view(torch.int32))
        assert (one.rows.loss, one.size) == (other.rows.loss, other.size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["group", "group asymmetric", "channel", "tensor"])
def test_numpy_rounds_as_torch_does(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with the sign of zero."""
    args = SCHEMES[name]
    expected = solved(args, dtype)

    def by_torch(factor_GO: torch.Tensor, zero_GO: torch.Tensor | None, num_bits: int, groups: Sequence[int]) -> Any:
        grids = Grids(scale_GO=factor_GO, factor_GO=factor_GO, zero_GO=zero_GO)
        assert num_bits == args.num_bits
        return gptq_columns._IntegerGrid(grids, args, groups)

    monkeypatch.setattr(gptq_columns, "HostIntegerGrid", by_torch)
    assert_same(expected, solved(args, dtype))


def test_numbers_that_are_not_finite_pass_through_numpy() -> None:
    """A scale of 0 gives infinity, which is clamped; NaN stays NaN."""
    rounded = gptq_columns.HostIntegerGrid(torch.tensor([[0.0, 0.0, 1.0, 0.5]]), None, 4, [0])
    targets, quantized, weights, errors = torch.tensor([[1.0, -1.0, torch.nan, 0.75]]), *torch.zeros(3, 1, 4)
    with pytest.warns(RuntimeWarning, match="divide by zero"):
        rounded.round_(0, *(rounded.rows(each.view(1, 4))[0] for each in (targets, quantized, weights, errors)))
    assert torch.equal(quantized[0].nan_to_num(99), torch.tensor([7.0, -8.0, 99.0, 2.0]))


@pytest.mark.parametrize("actorder", ["static", None])
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("is_quick", [True, False])
def test_the_loss_in_bfloat16_is_close(
    name: str, actorder: str | None, is_quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a processor that multiplies bf16 no faster: it multiplies the same rounded numbers in float32."""
    exact = solved(SCHEMES[name], actorder=actorder)
    monkeypatch.setattr(products, "has_quick_bfloat16", lambda: is_quick)
    found = solved(SCHEMES[name], actorder=actorder, far_dtype=torch.bfloat16)
    losses = [sum(piece.rows.loss for piece in pieces) for pieces in (exact, found)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_float64_is_not_rounded() -> None:
    args = SCHEMES["group"]
    assert_same(solved(args, torch.float64), solved(args, torch.float64, far_dtype=torch.bfloat16))


class Pair(Alone):
    """Two workers, of which the other one has another processor."""

    def __init__(self, other: bool) -> None:
        self.other = other

    def exchange(self, facts: Any) -> list[Any]:
        return [facts, self.other]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("other", [True, False])
def test_auto_is_decided_alike_on_all_workers(own: bool, other: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_quick_bfloat16", lambda: own)
    options = RunOptions(device=torch.device("cpu"), solve_products="auto")
    assert options.decided(Alone()).solve_products == ("bfloat16" if own else "float32")
    assert options.decided(Pair(other)).solve_products == ("bfloat16" if own and other else "float32")
    assert replace(options, device=torch.device("cuda")).decided(Alone()).solve_products == "float32"
    for name in ("float32", "bfloat16"):
        assert replace(options, solve_products=name).decided(Pair(other)).solve_products == name
        assert replace(options, solve_products=name).deciding(torch.float32)["solve products"] == name


def test_other_names_are_rejected() -> None:
    with pytest.raises(runtime.UsageError, match="solve_products must be one of auto, float32, bfloat16; got 'fp8'"):
        RunOptions(device=torch.device("cpu"), solve_products="fp8")
