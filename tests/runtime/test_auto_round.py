"""AutoRound on one weight: against the paper's algorithm with autograd, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms.auto_round import tune_alone
from runtime.algorithms.gptq import quantize_siblings
from runtime.algorithms.result import QuantizedWeight
from runtime.algorithms.rtn import quantize_rtn
from runtime.errors import QuantizationError
from runtime.formats.presets import scheme_from_preset

PRESETS = ("W2A16", "W3A16", "W4A16", "W4A16_ASYM", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16")


def problem(num_out: int = 24, num_in: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Gram matrix of correlated inputs, in float64."""
    generator = torch.Generator().manual_seed(3)
    weight_OI = torch.randn(num_out, num_in, generator=generator, dtype=torch.float64) / 16
    mixing_II = torch.eye(num_in) + torch.randn(num_in, num_in, generator=generator) / 12
    inputs_TI = (torch.randn(512, num_in, generator=generator) @ mixing_II).double()
    return weight_OI, inputs_TI.t() @ inputs_TI


def started(weight_OI: torch.Tensor, args: QuantizationArgs) -> QuantizedWeight:
    return quantize_rtn(weight_OI, args, scale_dtype=torch.bfloat16)


def rounded_straight_through(values: torch.Tensor) -> torch.Tensor:
    return values + (values.round() - values).detach()


def by_the_paper(weight_OI: torch.Tensor, hessian_II: torch.Tensor, bits: int, size: int, iters: int, sym: bool) -> Any:
    """Equations 3 and 4, and steps by the sign of gradients; the rounded weight of the least loss."""
    num_out, num_in = weight_OI.shape
    groups = weight_OI.view(num_out, num_in // size, size)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    half, steps = 2 ** (bits - 1), 2**bits - 1
    # The ranges of the first grid, as it is stored.
    widest = torch.maximum(high, -low) * 2 if sym else high - low
    first = (widest / steps).to(torch.bfloat16).double()
    low = -first * steps / 2 if sym else (-half - (-half - low / (widest / steps)).round()) * first
    high = low + first * steps
    offset = torch.zeros_like(groups, requires_grad=True)
    alpha, beta = (torch.ones_like(low, requires_grad=True) for _ in range(2))
    least, best = float("inf"), weight_OI
    for turn in range(iters + 1):
        exact = alpha * high * 2 / steps if sym else (alpha * high - beta * low) / steps
        stored = exact.detach().to(torch.bfloat16).double()
        scale = exact + (stored - exact).detach()
        zero = 0 * low if sym else rounded_straight_through(-half - beta * low / exact).clamp(-half, half - 1)
        points = rounded_straight_through(groups / scale + zero + offset).clamp(-half, half - 1)
        error = ((points - zero) * scale).view_as(weight_OI) - weight_OI
        loss = torch.trace(error @ hessian_II @ error.t())
        if float(loss.detach()) < least:
            least, best = float(loss.detach()), (error + weight_OI).detach()
        found = torch.autograd.grad(loss, (offset, alpha, beta), allow_unused=True)
        rate = (1 - turn / iters) / iters
        with torch.no_grad():
            offset.sub_(rate * found[0].sign()).clamp_(-0.5, 0.5)
            for factor, gradient in ((alpha, found[1]), (beta, found[2])):
                if gradient is not None:
                    factor.sub_(rate * gradient.sign()).clamp_(0.5, 1.5)
    return best, least


@pytest.mark.parametrize(("bits", "sym"), [(2, True), (3, False), (4, True), (4, False)])
def test_equals_the_paper_with_autograd(bits: int, sym: bool) -> None:
    weight_OI, hessian_II = problem()
    args = QuantizationArgs(num_bits=bits, symmetric=sym, strategy="group", group_size=32)
    start = started(weight_OI, args)
    found = tune_alone(weight_OI, hessian_II, start, args, scale_dtype=torch.bfloat16, iters=30)
    expected_OI, least = by_the_paper(weight_OI, hessian_II, bits, 32, 30, sym)
    assert found.loss == pytest.approx(least, rel=1e-5)
    assert torch.allclose(found.weight_OI.double(), expected_OI, rtol=1e-5, atol=1e-6)
    error_OI = start.weight_OI.double() - weight_OI
    assert found.loss < float(torch.trace(error_OI @ hessian_II @ error_OI.t()))  # steps have changed it


def test_is_deterministic_and_leaves_its_arguments_alone() -> None:
    weight_OI, hessian_II = (tensor.float() for tensor in problem())
    args = scheme_from_preset("W2A16", ["Linear"]).weights
    before = weight_OI.clone(), hessian_II.clone()
    start = started(weight_OI, args)
    one, two = (tune_alone(weight_OI, hessian_II, start, args, scale_dtype=torch.bfloat16, iters=20) for _ in range(2))
    assert torch.equal(one.weight_OI, two.weight_OI)
    assert torch.equal(one.scale, two.scale)
    assert torch.equal(weight_OI, before[0])
    assert torch.equal(hessian_II, before[1])


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("is_solved", [False, True])
def test_the_loss_never_grows_and_no_step_keeps_the_start(name: str, is_solved: bool) -> None:
    weight_OI, hessian_II = (tensor.float() for tensor in problem(32, 256))
    args = scheme_from_preset(name, ["Linear"]).weights
    options: Any = {"scale_dtype": torch.bfloat16}
    start = next(quantize_siblings([weight_OI], hessian_II, args, **options)) if is_solved else started(weight_OI, args)
    same = tune_alone(weight_OI, hessian_II, start, args, **options, iters=0)
    assert torch.equal(same.weight_OI, start.weight_OI)
    assert torch.equal(same.scale, start.scale)
    assert (same.zero_point is None) is (start.zero_point is None)
    tuned = tune_alone(weight_OI, hessian_II, start, args, **options, iters=25)
    assert tuned.loss <= same.loss
    factors = tuned.scale if tuned.global_scale is None else tuned.scale / tuned.global_scale
    if tuned.scale.shape[0] == len(weight_OI):  # what a reader computes with these numbers
        wide = factors.float().repeat_interleave(256 // factors.shape[1], 1)
        zero = 0 if tuned.zero_point is None else tuned.zero_point.repeat_interleave(256 // factors.shape[1], 1)
        points = tuned.weight_OI / wide + zero
        assert torch.equal(
            (points.round() if args.type == "int" else points) * wide - zero * wide, tuned.weight_OI
        ) or (args.type != "int")


def test_what_does_not_fit_is_rejected() -> None:
    weight_OI, hessian_II = (tensor.float() for tensor in problem())
    args = scheme_from_preset("W4A16", ["Linear"]).weights
    start = started(weight_OI, args)
    options: Any = {"scale_dtype": torch.bfloat16, "iters": 2}
    with pytest.raises(QuantizationError, match="does not match a weight"):
        tune_alone(weight_OI, hessian_II[:64, :64], start, args, **options)
    with pytest.raises(QuantizationError, match="is not finite"):
        tune_alone(weight_OI, hessian_II * float("nan"), start, args, **options)
    with pytest.raises(QuantizationError, match="not finite floats"):
        tune_alone(weight_OI * float("inf"), hessian_II, start, args, **options)
    with pytest.raises(QuantizationError, match="the start has the shape"):
        tune_alone(weight_OI[:8], hessian_II, start, args, **options)
