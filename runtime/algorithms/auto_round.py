"""AutoRound: learn the rounding of weights and the ranges of their grids by signed gradient descent.

Cheng, Zhang, Shen et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs",
arXiv 2309.05516. A weight is rounded with an offset V of at most half a step, and with a range that is scaled by alpha
and beta (equations 3 and 4):

    s = (alpha max - beta min) / (2^b - 1),   z = round(-2^(b-1) - beta min / s)
    Q = s (clip(round(B / s + z + V)) - z)

V, alpha and beta minimize the squared error of a block's output. Only the sign of a gradient is used, and the rate
falls linearly to zero (section 3.2):

    V <- clamp(V - rate sign(dL/dV), -1/2, 1/2)

Rounding has no gradient, so it is taken for the identity (straight-through estimator, section 2). Then the gradients
follow from G = dL/dQ in closed form, without a graph of the rounding:

    dL/dV = s G,    dL/ds = sum of G (Q - B) / s         where a number was not clipped
    dL/dV = 0,      dL/ds = sum of G Q / s,  dL/dz = -s sum of G    where it was

B is the weight, or for a start from another solution q, such as GPTQ's, the number nearest to the weight that rounds to
q: an offset of zero gives q, and the numbers that were moved away from the weight are the first to move back.

Differences to the paper: a float grid has steps of several sizes, and V is in units of the step next to a weight; a
symmetric grid has one factor; ranges may also grow.

Shapes: O out features, I in features, R and C rows and columns of tiles, h and w their height and width (see `grid`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType

from runtime.algorithms import grid
from runtime.algorithms.products import multiplied
from runtime.algorithms.result import QuantizedWeight
from runtime.errors import QuantizationError

STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")
LARGEST_OFFSET = 0.5
_NEARLY_HALF = 0.499  # of a step; exactly half may round either way
_HALF = 0.5 + 2.0**-20  # of a step, and errors of rounding
_FACTORS = (0.5, 1.5)  # of ranges


@dataclass(frozen=True, kw_only=True, slots=True)
class _Spans:
    """The range of each tile in the start.

    Attributes:
        low_RC, high_RC: the range, around zero if it is symmetric.
        num_steps: from one to the other.
        start: the grids of the start.
    """

    low_RC: torch.Tensor
    high_RC: torch.Tensor
    num_steps: float
    start: grid.Grid

    @classmethod
    def of(cls, found: grid.Grid, args: QuantizationArgs, dtype: torch.dtype) -> _Spans:
        """Compute the ranges from scales, whose sign does not matter, and zero points."""
        size_RC = found.factor_RC(torch.float32).abs().to(dtype)
        if args.type == QuantizationType.FLOAT:
            num_steps = 2 * grid.SMALL_FLOATS[args.num_bits][2]
        else:
            num_steps = 2.0**args.num_bits - 1
        if found.zero_point_RC is None:
            low_RC = -size_RC * (num_steps / 2)
        else:
            low_RC = (-(2.0 ** (args.num_bits - 1)) - found.zero_point_RC.to(dtype)) * size_RC
        return cls(low_RC=low_RC, high_RC=low_RC + num_steps * size_RC, num_steps=num_steps, start=found)


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningState:
    """A state of a `TunedWeight`: the start, and offsets and factors of ranges."""

    spans: _Spans
    base_RhCw: torch.Tensor
    offset_RhCw: torch.Tensor
    low_RC: torch.Tensor
    high_RC: torch.Tensor


class TunedWeight:
    """A weight whose rounding and ranges are learned.

    Args:
        weight_OI: the weight, any float dtype; not changed.
        start: a solution for it, whose scales and integers are the beginning.
        args: the weight's half of a quantization scheme.
        scale_dtype: the dtype that the checkpoint stores scales in.

    Attributes:
        dtype: of the arithmetic: float64 for a weight in float64, else float32.

    Raises:
        QuantizationError: for an unsupported strategy, type or shape, and numbers that are not finite.
    """

    def __init__(
        self, weight_OI: torch.Tensor, start: QuantizedWeight, args: QuantizationArgs, *, scale_dtype: torch.dtype
    ) -> None:
        grid.check_weight(weight_OI.detach(), args, supported=STRATEGIES)
        self.args, self.scale_dtype = args, scale_dtype
        self.shape = (weight_OI.shape[0], weight_OI.shape[1])
        self.dtype = grid.work_dtype(weight_OI)
        tiles_RhCw = grid.tile(weight_OI.detach(), args)
        self._quantized_RhCw = torch.empty_like(tiles_RhCw, dtype=self.dtype, memory_format=torch.contiguous_format)
        self._offset_RhCw = torch.empty_like(self._quantized_RhCw)
        self.start_(weight_OI, start)

    def start_(self, weight_OI: torch.Tensor, start: QuantizedWeight) -> None:
        """Begin again with another solution for the same weight."""
        if start.weight_OI.shape != self.shape:
            raise QuantizationError(
                f"the start has the shape {list(start.weight_OI.shape)}, and the weight {list(self.shape)}"
            )
        tiles_RhCw = grid.tile(weight_OI.detach().to(self.dtype), self.args)
        num_rows, _, num_columns, _ = tiles_RhCw.shape
        zero_RC = None if start.zero_point is None else start.zero_point.reshape(num_rows, num_columns)
        self._grid = grid.Grid(
            scale_RC=start.scale.reshape(num_rows, num_columns), zero_point_RC=zero_RC, global_scale=start.global_scale
        )
        self._spans = _Spans.of(self._grid, self.args, self.dtype)
        self._quantized_RhCw.copy_(grid.tile(start.weight_OI, self.args))
        self._reach_RhCw = self._reach(tiles_RhCw)
        self._base_RhCw = self._nearest_to_start(tiles_RhCw)
        self.restart_()

    def restart_(self) -> None:
        """Return to the start."""
        self._offset_RhCw.zero_()
        self._low_RC = self._high_RC = torch.ones_like(self._spans.low_RC)
        self._grid = self._spans.start
        self.round_()

    def state(self) -> TuningState:
        """Return the present state."""
        return TuningState(
            spans=self._spans,
            base_RhCw=self._base_RhCw,
            offset_RhCw=self._offset_RhCw.clone(),
            low_RC=self._low_RC,
            high_RC=self._high_RC,
        )

    def return_(self, state: TuningState) -> None:
        """Return to a state."""
        self._spans, self._base_RhCw = state.spans, state.base_RhCw
        self._offset_RhCw.copy_(state.offset_RhCw)
        self._low_RC, self._high_RC = state.low_RC, state.high_RC
        self._fit()
        self.round_()

    @property
    def quantized_OI(self) -> torch.Tensor:
        """A view of the rounded weight."""
        return self._quantized_RhCw.flatten(2, 3).flatten(0, 1)[: self.shape[0], : self.shape[1]]

    def _reach(self, tiles_RhCw: torch.Tensor) -> torch.Tensor | None:
        """The distance of grid points just below each number, over its scale; None for integers, where it is 1."""
        if self.args.type != QuantizationType.FLOAT:
            return None
        mantissa_bits, smallest, largest = grid.SMALL_FLOATS[self.args.num_bits]
        below = (tiles_RhCw / self._factor()).abs_().mul_(1 - 2.0**-10).clamp_(smallest, largest)
        return torch.exp2(below.log2_().floor_() - mantissa_bits)

    def _factor(self) -> torch.Tensor:
        return self._grid.factor_RC(torch.float32).to(self.dtype)[:, None, :, None]

    def _zero(self) -> torch.Tensor | None:
        zero_RC = self._grid.zero_point_RC
        return None if zero_RC is None else zero_RC.to(self.dtype)[:, None, :, None]

    def _nearest_to_start(self, tiles_RhCw: torch.Tensor) -> torch.Tensor:
        """Return the numbers nearest to the weights that round to the start."""
        rounded = grid.snap_(tiles_RhCw.clone(), self._factor(), self._zero(), self.args)
        start = self._quantized_RhCw
        reach_RhCw = self._reach(start)
        half = self._factor().abs() * (_NEARLY_HALF if reach_RhCw is None else _NEARLY_HALF * reach_RhCw)
        moved = torch.clamp(tiles_RhCw, start - half, start + half)
        return torch.where(rounded == start, tiles_RhCw, moved)

    def round_(self) -> None:
        """Round the weight with the present offsets and ranges."""
        torch.mul(self._offset_RhCw, self._unit(), out=self._quantized_RhCw).add_(self._base_RhCw)
        grid.snap_(self._quantized_RhCw, self._factor(), self._zero(), self.args)

    def _unit(self) -> torch.Tensor:
        """The distance of grid points next to each weight."""
        return self._factor() if self._reach_RhCw is None else self._factor() * self._reach_RhCw

    def step_(self, gradient_OI: torch.Tensor, rate: float, range_rate: float) -> None:
        """Move offsets and ranges against the sign of their gradients, and round again.

        Args:
            gradient_OI: of the loss by the rounded weight.
            rate: of offsets.
            range_rate: of the factors of ranges.
        """
        gradient = grid.tile(gradient_OI.to(self.dtype), self.args)
        error = self._quantized_RhCw - self._base_RhCw
        unit = self._unit()
        is_clipped = (self._offset_RhCw * unit).sub_(error).abs_() > unit.abs() * _HALF
        direction = (gradient * unit).masked_fill_(is_clipped, 0).sign_().nan_to_num_(0)
        self._step_ranges_(gradient, error, is_clipped, range_rate)
        self._offset_RhCw.sub_(direction, alpha=rate).clamp_(-LARGEST_OFFSET, LARGEST_OFFSET)
        self.round_()

    def _step_ranges_(self, gradient: torch.Tensor, error: torch.Tensor, is_clipped: torch.Tensor, rate: float) -> None:
        spans, size_RC = self._spans, self._grid.factor_RC(torch.float32).abs().to(self.dtype)
        by_scale_RC = torch.where(is_clipped, self._quantized_RhCw, error).mul_(gradient).sum(dim=(1, 3)) / size_RC
        by_span_RC = by_scale_RC / spans.num_steps
        if spans.start.zero_point_RC is None:
            self._high_RC = self._low_RC = _stepped(self._high_RC, by_span_RC, rate)
        else:
            by_zero_RC = -size_RC * (gradient * is_clipped).sum(dim=(1, 3))
            by_span_RC += by_zero_RC * spans.low_RC * self._low_RC / size_RC.square() / spans.num_steps
            by_low_RC = -by_span_RC - by_zero_RC / size_RC
            self._high_RC = _stepped(self._high_RC, by_span_RC * spans.high_RC, rate)
            self._low_RC = _stepped(self._low_RC, by_low_RC * spans.low_RC, rate)
        self._fit()

    def _fit(self) -> None:
        """Compute the grids from the present ranges; those that are not changed stay exactly as they were."""
        spans, start = self._spans, self._spans.start
        scale_RC, zero_RC = grid.fit(
            spans.low_RC * self._low_RC,
            spans.high_RC * self._high_RC,
            self.args,
            scale_dtype=self.scale_dtype,
            global_scale=start.global_scale,
            reads=False,
        )
        is_kept = (self._low_RC == 1) & (self._high_RC == 1) | ~torch.isfinite(scale_RC.to(torch.float32))
        scale_RC = torch.where(is_kept, start.scale_RC, torch.copysign(scale_RC, start.scale_RC))
        if start.zero_point_RC is not None and zero_RC is not None:
            zero_RC = torch.where(is_kept, start.zero_point_RC, zero_RC)
        self._grid = grid.Grid(scale_RC=scale_RC, zero_point_RC=zero_RC, global_scale=start.global_scale)

    def result(self, loss: float = 0.0) -> QuantizedWeight:
        """Return the rounded weight."""
        zero_RC = self._grid.zero_point_RC
        return QuantizedWeight(
            weight_OI=self.quantized_OI.to(torch.float32, copy=True, memory_format=torch.contiguous_format),
            scale=grid.stored(self._grid.scale_RC, self.args),
            zero_point=None if zero_RC is None else grid.stored(zero_RC, self.args),
            global_scale=self._grid.global_scale,
            loss=loss,
            damping=0.0,
        )


def _stepped(factors_RC: torch.Tensor, gradient_RC: torch.Tensor, rate: float) -> torch.Tensor:
    return (factors_RC - rate * gradient_RC.sign().nan_to_num_(0)).clamp_(*_FACTORS)


def tune_alone(
    weight_OI: torch.Tensor,
    hessian_II: torch.Tensor,
    start: QuantizedWeight,
    args: QuantizationArgs,
    *,
    scale_dtype: torch.dtype,
    iters: int = 200,
    rate: float | None = None,
) -> QuantizedWeight:
    """Tune a weight for the output of its own layer: the loss is tr((Q-W) H (Q-W)^T), its gradient 2 (Q-W) H.

    Args:
        weight_OI: the weight.
        hessian_II: H, the sum of x x^T over the layer's inputs.
        start: a solution for the weight.
        args: the weight's half of a quantization scheme.
        scale_dtype: the dtype that the checkpoint stores scales in.
        iters: the number of steps.
        rate: the first rate; None for 1 / iters.

    Returns:
        The solution with the least loss of all steps, which may be the start.

    Raises:
        QuantizationError: as `TunedWeight`, and for an H that is not finite or has another size.
    """
    tuned = TunedWeight(weight_OI, start, args, scale_dtype=scale_dtype)
    if hessian_II.shape != (tuned.shape[1],) * 2 or not grid.is_finite(hessian_II):
        raise QuantizationError(
            f"a Gram matrix of shape {list(hessian_II.shape)} is not finite, or does not match a weight of shape "
            f"{list(tuned.shape)}"
        )
    original_OI, gram_II = weight_OI.detach().to(tuned.dtype), hessian_II.to(tuned.dtype)
    best: QuantizedWeight | None = None
    for turn in range(iters + 1):
        error_OI = tuned.quantized_OI - original_OI
        gradient_OI = multiplied(error_OI, gram_II)
        loss = float((gradient_OI * error_OI).sum(dtype=torch.float64))
        if best is None or loss < best.loss:
            best = tuned.result(loss)
        if turn < iters:
            left = (1 - turn / iters) * (1 / iters if rate is None else rate)
            tuned.step_(gradient_OI, left, left)
    assert best is not None, "the start has a loss"
    return best
