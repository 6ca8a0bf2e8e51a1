"""Count the work of a subgraph's operators while its code runs on shapes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from runtime.host.dispatch_modes import LeanDispatchMode
from runtime.planning.work import PassWork

_aten: Any = torch.ops.aten
# Products of two matrices, and the position of the first one in their arguments.
_PRODUCTS = {_aten.mm: 0, _aten.addmm: 1, _aten.bmm: 0, _aten.baddbmm: 1}
_CONVOLUTIONS = (_aten.convolution, _aten._convolution)
_LOOKUPS = (_aten.embedding, _aten.index, _aten.index_select, _aten.gather)  # they do not read the whole table
_ONEDNN = "mkldnn::_linear_pointwise"  # products of halves on processors without instructions for them


class Operations(LeanDispatchMode):
    """Counts the operations of matrix products and convolutions, and the bytes that other operators read and write.

    Attributes:
        routed: with each token in the experts that it is routed to.
        unrouted: those besides if all experts are measured on all tokens.
        num_rounded: numbers of inputs that are rounded.
        routed_share: the part of the tokens that an expert gets.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.routed = self.unrouted = PassWork()
        self.num_rounded = 0.0
        self.routed_share = 1.0
        self._num_routed, self._num_experts = 1, 0
        self._is_paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._is_paused:
            return result
        packet = func.overloadpacket
        if packet in _PRODUCTS:
            self.add(products=2 * result.numel() * args[_PRODUCTS[packet]].shape[-1], calls=1)
        elif packet in _CONVOLUTIONS:
            self.add(products=2 * result.numel() * math.prod(args[1].shape[1:]), calls=1)
        elif func.name() == _ONEDNN:
            self.add(products=2 * result.numel() * args[0].shape[-1], calls=1)
        elif func.is_view:
            self.add(calls=1)
        elif isinstance(result, torch.Tensor):
            read = result.nbytes if packet in _LOOKUPS else sum(map(_stored_bytes, args))
            self.add(moved=read + result.nbytes, calls=1)
        else:
            self.add(moved=sum(map(_stored_bytes, (*args, *_leaves(result)))), calls=1)
        return result

    def add(self, **work: float) -> None:
        """Add work, of all experts while one of them runs."""
        found = PassWork(**work)
        if not self._num_experts:
            self.routed += found
            return
        routed = found.times(self._num_routed)
        calls = PassWork(calls=found.calls * self._num_experts)
        self.routed += PassWork(products=routed.products, attention=routed.attention, moved=routed.moved) + calls
        self.unrouted += found.times(self._num_experts)

    def add_rounded(self, count: float) -> None:
        """Add numbers of an input that is rounded."""
        self.num_rounded += count * self._num_routed

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing while the block runs: it is no code of the model."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    @contextlib.contextmanager
    def one_expert(self, num_experts: int, num_per_token: int) -> Iterator[None]:
        """While the block runs one expert with the rows of all tokens, count what all experts compute."""
        self._num_routed, self._num_experts = num_per_token, num_experts
        self.routed_share = num_per_token / num_experts
        try:
            yield
        finally:
            self._num_routed, self._num_experts = 1, 0


def _leaves(result: Any) -> Sequence[Any]:
    return result if isinstance(result, (tuple, list)) else ()


def _stored_bytes(value: Any) -> int:
    """The bytes of a tensor; numbers that it repeats count once."""
    if not isinstance(value, torch.Tensor):
        return sum(map(_stored_bytes, value)) if isinstance(value, (tuple, list)) else 0
    return min(value.nbytes, value.untyped_storage().nbytes())
