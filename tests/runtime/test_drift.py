"""Error-aware targets of GPTQ: the drift of inputs, and the weights that are corrected by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms.drift import DriftAccumulator, corrected_rows, corrections, drift_bytes
from runtime.algorithms.gptq import factor_siblings, quantize_siblings
from runtime.algorithms.gptq_options import SolveOptions
from runtime.errors import QuantizationError

CPU = torch.device("cpu")
NUM_IN, NUM_OUT, NUM_TOKENS = 48, 20, 400
DAMPENING = 0.01


def args(bits: int = 3, group: int | None = 16, **more: Any) -> QuantizationArgs:
    strategy = "group" if group else "channel"
    return QuantizationArgs(num_bits=bits, symmetric=True, strategy=strategy, group_size=group, **more)


def inputs(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of the original model and of the quantized one, which are correlated."""
    made = torch.Generator().manual_seed(seed)
    mixing_II = torch.randn(NUM_IN, NUM_IN, generator=made, dtype=torch.float64) / NUM_IN**0.5
    original_TI = torch.randn(NUM_TOKENS, NUM_IN, generator=made, dtype=torch.float64) @ mixing_II
    wrong_II = torch.randn(NUM_IN, NUM_IN, generator=made, dtype=torch.float64) / NUM_IN**0.5
    present_TI = original_TI + 0.2 * original_TI @ wrong_II
    present_TI += 0.1 * torch.randn(NUM_TOKENS, NUM_IN, generator=made, dtype=torch.float64)
    present_TI[:, 5] = 0  # a dead column, of the quantized model alone
    return original_TI.to(dtype), present_TI.to(dtype)


