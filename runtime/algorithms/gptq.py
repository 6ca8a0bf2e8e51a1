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

Weights with the same input (q, k and v; gate and up) are solved together: there is one factorization, and their stacked
rows are solved in tiles, independently of each other (`gptq_tiles`).

The observer chooses the range of a grid (`observers`): minimum to maximum, or the range with the least error, where
`imatrix_mse` weighs the errors of columns by H's diagonal. What is rounded are the targets t, which are not known
before the solve: with `range_passes: 2` ranges are searched for the targets of a first solve, and all columns are
solved again.

Layout: the working copy is transposed, weight_IO, and contiguous, so that a column is a row in memory.
Shapes: O out features, I in features, G groups, B columns of a block, T tokens.

Left out on purpose: activation order "group" (its g_idx is gone from the format), and falling back to round-to-nearest:
an unusable Hessian is an error, which the caller may handle in another way.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms import gptq_options, grid
from runtime.algorithms.drift import corrected_rows
from runtime.algorithms.gptq_columns import Buffers, Grids, solve_block_
from runtime.algorithms.gptq_factors import ROWS_OF_A_COPY, Factored, factored, output_squares, targets_of, weighed
from runtime.algorithms.gptq_grids import Fitting
from runtime.algorithms.gptq_options import (
    SolvedPiece,
    SolveOptions,
    check_hessian_numbers,
    check_hessian_type,
    check_options,
    corrected,
)
from runtime.algorithms.gptq_stack_factors import FactorStack, factored_stack
from runtime.algorithms.gptq_stack_grids import Problem
from runtime.algorithms.gptq_stacks import solve_stack
from runtime.algorithms.gptq_tiles import BLOCKS_AT_A_TIME, Piece, Tile, tiles_of
from runtime.algorithms.products import add_product_, float32_products
from runtime.algorithms.result import QuantizedWeight
from runtime.errors import QuantizationError

STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")
_FEW_ROWS, _SAMPLED_ROWS = 256, 128  # the size of the output of a piece with more than a few rows is estimated


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
    range_passes: int = 1,
    drift_II: torch.Tensor | None = None,
    strength: float = 1.0,
) -> Iterator[QuantizedWeight]:
    """Quantize weights that share an input so that the layer's outputs change least; all share one factorization.

    Args:
        weights: [O, I] each, any float dtype; not changed. The arithmetic is float64 if any tensor is, else float32.
        hessian_II: sum of x x^T over the layer's inputs; any positive multiple gives the same weight.
        args: strategy, bits, symmetry and observer.
        scale_dtype: see `SolveOptions`.
        dampening_frac: see `SolveOptions`.
        block_size: see `SolveOptions`.
        actorder: see `SolveOptions`.
        global_scale: NVFP4's [1], which siblings share; by default computed from all weights.
        overwrite_hessian: factor in H's own memory, which saves a copy if the caller no longer needs H.
        range_passes: see `SolveOptions`.
        drift_II: sum of (x - x^) x^^T, for error-aware targets (`drift`); H is then that of x^.
        strength: see `SolveOptions`.

    Yields:
        One result per weight, computed on demand, with the loss (without the dampening) and the dampening used.

    Raises:
        QuantizationError: for unsupported or non-finite input, and an H that is zero or fails even with dampening 1.
    """
    options = SolveOptions(
        args=args,
        scale_dtype=scale_dtype,
        dampening_frac=dampening_frac,
        block_size=block_size,
        actorder=actorder,
        range_passes=range_passes,
        strength=strength,
    )
    found = factor_siblings(weights, hessian_II, options, overwrite_hessian=overwrite_hessian, drift_II=drift_II)
    del hessian_II, drift_II
    options = replace(options, global_scale=grid.shared_global_scale(args, global_scale, weights))
    tiles = tiles_of([weight.shape for weight in weights], args, weights[0].device.type)
    solved = solve_tiles(weights, tiles, found, options)
    del found
    for _, pieces in itertools.groupby(solved, key=lambda one: one.piece.weight):
        yield joined(list(pieces))


