"""Fast products of float32 matrices, and a triangular factorization built from them.

torch multiplies float32 matrices with MKL, which does not use all instructions of other makers' processors: on an AMD
EPYC with AVX-512 it reaches less than half the speed of oneDNN, which detects the instructions and is part of torch.
Both are IEEE float32 and differ in the order of additions. LAPACK's factorization is slower still, so it is used only
for small blocks: the two halves are factorized one after the other, and the rest is products (Gustavson, "Recursion
leads to automatic variable blocking for dense linear-algebra algorithms", IBM J. Res. Dev. 41, 1997).
"""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Iterator
from typing import Any

import torch

_SMALL, _SMALL_ELSEWHERE = 128, 2048  # size of a block that LAPACK, or another device's library, factorizes or solves
_ROWS = 512  # rows of a product that are added at a time
SQUARE = 1024  # side of the part of a matrix that oneDNN gets at a time


@contextlib.contextmanager
def float32_products() -> Iterator[None]:
    """Multiply float32 matrices in float32 on a GPU, also if the process allows TF32, which has 11 bits."""
    settings: Any = torch.backends.cuda.matmul
    name: str = "allow_tf32"
    exact: Any = False
    try:
        before = settings.allow_tf32
    except RuntimeError:  # the process has set the other name, after which torch rejects the first
        name, exact, before = "fp32_precision", "ieee", settings.fp32_precision
    setattr(settings, name, exact)
    try:
        yield
    finally:
        setattr(settings, name, before)


def multiplied(first_MK: torch.Tensor, second_NK: torch.Tensor) -> torch.Tensor:
    """Return first second^T.

    Args:
        first_MK: [M, K], any float dtype.
        second_NK: [N, K], the same dtype and device.

    Returns:
        [M, N], in the same dtype and on the same device.
    """
    if not _is_for_onednn(first_MK):
        return first_MK @ second_NK.t()
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        _dense(first_MK), _dense(second_NK), None, "none", [], ""
    )
    return product


def add_product_(
    target_MN: torch.Tensor, first_MK: torch.Tensor, second_NK: torch.Tensor, *, sign: int = 1, is_new: bool = False
) -> None:
    """Add first second^T to the target in place, or with a sign of -1 subtract it; a new target is overwritten.

    The target may be wider than both matrices; then each of the products that are added is rounded to their dtype.

    oneDNN gets a square of the second matrix at a time: it copies that into its own layout before it multiplies, and
    the copy should be small; and it caches a kernel of nearly a megabyte for each shape, so shapes should be few.
    """
    if target_MN.device.type == "cpu" and first_MK.dtype == torch.bfloat16 and not has_quick_bfloat16():
        first_MK, second_NK = first_MK.to(target_MN.dtype), second_NK.to(target_MN.dtype)
    if not _is_for_onednn(first_MK) and first_MK.dtype == target_MN.dtype:
        target_MN.addmm_(first_MK, second_NK.t(), alpha=sign, beta=0 if is_new else 1)
        return
    for left in range(0, len(second_NK), SQUARE):
        columns = slice(left, left + SQUARE)
        for start in range(0, second_NK.shape[1], SQUARE):
            inner = slice(start, start + SQUARE)
            product_MN = multiplied(first_MK[:, inner], second_NK[columns, inner])
            if is_new and not start:
                torch.mul(product_MN, sign, out=target_MN[:, columns])
            else:
                target_MN[:, columns].add_(product_MN, alpha=sign)