def weight(seed: int = 1) -> torch.Tensor:
    return torch.randn(NUM_OUT, NUM_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(original_TI: torch.Tensor, present_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return present_TI.T @ present_TI, (original_TI - present_TI).T @ present_TI


def corrected_by_the_paper(
    weight_OI: torch.Tensor, original_TI: torch.Tensor, present_TI: torch.Tensor, alpha: float
) -> torch.Tensor:
    """W* = W + alpha W delta X^^T (H^ + damping)^-1 of arXiv 2504.09629, row by row and token by token."""
    hessian_II = torch.zeros(NUM_IN, NUM_IN, dtype=torch.float64)
    cross_OI = torch.zeros(NUM_OUT, NUM_IN, dtype=torch.float64)
    for token in range(NUM_TOKENS):
        present_I, delta_I = present_TI[token], original_TI[token] - present_TI[token]
        hessian_II += torch.outer(present_I, present_I)
        for row in range(NUM_OUT):
            cross_OI[row] += (weight_OI[row] @ delta_I) * present_I
    live_I = hessian_II.diagonal() != 0
    mean = hessian_II.diagonal()[live_I].mean()
    damped_II = hessian_II + torch.diag(DAMPENING * mean + mean * ~live_I)
    return weight_OI + torch.stack([alpha * torch.linalg.inv(damped_II) @ cross_I for cross_I in cross_OI])


def solved(alpha: float | None, present: Any = None, **more: Any) -> torch.Tensor:
    hessian_II, drift_II = moments(*inputs()) if present is None else present
    drift = {} if alpha is None else {"drift_II": drift_II, "strength": alpha}
    options: dict[str, Any] = {"scale_dtype": torch.float32, "dampening_frac": DAMPENING, **drift, **more}
    chosen = options.pop("args", args())
    (result,) = quantize_siblings([weight()], hessian_II, chosen, **options)
    return result.weight_OI


@pytest.mark.parametrize("actorder", ["static", None])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_the_corrected_weight_is_that_of_the_paper(actorder: str | None, alpha: float) -> None:
    original_TI, present_TI = inputs()
    hessian_II, drift_II = moments(original_TI, present_TI)
    options = SolveOptions(args=args(), scale_dtype=torch.float32, actorder=actorder, strength=alpha)
    found = factor_siblings([weight()], hessian_II, options, drift_II=drift_II)
    expected = corrected_by_the_paper(weight(), original_TI, present_TI, alpha)
    torch.testing.assert_close(corrected_rows(weight(), found.correction_II), expected, rtol=1e-9, atol=1e-9)
    assert (expected[:, 5] == weight()[:, 5]).all()
    # GPTQ then rounds that weight, on grids that fit it.
    plain = SolveOptions(args=args(), scale_dtype=torch.float32, dampening_frac=DAMPENING, actorder=actorder)
    (result,) = quantize_siblings([expected], hessian_II, args(), scale_dtype=torch.float32, actorder=plain.actorder)
    torch.testing.assert_close(solved(alpha, actorder=actorder), result.weight_OI, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [args(4), args(2), args(3, None), args(8, None)])
def test_the_error_of_the_output_is_smaller_than_that_of_plain_gptq(kind: QuantizationArgs) -> None:
    original_TI, present_TI = inputs()

    def error(alpha: float | None) -> float:
        quantized_OI = solved(alpha, args=kind).double()
        return float((original_TI @ weight().T - present_TI @ quantized_OI.T).square().sum())

    errors = [error(alpha) for alpha in (None, 0.5, 1.0)]
    assert errors[2] < errors[0]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("actorder", ["static", None])
def test_without_strength_or_drift_it_is_plain_gptq_bit_for_bit(actorder: str | None) -> None:
    original_TI, present_TI = (values.float() for values in inputs())
    plain = solved(None, moments(original_TI, present_TI), actorder=actorder)
    assert torch.equal(solved(0.0, moments(original_TI, present_TI), actorder=actorder), plain)
    zero = present_TI.T @ present_TI, torch.zeros(NUM_IN, NUM_IN)
    assert torch.equal(solved(1.0, zero, actorder=actorder), plain)


def test_the_result_is_deterministic() -> None:
    assert torch.equal(solved(0.7), solved(0.7))


def test_siblings_and_tiles_are_corrected_alike() -> None:
    both = torch.cat((weight(1), weight(2)))
    hessian_II, drift_II = moments(*inputs())
    options: dict[str, Any] = {"scale_dtype": torch.float32, "drift_II": drift_II}
    (whole,) = quantize_siblings([both], hessian_II, args(), **options)
    parts = quantize_siblings([weight(1), weight(2)], hessian_II, args(), **options)
    assert torch.equal(torch.cat([part.weight_OI for part in parts]), whole.weight_OI)


@pytest.mark.parametrize("strategy", ["tensor", "block", "tensor_group"])
def test_other_strategies(strategy: str) -> None:
    kinds = {
        "tensor": args(8, None).model_copy(update={"strategy": "tensor"}),
        "block": QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[10, 16]),
        "tensor_group": QuantizationArgs(
            num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
        ),
    }
    original_TI, present_TI = inputs()
    errors = []
    for alpha in (None, 1.0):
        quantized_OI = solved(alpha, args=kinds[strategy]).double()
        errors.append(float((original_TI @ weight().T - present_TI @ quantized_OI.T).square().sum()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_drift_is_summed_up_in_lanes(dtype: torch.dtype) -> None:
    original_TI, present_TI = inputs(dtype=dtype)
    expected = moments(original_TI.double(), present_TI.double())[1]
    found = DriftAccumulator(NUM_IN, device=CPU)
    for lane in (slice(0, 150), slice(150, 151), slice(151, NUM_TOKENS)):
        for part in torch.split(torch.arange(NUM_TOKENS)[lane], 64):
            found.add(original_TI[part], present_TI[part])
        found.end_lane()
    held = found._lane_II.nbytes + found._total_II.nbytes  # type: ignore[union-attr]
    assert held == drift_bytes(NUM_IN)
    torch.testing.assert_close(found.drift_II.double(), expected, rtol=1e-4, atol=1e-3)
    scale_I = torch.linspace(0.5, 2, NUM_IN)
    found.free_lane()
    found.rescale_(scale_I)
    scaled = moments(original_TI.double() / scale_I, present_TI.double() / scale_I)[1]
    torch.testing.assert_close(found.drift_II.double(), scaled, rtol=1e-4, atol=1e-3)


def test_no_inputs_have_no_drift() -> None:
    assert not DriftAccumulator(3, device=CPU).drift_II.any()


def test_bad_input_is_rejected() -> None:
    hessian_II, drift_II = moments(*inputs())
    options = SolveOptions(args=args(), scale_dtype=torch.float32)
    found = factor_siblings([weight()], hessian_II, options)
    for wrong, strength, message in (
        (drift_II[:4], 1.0, r"a drift of shape \[4, 48\]"),
        (drift_II, 1.5, "strength must be from 0 to 1, not 1.5"),
        (drift_II * torch.nan, 1.0, "is not finite"),
    ):
        with pytest.raises(QuantizationError, match=message):
            corrections(wrong, found.order_I, found.lower_II, found.pivot_I, strength)