def factor_siblings(
    weights: Sequence[torch.Tensor],
    hessian_II: torch.Tensor,
    options: SolveOptions,
    *,
    overwrite_hessian: bool = False,
    drift_II: torch.Tensor | None = None,
) -> Factored:
    """Check weights that share an input, their Hessian and the options, and factor the Hessian.

    Raises:
        QuantizationError: as `quantize_siblings`.
    """
    for weight_OI in weights:
        require_solvable(weight_OI.detach(), len(hessian_II), options.args)
    dtype = grid.work_dtype(*weights, hessian_II)
    shape = list(weights[0].shape)
    return factor_hessian(hessian_II, options, shape, dtype, overwrite_hessian=overwrite_hessian, drift_II=drift_II)


def require_solvable(weight_OI: torch.Tensor, num_in: int, args: QuantizationArgs) -> None:
    """Require a weight that GPTQ can quantize, with a Hessian of `num_in` features.

    Raises:
        QuantizationError: for other shapes, unsupported schemes, and numbers that are not finite; on a GPU
            `solve_tiles` raises it for these, to read them when they are known.
    """
    grid.check_weight(weight_OI, args, supported=STRATEGIES, reads=not gptq_options.is_asynchronous(weight_OI.device))
    if weight_OI.shape[1] != num_in:
        raise QuantizationError(
            f"a weight of shape {list(weight_OI.shape)} requires a Hessian of shape {[weight_OI.shape[1]] * 2}; "
            f"got {[num_in] * 2}"
        )


def factor_hessian(
    hessian_II: torch.Tensor,
    options: SolveOptions,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    overwrite_hessian: bool = False,
    drift_II: torch.Tensor | None = None,
) -> Factored:
    """Factor the Hessian of weights that `require_solvable` accepts.

    Args:
        hessian_II: the sum of x x^T over their inputs.
        options: of the solve.
        shape: of the first weight, for messages.
        dtype: of the arithmetic.
        overwrite_hessian: factor in H's own memory.
        drift_II: the sum of (x - x^) x^^T, if targets are error-aware.

    Raises:
        QuantizationError: as `quantize_siblings`.
    """
    hessian_II = hessian_II.detach()
    check_hessian_type(hessian_II, shape)
    check_options(options)
    how = options.actorder, options.dampening_frac, dtype
    if gptq_options.is_asynchronous(hessian_II.device):
        with float32_products():
            found = factored_stack([hessian_II], [shape], *how).only()
            return found if drift_II is None else found.corrected(drift_II, options.strength)
    check_hessian_numbers(hessian_II, shape)
    found = factored(hessian_II, *how, overwrite_hessian=overwrite_hessian)
    return found if drift_II is None else found.corrected(drift_II, options.strength)


def solve_tiles(
    weights: Sequence[torch.Tensor], tiles: Iterable[Tile], found: Factored, options: SolveOptions
) -> Iterator[SolvedPiece]:
    """Solve tiles of weights that `factor_siblings` has checked, one at a time, and yield the pieces of each in order.

    Args:
        weights: [O, I] each: all siblings.
        tiles: some or all of `tiles_of` these weights, in any order.
        found: the factors of the Hessian.
        options: those that it was factored with.

    Raises:
        QuantizationError: if a scale cannot be represented in the dtype of scales.
    """
    weights = [weight.detach() for weight in weights]
    fitting = Fitting.of(weights, found.diagonal_I, options)
    for tile in tiles:
        solved = _solved if fitting.reads else _solved_on_a_gpu
        pieces = solved(weights, tile, found, fitting, options)
        while pieces:
            yield pieces.pop(0)  # this frame holds no result while the caller works with it


def joined(pieces: Sequence[SolvedPiece]) -> QuantizedWeight:
    """Join the pieces of one weight."""
    rows = [one.rows for one in sorted(pieces, key=lambda one: one.piece.start)]
    if len(rows) == 1:
        return rows[0]
    first = rows[0]
    has_one_scale = first.scale.ndim == 1
    zeros = [one.zero_point for one in rows if one.zero_point is not None]
    return replace(
        first,
        weight_OI=torch.cat([one.weight_OI for one in rows]),
        scale=first.scale if has_one_scale else torch.cat([one.scale for one in rows]),
        zero_point=first.zero_point if has_one_scale or not zeros else torch.cat(zeros),
        loss=sum(one.loss for one in rows),
    )


