"""Replay the recorded part of a graph on a few real samples.

A step that cannot run on fake tensors gets a dry run on real ones (`dry_run.py`). Arguments that recorded operations
compute from the model's inputs (a grid of image patches, a mask, positions) must have consistent values, so these
operations are executed on the samples. Results of leaves are random: their shape is known and their numbers are
irrelevant.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from runtime.errors import TraceError
from seqbuild.trace.python.sequences import UnknownLength
from seqbuild.trace.real.weightless import small_tensor

if TYPE_CHECKING:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

# Larger parameters are not created for a replay, so that a laptop can compile any model.
_LARGEST_PARAMETER = 2**28

NodeOf = Callable[[Any], "fx.Node | None"]
Execute = Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]


@contextlib.contextmanager
def plain_execution() -> Iterator[None]:
    """Disable all modes and gradients, and restore the random state after the block."""
    with _disable_current_modes(), unset_fake_temporarily(), torch.random.fork_rng(devices=[]), torch.no_grad():
        yield


class Replay:
    """Executes a graph on real samples while it is being recorded.

    Args:
        samples: named inputs of at least two different sizes; the first has the sizes of the trace.
        shape_env: the symbols of the trace.
        node_of: returns the node whose result a fake tensor or symbol is, or None.
        execute: calls a recorded function of the model's code on real values.
        lookup: returns the value of a `get_attr` node.
    """

    def __init__(
        self,
        samples: Sequence[Mapping[str, Any]],
        shape_env: ShapeEnv,
        node_of: NodeOf,
        execute: Execute,
        lookup: Callable[[fx.Node], Any],
    ) -> None:
        self.samples = samples
        self.shape_env = shape_env
        self.node_of = node_of
        self.execute = execute
        self.lookup = lookup
        self.values: list[dict[fx.Node, Any]] = [{} for _ in samples]
        self.symbols: list[dict[sympy.Symbol, int]] = [{} for _ in samples]
        self._parameters: dict[str, torch.Tensor] = {}
        self._last: fx.Node | None = None
        self._generator = torch.Generator().manual_seed(1)

    def real(self, value: Any, variant: int) -> Any:
        """Return the real value of `value` (a fake tensor, a symbol or a container of them) for one sample."""
        node = self.node_of(value)
        if node is not None:
            self._catch_up(node.graph)
            known = self.values[variant][node]
            is_made_up = isinstance(known, _Failed) and isinstance(value, torch.Tensor) and value.is_floating_point()
            return self._made_up(value, variant) if is_made_up else self._value(node, variant)
        if isinstance(value, torch.Tensor):
            return self._made_up(value, variant)
        if isinstance(value, torch.SymInt):
            return self.size(value, variant)
        if isinstance(value, (torch.SymBool, torch.SymFloat)):
            return False if isinstance(value, torch.SymBool) else 0.5
        return mapped(value, lambda item: self.real(item, variant))

    def known(self, node: fx.Node) -> list[Any]:
        """Return a node's result for each sample.

        Raises:
            TraceError: if it is unknown.
        """
        self._catch_up(node.graph)
        return [self._value(node, variant) for variant in range(len(self.samples))]

    def remember(self, node: fx.Node, values: Sequence[Any]) -> None:
        """Store the real results of a dry run."""
        self._catch_up(node.graph, before=node)
        for known, value in zip(self.values, values, strict=True):
            known[node] = value
        self._bind(node)
        self._last = node

    def size(self, size: int | torch.SymInt, variant: int) -> int:
        """Return a size as a number for one sample."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = self.shape_env.replace(size.node.expr)
        value = expression.xreplace({s: sympy.Integer(n) for s, n in self.symbols[variant].items()})
        if not value.is_Integer:
            raise TraceError("a step that needs values has an argument whose size depends on data")
        return int(value)

    def _catch_up(self, graph: fx.Graph, before: fx.Node | None = None) -> None:
        """Execute the nodes recorded since the last call, in order, because operations may work in place."""
        node = next(iter(graph.nodes)) if self._last is None else self._last.next
        while node.op != "root" and node is not before:
            if node not in self.values[0]:
                for variant in range(len(self.samples)):
                    with plain_execution():
                        try:
                            self.values[variant][node] = self._run(node, variant)
                        except Exception as error:  # raised only if this value is needed
                            self.values[variant][node] = _Failed(error)
                self._bind(node)
            self._last, node = node, node.next

    def _value(self, node: fx.Node, variant: int) -> Any:
        value = self.values[variant][node]
        if isinstance(value, _Failed):
            raise TraceError(f"the value of {node.name} is unknown at compile time: {value.error}") from value.error
        return value

    def _run(self, node: fx.Node, variant: int) -> Any:
        if node.op == "placeholder":
            value = self.samples[variant][str(node.target)]
            return value.clone() if isinstance(value, torch.Tensor) else value
        if node.op == "get_attr":
            return self._attribute(node)
        if node.op == "call_module":
            return self._made_up(node.meta["structure"], variant)
        args: Any = fx.node.map_arg(node.args, lambda source: self._value(source, variant))
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda source: self._value(source, variant))
        target: Any = node.target
        if "opaque" in node.meta:
            return self.execute(target, args, kwargs)
        if isinstance(target, torch._ops.OpOverload):
            args, kwargs = _on_cpu(list(args)), _on_cpu(dict(kwargs))
        return target(*args, **kwargs)

    def _attribute(self, node: fx.Node) -> Any:
        value = self.lookup(node)
        if not isinstance(value, torch.Tensor) or not (value.is_meta or isinstance(value, FakeTensor)):
            return value
        name = str(node.target)
        if name not in self._parameters:
            if value.numel() > _LARGEST_PARAMETER:
                raise TraceError(f"{name} has {value.numel()} numbers, too many for a dry run")
            self._parameters[name] = small_tensor(value, self._generator)
        return self._parameters[name]

    def _made_up(self, value: Any, variant: int) -> Any:
        """Return random numbers in the structure of `value`."""
        if isinstance(value, torch.Tensor):
            return small_tensor(value, self._generator, [self.size(size, variant) for size in value.shape])
        if isinstance(value, torch.SymInt):
            return self.size(value, variant)
        return mapped(value, lambda item: self._made_up(item, variant))

    def _bind(self, node: fx.Node) -> None:
        """Determine the numbers for symbols that are the size or value of a result."""
        fake = node.meta.get("val")
        for variant, known in enumerate(self.values):
            value = known[node]
            pairs: list[tuple[Any, Any]] = []
            if isinstance(fake, torch.Tensor) and isinstance(value, torch.Tensor):
                pairs = list(zip(fake.shape, value.shape, strict=False))
            elif isinstance(fake, torch.SymInt) and type(value) is int:
                pairs = [(fake, value)]
            for size, number in pairs:
                if isinstance(size, torch.SymInt):
                    for expression in (size.node._expr, self.shape_env.replace(size.node._expr)):
                        if isinstance(expression, sympy.Symbol):
                            self.symbols[variant].setdefault(expression, int(number))


@dataclasses.dataclass(frozen=True)
class _Failed:
    error: Exception


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return mapped(value, _on_cpu)


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to the items of a container and return a new one; return any other value unchanged."""
    if isinstance(value, UnknownLength):
        return value
    if isinstance(value, torch.Size):
        return torch.Size(change(item) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(change(item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(change(item) for item in value) if type(value) in (tuple, list) else [*map(change, value)]
    if isinstance(value, (dict, UserDict)):
        if type(value) is dict:
            return {key: change(item) for key, item in value.items()}
        made: Any = copy.copy(value)
        for key, item in value.items():
            made[key] = change(item)
        return made
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for item in dataclasses.fields(value):
            object.__setattr__(made, item.name, change(getattr(value, item.name)))
        return made
    return value


def copied(value: Any) -> Any:
    """Copy all tensors and their containers; other objects, such as modules, are shared."""
    return value.clone() if isinstance(value, torch.Tensor) else mapped(value, copied)
