"""Record what the dispatcher does not see: literals, limits of dtypes, symbolic indices and `vmap`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._functorch import apis
from torch.fx.experimental.proxy_tensor import (
    ProxyTorchDispatchMode,
    PythonKeyTracer,
    disable_proxy_modes_tracing,
    get_proxy_mode,
)
from torch.overrides import TorchFunctionMode

from seqbuild.chain.marks import LIMIT_MARK

MARKED = ("eps", "tiny", "smallest_normal")


class _MarkedLimits:
    """`torch.finfo` of the weights' dtype, with marked numbers."""

    def __init__(self, info: Any) -> None:
        for name in ("bits", "dtype", "max", "min", "resolution"):
            setattr(self, name, getattr(info, name))
        for name in MARKED:
            setattr(self, name, float(getattr(info, name)) * LIMIT_MARK)


@contextlib.contextmanager
def limits_marked(weights_dtype: torch.dtype | None) -> Iterator[None]:
    """Make `torch.finfo` return marked numbers for the dtype that represents the weights' while the block runs."""
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
    """Record literal numbers exactly: `torch.tensor(0.1, dtype=...)`, `torch.tensor([0.1, 0.2], ...)`, `x[mask] = 0.1`.

    The dispatcher sees only the finished tensor, rounded to the dtype of the trace; a run in another dtype needs the
    exact number.
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


class SymbolicIndices(TorchFunctionMode):
    """Record reads and writes of tensors at symbolic indices."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and get_proxy_mode() is not None:
            items = args[1] if isinstance(args[1], tuple) else (args[1],)
            if _is_handled(items):
                return self._indexed(func, args[0], items, *args[2:])
        return func(*args, **(kwargs or {}))

    def _indexed(self, func: Callable[..., Any], tensor: torch.Tensor, items: tuple[Any, ...], *value: Any) -> Any:
        axes = {_axis(items, place, tensor.dim()): item for place, item in enumerate(items) if _is_symbol(item)}
        for axis in sorted(axes, reverse=True):
            tensor = torch.ops.aten.select.int(tensor, axis, axes[axis])
        rest = tuple(item for item in items if not _is_symbol(item))
        if not value and all(item is Ellipsis or item == slice(None) for item in rest):
            return tensor
        return func(tensor, rest or (Ellipsis,), *value)


def _is_symbol(item: Any) -> bool:
    return isinstance(item, torch.SymInt)


def _is_handled(items: tuple[Any, ...]) -> bool:
    """Return whether there is a symbol and no tensor among the indices; masks and index tensors have other rules."""
    is_plain = all(item is None or item is Ellipsis or type(item) in (int, slice, torch.SymInt) for item in items)
    return is_plain and any(_is_symbol(item) for item in items)


def _axis(items: tuple[Any, ...], place: int, num_axes: int) -> int:
    """Return the axis to which an item applies."""
    if any(item is Ellipsis for item in items[:place]):
        return num_axes - sum(item is not None for item in items[place:])
    return sum(item is not None for item in items[:place])


@contextlib.contextmanager
def vmap_recorded(tracer: PythonKeyTracer) -> Iterator[None]:
    """Record the inside of `torch.vmap` after functorch has converted batched operations into plain ones."""
    functions: Any = apis
    plain = functions.vmap_impl

    def recorded(*args: Any, **kwargs: Any) -> Any:
        mode = get_proxy_mode()
        if not getattr(mode, "pre_dispatch", False):
            return plain(*args, **kwargs)
        with disable_proxy_modes_tracing(), ProxyTorchDispatchMode(tracer, "symbolic", pre_dispatch=False):
            return plain(*args, **kwargs)

    functions.vmap_impl = recorded
    try:
        yield
    finally:
        functions.vmap_impl = plain