def _solved(
    weights: Sequence[torch.Tensor], tile: Tile, found: Factored, fitting: Fitting, options: SolveOptions
) -> list[SolvedPiece]:
    """Solve a tile."""
    parts = [corrected_rows(weights[piece.weight][piece.rows], found.correction_II) for piece in tile]
    grids = fitting.grids_of(tile) if found.correction_II is None else fitting.corrected_grids_of(tile, parts)
    residual_IO = _columns_as_rows(parts, found)
    del parts
    quantized_IO = torch.empty_like(residual_IO)
    samples = _samples(tile)
    sizes = [output_squares(residual_IO[:, rows].contiguous(), found) for rows in samples]
    loss_O = _solve_(residual_IO, quantized_IO, found, grids, fitting, options)
    if options.range_passes > 1:
        grids, loss_O = _solve_again_(residual_IO, quantized_IO, loss_O, found, grids, fitting, options)
    del residual_IO
    places_I = torch.argsort(found.order_I)
    pieces, first = [], 0
    for piece, sample, size_S in zip(tile, samples, sizes, strict=True):
        rows = slice(first, first + piece.stop - piece.start)
        zero_GO = None if grids.zero_GO is None else grids.zero_GO[:, rows]
        result = QuantizedWeight(
            weight_OI=_in_original_order(quantized_IO[:, rows], places_I),
            scale=fitting.stored(grids.scale_GO[:, rows], options.piece_scale_dtype),
            zero_point=None if zero_GO is None else fitting.stored(zero_GO, torch.int8),
            global_scale=options.global_scale,
            loss=max(float(loss_O[rows].sum()), 0.0),
            damping=found.damping,
        )
        size = _estimated(
            float(size_S.sum()), float(loss_O[sample].sum()), result.loss, len(loss_O[rows]) / len(size_S)
        )
        pieces.append(SolvedPiece(piece=piece, rows=result, size=size))
        first = rows.stop
    return pieces


