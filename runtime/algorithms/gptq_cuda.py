"""The sequential part of GPTQ on a GPU: all columns of a block, of all problems of a stack, in one kernel launch.

Solving a block column by column launches a dozen kernels for each of its 128 columns, and a launch takes longer than
the work. Rows do not depend on each other, so here each program of the launch grid solves all columns of the block for
some rows of one problem. The errors of finished columns stay in registers:

    t_k = target_k + sum over j < k of M_jk e_j        q_k = nearest grid point to t_k        e_k = w_k - q_k

A reader computes q_k as a grid point times its factor, and every rounding has to be the same here: the kernel divides
with IEEE rounding, products are not contracted to fused multiply-adds, and small floats are rounded by additions of a
power of two, because conversions of hardware differ. A number of the binade 2^n is a multiple of u = 2^(n - bits of the
mantissa) after 1.5 * 2^23 u is added and subtracted again, rounded half to even.

Memory traffic: the block's part of W, t and q once each, e once, 16 bytes per weight, and the triangle M once per
program. Arithmetic: 2 B operations per weight. `tests/bench/bench_gptq.py` prints the time beside both bounds.

Shapes: E problems, O rows, B columns of a block, G groups; weights are transposed, so that a column is contiguous.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from runtime.algorithms import grid

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

_ROWS = 32  # rows per program; with 128 columns their errors fill the registers of 4 warps
_WIDEST = 256
_DROPS_FRACTION = 1.5 * 2.0**23  # a float32 of this size has no fraction, and its neighbours are 1 apart


@cache
def has_triton() -> bool:
    """Whether Triton, which compiles the kernel, is installed."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def is_supported(num_columns: int, dtype: torch.dtype) -> bool:
    """Whether the kernel can solve a block: float32, at most 256 columns, and Triton is installed."""
    return dtype == torch.float32 and num_columns <= _WIDEST and has_triton()


def solve_block_(
    residual_EBO: torch.Tensor,
    target_EBO: torch.Tensor,
    quantized_EBO: torch.Tensor,
    loss_EO: torch.Tensor,
    *,
    lower_EBB: torch.Tensor,
    pivot_EB: torch.Tensor,
    factor_EGO: torch.Tensor,
    zero_EGO: torch.Tensor | None,
    group_EB: torch.Tensor,
    args: QuantizationArgs,
) -> None:
    """Round the columns of one block. The rows of every matrix are contiguous; problems and rows may be apart.

    Args:
        residual_EBO: w_k on entry, w_k - q_k on return, float32.
        target_EBO: w_k plus the corrections from earlier blocks, float32.
        quantized_EBO: overwritten with q_k, float32.
        loss_EO: D_k |t_k - q_k|^2 is added, float64, contiguous.
        lower_EBB: the blocks of M^T.
        pivot_EB: D.
        factor_EGO: the factors of grid points, contiguous.
        zero_EGO: zero points, contiguous, or None.
        group_EB: each column's group, int32, with the strides of `pivot_EB`.
        args: type and bits.
    """
    num_problems, num_columns, num_rows = residual_EBO.shape
    is_float = args.type == "float"
    mantissa_bits, smallest, largest = grid.float_format(args.num_bits) if is_float else (0, 1.0, 0.0)
    half = 2.0 ** (args.num_bits - 1)
    _kernel()[(-(-num_rows // _ROWS), num_problems)](
        residual_EBO,
        target_EBO,
        quantized_EBO,
        loss_EO,
        lower_EBB,
        pivot_EB,
        factor_EGO,
        zero_EGO if zero_EGO is not None else factor_EGO,
        group_EB,
        num_rows,
        num_columns,
        residual_EBO.stride(0),
        target_EBO.stride(0),
        quantized_EBO.stride(0),
        lower_EBB.stride(0),
        lower_EBB.stride(1),
        pivot_EB.stride(0),
        factor_EGO.stride(0),
        smallest if is_float else -half,
        largest if is_float else half - 1,
        _DROPS_FRACTION * 2.0**-mantissa_bits,
        IS_FLOAT=is_float,
        HAS_ZERO=zero_EGO is not None,
        NUM_COLUMNS=1 << (num_columns - 1).bit_length(),
        ROWS=_ROWS,
        enable_fp_fusion=False,
    )


@cache
def _kernel() -> Any:
    """Define the kernel on first use: importing Triton takes a second, and not every host has it."""
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator,unused-ignore]
    def solve(  # type: ignore[no-untyped-def]
        residual,
        target,
        quantized,
        loss,
        lower,
        pivot,
        factors,
        zeros,
        groups,
        num_rows,
        num_columns,
        residual_stride,
        target_stride,
        quantized_stride,
        lower_stride,
        lower_row,
        column_stride,
        factor_stride,
        smallest,
        largest,
        drops_fraction,
        IS_FLOAT: tl.constexpr,
        HAS_ZERO: tl.constexpr,
        NUM_COLUMNS: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        problem = tl.program_id(1).to(tl.int64)
        residual += problem * residual_stride
        target += problem * target_stride
        quantized += problem * quantized_stride
        loss += problem * num_rows
        lower += problem * lower_stride
        pivot += problem * column_stride
        groups += problem * column_stride
        factors += problem * factor_stride
        zeros += problem * factor_stride
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        is_row = rows < num_rows
        columns = tl.arange(0, NUM_COLUMNS)
        errors = tl.zeros([NUM_COLUMNS, ROWS], dtype=tl.float32)
        total = tl.load(loss + rows, mask=is_row, other=0.0)
        for column in range(num_columns):
            taken = tl.load(lower + column * lower_row + columns, mask=columns < column, other=0.0)
            wanted = tl.load(target + column * num_rows + rows, mask=is_row, other=0.0)
            wanted += tl.sum(taken[:, None] * errors, axis=0)
            place = tl.load(groups + column) * num_rows + rows
            factor = tl.load(factors + place, mask=is_row, other=1.0)
            steps = tl.div_rn(wanted, factor)
            if HAS_ZERO:
                zero = tl.load(zeros + place, mask=is_row, other=0.0)
                steps += zero
            if IS_FLOAT:
                bits = steps.to(tl.int32, bitcast=True)
                size = tl.minimum((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True), largest)
                binade = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
                shift = tl.maximum(binade, smallest) * drops_fraction
                size = (size + shift) - shift
                # Zero keeps its sign, as in grid.snap_.
                point = (size.to(tl.int32, bitcast=True) | (bits & -0x80000000)).to(tl.float32, bitcast=True)
            else:
                point = (tl.minimum(tl.maximum(steps, smallest), largest) + drops_fraction) - drops_fraction
            point = tl.where(steps == steps, point, steps)  # the bounds replace NaN
            if HAS_ZERO:
                point -= zero
            nearest = point * factor
            error = tl.load(residual + column * num_rows + rows, mask=is_row, other=0.0) - nearest
            errors = tl.where((columns == column)[:, None], error[None, :], errors)
            missed = (wanted - nearest).to(tl.float64)
            total += tl.load(pivot + column).to(tl.float64) * missed * missed
            tl.store(residual + column * num_rows + rows, error, mask=is_row)
            tl.store(quantized + column * num_rows + rows, nearest, mask=is_row)
        tl.store(loss + rows, total, mask=is_row)

    return solve
