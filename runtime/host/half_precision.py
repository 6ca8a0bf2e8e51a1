"""Products of 16-bit matrices, computed in float32 on processors that have no instructions for them.

oneDNN multiplies bf16 from AVX-512 on, and fp16 from AVX512-FP16 on. On other processors torch uses plain loops: on an
AVX2 machine a Linear in bf16 takes six times as long as in float32, and a product of two matrices of which neither is
transposed two hundred times. There, operands are copied to float32, a part at a time, and the result is rounded:
numbers are summed up in float32 and rounded once, as those instructions do, and only the order of additions differs.

Shapes: M, N and K of products [M, K] times [K, N]; B batches of them, S and T positions, H heads, D features of a head.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from runtime.algorithms.exact_products import HALVES
from runtime.host.dispatch_modes import LeanDispatchMode

NUMBERS_AT_A_TIME = 2**22  # numbers that are copied at a time: 16 MiB


@contextlib.contextmanager
def quick_halves(device_type: str, computed: Collection[torch.dtype] = HALVES) -> Iterator[None]:
    """Compute products of 16-bit matrices in float32 while the block runs, if that is faster.

    Args:
        device_type: the device of the products. Products on the meta device make copies of the same sizes.
        computed: the dtypes that the products may have. If none of them is slow, operators are not intercepted, which
            saves some microseconds for each.
    """
    slow = tuple(dtype for dtype in slow_halves() if dtype in computed) if device_type == "cpu" else ()
    with _InFloat32(slow) if slow else contextlib.nullcontext():
        yield


@functools.cache
def slow_halves() -> tuple[torch.dtype, ...]:
    """The 16-bit dtypes that oneDNN does not multiply on this processor."""
    supported = {
        torch.bfloat16: getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None),
        torch.float16: getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None),
    }
    return tuple(dtype for dtype, ask in supported.items() if not torch._C._has_mkldnn or ask is None or not ask())


def names_of_slow_halves() -> list[str]:
    """The names of `slow_halves`, for the journal of a run."""
    return [str(dtype).removeprefix("torch.") for dtype in slow_halves()]


class _InFloat32(LeanDispatchMode):
    supports_higher_order_operators = True  # they are called unchanged, as all other operators

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # otherwise attention that is compiled on its first call fails under this mode

    def __init__(self, dtypes: Sequence[torch.dtype]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtypes = dtypes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        make = _PRODUCTS.get(func)
        if make is None or not self._takes([value for value in args if isinstance(value, torch.Tensor)]):
            return func(*args, **kwargs)
        return make(*args, **kwargs)

    def _takes(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether all are dense tensors of one slow dtype; torch handles anything else itself."""
        dtype = tensors[0].dtype
        return dtype in self._dtypes and all(
            tensor.dtype == dtype and tensor.layout == torch.strided and tensor.device.type in ("cpu", "meta")
            for tensor in tensors
        )


def _addmm(
    added: torch.Tensor | None, first_MK: torch.Tensor, second_KN: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    """Multiply by a few columns of the second matrix (rows of a weight) at a time, to limit the copy.

    Not with oneDNN, which would cache a kernel for each number of rows, and the number of tokens varies.
    """
    full_MK = first_MK.float()
    result_MN = first_MK.new_empty(len(full_MK), second_KN.shape[1])
    for columns in _parts(second_KN.shape[1], len(second_KN) + len(full_MK)):
        product_MR = full_MK @ second_KN[:, columns].float()
        _add_(product_MR, None if added is None else added.expand_as(result_MN)[:, columns], beta, alpha)
        result_MN[:, columns] = product_MR
    return result_MN


def _add_(product: torch.Tensor, added: torch.Tensor | None, beta: float, alpha: float) -> None:
    """Compute alpha * product + beta * added in place; with beta 0 `added` is ignored, even if it is infinite."""
    if alpha != 1:
        product.mul_(alpha)
    if added is not None and beta:
        product.add_(added, alpha=beta)


def _baddbmm(
    added: torch.Tensor | None, first_BMK: torch.Tensor, second_BKN: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    num_rows, num_inner, num_columns = *first_BMK.shape[1:], second_BKN.shape[2]
    result_BMN = first_BMK.new_empty(len(first_BMK), num_rows, num_columns)
    for some in _parts(len(first_BMK), num_inner * (num_rows + num_columns) + num_rows * num_columns):
        product_RMN = torch.bmm(first_BMK[some].float(), second_BKN[some].float())
        _add_(product_RMN, None if added is None else added.expand_as(result_BMN)[some], beta, alpha)
        result_BMN[some] = product_RMN
    return result_BMN


def _attention(
    query_BHSD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the fused kernel for a few samples at a time, and with a mask for a few queries of each."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    result_BHSD = torch.empty_like(query_BHSD)
    sums_BHS = torch.empty_like(query_BHSD[..., 0], dtype=torch.float32)
    numbers = sum(math.prod(tensor.shape[1:]) for tensor in (query_BHSD, key_BHTD, value_BHTD))
    of_a_query = 0 if attn_mask is None else attn_mask.shape[-1] * (attn_mask.shape[1] if attn_mask.dim() == 4 else 1)
    for some in _parts(len(query_BHSD), numbers + of_a_query * query_BHSD.shape[2]):
        key_RHTD, value_RHTD = key_BHTD[some].float(), value_BHTD[some].float()
        for rows in _parts(query_BHSD.shape[2], of_a_query * (some.stop - some.start)):
            mask = None if attn_mask is None else _float(_of_mask(attn_mask, some, rows))
            query_RHQD = query_BHSD[some, :, rows].float()
            found_RHQD, found_RHQ = fused(
                query_RHQD, key_RHTD, value_RHTD, dropout_p, is_causal, attn_mask=mask, scale=scale
            )
            result_BHSD[some, :, rows] = found_RHQD
            sums_BHS[some, :, rows] = found_RHQ
    return result_BHSD, sums_BHS


def _of_mask(mask: torch.Tensor, some: slice, rows: slice) -> torch.Tensor:
    """Take a part of a mask of shape [S, T] or [B, H, S, T], where B, H and S may be 1."""
    if mask.dim() == 4 and mask.shape[0] > 1:
        mask = mask[some]
    return mask[..., rows, :] if mask.shape[-2] > 1 else mask


def _whole(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Call an operator with all operands copied to float32 at once; they are small."""
    result = func(*map(_float, args), **{name: _float(value) for name, value in kwargs.items()})
    return result.to(args[0].dtype)


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in HALVES else value


def _parts(count: int, numbers_of_one: int) -> Iterator[slice]:
    """Yield slices of `count` items that together have at most `NUMBERS_AT_A_TIME` numbers each; one slice for 0."""
    step = max(NUMBERS_AT_A_TIME // numbers_of_one, 1) if numbers_of_one else max(count, 1)
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


_aten = torch.ops.aten
_PRODUCTS: dict[Any, Callable[..., Any]] = {
    _aten.mm.default: functools.partial(_addmm, None),
    _aten.addmm.default: _addmm,
    _aten.bmm.default: functools.partial(_baddbmm, None),
    _aten.baddbmm.default: _baddbmm,
    _aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    **{
        func: functools.partial(_whole, func)
        for func in (_aten.convolution.default, _aten.mv.default, _aten.addmv.default, _aten.dot.default)
    },
}
