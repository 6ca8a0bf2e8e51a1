"""Solves in stacks, as on a GPU: the results are those of a CPU, and do not depend on the other problems of a stack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms import gptq_cuda, gptq_options, gptq_stack_factors, gptq_stacks, grid
from runtime.algorithms.gptq import quantize_siblings
from runtime.algorithms.gptq_factors import factored
from runtime.algorithms.gptq_options import SolvedPiece, SolveOptions
from runtime.algorithms.gptq_stack_factors import factored_stack, num_stacked
from runtime.algorithms.gptq_stacks import solve_together
from runtime.algorithms.gptq_tiles import tiles_of
from runtime.errors import QuantizationError
from tests.runtime.test_gptq_tiles import SCHEMES

NUM_IN, SHAPES, FULL = 192, ((70, 192), (40, 192)), 4
HALF = torch.float16


@pytest.fixture
def queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Solve on the CPU as on a GPU, in small parts, and without the kernel."""
    monkeypatch.setattr(gptq_options, "is_asynchronous", lambda device: True)
    monkeypatch.setattr(gptq_cuda, "has_triton", lambda: False)
    monkeypatch.setattr(gptq_stack_factors, "_SMALL", 48)
    monkeypatch.setattr(gptq_stack_factors, "_SMALL_IN_STACK", 32)
    monkeypatch.setattr(gptq_stack_factors, "_ROWS", 40)
    monkeypatch.setattr(gptq_stacks, "PANEL", 56)


def hessian(seed: int = 0, *, dead: Sequence[int] = ()) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size_I = 0.1 + 3 * torch.rand(NUM_IN, generator=generator)
    inputs = torch.randn(500, NUM_IN, generator=generator) @ torch.randn(NUM_IN, NUM_IN, generator=generator) * size_I
    inputs[:, list(dead)] = 0
    return inputs.T @ inputs


def weights(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES]


def options_of(args: QuantizationArgs, own: Sequence[torch.Tensor] = (), **changes: Any) -> SolveOptions:
    scale = grid.shared_global_scale(args, None, own) if own else None
    return SolveOptions(args=args, scale_dtype=torch.bfloat16, global_scale=scale, **changes)


def together(
    seeds: Sequence[int], args: QuantizationArgs, hessians: Sequence[torch.Tensor] | None = None, **changes: Any
) -> list[list[SolvedPiece] | QuantizationError]:
    given = [weights(seed) for seed in seeds]
    options = [options_of(args, own, **changes) for own in given]
    found = [hessian(seed) for seed in seeds] if hessians is None else list(hessians)
    return solve_together(given, found, tiles_of(SHAPES, args, "cpu"), options, FULL)


def assert_same(one: list[SolvedPiece] | QuantizationError, other: list[SolvedPiece] | QuantizationError) -> None:
    assert isinstance(one, list) and isinstance(other, list) and len(one) == len(other) > 0
    for first, second in zip(one, other, strict=True):
        assert first.piece == second.piece and first.size == second.size and first.rows.loss == second.rows.loss
        assert torch.equal(first.rows.weight_OI, second.rows.weight_OI)
        assert torch.equal(first.rows.scale, second.rows.scale) and first.rows.damping == second.rows.damping


@pytest.mark.parametrize("actorder", ["static", None])
@pytest.mark.parametrize("name", SCHEMES)
def test_equals_the_solve_on_a_cpu(name: str, actorder: str | None, request: pytest.FixtureRequest) -> None:
    own, given = weights(), (hessian(dead=(3, 50)), SCHEMES[name])
    how: dict[str, Any] = {"scale_dtype": torch.bfloat16, "actorder": actorder}
    plain = list(quantize_siblings(own, *given, **how))
    request.getfixturevalue("queued")
    found = list(quantize_siblings(own, *given, **how))
    for one, other in zip(plain, found, strict=True):
        same = one.weight_OI == other.weight_OI
        assert same.all(dim=1).float().mean() > 0.9, "sums in another order; a tie may fall to the other side"
        assert torch.isclose(one.scale.float(), other.scale.float(), rtol=0.01).float().mean() > 0.99
        assert other.loss == pytest.approx(one.loss, rel=1e-3) and one.damping == other.damping
        assert (one.zero_point is None) == (other.zero_point is None) and other.weight_OI.is_contiguous()


