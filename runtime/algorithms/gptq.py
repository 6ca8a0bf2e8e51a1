"""GPTQ: round the columns one after the other, and let the columns not yet rounded compensate the error.

Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323. It keeps the layer's output on the calibration inputs X close (equation 1):

    ||W X - Q X||^2 = tr((W-Q) H (W-Q)^T),    H = X X^T

The paper's algorithm 1 rounds column k, and corrects the later columns by the error over the diagonal,
times row k of the upper Cholesky factor of (H + damping)^-1 (equation 2, and "step 3"). Summing up a column's
corrections when it is rounded gives the same algorithm without an inverse: LDLQ, which Chee et al., "QuIP",
arXiv 2307.13304, prove to be equivalent. With M unit upper triangular and D diagonal:

    H + damping = M D M^T                             one Cholesky factorization, from the last column on
    t_k = w_k + sum over j < k of (w_j - q_j) M_jk    the target of column k
    q_k = nearest grid point to t_k
    tr((W-Q) (H + damping) (W-Q)^T) = sum of D_k |t_k - q_k|^2

The inverse and its factor would cost 4/3 I^3 operations and lose digits; this factorization costs 1/3 I^3.
The sum over earlier blocks of columns is one matmul per block ("step 2", lazy batches), the sum inside a
block one matrix-vector product per column.

Group grids: without ordering, a group's grid is fitted when the solve reaches the group's first column, to
the weights as corrected until then ("additional tricks" in section 5). Algorithm 1 maintains those weights; here they
are w + (t - w) M_gg^-1, a small triangular solve. With ordering ("static groups" in the paper's code) the columns of a
group are not solved together, so its grid is fitted to the original weights; columns are stored in their original
order, and a reader needs no g_idx.

A dead column (input always zero, H_kk = 0) is independent of the others: it is rounded to nearest, not set to zero.

Weights with the same input (q, k and v; gate and up) are solved together: their rows are stacked, so that there is
one factorization and one pass over the columns.

The observer chooses the range of a grid (`observers`): minimum to maximum, or the range with the least error, where
`imatrix_mse` weighs the errors of columns by H's diagonal.

Layout: the working copy is transposed, weight_IO, and contiguous, so that a column is a row in memory.
Shapes: O out features, I in features, G groups, B columns of a block, T tokens.

Left out on purpose: activation order "group" (its g_idx is gone from the format), and falling back to round-to-nearest:
an unusable Hessian is an error, which the caller may handle in another way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms import grid
from runtime.algorithms.gptq_columns import Grids, solve_block_
from runtime.algorithms.gptq_factors import MAX_DAMPING, ROWS_OF_A_COPY, Factors, column_order, factors_of
from runtime.algorithms.observers import fitted_grid
from runtime.algorithms.products import add_product_
from runtime.algorithms.result import QuantizedWeight
from runtime.errors import QuantizationError

STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")
_NUMBERS_OF_A_PASS = 2**24  # elements of the weights solved in one pass: 64 MiB in float32
BLOCKS_AT_A_TIME = 4  # blocks that share one product with the errors of earlier ones: a taller product is faster
_COLUMNS_OF_A_SUM = 128


def quantize_siblings(
    weights: Sequence[torch.Tensor],
    hessian_II: torch.Tensor,
    args: QuantizationArgs,
    *,
    scale_dtype: torch.dtype,
    dampening_frac: float = 0.01,
    block_size: int = 128,
    actorder: str | None = "static",
    global_scale: torch.Tensor | None = None,
    overwrite_hessian: bool = False,
) -> Iterator[QuantizedWeight]:
    """Quantize weights that share an input so that the layer's outputs change least; all share one factorization.

    Args:
        weights: [O, I] each, any float dtype; not changed. The arithmetic is float64 if any tensor is, else float32.
        hessian_II: sum of x x^T over the layer's inputs; any positive multiple gives the same weight.
        args: strategy, bits, symmetry and observer.
        scale_dtype: the dtype that the checkpoint stores scales in, e.g. bf16.
        dampening_frac: added to the diagonal, as a fraction of its live mean; raised tenfold while H does not factor.
        block_size: columns per block; affects only speed. If grids are fitted during the solve, a group is a block.
        actorder: "static" (alias "weight") solves columns by decreasing H_kk; `None` from first to last.
        global_scale: NVFP4's [1], which siblings share; by default computed from all weights.
        overwrite_hessian: factor in H's own memory, which saves a copy if the caller no longer needs H.

    Yields:
        One result per weight, computed on demand, with the loss (without the dampening) and the dampening used.

    Raises:
        QuantizationError: for unsupported or non-finite input, and an H that is zero or fails even with dampening 1.
    """
    weights, hessian_II = [weight.detach() for weight in weights], hessian_II.detach()
    _check_all(weights, hessian_II, args)  # not here: a loop's variable would hold a weight after it was rounded
    _check_options(dampening_frac, block_size, actorder)
    dtype = grid.work_dtype(*weights, hessian_II)
    order_I = column_order(hessian_II, actorder)
    diagonal_I = hessian_II.diagonal().to(dtype, copy=True)
    factors = factors_of(hessian_II, order_I, dampening_frac, dtype, overwrite_hessian=overwrite_hessian)
    del hessian_II
    fitting = _Fitting(args, scale_dtype, grid.shared_global_scale(args, global_scale, weights), diagonal_I)
    refit = fitting if grid.is_grouped(args) and actorder is None else None
    width, damping = args.group_size if refit is not None else block_size, factors.damping
    sizes = [part.stop - part.start for part in in_passes([weight.shape for weight in weights])]
    while sizes:
        taken, weights = weights[: sizes[0]], weights[sizes.pop(0) :]
        grids = fitting.all_grids(taken, dtype)
        residual_IO = _columns_as_rows(taken, order_I, dtype)
        quantized_IO, loss_O = _solve_(residual_IO, factors, grids, args, order_I, width, refit)
        del residual_IO
        if not sizes:
            del factors  # before the results need memory twice
        # Free each weight when it is rounded, and each result when the caller has taken it.
        first = 0
        while taken:
            end = first + len(taken[0])
            result = [_result(taken.pop(0), slice(first, end), quantized_IO, order_I, loss_O, grids, fitting, damping)]
            first = end
            if not taken:
                del quantized_IO
            yield result.pop()


def in_passes(shapes: Sequence[Sequence[int]]) -> Iterator[slice]:
    """Yield the slices of weights that share a pass over the columns: neighbours whose total size is small."""
    start = num_numbers = 0
    for index, shape in enumerate(shapes):
        if index > start and num_numbers + math.prod(shape) > _NUMBERS_OF_A_PASS:
            yield slice(start, index)
            start, num_numbers = index, 0
        num_numbers += math.prod(shape)
    yield slice(start, len(shapes))


def _columns_as_rows(weights: Sequence[torch.Tensor], order_I: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Stack the weights and return their columns in the order of the solve, each a row in memory."""
    num_rows = sum(map(len, weights))
    columns_IO = torch.empty(len(order_I), num_rows, dtype=dtype, device=order_I.device)
    places = torch.split(columns_IO, [len(weight) for weight in weights], dim=1)
    for weight_OI, place_IO in zip(weights, places, strict=True):
        for top in range(0, len(weight_OI), ROWS_OF_A_COPY):
            rows = slice(top, top + ROWS_OF_A_COPY)
            place_IO[:, rows] = weight_OI[rows].to(dtype).t().contiguous().index_select(0, order_I)
    return columns_IO


