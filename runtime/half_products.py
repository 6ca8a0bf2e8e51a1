"""Products of 16-bit matrices, made in float32 on a processor that has no instructions for them.

oneDNN multiplies bf16 from AVX-512 on, and fp16 from AVX512-FP16 on. On other processors torch multiplies by plain
loops: on an AVX2 machine Linear in bf16 takes six times as long as in float32, and the product of two matrices of which
neither is transposed two hundred times. There, what is multiplied is copied to float32, some of it at a time, and the
result rounded: numbers are summed up in float32 and rounded once, as those instructions do it, and only the order of
additions differs.

Shapes: M, N and K of products [M, K] times [K, N]; B batches of them, S and T positions, H heads, D features of a head.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.algorithms.products import multiplied

_HALVES = (torch.bfloat16, torch.float16)
_NUMBERS_AT_A_TIME = 2**22  # that are copied: 16 MiB


@contextlib.contextmanager
def quick_halves(device_type: str) -> Iterator[None]:
    """Within the block products of halves are made in float32 where that is quicker.

    Args:
        device_type: where the products are made. What runs on the meta device meanwhile makes copies of the same sizes.
    """
    slow = slow_halves() if device_type == "cpu" else ()
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


class _InFloat32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    supports_higher_order_operators = True  # they are handed on like all else

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to ask it would import it

    def __init__(self, dtypes: Sequence[torch.dtype]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtypes = dtypes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        make = _PRODUCTS.get(func)
        if make is None or not isinstance(args[0], torch.Tensor) or args[0].dtype not in self._dtypes:
            return func(*args, **kwargs)
        if args[0].device.type not in ("cpu", "meta"):
            return func(*args, **kwargs)
        return make(*args, **kwargs)


def _mm(first_MK: torch.Tensor, second_KN: torch.Tensor) -> torch.Tensor:
    return _addmm(None, first_MK, second_KN)


def _addmm(
    added: torch.Tensor | None, first_MK: torch.Tensor, second_KN: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    """Columns of the second matrix, which are rows of a weight, are copied some at a time."""
    full_MK, second_NK = first_MK.float(), second_KN.t()
    result_MN = first_MK.new_empty(len(full_MK), len(second_NK))
    for rows in _parts(len(second_NK), second_NK.shape[1] + len(full_MK)):
        product_MR = multiplied(full_MK, second_NK[rows].float())
        if added is not None and beta:
            product_MR.mul_(alpha).add_(added.expand_as(result_MN)[:, rows], alpha=beta)
        result_MN[:, rows] = product_MR
    return result_MN


def _linear(inputs: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    flat_MK = inputs.reshape(-1, inputs.shape[-1])
    return _addmm(bias_N, flat_MK, weight_NK.t()).view(*inputs.shape[:-1], len(weight_NK))


def _bmm(first_BMK: torch.Tensor, second_BKN: torch.Tensor) -> torch.Tensor:
    return _baddbmm(None, first_BMK, second_BKN)


def _baddbmm(
    added: torch.Tensor | None, first_BMK: torch.Tensor, second_BKN: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    num_rows, num_inner, num_columns = *first_BMK.shape[1:], second_BKN.shape[2]
    result_BMN = first_BMK.new_empty(len(first_BMK), num_rows, num_columns)
    for some in _parts(len(first_BMK), num_inner * (num_rows + num_columns) + num_rows * num_columns):
        product_RMN = torch.bmm(first_BMK[some].float(), second_BKN[some].float())
        if added is not None and beta:
            product_RMN.mul_(alpha).add_(added.expand_as(result_BMN)[some], alpha=beta)
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
    """The fused kernel, for some samples at a time; its result is laid out as its query."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    results, sums = [], []
    tensors = (query_BHSD, key_BHTD, value_BHTD)
    for some in _parts(len(query_BHSD), sum(math.prod(tensor.shape[1:]) for tensor in tensors)):
        mask = attn_mask
        if mask is not None:
            mask = mask[some] if mask.dim() == 4 and mask.shape[0] > 1 else mask
            mask = _float(mask)
        parts = (tensor[some].float() for tensor in tensors)
        found_RHSD, sums_RSH = fused(*parts, dropout_p, is_causal, attn_mask=mask, scale=scale)
        results.append(found_RHSD.to(query_BHSD.dtype))
        sums.append(sums_RSH)
    strides = (math.prod(results[0].shape[1:]), *results[0].stride()[1:])
    result_BHSD = torch.empty_strided(query_BHSD.shape, strides, dtype=query_BHSD.dtype, device=query_BHSD.device)
    return torch.cat(results, out=result_BHSD), torch.cat(sums)


def _whole(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Of small weights, or small altogether."""
    result = func(*map(_float, args), **{name: _float(value) for name, value in kwargs.items()})
    return result.to(args[0].dtype)


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _HALVES else value


def _parts(count: int, numbers_of_one: int) -> Iterator[slice]:
    """Slices of so many, each of as much as is copied at a time."""
    step = max(_NUMBERS_AT_A_TIME // max(numbers_of_one, 1), 1)
    for first in range(0, count, step):
        yield slice(first, first + step)


_aten = torch.ops.aten
_PRODUCTS: dict[Any, Callable[..., Any]] = {
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.linear.default: _linear,
    _aten.bmm.default: _bmm,
    _aten.baddbmm.default: _baddbmm,
    _aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    **{
        func: functools.partial(_whole, func)
        for func in (_aten.convolution.default, _aten.mv.default, _aten.addmv.default, _aten.dot.default)
    },
}
