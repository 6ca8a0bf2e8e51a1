"""Add products of matrices to a float32 sum in place, on a GPU, without rounding a product to 16 bits.

Tensor cores multiply bf16 and fp16 numbers exactly and add products in float32, many times faster than they multiply
float32 numbers. `addmm` with `out_dtype` returns that sum unrounded. Which forms of it exist depends on the version of
torch and on the device: some require the sum to have the dtype of the matrices. So each form is tried once, on numbers
whose product bf16 cannot represent, and the first that returns the right sum is used from then on.

Both matrices have tokens as rows, [T, I], and only a row is contiguous. So the leading dimension of each operand is I,
and their alignment does not depend on the number of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

HALVES = (torch.bfloat16, torch.float16)
_TOKENS = 4096  # that are converted to float32 at a time, where products of 16-bit numbers must be
_INEXACT = 1.0078125  # its square takes more digits than bf16 has

# Add first^T second to the sum [P, R], or overwrite it; first [T, P] and second [T, R].
Adding = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], None]


def add_exact_product_(sum_PR: torch.Tensor, first_TP: torch.Tensor, second_TR: torch.Tensor, *, is_new: bool) -> None:
    """Add first^T second to a float32 sum; a new sum is overwritten, whatever it contains.

    Products of float32 matrices follow `torch.backends.cuda.matmul.allow_tf32`, which is off by default.
    """
    way = _way(first_TP.dtype, str(first_TP.device)) if first_TP.dtype in HALVES else _converted
    way(sum_PR, first_TP, second_TR, is_new)


@functools.cache
def _way(dtype: torch.dtype, device: str) -> Adding:
    """The fastest way that returns an exact sum of products of this dtype on this device."""
    for way in (_in_place, _through_a_copy):
        if _is_exact(way, dtype, device):
            return way
    return _converted


def _is_exact(way: Adding, dtype: torch.dtype, device: str) -> bool:
    size = 16
    sum_PR = torch.full((size, size), torch.nan, device=device)
    numbers_TP = torch.full((size, size), _INEXACT, device=device).to(dtype)
    try:
        way(sum_PR, numbers_TP, numbers_TP, True)
        way(sum_PR, numbers_TP, numbers_TP, False)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return bool((sum_PR == 2 * size * _INEXACT**2).all())


def _in_place(sum_PR: torch.Tensor, first_TP: torch.Tensor, second_TR: torch.Tensor, is_new: bool) -> None:
    beta = 0 if is_new else 1
    torch.addmm(sum_PR, first_TP.t(), second_TR, out_dtype=torch.float32, beta=beta, out=sum_PR)


def _through_a_copy(sum_PR: torch.Tensor, first_TP: torch.Tensor, second_TR: torch.Tensor, is_new: bool) -> None:
    product_PR = torch.mm(first_TP.t(), second_TR, out_dtype=torch.float32)
    sum_PR.copy_(product_PR) if is_new else sum_PR.add_(product_PR)


def _converted(sum_PR: torch.Tensor, first_TP: torch.Tensor, second_TR: torch.Tensor, is_new: bool) -> None:
    parts = zip(torch.split(first_TP, _TOKENS), torch.split(second_TR, _TOKENS), strict=True)
    for place, (few_TP, few_TR) in enumerate(parts):
        sum_PR.addmm_(few_TP.float().t(), few_TR.float(), beta=0 if is_new and not place else 1)
