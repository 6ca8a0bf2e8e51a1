"""Notice operators whose bits depend on the place of a number in its tensor."""

from __future__ import annotations

from typing import Any

import torch

from runtime.host.dispatch_modes import LeanDispatchMode

_HALVES = (torch.float16, torch.bfloat16)


class TwiceRounded(LeanDispatchMode):  # type: ignore[no-untyped-call]
    """Notices `rsqrt` of 16-bit numbers: torch rounds the root and its inverse for those that do not fill a vector, and
    only the inverse for others.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_used = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.is_used |= func is torch.ops.aten.rsqrt.default and args[0].dtype in _HALVES
        return func(*args, **(kwargs or {}))
