"""Interface of the tracer for the modules that record parts of a forward: steps, loops, repeated layers, proofs."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.fx.experimental.proxy_tensor import PythonKeyTracer

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch
    from torch import fx, nn
    from torch._subclasses import FakeTensorMode

    from seqbuild.trace.sizes.symbols import WatchedSizes


def nodes_after(last: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes recorded after `last`."""
    node = last.next
    while node.op != "root":
        yield node
        node = node.next


class Recorder(PythonKeyTracer, abc.ABC):
    """An fx tracer that knows the node of every value; implemented in `seqbuild.trace.record.tracer`.

    Attributes:
        dtype: the dtype of the weights during the trace; None for their own.
        constants: tensors created by the model's code, by the names of their nodes.
        parameter_names: all dotted names of each parameter and buffer, by its id.
        targets: modules that must not be called inside an opaque step.
        shape_env: the symbols of the trace and the assumptions about them.
        fake_mode: the mode of the trace's fake tensors.
    """

    dtype: torch.dtype | None
    constants: dict[str, torch.Tensor]
    parameter_names: dict[int, tuple[str, ...]]
    targets: Collection[nn.Module]
    shape_env: WatchedSizes
    fake_mode: FakeTensorMode

    @abc.abstractmethod
    def node_of(self, value: Any) -> fx.Node | None:
        """Return the node whose result a value is; None for a value unknown to the trace."""

    @abc.abstractmethod
    def known_node(self, tensor: torch.Tensor) -> fx.Node | None:
        """Return the node of a tensor; None for a parameter that has not been used yet."""

    @abc.abstractmethod
    def outer_node(self, tensor: torch.Tensor) -> fx.Node | None:
        """Return the node of a tensor; create one for a parameter that has not been used yet."""

    @abc.abstractmethod
    def name_of(self, module: nn.Module) -> str:
        """Return the dotted name of a module."""

    @abc.abstractmethod
    def track(self, value: Any, proxy: fx.Proxy) -> Any:
        """Register a value as the result of a proxy's node."""

    @abc.abstractmethod
    def item(self, proxy: fx.Proxy, key: Any) -> fx.Proxy:
        """Record `proxy[key]`."""
