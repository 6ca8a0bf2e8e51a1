"""The sequential part of GPTQ on a GPU: all columns of a block in one kernel launch.

Solving a block column by column launches a dozen kernels for each of its 128 columns, and a launch takes longer than
the work. Rows do not depend on each other, so here each program of the launch grid solves all columns of the block for
some of the rows. The errors of finished columns stay in registers:

    t_k = target_k + sum over j < k of M_jk e_j        q_k = nearest grid point to t_k        e_k = w_k - q_k

Memory traffic: the block's part of W, t, q and e once each, 16 bytes per weight, and the triangle M once per program.
Arithmetic: 2 B operations per weight. `tests/bench/bench_gptq.py` prints the time beside both bounds.

Shapes: O rows, B columns of a block, G groups; everything is transposed, so that a column is contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

_ROWS = 32  # rows per program; with 128 columns their errors fill the registers of 4 warps
_WIDEST = 256


@cache
def has_triton() -> bool:
    """Whether Triton, which compiles the kernel, is installed."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def is_supported(residual_BO: torch.Tensor, args: QuantizationArgs) -> bool:
    """Whether the kernel can solve a block: int grid, float32, at most 256 columns, and Triton is installed."""
    is_plain = args.type == "int" and residual_BO.dtype == torch.float32
    return is_plain and len(residual_BO) <= _WIDEST and has_triton()


def solve_block_(
    residual_BO: torch.Tensor,
    target_BO: torch.Tensor,
    quantized_BO: torch.Tensor,
    lower_BB: torch.Tensor,
    scale_GO: torch.Tensor,
    zero_GO: torch.Tensor | None,
    group_of_B: Sequence[int],
    num_bits: int,
) -> None:
    """Round the columns of one block; arguments as for `gptq_columns.solve_block_`, all contiguous and float32."""
    num_columns, num_rows = residual_BO.shape
    groups_B = torch.tensor(group_of_B, dtype=torch.int32, device=residual_BO.device)
    padded = 1 << (num_columns - 1).bit_length() if num_columns > 1 else 1
    _kernel()[(-(-num_rows // _ROWS),)](
        residual_BO,
        target_BO,
        quantized_BO,
        lower_BB,
        scale_GO,
        zero_GO if zero_GO is not None else scale_GO,
        groups_B,
        num_rows,
        num_columns,
        float(-(2 ** (num_bits - 1))),
        float(2 ** (num_bits - 1) - 1),
        has_zero=zero_GO is not None,
        NUM_COLUMNS=padded,
        ROWS=_ROWS,
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
        lower,
        scale,
        zero,
        groups,
        num_rows,
        num_columns,
        smallest,
        largest,
        has_zero: tl.constexpr,
        NUM_COLUMNS: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        is_row = rows < num_rows
        columns = tl.arange(0, NUM_COLUMNS)
        errors = tl.zeros([NUM_COLUMNS, ROWS], dtype=tl.float32)
        for column in range(num_columns):
            taken = tl.load(lower + column * num_columns + columns, mask=columns < column, other=0.0)
            wanted = tl.load(target + column * num_rows + rows, mask=is_row, other=0.0)
            wanted += tl.sum(taken[:, None] * errors, axis=0)
            place = tl.load(groups + column) * num_rows + rows
            factor = tl.load(scale + place, mask=is_row, other=1.0)
            steps = wanted / factor
            if has_zero:
                shift = tl.load(zero + place, mask=is_row, other=0.0)
                steps += shift
            steps = tl.minimum(tl.maximum(steps, smallest), largest)
            # Rounds half to even, as in grid.snap_: a float32 of this size has no fraction.
            steps = (steps + 12582912.0) - 12582912.0
            if has_zero:
                steps -= shift
            nearest = steps * factor
            error = tl.load(residual + column * num_rows + rows, mask=is_row, other=0.0) - nearest
            errors = tl.where((columns == column)[:, None], error[None, :], errors)
            tl.store(residual + column * num_rows + rows, error, mask=is_row)
            tl.store(target + column * num_rows + rows, wanted - nearest, mask=is_row)
            tl.store(quantized + column * num_rows + rows, nearest, mask=is_row)

    return solve
