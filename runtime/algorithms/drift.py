"""Error-aware targets: make up for the error of earlier quantized layers in the weights that are rounded.

The layers before a weight W are quantized already, so its inputs are x^ and no longer the original x. GPTQ keeps
W x^ close; the output to keep is W x. With H = sum of x^ x^^T, and the drift x - x^ of the inputs in

    C = sum of (x - x^) x^^T

completing the square gives (Arai and Ichikawa, "Quantization Error Propagation", arXiv 2504.09629, proposition 5.1)

    || W X - Q X^ ||^2 + |W - Q|^2_damping = tr((W* - Q) (H + damping) (W* - Q)^T) + a constant
    W* = W + strength W P,          P = C (H + damping)^-1

for a strength of 1. So Q is what GPTQ returns for W* instead of W, and the solve is unchanged; grids are fitted to W*,
too. A smaller strength (QEP's alpha) corrects less: P is estimated from calibration data, and is uncertain where there
are few tokens.

P follows from the factors that GPTQ has, H + damping = M D M^T: two triangular solves with I right sides, 2 I^3
operations for all weights that read one input, and 2 O I^2 for the weights. C takes twice as many operations as H,
because it is not symmetric.

Related methods: Qronos (Zhang et al., arXiv 2505.11695) rounds the first column of W in another way, and then continues
with W* as here. GPTAQ (Li et al., arXiv 2504.02692) corrects column k only by the drift of columns that are solved
before it: P = striu(C M^-T D^-1) M^-1, without the part of C that the strict upper triangle leaves out. Both are left
out, and so is a strength for each layer.

Lanes are added in their order, as in `hessian`. C has no symmetric half to keep the total in, so there are two matrices
while batches run, if there are several lanes.

Shapes: O out features, I in features, T tokens, P rows of a panel.
"""

from __future__ import annotations

import torch

from runtime.algorithms.exact_products import add_exact_product_
from runtime.algorithms.grid import is_finite
from runtime.algorithms.hessian import hessian_bytes, is_gpu, padded_columns, panel_width
from runtime.algorithms.lane_sums import SumOverLanes
from runtime.algorithms.products import SQUARE, add_product_, solve_lower_, solve_transposed_
from runtime.errors import QuantizationError

_ROWS = 512  # of C that are multiplied or copied at a time on a CPU


class DriftAccumulator(SumOverLanes):
    """The sum C of (x - x^) x^^T over calibration inputs, in float32; lanes as in `hessian.HessianAccumulator`.

    Args:
        num_in_features: I, the layer's input width.
        device: the device of the sum and of the inputs.
    """

    def __init__(self, num_in_features: int, *, device: torch.device) -> None:
        super().__init__(panel_width(device.type))
        self._lane_II = torch.empty(num_in_features, num_in_features, dtype=torch.float32, device=device)
        self._total_II: torch.Tensor | None = None

    def add(self, originals_TI: torch.Tensor, inputs_TI: torch.Tensor) -> None:
        """Add a batch to the lane.

        Args:
            originals_TI: x.
            inputs_TI: x^ of the same tokens, in the same dtype.
        """
        self.fold_ended_()
        is_new = not self.has_lane
        if is_gpu(inputs_TI.device.type):
            drift_TI = (originals_TI.float() - inputs_TI.float()).to(inputs_TI.dtype)
            add_exact_product_(self._lane_II, drift_TI, inputs_TI.contiguous(), is_new=is_new)
        else:
            parts = zip(torch.split(originals_TI, SQUARE), torch.split(inputs_TI, SQUARE), strict=True)
            for number, (original_TI, input_TI) in enumerate(parts):
                inputs_IT = padded_columns(input_TI)
                drift_IT = padded_columns(original_TI).sub_(inputs_IT)
                for rows_RI, drift_RT in zip(
                    torch.split(self._lane_II, _ROWS), torch.split(drift_IT, _ROWS), strict=True
                ):
                    add_product_(rows_RI, drift_RT, inputs_IT, is_new=is_new and not number)
        self.has_lane = True

    @property
    def size(self) -> int:
        """I."""
        return len(self._lane_II)

    def lane_panel(self, left: int) -> torch.Tensor:
        """The rows of a panel, [P, I]: the lane's sum, not a copy."""
        return self._lane_II[left : left + self.width]

    def fold_(self, left: int, lane: torch.Tensor, *, is_first: bool | None = None) -> None:
        """Add a lane's sum to the total of a panel, see `SumOverLanes`."""
        if self._total_II is None:
            self._total_II = torch.empty_like(self._lane_II)
        total_PI = self._total_II[left : left + self.width]
        if not self.has_total if is_first is None else is_first:
            total_PI.copy_(lane)
        else:
            total_PI.add_(lane)

    @property
    def drift_II(self) -> torch.Tensor:
        """The sum so far, not a copy; a later `add` starts another lane."""
        if not self.has_lane and not self.has_total:
            self._lane_II.zero_()
            self.has_lane = True
        if self.has_lane and self.has_total:
            self.end_lane()
            self.fold_ended_()
        return self._lane_II if self._total_II is None or not self.has_total else self._total_II

    def free_lane(self) -> None:
        """Free the memory of lanes, when all have been added."""
        total_II = self.drift_II
        self._lane_II, self._total_II = total_II, None
        self.has_lane, self.has_total, self._is_ended = True, False, True

    def rescale_(self, scale_I: torch.Tensor) -> None:
        """Divide the summed inputs by these factors, in place."""
        self.drift_II.div_(scale_I).div_(scale_I[:, None])


