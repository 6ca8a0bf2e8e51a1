"""The sequential part of GPTQ on a GPU: all columns of a block, of all problems of a stack, in one kernel launch.

Solving a block column by column launches a dozen kernels for each of its 128 columns, and a launch takes longer than
the work. Rows do not depend on each other, so here each program of the launch grid solves all columns of the block for
some rows of one problem. The errors of finished columns stay in registers:

    t_k = target_k + sum over j < k of M_jk e_j        q_k = nearest grid point to t_k        e_k = w_k - q_k

A reader computes q_k as a grid point times its factor, so the kernel is launched without the contraction of products to
fused multiply-adds.

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
    mantissa_bits, smallest, largest = grid.SMALL_FLOATS[args.num_bits] if is_float else (0, 1.0, 0.0)
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
    """Import the kernel on first use: importing Triton takes a second, and not every host has it."""
    from runtime.algorithms.gptq_kernel import solve

    return solve
