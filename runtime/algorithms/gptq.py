"""GPTQ: round one column after the other, and let the columns not yet rounded make up for the error.

Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323. It keeps the layer's output on the calibration inputs X close (equation 1):

    ||W X - Q X||^2 = tr((W-Q) H (W-Q)^T),    H = X X^T

The paper's algorithm 1 rounds column k, and corrects the later columns by the error over the diagonal,
times row k of the upper Cholesky factor of (H + damping)^-1 (equation 2, and "step 3"). Summing up what a
column has received when its turn comes gives the same algorithm without an inverse: LDLQ, which Chee et
al., "QuIP", arXiv 2307.13304, prove to be equivalent. With M unit upper triangular and D diagonal:

    H + damping = M D M^T                             one Cholesky factorization, from the last column on
    t_k = w_k + sum over j < k of (w_j - q_j) M_jk    what column k is to become
    q_k = nearest grid point to t_k
    tr((W-Q) (H + damping) (W-Q)^T) = sum of D_k |t_k - q_k|^2

The inverse and its factor would cost 4/3 I^3 operations and lose digits; this factorization costs 1/3 I^3.
The sum over earlier blocks of columns is one matmul a block ("step 2", lazy batches), the sum inside a
block one matrix-vector product a column.

Group grids: without ordering, a group's grid is fitted when the solve reaches the group's first column, to
the weights as corrected until then ("additional tricks" in section 5). Algorithm 1 holds those weights
ready; here they are w + (t - w) M_gg^-1, a small triangular solve. With ordering ("static groups" in the
paper's code) the columns of a group come at different times, so its grid is fitted to the original weights;
columns are stored in their original order, and a reader needs no g_idx.

A dead column (input always zero, H_kk = 0) is tied to no other: it is rounded to nearest, not set to zero.

Layout: the working copy is transposed, weight_IO, and contiguous, so that a column is a row in memory.
Shapes: O out features, I in features, G groups, B columns of a block, T tokens.

Left out on purpose: activation order "group" (its g_idx is gone from the format), several weights in a
batch, and falling back to round-to-nearest: a Hessian that cannot be used is an error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms import grid
from runtime.algorithms.result import QuantizedWeight
from runtime.errors import QuantizationError

STRATEGIES = ("tensor", "channel", "group")
MAX_DAMPING = 1.0
PANEL_WIDTH = 512  # columns that a Hessian is summed up in at a time


class HessianAccumulator:
    """Sums up H = X X^T over calibration inputs, in float32.

    A plain sum, neither doubled nor divided by the number of tokens: sums of parts add up to the sum of the
    whole, and the loss is the squared error of the layer's output over all the tokens. bf16 and fp16 inputs
    are multiplied without rounding. H is symmetric, so only panels from the diagonal to the right are summed
    up, which saves up to half of the work.

    Args:
        num_in_features: I, the layer's input width.
        device: where the sum is kept; inputs must be there.

    Attributes:
        num_tokens: how many inputs are in the sum.
    """

    __slots__ = ("_upper_II", "num_tokens")

    def __init__(self, num_in_features: int, *, device: torch.device | str = "cpu") -> None:
        self._upper_II = torch.zeros(num_in_features, num_in_features, dtype=torch.float32, device=device)
        self.num_tokens = 0

    def add(self, inputs_TI: torch.Tensor) -> None:
        """Add a batch of inputs, [..., I]; all leading dimensions count as tokens."""
        flat_TI = inputs_TI.detach().reshape(-1, inputs_TI.shape[-1])
        # Tensor cores multiply bf16 and fp16 exactly and add up in float32, at many times the speed of float32.
        is_narrow = flat_TI.is_cuda and flat_TI.dtype in (torch.bfloat16, torch.float16)
        if not is_narrow:
            flat_TI = flat_TI.to(torch.float32)
        for left in range(0, flat_TI.shape[1], PANEL_WIDTH):
            panel = slice(left, left + PANEL_WIDTH)
            target, first_TP, second_TR = self._upper_II[panel, left:], flat_TI[:, panel], flat_TI[:, left:]
            if is_narrow:
                target.add_(torch.mm(first_TP.t(), second_TR, out_dtype=torch.float32))
            else:
                target.addmm_(first_TP.t(), second_TR)
        self.num_tokens += flat_TI.shape[0]

    @property
    def hessian_II(self) -> torch.Tensor:
        """The sum so far: the accumulator's own tensor, which a later `add` changes."""
        for left in range(0, len(self._upper_II), PANEL_WIDTH):
            right = left + PANEL_WIDTH
            self._upper_II[right:, left:right] = self._upper_II[left:right, right:].t()
        return self._upper_II