def _weighed_squares(residual_IO: torch.Tensor, factor_I: torch.Tensor) -> torch.Tensor:
    """Sum factor times squared residual over the columns, for each row; in float64, a few columns at a time."""
    total_O = torch.zeros(residual_IO.shape[1], dtype=torch.float64, device=residual_IO.device)
    for start in range(0, len(factor_I), _COLUMNS_OF_A_SUM):
        part = slice(start, start + _COLUMNS_OF_A_SUM)
        total_O += factor_I[part].double() @ residual_IO[part].square().double()
    return total_O


def _result(
    weight_OI: torch.Tensor,
    rows: slice,
    quantized_IO: torch.Tensor,
    order_I: torch.Tensor,
    loss_O: torch.Tensor,
    grids: Grids,
    fitting: _Fitting,
    damping: float,
) -> QuantizedWeight:
    """Build the result of one weight from its rows of a solve, with its columns in their original order."""
    args = fitting.args
    scale_dtype = torch.float32 if args.scale_dtype is not None else fitting.scale_dtype
    zero_GO = None if grids.zero_GO is None else grids.zero_GO[:, rows]
    quantized_OI = torch.empty(weight_OI.shape, dtype=torch.float32, device=quantized_IO.device)
    places_I = torch.argsort(order_I)
    pieces = torch.split(quantized_OI, ROWS_OF_A_COPY), torch.split(quantized_IO[:, rows], ROWS_OF_A_COPY, dim=1)
    for piece_RI, piece_IR in zip(*pieces, strict=True):
        piece_RI.copy_(piece_IR.index_select(0, places_I).t())
    return QuantizedWeight(
        weight_OI=quantized_OI,
        scale=_stored(grids.scale_GO[:, rows], args, scale_dtype),
        zero_point=None if zero_GO is None else _stored(zero_GO, args, torch.int8),
        global_scale=fitting.global_scale,
        loss=max(float(loss_O[rows].sum()), 0.0),
        damping=damping,
    )