def drift_bytes(num_in: int) -> int:
    """The size of a `DriftAccumulator` of several lanes: the sum of a lane, and that of all."""
    return 2 * hessian_bytes(num_in)


def corrections(
    drift_II: torch.Tensor,
    order_I: torch.Tensor,
    lower_II: torch.Tensor,
    pivot_I: torch.Tensor,
    strength: float,
) -> torch.Tensor:
    """Compute the transpose of strength times P: row k has what column k gets of each column of the weights.

    Args:
        drift_II: C, not changed.
        order_I: of the factors of H, see `gptq_factors.Factored`.
        lower_II: the same.
        pivot_I: the same.
        strength: from 0 to 1.

    Raises:
        QuantizationError: for a matrix of another shape, one that is not finite on a CPU, and a strength out of range.
    """
    size = len(order_I)
    if drift_II.shape != (size, size):
        raise QuantizationError(f"a drift of shape {list(drift_II.shape)} does not match a Hessian of {[size] * 2}")
    if drift_II.device.type == "cpu" and not is_finite(drift_II):  # reading it would wait for a GPU
        raise QuantizationError(
            f"the drift of {size} input features is not finite",
            hint="an activation of the original model overflowed: calibrate in a wider dtype",
        )
    if not 0 <= strength <= 1:
        raise QuantizationError(f"strength must be from 0 to 1, not {strength}")
    right_II = torch.empty_like(lower_II, memory_format=torch.contiguous_format)  # C^T, its rows in the solve's order
    for top in range(0, size, _ROWS):
        rows = slice(top, top + _ROWS)
        right_II[:, rows] = drift_II[rows].index_select(1, order_I).t()
    solve_transposed_(lower_II, right_II)
    right_II.mul_((strength / pivot_I)[:, None])
    solve_lower_(lower_II, right_II)
    return right_II.index_select(0, torch.argsort(order_I))


def corrected_rows(weight_OI: torch.Tensor, correction_II: torch.Tensor | None) -> torch.Tensor:
    """Return rows of W*, given the result of `corrections`; without one the rows themselves."""
    if correction_II is None:
        return weight_OI
    plain_OI = weight_OI.to(correction_II.dtype).contiguous()
    target_OI = plain_OI.clone()
    add_product_(target_OI, plain_OI, correction_II)
    return target_OI
