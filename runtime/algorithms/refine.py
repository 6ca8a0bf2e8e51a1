"""Refine a quantized weight: improve one column or scale at a time while all others are fixed.

GPTQ rounds each column once, given only the errors of the columns before it. Behzadifar et al., "QuantEase:
Optimization-based Quantization for Language Models", arXiv 2309.01885, continue by coordinate descent: column k
becomes the best grid point while all other columns are fixed (their lemma 1). With R = W - Q and P = H R^T,

    q_k  <-  nearest grid point to  q_k + P_k / H_kk

which can only lower tr(R H R^T). Given the integers, scales can be improved, too: the loss is quadratic in the
scale s of a row's group, with integers c in it, and has its minimum at

    s  <-  s + c P_g / (c H_gg c^T)

A sweep does both for one group after the other. It costs about as much as GPTQ's solve, 2 O I^2 operations. The gain
is small at 4 bits, and a tenth of the loss or more at 2 bits; whether the model improves as well must be measured,
because a loss on few tokens can be lowered by overfitting them.

Scales are rounded to the stored dtype before they are used, and a new one is accepted only if it lowers the loss.
NVFP4 and MX scales are not changed, nor are those of strategies with one scale for many rows.

Layout: everything is transposed, so that a column is a row in memory.
Shapes: O out features, I in features, G groups, B columns of a group or block.
"""

from __future__ import annotations

import dataclasses

import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms import grid
from runtime.algorithms.products import multiplied
from runtime.algorithms.result import QuantizedWeight
from runtime.errors import QuantizationError

BLOCK = 128  # columns of a block, for strategies without groups


def refine(
    weight_OI: torch.Tensor,
    result: QuantizedWeight,
    hessian_II: torch.Tensor,
    args: QuantizationArgs,
    *,
    sweeps: int = 2,
    dampening_frac: float = 0.01,
) -> QuantizedWeight:
    """Lower the loss of a quantized weight.

    Args:
        weight_OI: the original weight, [O, I].
        result: the result of `quantize_siblings` or `quantize_rtn` for it.
        hessian_II: H, the sum of x x^T over the layer's inputs.
        args: the scheme that it was quantized by.
        sweeps: the number of passes over all columns.
        dampening_frac: the value added to H's diagonal, as a fraction of its mean; without it many sweeps overfit the
            calibration data.

    Returns:
        A result on the same kind of grid, whose loss tr((W-Q) (H + damping) (W-Q)^T) is no larger; `loss` is without
        the damping.

    Raises:
        QuantizationError: for an unsupported strategy, or shapes that do not match.
    """
    strategy = grid.strategy_of(args)
    if strategy not in ("channel", "group", "tensor_group", "tensor"):
        raise QuantizationError(f"weights with the strategy {strategy} cannot be refined", hint="set refine: 0")
    if hessian_II.shape != (weight_OI.shape[1],) * 2 or result.weight_OI.shape != weight_OI.shape:
        raise QuantizationError(
            f"a Hessian of shape {list(hessian_II.shape)} does not match a weight of shape {list(weight_OI.shape)}"
        )
    dtype = grid.work_dtype(weight_OI, hessian_II)
    added = dampening_frac * float(hessian_II.diagonal().mean())
    damped_II = hessian_II.to(dtype, copy=True)
    damped_II.diagonal().add_(added)
    state = _Refinement(weight_OI, result, damped_II, args, dtype)
    for _ in range(sweeps):
        for left in range(0, weight_OI.shape[1], state.width):
            state.improve(slice(left, min(left + state.width, weight_OI.shape[1])))
    return state.result(result, added)


