"""A Hessian is factorized in its own memory, for whoever needs it no more, to the same bits as in a copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from runtime.algorithms import products
from runtime.algorithms.gptq import quantize_siblings
from runtime.algorithms.gptq_factors import factored
from runtime.quantize.statistics import InputStatistics
from runtime.recipe.recipe import Recipe
from tests.runtime.small import NARROW_W4, Small, calibrate, read_tensors, recipe
from tests.runtime.test_gptq import int_args

SIZES = (1, 96, 128, 640, 1300)


def hessian(size: int, smallest: float) -> torch.Tensor:
    """Symmetric, with a smallest eigenvalue."""
    found_II, value, vector_I = with_smallest_pair(size)
    found_II = found_II + (smallest - value) * torch.outer(vector_I, vector_I)
    return torch.maximum(found_II, found_II.t())


@cache
def with_smallest_pair(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A positive matrix, its smallest eigenvalue and the vector of it, which take a second for the largest size."""
    generator = torch.Generator().manual_seed(size)
    found_II = torch.randn(size, 2 * size, generator=generator)
    found_II = found_II @ found_II.t() / (2 * size)
    values_I, vectors_II = torch.linalg.eigh(found_II)
    return found_II, values_I[0], vectors_II[:, 0]


@pytest.mark.parametrize("actorder", ["static", None])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("smallest", [0.1, -0.05])
def test_factors_are_those_of_a_copy(size: int, smallest: float, actorder: str | None) -> None:
    """Also where dampening is raised, for which the matrix is wanted once more."""
    hessian_II = hessian(size, smallest) if size > 1 else torch.ones(1, 1)
    before_II = hessian_II.clone()
    copied = factored(hessian_II, actorder, 1e-3, torch.float32)
    assert torch.equal(hessian_II, before_II)
    inside = factored(hessian_II, actorder, 1e-3, torch.float32, overwrite_hessian=True)
    assert inside.lower_II.data_ptr() == hessian_II.data_ptr()
    assert torch.equal(inside.lower_II.tril(), copied.lower_II.tril())
    assert torch.equal(inside.pivot_I, copied.pivot_I) and torch.equal(inside.added_I, copied.added_I)
    assert torch.equal(inside.order_I, copied.order_I) and torch.equal(inside.diagonal_I, copied.diagonal_I)
    assert inside.damping == copied.damping
    if size > 96:
        assert (copied.damping > 1e-3) == (smallest < 0)


def test_in_another_dtype_it_is_a_copy() -> None:
    hessian_II = hessian(96, 0.1)
    before_II = hessian_II.clone()
    factors = factored(hessian_II, "static", 0.01, torch.float64, overwrite_hessian=True)
    assert factors.lower_II.dtype == torch.float64 and torch.equal(hessian_II, before_II)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("small", [128, 512])
def test_a_factorization_reaches_no_further(size: int, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_SMALL", small)
    before_II = hessian(size, 0.1) if size > 1 else torch.ones(1, 1)
    after_II = before_II.clone()
    assert products.factorize_(after_II)
    reached = products.reach(after_II.device)
    assert torch.equal(after_II.triu(reached), before_II.triu(reached))


def test_what_is_above_the_diagonal_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody filled holds anything: here it is filled with NaN."""
    hessian_II = hessian(1300, 0.1)
    weight_OI = torch.randn(40, 1300, generator=torch.Generator().manual_seed(0))

    def solved() -> torch.Tensor:
        (result,) = quantize_siblings([weight_OI], hessian_II, int_args(strategy="channel"), scale_dtype=torch.float32)
        return result.weight_OI

    expected_OI = solved()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        assert torch.equal(solved(), expected_OI)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("actorder", ["static", None])
def test_integers_are_those_of_a_copy(actorder: str | None) -> None:
    weights = [torch.randn(height, 1024, generator=torch.Generator().manual_seed(height)) for height in (40, 8)]
    hessian_II = hessian(1024, 0.1)
    found = [
        list(
            quantize_siblings(
                weights,
                hessian_II.clone(),
                int_args(symmetric=False),
                scale_dtype=torch.bfloat16,
                actorder=actorder,
                overwrite_hessian=overwrite,
            )
        )
        for overwrite in (False, True)
    ]
    for copied, inside in zip(*found, strict=True):
        assert torch.equal(copied.weight_OI, inside.weight_OI) and torch.equal(copied.scale, inside.scale)
        assert copied.loss == inside.loss


_MIXED = (
    "config_groups: {a: {targets: ['re:.*(q|up)_proj$'], weights: {num_bits: 8, strategy: channel}}, "
    "b: {targets: ['re:.*(k|v|gate|down)_proj$'], weights: {num_bits: 4, strategy: channel, symmetric: false}}}, "
    "ignore: [lm_head]"
)


@pytest.mark.parametrize("text", [NARROW_W4, _MIXED, f"{NARROW_W4}, fallback: rtn", f"{NARROW_W4}, refine: 2"])
@pytest.mark.parametrize("name", ["narrow_llama", "qwen3_moe"])
def test_none_is_overwritten_that_is_wanted_again(
    name: str, text: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Siblings with different schemes are solved one after the other, with one Hessian."""
    small: Small = request.getfixturevalue(name)
    taken: list[InputStatistics] = []
    real: Callable[[InputStatistics], torch.Tensor] = InputStatistics.take_hessian

    def take(self: InputStatistics) -> torch.Tensor:
        taken.append(self)
        return real(self)

    monkeypatch.setattr(InputStatistics, "take_hessian", take)
    calibrate(small, recipe(text, modifier="GPTQModifier"), tmp_path / "inside")
    assert bool(taken) == (text in (NARROW_W4, _MIXED))
    monkeypatch.setattr(InputStatistics, "take_hessian", lambda self: self.hessian_II.clone())
    calibrate(small, recipe(text, modifier="GPTQModifier"), tmp_path / "copied")
    inside, copied = read_tensors(tmp_path / "inside"), read_tensors(tmp_path / "copied")
    assert list(inside) == list(copied)
    assert all(torch.equal(inside[key], copied[key]) for key in copied)


def test_sums_of_what_is_only_rescaled_are_not_waited_for(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of query, key and value, which share a Hessian, one is rounded."""
    text = (
        "SmoothQuantModifier: {mappings: [[['re:.*q_proj', 're:.*k_proj', 're:.*v_proj'], 're:.*input_layernorm']]}\n"
        "GPTQModifier: {config_groups: {a: {targets: ['re:.*q_proj$'], weights: {num_bits: 8, strategy: channel}}}}"
    )
    taken: list[InputStatistics] = []
    real: Callable[[InputStatistics], torch.Tensor] = InputStatistics.take_hessian
    monkeypatch.setattr(InputStatistics, "take_hessian", lambda self: taken.append(self) or real(self))
    calibrate(narrow_llama, Recipe.from_text(text, "recipe.yaml"), tmp_path / "out")
    assert len(taken) == 3
