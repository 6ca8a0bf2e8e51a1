"""Numbers in the model's code, recorded as they are written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode

# What the model's code may ask of the weights' dtype. Other dtypes have such numbers too, and so has arithmetic: so
# while a trace lasts each is off by a trillionth, by which it is known again.
_MARK = 1 + 2.0**-40
MARKED = ("eps", "tiny", "smallest_normal")


def marked(dtype: torch.dtype, name: str) -> float:
    """The number that stands for `torch.finfo(run's dtype).<name>` in a trace whose weights have this dtype."""
    return float(getattr(torch.finfo(dtype), name)) * _MARK


class _MarkedLimits:
    """`torch.finfo` of the weights' dtype."""

    def __init__(self, info: Any) -> None:
        for name in ("bits", "dtype", "max", "min", "resolution"):
            setattr(self, name, getattr(info, name))
        for name in MARKED:
            setattr(self, name, float(getattr(info, name)) * _MARK)


@contextlib.contextmanager
def limits_marked(weights_dtype: torch.dtype | None) -> Iterator[None]:
    """While the block runs, `torch.finfo` gives marked numbers for the dtype that stands for the weights'."""
    plain: Any = torch.finfo

    def finfo(dtype: torch.dtype | None = None) -> Any:
        found = plain(dtype) if dtype is not None else plain()
        return _MarkedLimits(found) if dtype is not None and dtype == weights_dtype else found

    torch.finfo = finfo  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch.finfo = plain  # type: ignore[misc]


class LiteralTensors(TorchFunctionMode):
    """Record numbers that the model's code makes tensors of as they are written: `torch.tensor(0.1, dtype=...)`,
    `torch.tensor([0.1, 0.2], dtype=...)`, `x[mask] = 0.1`.

    The dispatcher sees only the finished tensor, rounded to the dtype of the trace; a run in another dtype needs the
    number itself.
    """

    def __init__(self, weights_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.weights_dtype = weights_dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if get_proxy_mode() is not None:
            if func in (torch.tensor, torch.as_tensor):
                return self._tensor(func, *args, **kwargs)
            if func is torch.Tensor.__setitem__ and type(args[2]) in (int, float):
                return func(args[0], args[1], _scalar(args[2], args[0].dtype, args[0].device))
        return func(*args, **kwargs)

    def _tensor(self, func: Callable[..., Any], data: Any, **options: Any) -> Any:
        dtype = options.get("dtype")
        if type(data) in (int, float):
            usual = torch.int64 if type(data) is int else torch.get_default_dtype()
            return _scalar(data, dtype or usual, options.get("device"))
        if isinstance(data, (list, tuple)) and dtype is not None and dtype == self.weights_dtype:
            return func(data, **{**options, "dtype": torch.float64}).to(dtype)
        return func(data, **options)


def _scalar(number: float, dtype: torch.dtype, device: torch.device | str | None) -> torch.Tensor:
    place = torch.device("cpu") if device is None else torch.device(device)
    scalar: torch.Tensor = torch.ops.aten.scalar_tensor.default(number, dtype=dtype, device=place)
    return scalar