class _Refinement:
    """The state of the refinement, transposed: quantized values, residuals, and each group's scale."""

    def __init__(
        self,
        weight_OI: torch.Tensor,
        result: QuantizedWeight,
        hessian_II: torch.Tensor,
        args: QuantizationArgs,
        dtype: torch.dtype,
    ) -> None:
        num_out = weight_OI.shape[0]
        self.args, self.hessian_II, self.dtype = args, hessian_II, dtype
        self.quantized_IO = result.weight_OI.to(dtype).t().contiguous()
        self.residual_IO = weight_OI.to(dtype).t() - self.quantized_IO
        self.stored = result.scale.dtype
        factor = grid.effective(result.scale.float(), result.global_scale).to(dtype)
        self.factor_GO = factor.reshape(factor.shape[0], -1).t().expand(-1, num_out).contiguous()
        self.zero_GO = None
        if result.zero_point is not None:
            zero = result.zero_point.to(dtype)
            self.zero_GO = zero.reshape(zero.shape[0], -1).t().expand(-1, num_out).contiguous()
        self.is_grouped = grid.is_grouped(args)
        self.width = int(args.group_size) if self.is_grouped else BLOCK
        # Fitting the scale of a whole row would need all of its columns at once.
        self.fits_scales = self.is_grouped and args.scale_dtype is None

    def improve(self, block: slice) -> None:
        """Improve one group's scales, then its columns."""
        group = block.start // self.width if self.is_grouped else 0
        pull_BO = multiplied(self.hessian_II[block], self.residual_IO.t())
        inner_BB = self.hessian_II[block, block].contiguous()
        if self.fits_scales:
            pull_BO -= inner_BB @ self._fit_scale(block, group, pull_BO, inner_BB)
        self._descend(block, group, pull_BO, inner_BB)

    def _fit_scale(self, block: slice, group: int, pull_BO: torch.Tensor, inner_BB: torch.Tensor) -> torch.Tensor:
        """Set each row's scale of the group to the best for its integers; return the change of the quantized values."""
        factor_O = self.factor_GO[group]
        integers_BO = self.quantized_IO[block] / factor_O
        slope_O = (integers_BO * pull_BO).sum(dim=0)
        curve_O = (integers_BO * (inner_BB @ integers_BO)).sum(dim=0)
        wanted_O = factor_O + slope_O / curve_O.clamp(min=torch.finfo(self.dtype).tiny)
        new_O = wanted_O.to(self.stored).to(self.dtype)
        step_O = new_O - factor_O
        gain_O = 2 * step_O * slope_O - step_O.square() * curve_O
        is_better = torch.isfinite(new_O) & (new_O * factor_O > 0) & (gain_O > 0) & (curve_O > 0)
        new_O = torch.where(is_better, new_O, factor_O)
        # The same product that a reader computes, to the bit, not the old value plus a difference.
        replaced_BO = torch.where(is_better, integers_BO.round() * new_O, self.quantized_IO[block])
        change_BO = replaced_BO - self.quantized_IO[block]
        self.factor_GO[group] = new_O
        self.quantized_IO[block] = replaced_BO
        self.residual_IO[block] -= change_BO
        return change_BO

    def _descend(self, block: slice, group: int, pull_BO: torch.Tensor, inner_BB: torch.Tensor) -> None:
        """Move each column to its best grid point while the others are fixed."""
        zero_O = None if self.zero_GO is None else self.zero_GO[group]
        factor_O = self.factor_GO[group]
        changes_BO = torch.zeros_like(pull_BO)
        curve_B = inner_BB.diagonal().tolist()
        for column in range(len(pull_BO)):
            if curve_B[column] <= 0:
                continue  # the input is always zero, so any value is equally good
            pull_O = pull_BO[column]
            if column:
                pull_O.addmv_(changes_BO[:column].t(), inner_BB[column, :column], alpha=-1)
            current_O = self.quantized_IO[block.start + column]
            new_O = grid.snap_(pull_O.div_(curve_B[column]).add_(current_O), factor_O, zero_O, self.args)
            torch.sub(new_O, current_O, out=changes_BO[column])
            current_O.copy_(new_O)
            self.residual_IO[block.start + column].sub_(changes_BO[column])

    def result(self, before: QuantizedWeight, added: float) -> QuantizedWeight:
        """Return the refined weight, or the one before if the loss did not fall; `added` is the damping."""
        damped = float(
            (self.residual_IO * (multiplied(self.hessian_II, self.residual_IO.t()))).sum(dtype=torch.float64)
        )
        loss = damped - added * float(self.residual_IO.square().sum(dtype=torch.float64))
        original_IO = self.residual_IO + self.quantized_IO
        error = float((original_IO - before.weight_OI.to(self.dtype).t()).square().sum(dtype=torch.float64))
        if damped >= before.loss + added * error:
            return before
        scale = self.factor_GO.t().to(self.stored).contiguous() if self.fits_scales else before.scale
        return dataclasses.replace(
            before, weight_OI=self.quantized_IO.t().to(torch.float32).contiguous(), scale=scale, loss=max(loss, 0.0)
        )
