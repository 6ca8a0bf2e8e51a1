"""Count what a GPU would launch, and fail where Python would wait for it; needs no GPU.

Tensors are on the meta device and have no numbers: torch itself rejects `item`, `tolist`, `bool`, copies to
the CPU, and shapes that depend on numbers. `Launches` also rejects copies of numbers to the device, and everything that
reads numbers if it runs on CPU tensors.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from runtime.host.dispatch_modes import LeanDispatchMode

ATEN = torch.ops.aten
READS = {
    ATEN._local_scalar_dense.default,
    ATEN.is_nonzero.default,
    ATEN.equal.default,
    ATEN.nonzero.default,
    ATEN.masked_select.default,
    ATEN.repeat_interleave.Tensor,
    ATEN._unique2.default,
    ATEN.unique_dim.default,
    ATEN.unique_consecutive.default,
    ATEN.bincount.default,
}
FREE = {  # they allocate memory, or return their argument
    ATEN.empty.memory_format,
    ATEN.empty_like.default,
    ATEN.empty_strided.default,
    ATEN.new_empty.default,
    ATEN.lift_fresh.default,
    ATEN.scalar_tensor.default,
    ATEN._unsafe_view.default,
    ATEN.split_with_sizes.default,
}


class WaitedError(AssertionError):
    """Python would have waited for the device."""


class _Numbers(TorchFunctionMode):
    """Fails where numbers of Python become a tensor on the device, which the dispatcher does not see."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "meta":
            raise WaitedError(f"{func} copies numbers to the device")
        return func(*args, **kwargs)


class Launches(LeanDispatchMode):
    """Counts operators that launch a kernel; views and allocations do not.

    Attributes:
        counts: of each operator, by its name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._numbers = _Numbers()

    def __enter__(self) -> Launches:
        self._numbers.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._numbers.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if func in READS:
            raise WaitedError(f"{func} reads numbers")
        if func is ATEN.index.Tensor and any(one is not None and one.dtype == torch.bool for one in args[1]):
            raise WaitedError("the shape of a selection by a mask depends on numbers")
        found = func(*args, **kwargs)
        outputs = [one for one in (found if isinstance(found, (tuple, list)) else [found]) if torch.is_tensor(one)]
        devices = {one.device.type for one in (*tensors, *outputs)}
        if func in (ATEN._to_copy.default, ATEN.copy_.default) and len(devices) > 1:
            raise WaitedError(f"{func} copies numbers between devices")
        is_view = any(
            result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns
        )
        if not is_view and func not in FREE and "meta" in devices:
            self.counts[func.overloadpacket.__name__] += 1
        return found

    @property
    def total(self) -> int:
        """The number of all launches."""
        return sum(self.counts.values())