@pytest.mark.parametrize(
    ("name", "observer"),
    [
        ("group", "imatrix_mse"),
        ("group asymmetric", "memoryless_minmax"),
        ("channel", "percentile"),
        ("tensor", "memoryless_minmax"),
        ("NVFP4", "memoryless_minmax"),
        ("block", "memoryless_minmax"),
    ],
)
@pytest.mark.usefixtures("queued")
def test_a_result_does_not_depend_on_the_others(name: str, observer: str) -> None:
    args = SCHEMES[name].model_copy(update={"observer": observer})
    both = together((1, 2, 3), args)
    for place, seed in enumerate((1, 2, 3)):
        assert_same(both[place], together((seed,), args)[0])
    assert_same(both[1], together((2, 3, 1, 0), args)[0])
    own = weights(1)
    alone = list(quantize_siblings(own, hessian(1), args, scale_dtype=torch.bfloat16))
    first = both[0]
    assert isinstance(first, list)
    for piece in first:
        part = alone[piece.piece.weight].weight_OI[piece.piece.rows]
        assert (piece.rows.weight_OI == part).all(dim=1).float().mean() > 0.9


@pytest.mark.usefixtures("queued")
def test_a_bad_problem_does_not_disturb_the_others() -> None:
    args = SCHEMES["group"]
    flat = torch.zeros(NUM_IN, NUM_IN)
    infinite, indefinite, hard = hessian(1), -2 * torch.eye(NUM_IN), hessian(3)
    infinite[5, 5] = torch.inf
    indefinite.diagonal()[0] = NUM_IN * 2.0
    hard -= 0.1 * hard.diagonal().mean() * torch.eye(NUM_IN)  # needs more dampening
    expected = together((0,), args)
    found = together((0, 1, 2, 3), args, [hessian(0), infinite, flat, hard])
    assert_same(found[0], expected[0])
    assert "is not finite" in str(found[1]) and "is zero: no input reached" in str(found[2])
    assert isinstance(found[3], list) and found[3][0].rows.damping > 0.01
    assert_same(found[3], together((3,), args, [hard])[0])
    again = together((0, 1, 2), args, [hessian(0), indefinite, hessian(2)])
    assert_same(again[0], expected[0])
    assert "does not factor with dampening 1" in str(again[1])
    assert_same(again[2], together((2,), args)[0])


def test_raised_dampening_is_that_of_a_cpu(request: pytest.FixtureRequest) -> None:
    hard = hessian(3)
    hard -= 0.1 * hard.diagonal().mean() * torch.eye(NUM_IN)
    plain = factored(hard, "static", 0.01, torch.float32)
    request.getfixturevalue("queued")
    found = factored_stack([hard], [SHAPES[0]], "static", 0.01, torch.float32).only()
    assert found.damping == plain.damping > 0.01
    torch.testing.assert_close(found.pivot_I, plain.pivot_I, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.lower_II.tril(), plain.lower_II.tril(), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(found.added_I, plain.added_I)
    assert torch.equal(found.order_I, plain.order_I) and torch.equal(found.diagonal_I, plain.diagonal_I)


@pytest.mark.usefixtures("queued")
def test_numbers_that_are_not_finite_are_found_when_they_are_read() -> None:
    args = SCHEMES["group"]
    bad, good = weights(0), weights(1)
    bad[1][7, 9] = torch.nan
    tiles, options = tiles_of(SHAPES, args, "cpu"), [options_of(args)] * 2
    found = solve_together([bad, good], [hessian(0), hessian(1)], tiles, options, FULL)
    assert "shape [40, 192] holds numbers that are not finite" in str(found[0])
    assert_same(found[1], together((1,), args)[0])
    large = [weight.float() * 1e6 for weight in good]
    narrow = [replace(one, scale_dtype=HALF) for one in options[:1]]
    (overflow,) = solve_together([large], [hessian(1)], tiles, narrow, FULL)
    assert "overflows float16" in str(overflow)


@pytest.mark.usefixtures("queued")
def test_options_are_checked() -> None:
    with pytest.raises(QuantizationError, match="dampening_frac must be above 0"):
        together((1,), SCHEMES["group"], dampening_frac=2.0)
    with pytest.raises(QuantizationError, match="block_size must be at least 1"):
        together((1,), SCHEMES["group"], block_size=0)


def test_the_size_of_a_stack_depends_on_shapes() -> None:
    assert [num_stacked(num_in, 256) for num_in in (256, 2048, 4096, 5120, 8192)] == [16, 16, 4, 2, 1]
    assert [num_stacked(1024, experts) for experts in (8, 60, 64, 128, 1000)] == [1, 4, 8, 16, 16]