def _check_all(weights: Sequence[torch.Tensor], hessian_II: torch.Tensor, args: QuantizationArgs) -> None:
    for weight_OI in weights:
        grid.check_weight(weight_OI, args, supported=STRATEGIES)
        _check_hessian(hessian_II, weight_OI)


def _check_hessian(hessian_II: torch.Tensor, weight_OI: torch.Tensor) -> None:
    num_in = weight_OI.shape[1]
    if list(hessian_II.shape) != [num_in, num_in]:
        raise QuantizationError(
            f"a weight of shape {list(weight_OI.shape)} requires a Hessian of shape {[num_in, num_in]}; "
            f"got {list(hessian_II.shape)}"
        )
    if not hessian_II.is_floating_point() or not grid.is_finite(hessian_II):
        raise QuantizationError(
            f"the Hessian of a weight of shape {list(weight_OI.shape)} is not finite",
            hint="an activation overflowed: calibrate in a wider dtype",
        )
    if not hessian_II.diagonal().any():
        raise QuantizationError(
            f"the Hessian of a weight of shape {list(weight_OI.shape)} is zero: no input reached the module",
            hint="calibrate with more data, or use round-to-nearest for this module in the recipe",
        )


def _check_options(dampening_frac: float, block_size: int, actorder: str | None) -> None:
    if not 0 < dampening_frac <= MAX_DAMPING:
        raise QuantizationError(f"dampening_frac must be above 0 and at most {MAX_DAMPING:g}, not {dampening_frac}")
    if block_size < 1:
        raise QuantizationError(f"block_size must be at least 1, not {block_size}")
    if actorder not in (None, "static", "weight"):
        raise QuantizationError(f"actorder {actorder!r} is not supported", hint="supported: static, weight and null")


def _corrected(weight_BO: torch.Tensor, target_BO: torch.Tensor, lower_BB: torch.Tensor) -> torch.Tensor:
    """Compute the weights of a group as algorithm 1 has corrected them when it reaches the group's first column."""
    shift_BO: torch.Tensor = torch.linalg.solve_triangular(
        lower_BB, target_BO - weight_BO, upper=False, unitriangular=True
    )
    return weight_BO + shift_BO


