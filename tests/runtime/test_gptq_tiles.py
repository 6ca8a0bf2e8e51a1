"""Tiles of a solve: the same bits for any order and any process, and the size of outputs from the factor."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms import gptq_tiles
from runtime.algorithms.gptq import SolvedPiece, SolveOptions, factor_siblings, joined, quantize_siblings, solve_tiles
from runtime.algorithms.gptq_factors import Factored, factored
from runtime.algorithms.gptq_tiles import Piece, Tile, tiles_of
from runtime.algorithms.grid import shared_global_scale
from runtime.algorithms.observers import fitted_grid
from runtime.errors import QuantizationError
from tests.runtime.test_gptq import FLOAT8, MXFP4, NVFP4, int_args
from tests.sweep import sweep

NUM_IN = 192
SHAPES = ((150, NUM_IN), (7, NUM_IN), (33, NUM_IN), (100, NUM_IN))
BLOCKS = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="block", block_structure=[10, 32])
SCHEMES = {
    "group": int_args(),
    "group asymmetric": int_args(3, symmetric=False),
    "channel": int_args(8, strategy="channel"),
    "tensor": int_args(strategy="tensor"),
    "float by channel": FLOAT8,
    "NVFP4": NVFP4,
    "MXFP4": MXFP4,
    "block": BLOCKS,
}
OBSERVERS = ("memoryless_minmax", "mse", "imatrix_mse", "percentile")


@pytest.fixture(autouse=True)
def low_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 64 rows, of which the small weights here have several."""
    monkeypatch.setattr(gptq_tiles, "_HEIGHT", 64)


def siblings() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(shape, generator=generator) * (1 + index)).bfloat16() for index, shape in enumerate(SHAPES)]


