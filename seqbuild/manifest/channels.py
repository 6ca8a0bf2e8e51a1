"""Follow the channels of one tensor through a graph.

Scaling output channel c of a Linear or of a norm's weight by a positive factor scales every number that is computed
from it by data movement, by products with other numbers, by ReLU, or by weighted sums over tokens such as attention.
The analysis needs to know operators only, not architectures: a tensor of integers in the shape of the value states for
each number which channel it is proportional to (`FREE` for none). Data movement is executed on these integers exactly
as in the graph, so heads, repeated heads, fused projections and interleaved layouts are handled correctly. A channel
that flows into any other operation has escaped and cannot be scaled.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

FREE = -1

# Operators that move numbers without changing them; executed on the integers.
MOVES = frozenset(
    (
        *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "contiguous"),
        *("transpose", "permute", "t", "numpy_T", "mT", "movedim", "swapaxes", "swapdims"),
        *("slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind"),
        *("tensor_split", "unsafe_split", "unsafe_chunk", "clone", "alias", "detach", "lift_fresh"),
        *("repeat", "repeat_interleave", "tile", "roll", "flip", "cat", "concat", "stack"),
    )
)
_PADS = frozenset(["constant_pad_nd", "pad"])  # with zeros, which any factor leaves as they are
# Operators whose result has the shape of their first argument, proportional to it.
_SAME = frozenset(
    (
        *("to", "_to_copy", "type_as", "float", "half", "bfloat16", "dropout"),
        *("relu", "relu_", "leaky_relu", "neg", "neg_", "abs"),
    )
)
_PRODUCTS = frozenset(("mul", "mul_", "div", "div_", "true_divide", "multiply", "divide"))
_SUMS = frozenset(("add", "add_", "sub", "sub_"))
# Operators that use a tensor's shape only, not its numbers.
METADATA = frozenset(
    (
        *("sym_size", "sym_numel", "sym_stride", "new_empty", "new_zeros", "new_ones", "new_full"),
        *("empty_like", "zeros_like", "ones_like", "full_like"),
    )
)
# Operators that use the numbers of their first argument, and only shape and dtype of the second.
_LIKE = frozenset(("type_as", "to", "expand_as", "view_as", "reshape_as"))
# Contractions over tokens, with the position of the argument whose last axis is kept.
WEIGHTED_SUMS: Mapping[str, int] = {"matmul": 1, "bmm": 1, "scaled_dot_product_attention": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """A parameter that multiplies a scaled value along an axis.

    Attributes:
        node: the call.
        parameter: the weight's dotted name.
        axis: the weight's axis along the value's channels.
        channels: the source's channel for each index along that axis.
    """

    node: fx.Node
    parameter: str
    axis: int
    channels: tuple[int, ...]


@dataclass(kw_only=True)
class Flow:
    """Uses of one source's channels.

    Attributes:
        arrivals: the parameters that multiply the channels.
        escaped: channels with a use that cannot be compensated.
    """

    arrivals: list[Arrival] = field(default_factory=list)
    escaped: set[int] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """The parameter of a call that takes channels in, and its axis along them."""

    name: str
    axis: int


def operator_name(node: fx.Node) -> str:
    """Return the aten operator's name without overload, or an empty string for any other node."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__) if target.namespace == "aten" else ""
    return ""


