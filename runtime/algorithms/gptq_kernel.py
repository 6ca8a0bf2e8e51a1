"""The Triton kernel of `gptq_cuda`, which imports this file where it launches the kernel.

Every rounding is that of `grid.snap_`: divisions are IEEE divisions, which `/` is not on a GPU, and small floats are
rounded by additions, because conversions of hardware differ. A number of the binade 2^n becomes a multiple of
u = 2^(n - bits of the mantissa), rounded half to even, when 1.5 * 2^23 u is added and subtracted again.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def snapped(steps, smallest, largest, shift, IS_FLOAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round to a grid with factor 1; `smallest` is the smallest integer, or for floats the smallest normal number."""
    if IS_FLOAT:
        bits = steps.to(tl.int32, bitcast=True)
        size = tl.minimum((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True), largest)
        binade = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        own_shift = tl.maximum(binade, smallest) * shift
        size = (size + own_shift) - own_shift
        # Zero keeps its sign.
        point = (size.to(tl.int32, bitcast=True) | (bits & -0x80000000)).to(tl.float32, bitcast=True)
    else:
        point = (tl.minimum(tl.maximum(steps, smallest), largest) + shift) - shift
    return tl.where(steps == steps, point, steps)  # the bounds replace NaN


# fmt: off
@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def solve(  # type: ignore[no-untyped-def]
    residual, target, quantized, loss, lower, pivot, factors, zeros, groups,
    num_rows, num_columns, residual_stride, target_stride, quantized_stride, lower_stride, lower_row, column_stride,
    factor_stride, smallest, largest, shift,
    IS_FLOAT: tl.constexpr, HAS_ZERO: tl.constexpr, NUM_COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):
    # fmt: on
    """Solve the columns of a block for ROWS rows of a problem; arguments as for `gptq_cuda.solve_block_`."""
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
            point = snapped(steps + zero, smallest, largest, shift, IS_FLOAT) - zero
        else:
            point = snapped(steps, smallest, largest, shift, IS_FLOAT)
        nearest = point * factor
        error = tl.load(residual + column * num_rows + rows, mask=is_row, other=0.0) - nearest
        errors = tl.where((columns == column)[:, None], error[None, :], errors)
        missed = (wanted - nearest).to(tl.float64)
        total += tl.load(pivot + column).to(tl.float64) * missed * missed
        tl.store(residual + column * num_rows + rows, error, mask=is_row)
        tl.store(quantized + column * num_rows + rows, nearest, mask=is_row)
    tl.store(loss + rows, total, mask=is_row)