def inputs(num_in: int = NUM_IN, num_tokens: int = 500) -> torch.Tensor:
    """Features [T, I] that depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(num_in)
    size_I = 0.1 + 3 * torch.rand(num_in, generator=generator)
    return torch.randn(num_tokens, num_in, generator=generator) @ (
        torch.randn(num_in, num_in, generator=generator) / num_in**0.5 * size_I
    )


def options_for(args: QuantizationArgs, **others: Any) -> SolveOptions:
    return SolveOptions(
        args=args,
        scale_dtype=torch.bfloat16,
        global_scale=shared_global_scale(args, None, siblings()),
        **others,
    )


def received(found: Factored) -> Factored:
    """The factors as another process gets them; values that are not sent are NaN."""
    got = Factored.empty(len(found.order_I), found.lower_II.dtype, "cpu")
    got.lower_II.fill_(torch.nan)
    for part, sent in zip(got.parts(), found.parts(), strict=True):
        part.copy_(sent.contiguous())
    return dataclasses.replace(got, damping=found.damping)


def solved(tiles: Sequence[Tile], found: Factored, options: SolveOptions) -> dict[Piece, SolvedPiece]:
    return {one.piece: one for one in solve_tiles(siblings(), tiles, found, options)}


def assert_equal(one: SolvedPiece, other: SolvedPiece) -> None:
    assert torch.equal(one.rows.weight_OI, other.rows.weight_OI)
    assert torch.equal(one.rows.scale, other.rows.scale)
    assert (one.rows.zero_point is None) == (other.rows.zero_point is None)
    if one.rows.zero_point is not None and other.rows.zero_point is not None:
        assert torch.equal(one.rows.zero_point, other.rows.zero_point)
    assert (one.rows.loss, one.size, one.rows.damping) == (other.rows.loss, other.size, other.rows.damping)


# The cut


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["group", "block"])
def test_tiles_hold_each_row_once_and_in_order(name: str, device_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq_tiles, "_HEIGHT_ON_CUDA", 90)
    height = {"cpu": 64, "cuda": 90}[device_type]
    choose = random.Random(0)
    for _ in range(200):
        shapes = [(choose.randint(1, 300), NUM_IN) for _ in range(choose.randint(1, 8))]
        pieces = [piece for tile in tiles_of(shapes, SCHEMES[name], device_type) for piece in tile]
        rows = [(piece.weight, row) for piece in pieces for row in range(*piece.rows.indices(10**6))]
        assert rows == [(index, row) for index, (count, _) in enumerate(shapes) for row in range(count)]
        sizes = [sum(p.stop - p.start for p in tile) for tile in tiles_of(shapes, SCHEMES[name], device_type)]
        assert max(sizes) <= height
        if name == "block":
            assert all(piece.start % 10 == 0 for piece in pieces)
        else:
            assert all(size == height for size in sizes[:-1])


def test_long_rows_have_lower_tiles_and_tall_blocks_higher_ones() -> None:
    assert [tile[0].stop for tile in tiles_of([(600, 8193)], int_args(), "cpu")] == [512, 600]
    tall = BLOCKS.model_copy(update={"block_structure": [100, 32]})
    assert tiles_of([(250, NUM_IN)], tall, "cpu") == [(Piece(0, 0, 100),), (Piece(0, 100, 200),), (Piece(0, 200, 250),)]


# Independence


@pytest.mark.parametrize("actorder", [None, "static"])
@pytest.mark.parametrize("name", SCHEMES)
def test_tiles_are_the_same_in_any_order_and_any_process(name: str, actorder: str | None) -> None:
    options = options_for(SCHEMES[name], actorder=actorder)
    hessian_II = inputs().T @ inputs()
    found = factor_siblings(siblings(), hessian_II, options)
    tiles = tiles_of(SHAPES, options.args, "cpu")
    assert len(tiles) >= 5 and any(len(tile) > 1 for tile in tiles)
    expected = solved(tiles, found, options)
    elsewhere = received(found)
    for some in (tiles[::-1], tiles[::2], tiles[1:2]):
        for piece, got in solved(some, elsewhere, options).items():
            assert_equal(got, expected[piece])
    whole = quantize_siblings(siblings(), hessian_II, options.args, scale_dtype=torch.bfloat16, actorder=actorder)
    for index, result in enumerate(whole):
        pieces = [one for piece, one in expected.items() if piece.weight == index]
        again = joined(pieces[::-1])
        assert result.weight_OI.shape == SHAPES[index]
        assert torch.equal(result.weight_OI, again.weight_OI) and torch.equal(result.scale, again.scale)
        assert result.loss == again.loss == sum(one.rows.loss for one in pieces)


@pytest.mark.parametrize(
    ("name", "observer"),
    sweep(
        itertools.product(SCHEMES, OBSERVERS),
        *zip(SCHEMES, itertools.cycle(OBSERVERS), strict=False),
        *(("group asymmetric", "imatrix_mse"), ("block", "mse"), ("tensor", "imatrix_mse"), ("channel", "mse")),
    ),
)
def test_a_tile_has_the_grids_of_the_whole_weight(name: str, observer: str) -> None:
    """The search of ranges adds up errors of each row or block alone."""
    args = SCHEMES[name].model_copy(update={"observer": observer, "observer_kwargs": {}})
    options = options_for(args)
    hessian_II = inputs().T @ inputs()
    found = factor_siblings(siblings(), hessian_II, options)
    pieces = solved(tiles_of(SHAPES, args, "cpu"), found, options).values()
    for index, weight_OI in enumerate(siblings()):
        expected = fitted_grid(
            weight_OI,
            args,
            scale_dtype=torch.bfloat16,
            global_scale=options.global_scale,
            importance_I=hessian_II.diagonal(),
        )
        got = joined([one for one in pieces if one.piece.weight == index])
        assert torch.equal(got.scale, expected.scale_RC.reshape(got.scale.shape).to(got.scale.dtype))
        if expected.zero_point_RC is not None and got.zero_point is not None:
            assert torch.equal(got.zero_point, expected.zero_point_RC.reshape(got.zero_point.shape))


@pytest.mark.parametrize("name", ["group", "channel", "block"])
def test_rows_do_not_depend_on_their_tile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, where the order of additions decides no rounding."""
    hessian_II = (inputs().T @ inputs()).double()
    low = list(quantize_siblings(siblings(), hessian_II, SCHEMES[name], scale_dtype=torch.bfloat16))
    monkeypatch.setattr(gptq_tiles, "_HEIGHT", 1000)
    for one, other in zip(
        low, quantize_siblings(siblings(), hessian_II, SCHEMES[name], scale_dtype=torch.bfloat16), strict=True
    ):
        assert torch.equal(one.weight_OI, other.weight_OI) and torch.equal(one.scale, other.scale)
        assert one.loss == pytest.approx(other.loss, rel=1e-9)


@pytest.mark.parametrize("num_in", [1, 96, 512, 1300])
def test_factors_are_sent_in_half_a_matrix(num_in: int) -> None:
    found = factored(inputs(num_in).T @ inputs(num_in), "static", 0.01, torch.float32)
    got = received(found)
    assert torch.equal(got.lower_II.tril(), found.lower_II.tril())
    for name in ("order_I", "diagonal_I", "pivot_I", "added_I", "damping"):
        one, other = getattr(got, name), getattr(found, name)
        assert one == other if name == "damping" else torch.equal(one, other) and one.dtype == other.dtype
    numbers = sum(part.numel() for part in found.parts())
    assert numbers <= num_in * (num_in + 512) / 2 + 4 * num_in or num_in <= 512


# The size of outputs


def exact(weight_OI: torch.Tensor, hessian_II: torch.Tensor) -> float:
    wide = weight_OI.double()
    return float(((wide @ hessian_II.double()) * wide).sum())


KINDS = ("ordinary", "dead columns", "few tokens", "one outlier", "raised damping")


