"""A second pass of GPTQ, whose ranges are searched for the targets of the first."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms import gptq_cuda, gptq_options, gptq_stack_grids
from runtime.algorithms.gptq import factor_siblings, quantize_siblings, solve_tiles
from runtime.algorithms.gptq_grids import Fitting
from runtime.algorithms.gptq_options import SolveOptions
from runtime.algorithms.gptq_stack_factors import FactorStack
from runtime.algorithms.gptq_stack_grids import Problem
from runtime.algorithms.gptq_stacks import solve_stack
from runtime.algorithms.gptq_tiles import tiles_of
from runtime.algorithms.observers import fitted_grid
from runtime.algorithms.result import QuantizedWeight
from runtime.errors import QuantizationError, RecipeError
from runtime.recipe.recipe import Recipe


def correlated(num_in: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(4 * num_in, num_in, generator=generator, dtype=torch.float64)
    return inputs @ torch.randn(num_in, num_in, generator=generator, dtype=torch.float64)


def searched(num_bits: int, observer: str = "signed_mse") -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=num_bits, type="int", symmetric=True, strategy="group", group_size=32, observer=observer
    )


def plain_targets(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Equation 2 of the paper in float64, written for w - q: t_k is w_k plus what compensates earlier errors."""
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    errors, targets = (weight - quantized)[:, order], torch.zeros_like(weight)
    damped = damped[order][:, order]
    for place in range(len(order)):
        free = slice(place, None)  # the columns that compensate the errors of those before
        wanted = torch.linalg.solve(damped[free, free], damped[free, :place] @ errors[:, :place].T)[0]
        targets[:, order[place]] = weight[:, order[place]] + wanted
    return targets


def row_losses(weight: torch.Tensor, found: QuantizedWeight, hessian: torch.Tensor) -> torch.Tensor:
    errors = weight - found.weight_OI.double()
    return ((errors @ hessian) * errors).sum(dim=1)


@pytest.mark.parametrize("num_bits", [2, 3])
def test_second_pass_searches_ranges_of_the_targets(num_bits: int) -> None:
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    inputs = correlated()
    hessian, scheme = inputs.T @ inputs, searched(num_bits)
    (first,) = quantize_siblings([weight], hessian, scheme, scale_dtype=torch.float32)
    (second,) = quantize_siblings([weight], hessian, scheme, scale_dtype=torch.float32, range_passes=2)
    targets = plain_targets(weight, first.weight_OI.double(), hessian).float()
    observed = scheme.model_copy(update={"observer_kwargs": {"norm": 2.4}})
    expected = fitted_grid(targets, observed, scale_dtype=torch.float32).scale_RC
    is_kept = (second.scale == first.scale).all(dim=1, keepdim=True)
    is_new = (second.scale - expected).abs() <= 1e-3 * expected.abs()
    # Where two ranges are equally good, the last digit decides.
    assert float((is_kept | is_new).float().mean()) > 0.95
    assert 0 < int(is_kept.sum()) < len(weight)
    assert second.loss < 0.99 * first.loss
    losses = [row_losses(weight, found, hessian) for found in (first, second)]
    assert bool((losses[1] <= losses[0] * (1 + 1e-6)).all())
    (again,) = quantize_siblings([weight], hessian, scheme, scale_dtype=torch.float32, range_passes=2)
    assert torch.equal(second.weight_OI, again.weight_OI)


def test_second_pass_in_a_stack_equals_that_of_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq_cuda, "has_triton", lambda: False)
    monkeypatch.setattr(gptq_stack_grids, "PANEL", 56)
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(9))
    inputs = correlated()
    hessian = (inputs.T @ inputs).float()
    options = SolveOptions(args=searched(3), scale_dtype=torch.bfloat16, range_passes=2)
    found = factor_siblings([weight], hessian, options)
    (tile,) = tiles_of([weight.shape], options.args, "cpu")
    (alone,) = solve_tiles([weight], [tile], found, options)
    problem = Problem(weights=[weight], tile=tile, fitting=Fitting.of([weight], found.diagonal_I, options))
    (stacked,) = solve_stack([problem], FactorStack.of(found), options)
    assert not isinstance(stacked, QuantizationError)
    assert torch.equal(alone.rows.scale, stacked[0].rows.scale)
    assert torch.equal(alone.rows.weight_OI, stacked[0].rows.weight_OI)
    assert stacked[0].rows.loss == pytest.approx(alone.rows.loss, rel=1e-3)


@pytest.mark.parametrize(("observer", "actorder"), [("minmax", "static"), ("signed_mse", None)])
def test_second_pass_requires_searched_ranges_and_static_order(observer: str, actorder: str | None) -> None:
    weight, inputs = torch.randn(4, 128), correlated()
    with pytest.raises(QuantizationError, match="range_passes 2 requires ranges that are searched"):
        list(
            quantize_siblings(
                [weight],
                inputs.T @ inputs,
                searched(3, observer),
                scale_dtype=torch.float32,
                actorder=actorder,
                range_passes=2,
            )
        )
    null = "" if actorder else ", actorder: null"
    with pytest.raises(RecipeError, match="range_passes 2 requires ranges that are searched"):
        Recipe.from_text(
            f"GPTQModifier: {{targets: Linear, scheme: W3A16, weight_observer: {observer}, range_passes: 2{null}}}", "r"
        )


@pytest.mark.parametrize("is_stacked", [False, True])
def test_second_pass_keeps_the_corrected_weights(is_stacked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With error-aware targets both passes solve the corrected weights, and a row gets no worse."""
    if is_stacked:
        monkeypatch.setattr(gptq_options, "is_asynchronous", lambda device: True)
        monkeypatch.setattr(gptq_cuda, "has_triton", lambda: False)
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    inputs = correlated()
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    drift = 0.2 * float(inputs.std()) * noise
    hessian = inputs.T @ inputs
    corrected = weight + weight @ (drift.T @ inputs) @ torch.linalg.inv(
        hessian + 0.01 * hessian.diagonal().mean() * torch.eye(128, dtype=torch.float64)
    )
    found = []
    for passes in (1, 2):
        (result,) = quantize_siblings(
            [weight],
            hessian.clone(),
            searched(3),
            scale_dtype=torch.float32,
            range_passes=passes,
            drift_II=drift.T @ inputs,
        )
        found.append(result)
    losses = [row_losses(corrected, result, hessian) for result in found]
    assert bool((losses[1] <= losses[0] * (1 + 1e-4)).all())
    assert float(losses[1].sum()) < 0.995 * float(losses[0].sum())
    assert found[1].loss == pytest.approx(float(losses[1].sum()), rel=1e-3)