def size_of(node: fx.Node) -> tuple[int, ...] | None:
    """Return the shape of a node's value for the traced sample, or None if it is not a tensor or has no such shape."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    sizes = [_hint(size) for size in value.shape]
    return None if any(size is None for size in sizes) else tuple(size for size in sizes if size is not None)


def _hint(size: Any) -> int | None:
    if not isinstance(size, torch.SymInt):
        return int(size)
    hint = size.node.hint if size.node.has_hint() else None
    return None if hint is None else int(hint)


def follow(
    graph: fx.Graph, source: fx.Node, channels: torch.Tensor, weights: Mapping[fx.Node, Sequence[Weight]]
) -> Flow:
    """Follow a source's channels to the end of a graph.

    Args:
        graph: in order of execution; channels that reach its output have escaped.
        source: the node whose value is proportional to the channels.
        channels: integers in the shape of its value.
        weights: the calls that take channels in along the last axis of their first argument, with their parameters.
    """
    flow = Flow()
    tracked: dict[fx.Node, Any] = {source: channels}
    node = source.next
    while node.op != "root":
        inputs = [entry for entry in node.all_input_nodes if entry in tracked]
        if inputs:
            _step(node, inputs, tracked, weights, flow)
        node = node.next
    return flow


def _step(
    node: fx.Node,
    inputs: Sequence[fx.Node],
    tracked: dict[fx.Node, Any],
    weights: Mapping[fx.Node, Sequence[Weight]],
    flow: Flow,
) -> None:
    if operator_name(node) in METADATA or (operator_name(node) in _LIKE and node.args[0] not in inputs):
        return
    if node in weights:
        if inputs == [node.all_input_nodes[0]] and _arrive(node, tracked[inputs[0]], weights[node], flow):
            return
        result = None
    elif operator_name(node) in WEIGHTED_SUMS:
        summed = node.args[WEIGHTED_SUMS[operator_name(node)]]
        result = _weighted_sum(node, summed, tracked)
        if result is not None:  # channels in the weights of the sum escape in any case
            inputs = [entry for entry in inputs if entry is not summed]
            _escape(inputs, tracked, flow)
    else:
        result = _moved(node, tracked)
    if result is None:
        _escape(inputs, tracked, flow)
    else:
        tracked[node] = result


def _escape(inputs: Sequence[fx.Node], tracked: Mapping[fx.Node, Any], flow: Flow) -> None:
    for entry in inputs:
        flow.escaped.update(_channels(tracked[entry]))


def _channels(value: Any) -> list[int]:
    parts = value if isinstance(value, (tuple, list)) else [value]
    return [channel for part in parts for channel in _once(part).unique().tolist() if channel != FREE]


def _once(value: Any) -> Any:
    """Remove repetitions that take no memory (stride zero), to avoid sorting them."""
    for axis, stride in enumerate(value.stride()):
        if stride == 0:
            value = value.narrow(axis, 0, min(1, value.shape[axis]))
    return value


def _arrive(node: fx.Node, value: torch.Tensor, weights: Sequence[Weight], flow: Flow) -> bool:
    """Record an arrival of channels; return False if they do not lie along the last axis alone."""
    flat = value.reshape(-1, value.shape[-1])
    first = flat[0]
    if bool((flat != first).any()) or bool((first == FREE).any()):
        return False
    channels = tuple(first.tolist())
    flow.arrivals += [
        Arrival(node=node, parameter=weight.name, axis=weight.axis, channels=channels) for weight in weights
    ]
    return True


def _moved(node: fx.Node, tracked: Mapping[fx.Node, Any]) -> Any:
    """Return the channels of a node's value, or None if the value is not proportional to them."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        container, index = node.args
        value = tracked.get(container)  # type: ignore[arg-type]
        return value[index] if isinstance(value, (tuple, list)) and isinstance(index, int) else None
    name = operator_name(node)
    if name in MOVES:
        return executed(node, tracked)
    if name in _PADS:
        is_plain = not any(node.args[2:]) and not node.kwargs
        return (
            executed(node, {key: value + 1 for key, value in tracked.items() if key is node.args[0]}, -1)
            if is_plain
            else None
        )
    size = size_of(node)
    first = node.args[0] if node.args else None
    if size is None or not isinstance(first, fx.Node):
        return None
    if name in _SAME:
        return tracked[first].expand(size) if first in tracked else None
    if name in ("masked_fill", "masked_fill_"):
        return tracked[first].expand(size) if first in tracked and node.args[2] == 0 else None
    if name in _PRODUCTS:
        return _product(node, name, tracked, size)
    if name in _SUMS:
        parts = [tracked.get(argument) if isinstance(argument, fx.Node) else None for argument in node.args[:2]]
        spread = [part.expand(size) for part in parts if part is not None]
        return spread[0] if len(spread) == 2 and torch.equal(spread[0], spread[1]) else None
    return None


def _product(node: fx.Node, name: str, tracked: Mapping[fx.Node, Any], size: tuple[int, ...]) -> torch.Tensor | None:
    """Handle a product with one followed factor, or a quotient with a followed numerator."""
    factors = [argument for argument in node.args[:2] if isinstance(argument, fx.Node) and argument in tracked]
    if len(factors) != 1 or (name.startswith(("div", "true")) and factors[0] is not node.args[0]):
        return None
    if node.args[0] is node.args[1]:
        return None
    spread: torch.Tensor = tracked[factors[0]].expand(size)
    return spread


def _weighted_sum(node: fx.Node, summed: Any, tracked: Mapping[fx.Node, Any]) -> torch.Tensor | None:
    """Handle sums over the second last axis of an argument, weighted by other numbers."""
    size = size_of(node)
    if summed not in tracked or size is None or node.all_input_nodes.count(summed) != 1:
        return None
    value: torch.Tensor = tracked[summed]
    if value.dim() < 2 or len(size) < 2:
        return None
    first = value[..., :1, :]
    if bool((value != first).any()):
        return None
    if node.kwargs.get("enable_gqa") and first.shape[-3] != size[-3]:
        first = first.repeat_interleave(size[-3] // first.shape[-3], dim=-3)
    try:
        return first.expand(size)
    except RuntimeError:
        return None


def executed(node: fx.Node, tracked: Mapping[fx.Node, Any], shift: int = 0) -> Any:
    """Execute data movement on the integers; `shift` is added to the result. None if that is impossible."""
    unknown = False

    def substitute(argument: fx.Node) -> Any:
        nonlocal unknown
        if argument in tracked:
            return tracked[argument]
        value = argument.meta.get("val")
        if isinstance(value, torch.Tensor):
            size = size_of(argument)
            unknown = unknown or size is None
            return torch.full(size or (), FREE, dtype=torch.int32)
        size_hint = _hint(value) if isinstance(value, (int, torch.SymInt)) else None
        unknown = unknown or size_hint is None
        return size_hint

    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), substitute)
    if unknown:
        return None
    try:
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, IndexError, TypeError):
        return None
    return result + shift if shift else result
