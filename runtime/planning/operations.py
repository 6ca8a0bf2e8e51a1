"""Count the floating-point operations of a subgraph's matrix products, while its code runs on shapes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from runtime.host.dispatch_modes import LeanDispatchMode

_aten: Any = torch.ops.aten
# Products of two matrices, and the position of the first one in their arguments.
_PRODUCTS = {_aten.mm: 0, _aten.addmm: 1, _aten.bmm: 0, _aten.baddbmm: 1}
_CONVOLUTIONS = (_aten.convolution, _aten._convolution)
_ONEDNN = "mkldnn::_linear_pointwise"  # products of halves on processors without instructions for them


class Operations(LeanDispatchMode):
    """Counts the operations of matrix products and convolutions; a multiplication and an addition are two.

    Attributes:
        routed: with each token in the experts that it is routed to.
        unrouted: those besides if all experts are measured on all tokens.
        routed_share: the part of the tokens that an expert gets.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.routed = self.unrouted = 0.0
        self.routed_share = 1.0
        self._num_routed, self._num_unrouted = 1, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in _PRODUCTS:
            self.add(2 * result.numel() * args[_PRODUCTS[packet]].shape[-1])
        elif packet in _CONVOLUTIONS:
            self.add(2 * result.numel() * math.prod(args[1].shape[1:]))
        elif func.name() == _ONEDNN:
            self.add(2 * result.numel() * args[0].shape[-1])
        return result

    def add(self, count: float) -> None:
        """Add operations that no product on shapes shows."""
        self.routed += count * self._num_routed
        self.unrouted += count * self._num_unrouted

    @contextlib.contextmanager
    def one_expert(self, num_experts: int, num_per_token: int) -> Iterator[None]:
        """While the block runs one expert with the rows of all tokens, count what all experts compute."""
        self._num_routed, self._num_unrouted = num_per_token, num_experts
        self.routed_share = num_per_token / num_experts
        try:
            yield
        finally:
            self._num_routed, self._num_unrouted = 1, 0