@dataclass(frozen=True, slots=True)
class _Fitting:
    """The inputs of fitting grids: scheme, stored dtype of scales, NVFP4's global scale, and H's diagonal."""

    args: QuantizationArgs
    scale_dtype: torch.dtype
    global_scale: torch.Tensor | None
    diagonal_I: torch.Tensor

    def all_grids(self, weights: Sequence[torch.Tensor], dtype: torch.dtype) -> Grids:
        """Fit all grids at once, to the original weights."""
        found = [self._fitted(weight_OI, self.args, self.diagonal_I) for weight_OI in weights]

        def rows(parts: Sequence[torch.Tensor]) -> torch.Tensor:
            height = args.block_structure[0] if (args := self.args).block_structure else 1
            tall = [part.repeat_interleave(height, dim=0)[: len(w)] for part, w in zip(parts, weights, strict=True)]
            spread = [part.t().to(dtype).expand(-1, len(w)) for part, w in zip(tall, weights, strict=True)]
            return torch.cat(spread, dim=1).contiguous()

        zeros = [entry.zero_point_RC for entry in found if entry.zero_point_RC is not None]
        return Grids(
            scale_GO=rows([entry.scale_RC for entry in found]),
            factor_GO=rows([entry.factor_RC(torch.float32) for entry in found]),
            zero_GO=rows(zeros) if zeros else None,
        )

    def refit_(self, grids: Grids, group: int, weight_BO: torch.Tensor) -> None:
        """Fit a group's grid to its weights as corrected when the solve reaches it, and store it in the group's row."""
        width = len(weight_BO)
        diagonal_B = self.diagonal_I[group * width : (group + 1) * width]
        found = self._fitted(weight_BO.t(), self.args, diagonal_B)
        grids.scale_GO[group] = found.scale_RC[:, 0]
        grids.factor_GO[group] = found.factor_RC(torch.float32)[:, 0]
        if grids.zero_GO is not None and found.zero_point_RC is not None:
            grids.zero_GO[group] = found.zero_point_RC[:, 0]

    def _fitted(self, weight_OI: torch.Tensor, args: QuantizationArgs, diagonal_I: torch.Tensor) -> grid.Grid:
        return fitted_grid(
            weight_OI, args, scale_dtype=self.scale_dtype, global_scale=self.global_scale, importance_I=diagonal_I
        )


def _stored(tensor_GO: torch.Tensor, args: QuantizationArgs, dtype: torch.dtype) -> torch.Tensor:
    """Convert rows of scales or zero points to the checkpoint's shape and dtype."""
    if grid.strategy_of(args) == "tensor":
        return tensor_GO[0, :1].to(dtype)
    height = args.block_structure[0] if args.block_structure else 1
    return tensor_GO.t()[::height].to(dtype).contiguous()


def _columns_of_a_scale(args: QuantizationArgs, num_columns: int) -> int:
    """The number of consecutive columns that share a scale."""
    if grid.is_grouped(args):
        return int(args.group_size)
    return int(args.block_structure[1]) if args.block_structure else num_columns


def _solve_(
    residual_IO: torch.Tensor,
    factors: Factors,
    grids: Grids,
    args: QuantizationArgs,
    order_I: torch.Tensor,
    width: int,
    fitting: _Fitting | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round all columns, block by block.

    Args:
        residual_IO: w_k on entry, w_k - q_k on return.
        factors: M and D.
        grids: scales and zero points; overwritten if `fitting` is given.
        args: strategy, bits and symmetry.
        order_I: the columns in the order of the solve.
        width: columns per block.
        fitting: given if each block is a group whose grid is fitted during the solve.

    Returns:
        quantized_IO: q_k.
        loss_O: the loss of each row, without the dampening, float64.
    """
    group_of_I = (order_I // _columns_of_a_scale(args, len(order_I))).tolist()
    quantized_IO = torch.empty_like(residual_IO)
    loss_O = torch.zeros(residual_IO.shape[1], dtype=torch.float64, device=residual_IO.device)
    for first in range(0, len(group_of_I), width * BLOCKS_AT_A_TIME):
        some = slice(first, first + width * BLOCKS_AT_A_TIME)
        targets_SO = residual_IO[some].clone()
        if first:
            add_product_(targets_SO, factors.lower_II[some, :first], residual_IO[:first].t())
        for start in range(first, first + len(targets_SO), width):
            block = slice(start, start + width)
            lower_BB = factors.lower_II[block, block].contiguous()
            target_BO = targets_SO[start - first : start - first + width]
            if start > first:
                add_product_(target_BO, factors.lower_II[block, first:start], residual_IO[first:start].t())
            if fitting is not None:
                fitting.refit_(grids, group_of_I[start], _corrected(residual_IO[block], target_BO, lower_BB))
            solve_block_(residual_IO[block], target_BO, quantized_IO[block], lower_BB, grids, args, group_of_I[block])
            loss_O += factors.pivot_I[block].double() @ target_BO.square_().double()
        del targets_SO, target_BO  # before the next ones are allocated
    return quantized_IO, loss_O - _weighed_squares(residual_IO, factors.added_I)