@pytest.mark.parametrize(
    ("kind", "num_in", "actorder"),
    sweep(
        itertools.product(KINDS, (96, 640), (None, "static")),
        *((kind, num_in, actorder) for kind in KINDS for num_in, actorder in ((96, None), (640, "static"))),
    ),
)
def test_the_size_is_that_of_the_outputs(num_in: int, kind: str, actorder: str | None) -> None:
    inputs_TI = inputs(num_in, num_tokens=40 if kind == "few tokens" else 2 * num_in)
    if kind == "dead columns":
        inputs_TI[:, ::5] = 0
    if kind == "one outlier":
        inputs_TI[:, 3] *= 100
    hessian_II = inputs_TI.T @ inputs_TI
    if kind == "raised damping":
        values_I, vectors_II = torch.linalg.eigh(hessian_II)
        smallest = -0.05 * float(hessian_II.diagonal().mean())
        hessian_II += (smallest - values_I[0]) * torch.outer(vectors_II[:, 0], vectors_II[:, 0])
    weights = [torch.randn(height, num_in, generator=torch.Generator().manual_seed(height)) for height in (90, 5)]
    options = SolveOptions(args=int_args(strategy="channel"), scale_dtype=torch.float32, actorder=actorder)
    found = factor_siblings(weights, hessian_II, options)
    assert (found.damping > 0.05) == (kind == "raised damping")
    pieces = list(solve_tiles(weights, tiles_of([w.shape for w in weights], options.args, "cpu"), found, options))
    for index, weight_OI in enumerate(weights):
        size = sum(one.size for one in pieces if one.piece.weight == index)
        assert size == pytest.approx(exact(weight_OI, hessian_II), rel=1e-3)


def test_the_size_of_many_rows_is_estimated() -> None:
    """Rows have very different sizes, and errors relative to them; their ratio is reported."""
    inputs_TI = inputs(96)
    hessian_II = inputs_TI.T @ inputs_TI
    weight_OI = torch.randn(1000, 96, generator=torch.Generator().manual_seed(0))
    weight_OI *= torch.logspace(-2, 1, 1000)[torch.randperm(1000, generator=torch.Generator().manual_seed(1)), None]
    options = SolveOptions(args=int_args(strategy="channel"), scale_dtype=torch.float32)
    found = factor_siblings([weight_OI], hessian_II, options)
    (piece,) = solve_tiles([weight_OI], [(Piece(0, 0, 1000),)], found, options)
    assert piece.size == pytest.approx(exact(weight_OI, hessian_II), rel=0.1)
    assert piece.size != pytest.approx(exact(weight_OI, hessian_II), rel=1e-6), "all rows were multiplied"


def test_a_size_is_never_negative() -> None:
    """A weight whose outputs are all zero has only rounding errors, of either sign."""
    inputs_TI = inputs(96)
    inputs_TI[:, 1] = inputs_TI[:, 0]
    weight_OI = torch.zeros(40, 96)
    weight_OI[:, 0], weight_OI[:, 1] = 1, -1
    options = SolveOptions(args=int_args(strategy="channel"), scale_dtype=torch.float32, dampening_frac=1.0)
    found = factor_siblings([weight_OI], inputs_TI.T @ inputs_TI, options)
    sizes = [one.size for one in solve_tiles([weight_OI], tiles_of([(40, 96)], options.args, "cpu"), found, options)]
    assert min(sizes) >= 0
    assert sum(sizes) <= 1e-3 * float(inputs_TI.square().sum())


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [({"dampening_frac": 2.0}, "dampening_frac"), ({"block_size": 0}, "block_size"), ({"actorder": "group"}, "group")],
)
def test_options_are_checked_before_anything_is_factored(change: dict[str, Any], message: str) -> None:
    hessian_II = torch.eye(NUM_IN)
    with pytest.raises(QuantizationError, match=message):
        factor_siblings(siblings(), hessian_II, options_for(int_args(), **change), overwrite_hessian=True)
    assert torch.equal(hessian_II, torch.eye(NUM_IN))


def test_a_scale_that_its_dtype_cannot_hold_is_an_error_of_the_tile() -> None:
    weights = [torch.full((100, NUM_IN), 1e8)]
    options = SolveOptions(args=int_args(strategy="channel"), scale_dtype=torch.float16)
    found = factor_siblings(weights, torch.eye(NUM_IN), options)
    with pytest.raises(QuantizationError, match="overflows float16"):
        list(solve_tiles(weights, tiles_of([(100, NUM_IN)], options.args, "cpu"), found, options))


def test_tiles_of_siblings_are_enough_for_any_split_among_workers() -> None:
    """Each worker solves some tiles; together they have all rows."""
    options = options_for(int_args())
    found = factor_siblings(siblings(), inputs().T @ inputs(), options)
    tiles = tiles_of(SHAPES, options.args, "cpu")
    for num_workers in (2, 3, 16):
        shares = [solved(tiles[rank::num_workers], received(found), options) for rank in range(num_workers)]
        pieces = list(itertools.chain.from_iterable(share.values() for share in shares))
        for index, expected in enumerate(
            quantize_siblings(siblings(), inputs().T @ inputs(), options.args, scale_dtype=torch.bfloat16)
        ):
            got = joined([one for one in pieces if one.piece.weight == index])
            assert torch.equal(got.weight_OI, expected.weight_OI) and got.loss == expected.loss