def _samples(tile: Tile) -> list[slice]:
    """Choose evenly spread rows of each piece: the size of all outputs would take as many operations as the solve."""
    samples, first = [], 0
    for piece in tile:
        height = piece.stop - piece.start
        samples.append(slice(first, first + height, 1 if height <= _FEW_ROWS else -(-height // _SAMPLED_ROWS)))
        first += height
    return samples


def _estimated(size: float, sampled_loss: float, loss: float, num_rows_of_each: float) -> float:
    """Estimate the size of all rows from that of a sample, which has the same share of the size as of the loss."""
    share = sampled_loss / loss if min(sampled_loss, loss) > 0 else 1 / num_rows_of_each
    return max(size / share, 0.0)


def _solved_on_a_gpu(
    weights: Sequence[torch.Tensor], tile: Tile, found: Factored, fitting: Fitting, options: SolveOptions
) -> list[SolvedPiece]:
    """Solve a tile as a stack of one problem."""
    with float32_products():
        result = solve_stack([Problem(weights=weights, tile=tile, fitting=fitting)], FactorStack.of(found), options)[0]
    if isinstance(result, QuantizationError):
        raise result
    return result


def _columns_as_rows(parts: Sequence[torch.Tensor], found: Factored) -> torch.Tensor:
    """Stack rows of weights and return their columns in the order of the solve, each a row in memory."""
    order_I, dtype = found.order_I, found.lower_II.dtype
    columns_IO = torch.empty(len(order_I), sum(map(len, parts)), dtype=dtype, device=order_I.device)
    places = torch.split(columns_IO, [len(part) for part in parts], dim=1)
    for part_OI, place_IO in zip(parts, places, strict=True):
        for top in range(0, len(part_OI), ROWS_OF_A_COPY):
            rows = slice(top, top + ROWS_OF_A_COPY)
            place_IO[:, rows] = part_OI[rows].t().contiguous().index_select(0, order_I)
    return columns_IO


def _in_original_order(quantized_IO: torch.Tensor, places_I: torch.Tensor) -> torch.Tensor:
    """Return [O, I], float32."""
    quantized_OI = torch.empty(quantized_IO.shape[::-1], dtype=torch.float32, device=quantized_IO.device)
    pieces = torch.split(quantized_OI, ROWS_OF_A_COPY), torch.split(quantized_IO, ROWS_OF_A_COPY, dim=1)
    for piece_RI, piece_IR in zip(*pieces, strict=True):
        piece_RI.copy_(piece_IR.index_select(0, places_I).t())
    return quantized_OI


def _solve_(
    residual_IO: torch.Tensor,
    quantized_IO: torch.Tensor,
    found: Factored,
    grids: Grids,
    fitting: Fitting,
    options: SolveOptions,
) -> torch.Tensor:
    """Round all columns, block by block.

    Args:
        residual_IO: w_k on entry, w_k - q_k on return.
        quantized_IO: overwritten with q_k.
        found: M and D.
        grids: scales and zero points; overwritten if groups are fitted during the solve.
        fitting: fits them.
        options: strategy, bits, symmetry and columns per block.

    Returns:
        The loss of each row, without the dampening, float64.
    """
    args, width = options.args, options.block_width
    group_of_I = (found.order_I // options.columns_of_a_scale(len(residual_IO))).tolist()
    buffers = Buffers(min(width, len(residual_IO)), residual_IO)
    loss_O = torch.zeros(residual_IO.shape[1], dtype=torch.float64, device=residual_IO.device)
    dtype = residual_IO.dtype if residual_IO.dtype == torch.float64 else options.far_dtype
    errors_IO = residual_IO if residual_IO.dtype == dtype else torch.empty_like(residual_IO, dtype=dtype)
    for first in range(0, len(group_of_I), width * BLOCKS_AT_A_TIME):
        some = slice(first, first + width * BLOCKS_AT_A_TIME)
        targets_KO = buffers.targets_KO[: len(residual_IO[some])]
        targets_KO.copy_(residual_IO[some])
        if first:
            add_product_(targets_KO, found.lower_II[some, :first].to(dtype), errors_IO[:first].t())
        for start in range(first, first + len(targets_KO), width):
            block = slice(start, start + width)
            lower_BB = found.lower_II[block, block].contiguous()
            target_BO = targets_KO[start - first : start - first + width]
            if start > first:
                add_product_(target_BO, found.lower_II[block, first:start], residual_IO[first:start].t())
            if options.refits:
                fitting.refit_(grids, group_of_I[start], corrected(residual_IO[block], target_BO, lower_BB))
            groups = group_of_I[block]
            solve_block_(residual_IO[block], start - first, quantized_IO[block], lower_BB, grids, args, groups, buffers)
            loss_O += weighed(target_BO, found.pivot_I[block])
        if errors_IO is not residual_IO:
            errors_IO[some] = residual_IO[some]
    return loss_O - weighed(residual_IO, found.added_I)


def _solve_again_(
    residual_IO: torch.Tensor,
    quantized_IO: torch.Tensor,
    loss_O: torch.Tensor,
    found: Factored,
    grids: Grids,
    fitting: Fitting,
    options: SolveOptions,
) -> tuple[Grids, torch.Tensor]:
    """Search ranges for the targets of a solve, solve again, and keep the better result of each row.

    Arguments are those of `_solve_` after that solve, and its result; returns the grids and losses of the kept rows.
    """
    targets_OI = _in_original_order(targets_of(residual_IO, quantized_IO, found), torch.argsort(found.order_I))
    others = fitting.of_targets(targets_OI).grids_of((Piece(weight=0, start=0, stop=len(targets_OI)),))
    del targets_OI
    residual_IO.add_(quantized_IO)  # the weights
    before_IO = quantized_IO.clone()
    again_O = _solve_(residual_IO, quantized_IO, found, others, fitting, options)
    is_worse_O = again_O >= loss_O
    quantized_IO[:, is_worse_O] = before_IO[:, is_worse_O]
    return others.replaced(grids, is_worse_O), torch.minimum(again_O, loss_O)