def quantize_gptq(
    weight_OI: torch.Tensor,
    hessian_II: torch.Tensor,
    args: QuantizationArgs,
    *,
    scale_dtype: torch.dtype,
    dampening_frac: float = 0.01,
    block_size: int = 128,
    actorder: str | None = "static",
) -> QuantizedWeight:
    """Quantize a weight so that the layer's output on the calibration inputs changes least.

    Args:
        weight_OI: [O, I], any float dtype; not changed. In float64 the arithmetic is float64, else float32.
        hessian_II: sum of x x^T over the layer's inputs; any positive multiple gives the same weight.
        args: strategy, bits and symmetry.
        scale_dtype: the dtype that the checkpoint stores scales in, e.g. bf16.
        dampening_frac: what is added to the diagonal, as a fraction of its mean over live columns. When that
            does not factor it is raised tenfold, up to 1.
        block_size: columns a block. A matter of speed alone. Where grids are fitted on the way, a group is
            a block.
        actorder: "static" (alias "weight") solves columns by falling H_kk; `None` from first to last.

    Returns:
        The dequantized weight with its scales, the loss (without the dampening) and the dampening used.

    Raises:
        QuantizationError: for a strategy, type, shape or numbers that cannot be worked with, for a Hessian
            that is all zero, and for one that does not factor even with dampening 1.
    """
    weight_OI, hessian_II = weight_OI.detach(), hessian_II.detach()
    grid.check_weight(weight_OI, args, offered=STRATEGIES)
    _check_hessian(hessian_II, weight_OI)
    _check_options(dampening_frac, block_size, actorder)
    dtype = grid.work_dtype(weight_OI, hessian_II)
    order_I = _column_order(hessian_II, actorder)
    factors = _factorize(hessian_II, order_I, dampening_frac, dtype)
    grids = _fit_all(weight_OI, args, scale_dtype=scale_dtype, dtype=dtype)

    is_group = grid.strategy_of(args) == "group"
    group_of_I = (order_I // (args.group_size if is_group else len(order_I))).tolist()
    residual_IO = weight_OI.to(dtype).t()[order_I].contiguous()  # a copy, for indexing with a tensor copies
    if is_group and actorder is None:
        width, refit_dtype = args.group_size, scale_dtype
    else:
        width, refit_dtype = block_size, None
    quantized_IO, error_I = _solve_(residual_IO, factors, grids, args, group_of_I, width, refit_dtype)
    return QuantizedWeight(
        weight_OI=quantized_IO[torch.argsort(order_I)].t().to(torch.float32).contiguous(),
        scale=_stored(grids.scale_GO, args, scale_dtype),
        zero_point=None if grids.zero_GO is None else _stored(grids.zero_GO, args, torch.int8),
        loss=_loss(error_I, residual_IO, factors),
        damping=factors.damping,
    )


def _check_hessian(hessian_II: torch.Tensor, weight_OI: torch.Tensor) -> None:
    num_in = weight_OI.shape[1]
    if list(hessian_II.shape) != [num_in, num_in]:
        raise QuantizationError(
            f"a Hessian of shape {list(hessian_II.shape)} does not fit a weight of shape {list(weight_OI.shape)}"
        )
    if not hessian_II.is_floating_point() or not torch.isfinite(hessian_II).all():
        raise QuantizationError(
            f"the Hessian of a weight of shape {list(weight_OI.shape)} is not finite",
            hint="an activation of the calibration run overflowed",
        )
    if not hessian_II.diagonal().any():
        raise QuantizationError(
            f"the Hessian of a weight of shape {list(weight_OI.shape)} is zero: the module saw no input",
            hint="calibrate with more data, or give this module to round-to-nearest in the recipe",
        )


def _check_options(dampening_frac: float, block_size: int, actorder: str | None) -> None:
    if not 0 < dampening_frac <= MAX_DAMPING:
        raise QuantizationError(f"dampening_frac must be above 0 and at most {MAX_DAMPING:g}, not {dampening_frac}")
    if block_size < 1:
        raise QuantizationError(f"block_size must be at least 1, not {block_size}")
    if actorder not in (None, "static", "weight"):
        raise QuantizationError(f"actorder {actorder!r} is not offered", hint="offered are static, weight and null")


def _column_order(hessian_II: torch.Tensor, actorder: str | None) -> torch.Tensor:
    """The order in which columns are solved; ties stay in place, so that it is the same everywhere."""
    if actorder is None:
        return torch.arange(hessian_II.shape[0], device=hessian_II.device)
    return torch.argsort(hessian_II.diagonal(), descending=True, stable=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Factors:
    """H + diag(added) = M D M^T with the columns in the order of the solve.

    Args:
        lower_II: M^T, unit lower triangular: row k holds what column k takes of each earlier error.
        pivot_I: D.
        added_I: what was added to the diagonal.
        damping: the dampening, as a fraction of the mean diagonal.
    """

    lower_II: torch.Tensor
    pivot_I: torch.Tensor
    added_I: torch.Tensor
    damping: float


def _factorize(hessian_II: torch.Tensor, order_I: torch.Tensor, dampening_frac: float, dtype: torch.dtype) -> _Factors:
    diagonal_I = hessian_II.diagonal()[order_I].to(dtype)
    dead_I = diagonal_I == 0
    mean = diagonal_I[~dead_I].mean()
    # An upper triangular factor is a lower triangular one of the matrix read backwards.
    backwards_I = order_I.flip(0)
    damping = dampening_frac
    while True:
        added_I = damping * mean + mean * dead_I
        damped_II = hessian_II[backwards_I[:, None], backwards_I].to(dtype)
        damped_II.diagonal().add_(added_I.flip(0))
        cholesky_II, failed = torch.linalg.cholesky_ex(damped_II)
        del damped_II
        if not failed and torch.isfinite(cholesky_II.diagonal()).all():
            break
        if damping >= MAX_DAMPING:
            raise QuantizationError(
                f"a Hessian of shape {list(hessian_II.shape)} does not factor with dampening {damping:g}",
                hint="it is no sum of x x^T; calibrate with more data or in a wider dtype",
            )
        damping = min(damping * 10, MAX_DAMPING)
    lower_II = cholesky_II.flip(0, 1).t()
    root_I = lower_II.diagonal().clone()
    return _Factors(lower_II=lower_II.div_(root_I[:, None]), pivot_I=root_I.square(), added_I=added_I, damping=damping)


def _corrected(weight_BO: torch.Tensor, target_BO: torch.Tensor, lower_BB: torch.Tensor) -> torch.Tensor:
    """The weights of a group as algorithm 1 holds them when it reaches the group's first column."""
    shift_BO: torch.Tensor = torch.linalg.solve_triangular(
        lower_BB, target_BO - weight_BO, upper=False, unitriangular=True
    )
    return weight_BO + shift_BO


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grids:
    """Each group's scale and zero point, a contiguous row each, in the dtype of the solve.

    Strategies tensor and channel are one group. The numbers are those that will be stored: rounded already.
    """

    scale_GO: torch.Tensor
    zero_GO: torch.Tensor | None

    def fit_(self, group: int, weight_BO: torch.Tensor, args: QuantizationArgs, scale_dtype: torch.dtype) -> None:
        """Fill in a group's row from its weights."""
        scale_O, zero_O = grid.fit(weight_BO.amin(dim=0), weight_BO.amax(dim=0), args, scale_dtype=scale_dtype)
        self.scale_GO[group] = scale_O
        if self.zero_GO is not None and zero_O is not None:
            self.zero_GO[group] = zero_O


def _fit_all(
    weight_OI: torch.Tensor, args: QuantizationArgs, *, scale_dtype: torch.dtype, dtype: torch.dtype
) -> _Grids:
    """All grids at once, from the original weights."""
    found = grid.min_max_grid(weight_OI, args, scale_dtype=scale_dtype)

    def rows(tensor_RC: torch.Tensor) -> torch.Tensor:
        return tensor_RC.t().to(dtype).expand(-1, weight_OI.shape[0]).contiguous()

    zero_point_RC = found.zero_point_RC
    return _Grids(scale_GO=rows(found.scale_RC), zero_GO=None if zero_point_RC is None else rows(zero_point_RC))


def _stored(tensor_GO: torch.Tensor, args: QuantizationArgs, dtype: torch.dtype) -> torch.Tensor:
    """Rows of scales or zero points in the shape and dtype of the checkpoint."""
    if grid.strategy_of(args) == "tensor":
        return tensor_GO[0, :1].to(dtype)
    return tensor_GO.t().to(dtype).contiguous()


def _solve_(
    residual_IO: torch.Tensor,
    factors: _Factors,
    grids: _Grids,
    args: QuantizationArgs,
    group_of_I: list[int],
    width: int,
    refit_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round all columns, block by block.

    Args:
        residual_IO: w_k on entry, w_k - q_k on return.
        factors: M and D.
        grids: scales and zero points; overwritten where `refit_dtype` is given.
        args: strategy, bits and symmetry.
        group_of_I: each column's group.
        width: columns a block.
        refit_dtype: given when each block is a group whose grid is to be fitted on the way; the dtype of
            stored scales.

    Returns:
        quantized_IO: q_k.
        error_I: |t_k - q_k|^2 of each column, float64.
    """
    quantized_IO = torch.empty_like(residual_IO)
    error_I = torch.empty(len(group_of_I), dtype=torch.float64, device=residual_IO.device)
    for start in range(0, len(group_of_I), width):
        block = slice(start, start + width)
        lower_BB = factors.lower_II[block, block].contiguous()
        target_BO = torch.addmm(residual_IO[block], factors.lower_II[block, :start], residual_IO[:start])
        if refit_dtype is not None:
            corrected_BO = _corrected(residual_IO[block], target_BO, lower_BB)
            grids.fit_(group_of_I[start], corrected_BO, args, refit_dtype)
        for column, group in enumerate(group_of_I[block]):
            target_O = target_BO[column]
            if column:
                errors_BO = residual_IO[start : start + column]
                torch.addmv(target_O, errors_BO.t(), lower_BB[column, :column], out=target_O)
            zero_O = None if grids.zero_GO is None else grids.zero_GO[group]
            quantized_O = quantized_IO[start + column].copy_(target_O)
            grid.snap_(quantized_O, grids.scale_GO[group], zero_O, args)
            residual_IO[start + column].sub_(quantized_O)
            target_O.sub_(quantized_O)
        error_I[block] = target_BO.square().sum(dim=1, dtype=torch.float64)
    return quantized_IO, error_I


def _loss(error_I: torch.Tensor, residual_IO: torch.Tensor, factors: _Factors) -> float:
    """tr((W-Q) H (W-Q)^T): the sum that the solve has made, without what was added to H's diagonal."""
    added = factors.added_I.double() @ residual_IO.square().sum(dim=1, dtype=torch.float64)
    return max(float(factors.pivot_I.double() @ error_I - added), 0.0)