def _dense(matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix, copied if neither its rows nor its columns are contiguous, for which oneDNN is slow."""
    if matrix.is_contiguous() or matrix.t().is_contiguous():
        return matrix
    return matrix.t().contiguous().t() if matrix.stride(0) == 1 else matrix.contiguous()


def _is_for_onednn(matrix: torch.Tensor) -> bool:
    is_float32 = matrix.dtype == torch.float32 and matrix.device.type == "cpu"
    return is_float32 and matrix.numel() > 0 and _has_onednn()


@functools.cache
def _has_onednn() -> bool:
    """Whether torch can use oneDNN for ordinary tensors: on x86, in builds that include it."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return is_x86 and bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def has_quick_bfloat16() -> bool:
    """Whether this processor multiplies bf16 in less time than float32: it has instructions, and oneDNN uses them."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    has_instructions = any(ask() for ask in (getattr(torch.cpu, name, None) for name in names) if ask is not None)
    is_known = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return has_instructions and _has_onednn() and is_known is not None and bool(is_known())


def factorize_(matrix_NN: torch.Tensor) -> bool:
    """Replace a matrix by the lower triangular L with L^T L the matrix: a Cholesky factorization from the last column.

    Args:
        matrix_NN: [N, N], symmetric; only the lower triangle is read. Overwritten with L; up to `reach` columns to the
            right of the diagonal are overwritten with meaningless values.

    Returns:
        Whether the factorization exists, i.e. the matrix is positive definite.
    """
    middle = _middle(matrix_NN)
    if not middle:
        return _factorize_small_(matrix_NN)
    first_II, second_KK = matrix_NN[:middle, :middle], matrix_NN[middle:, middle:]
    between_KI = matrix_NN[middle:, :middle]
    if not factorize_(second_KK):
        return False
    solve_transposed_(second_KK, between_KI)
    for top in range(0, middle, _ROWS):
        bottom = min(top + _ROWS, middle)
        rows_RK = between_KI[:, top:bottom].contiguous().t()
        add_product_(first_II[top:bottom, :bottom], rows_RK, between_KI[:, :bottom].t(), sign=-1)
    return factorize_(first_II)


def reach(device: torch.device) -> int:
    """The number of columns to the right of the diagonal that `factorize_` may overwrite."""
    return max(_ROWS, _small(device))


def _small(device: torch.device) -> int:
    return _SMALL if device.type == "cpu" else _SMALL_ELSEWHERE


def _middle(matrix_NN: torch.Tensor) -> int:
    """The index at which to cut a matrix in two, the second part being a multiple of the small size; 0 if small."""
    size, small = len(matrix_NN), _small(matrix_NN.device)
    return 0 if size <= small else size - (size // 2 + small - 1) // small * small


def _factorize_small_(matrix_NN: torch.Tensor) -> bool:
    # Transposed so that the lower triangle is read: the values above the diagonal may be outdated.
    lower_NN, info = torch.linalg.cholesky_ex(matrix_NN.t().flip(0, 1))
    matrix_NN.copy_(lower_NN.flip(0, 1).t())
    return not info and bool(torch.isfinite(matrix_NN.diagonal()).all())


def solve_transposed_(lower_KK: torch.Tensor, right_KI: torch.Tensor) -> None:
    """Solve L^T X = right, and overwrite the right side with X; values of L above the diagonal are not read."""
    middle = _middle(lower_KK)
    if not middle:
        one_KK = torch.eye(len(lower_KK), dtype=lower_KK.dtype, device=lower_KK.device)
        inverse_KK = torch.linalg.solve_triangular(lower_KK.t(), one_KK, upper=True)
        right_KI.copy_(multiplied(inverse_KK, right_KI.contiguous().t()))
        return
    solve_transposed_(lower_KK[middle:, middle:], right_KI[middle:])
    across_FS = lower_KK[middle:, :middle].t().contiguous()
    add_product_(right_KI[:middle], across_FS, right_KI[middle:].t(), sign=-1)
    solve_transposed_(lower_KK[:middle, :middle], right_KI[:middle])


def solve_lower_(lower_KK: torch.Tensor, right_KI: torch.Tensor) -> None:
    """Solve L X = right, and overwrite the right side with X; values of L above the diagonal are not read."""
    middle = _middle(lower_KK)
    if not middle:
        one_KK = torch.eye(len(lower_KK), dtype=lower_KK.dtype, device=lower_KK.device)
        inverse_KK = torch.linalg.solve_triangular(lower_KK, one_KK, upper=False)
        right_KI.copy_(multiplied(inverse_KK, right_KI.contiguous().t()))
        return
    solve_lower_(lower_KK[:middle, :middle], right_KI[:middle])
    across_SF = lower_KK[middle:, :middle].contiguous()
    add_product_(right_KI[middle:], across_SF, right_KI[:middle].t(), sign=-1)
    solve_lower_(lower_KK[middle:, middle:], right_KI[middle:])
