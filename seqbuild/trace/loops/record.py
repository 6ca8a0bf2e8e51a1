"""Record a loop over a symbolic size, `for index in range(size):`, as a loop.

The body is executed once. A name that held a tensor before the loop and is assigned in the body becomes a variable,
which carries its value from one iteration to the next. Tensors that the body appends to a list are joined after the
loop. `seqbuild.trace.loops.source` decides from the source code whether this is possible, and the recorded code is
proven by execution for several numbers of iterations (`seqbuild.trace.record.proofs`). A loop without proof is an
error.
"""

from __future__ import annotations

import builtins
import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import sympy
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, track_tensor_tree

from runtime.errors import TraceError
from seqbuild.blame import UntraceableError, find_culprit
from seqbuild.chain import marks
from seqbuild.trace.loops.source import LoopSource, loop_of
from seqbuild.trace.recorder import Recorder, nodes_after
from seqbuild.trace.sizes.relations import summed
from seqbuild.trace.sizes.trials import Doubt, IterationCount

if TYPE_CHECKING:
    from seqbuild.blame import Culprit

_CULPRIT = "loop"  # metadata key of a loop's first node: its line in the model's code
_MISSING = object()
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """A recorded loop.

    Attributes:
        index: the symbol of the iteration's index.
        count: the number of iterations, in symbols.
        culprit: the loop's line.
        doubts: relations of the index that the recorded code assumes and that do not hold in all iterations.
    """

    index: Any
    count: Any
    culprit: Culprit | None
    doubts: tuple[Any, ...] = ()

    def questions(self) -> list[Any]:
        """Return what has to be proven."""
        doubts = (Doubt(relation=relation, index=self.index, count=self.count) for relation in self.doubts)
        return [IterationCount(count=self.count), *doubts]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Collected:
    """A list filled by a loop: the list, its node, the tensors that each iteration appends, and the loop."""

    values: list[Any]
    node: fx.Node
    parts: tuple[torch.Tensor, ...]
    loop: Loop


class Loops:
    """The loops of one trace.

    Args:
        tracer: owns the graph.
    """

    def __init__(self, tracer: Recorder) -> None:
        self.tracer = tracer
        self.unproven: list[Loop] = []
        self.num_open = 0
        self.collected: dict[int, _Collected] = {}

    def range(self, *args: Any) -> Any:
        """Replace `range` in the model's code."""
        size = args[0] if len(args) == 1 else None
        is_recorded = get_proxy_mode() is not None and self.tracer.shape_env.is_noting
        if isinstance(size, torch.SymInt) and is_recorded:
            is_free = not self.tracer.shape_env.replace(size.node.expr).is_number
            frame = sys._getframe(1)
            source = loop_of(frame) if is_free else None
            if source is not None:
                return _RecordedRange(self, size, frame, source)
        return builtins.range(*args)

    def is_collected(self, values: Any) -> bool:
        """Return whether a loop has filled this list."""
        return type(values) is list and id(values) in self.collected

    def join(self, function: Any, args: tuple[Any, ...]) -> Any:
        """Record `torch.stack` or `torch.cat` of a list filled by a loop."""
        values, axis = args
        found = self.collected[id(values)]
        shape = self._joined(found, axis, is_stack=function is torch.ops.aten.stack.default)
        with disable_proxy_modes_tracing():
            fake = torch.empty(shape, dtype=found.parts[0].dtype, device=found.parts[0].device)
        node = self.tracer.create_node("call_function", function, (found.node, axis), {})
        return self.tracer.track(fake, fx.Proxy(node, self.tracer))

    def _joined(self, found: _Collected, axis: int, *, is_stack: bool) -> list[Any]:
        """Return the shape of the joined tensor."""
        shape_env, loop = self.tracer.shape_env, found.loop
        sizes = [shape_env.replace(_sympy(size)) for size in found.parts[0].shape]
        if is_stack:
            axis = axis % (len(sizes) + 1)
            sizes.insert(axis, _sympy(1))
        else:
            axis = axis % len(sizes)
        total = summed(sizes[axis], loop.index, loop.count)
        sizes[axis] = None if total is None else total * len(found.parts)
        if any(size is None or loop.index in size.free_symbols for size in sizes):
            raise TraceError("a loop joins tensors whose sizes depend on the iteration")
        return [int(s) if s.is_number else shape_env.create_symintnode(s, hint=None) for s in sizes]

    def require_closed(self, graph: fx.Graph) -> None:
        """Reject a trace with an unproven loop, or with a value that is used outside its loop.

        Raises:
            UntraceableError: naming the line.
        """
        around = dict(marks.paths(graph.nodes))
        for node, path in around.items():
            if any(around[user][: len(path)] != path for user in node.users):
                raise UntraceableError(f"{node.name} is used outside of its loop", culprit=path[-1].meta.get(_CULPRIT))
        for loop in self.unproven:
            raise UntraceableError("a loop over a size could not be recorded", culprit=loop.culprit)
        if self.num_open:
            raise UntraceableError("a loop over a size was left before its end", culprit=None)


def _sympy(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


@dataclass(kw_only=True)
class _LoopState:
    """State of a loop while its body is executed."""

    loop: Loop
    first: fx.Node
    before: Mapping[str, Any]
    sizes: dict[Any, Any]
    variables: dict[str, tuple[torch.Tensor, fx.Node, Any]] = field(default_factory=dict)
    lists: dict[str, fx.Node] = field(default_factory=dict)


class _RecordedRange:
    """Iterator over the single iteration that is recorded."""

    def __init__(self, loops: Loops, size: torch.SymInt, frame: FrameType, source: LoopSource) -> None:
        self.loops = loops
        self.tracer = loops.tracer
        self.size = size
        self.frame = frame
        self.source = source
        self.state: _LoopState | None = None

    def __iter__(self) -> _RecordedRange:
        return self

    def __next__(self) -> Any:
        if self.state is None:
            return self._begin()
        self._end(self.state)
        del self.frame
        raise StopIteration

    def _refuse(self, why: str) -> NoReturn:
        raise TraceError(f"a loop over a size cannot be recorded: {why}")

    def _begin(self) -> torch.SymInt:
        tracer, before = self.tracer, dict(self.frame.f_locals)
        lists = {name: self._list(name, before) for name in self.source.lists}
        variables = {
            name: self._variable(name, before)
            for name in self.source.assigned
            if isinstance(before.get(name), torch.Tensor)
        }
        sizes = dict(tracer.symnode_tracker.sym_node_dict)
        index = tracer.shape_env.new_iteration_index(self.size)
        first = tracer.create_node("call_function", marks.begin, (tracer.create_arg(self.size),), {}, self.source.index)
        if not isinstance(first.args[0], fx.Node):
            self._refuse("the size is a constant")
        sizes.update(tracer.symnode_tracker.sym_node_dict)
        first.meta[_CULPRIT] = find_culprit()
        tracer.track(index, fx.Proxy(first, tracer))
        loop = Loop(
            index=index.node.expr,
            count=tracer.shape_env.iteration_counts[index.node.expr],
            culprit=first.meta[_CULPRIT],
        )
        self.loops.num_open += 1
        self.state = _LoopState(loop=loop, first=first, before=before, sizes=sizes, variables=variables, lists=lists)
        return index

    def _list(self, name: str, before: Mapping[str, Any]) -> fx.Node:
        values = before.get(name)
        if type(values) is not list or values or self._is_elsewhere(values, name, before):
            self._refuse(f"{name} is not an empty list, or is referenced elsewhere")
        return self.tracer.create_node("call_function", marks.collected, (), {}, name)

    def _variable(self, name: str, before: Mapping[str, Any]) -> tuple[torch.Tensor, fx.Node, Any]:
        """Return a tensor that the body may replace, the node of its variable, and its previous tracker entry."""
        tracer, tensor = self.tracer, before[name]
        known = tracer.unwrap_proxy(tensor)
        if not isinstance(known, fx.Proxy) or self._is_elsewhere(tensor, name, before):
            self._refuse(f"{name} is referenced elsewhere")
        slot = tracer.tensor_tracker[tensor]
        node = tracer.create_node("call_function", marks.variable, (known.node,), {}, name)
        track_tensor_tree(tensor, fx.Proxy(node, tracer), constant=None, tracer=tracer)
        return tensor, node, slot

    def _is_elsewhere(self, value: Any, name: str, before: Mapping[str, Any]) -> bool:
        others = [other for key, other in before.items() if key != name]
        inside = [item for other in others if type(other) in (list, tuple) for item in other]
        inside += [item for other in others if type(other) is dict for item in other.values()]
        return any(other is value for other in (*others, *inside))

    def _end(self, state: _LoopState) -> None:
        tracer, after = self.tracer, dict(self.frame.f_locals)
        body = _nodes_from(state.first)
        self._check_others(state, after)
        carried = {name: self._carried(state, name, after, body) for name in state.variables}
        parts = {name: self._parts(name, after) for name in state.lists}
        for name, tensor in carried.items():
            if tensor is not None:
                node = tracer.node_of(tensor)
                tracer.create_node("call_function", marks.assign, (state.variables[name][1], node), {})
        for name, tensors in parts.items():
            for tensor in tensors:
                value = tracer.create_arg(tensor)
                tracer.create_node("call_function", marks.append, (state.lists[name], value), {})
        _hoist(state.first)
        tracer.create_node("call_function", marks.end, (state.first,), {})
        self._forget_sizes(state)
        for name, (old, node, slot) in state.variables.items():
            new = carried[name]
            tracer.tensor_tracker[old] = slot
            if new is None:
                (initial,) = node.all_input_nodes
                node.replace_all_uses_with(initial)
                tracer.graph.erase_node(node)
            else:
                track_tensor_tree(new, fx.Proxy(node, tracer), constant=None, tracer=tracer)
        for name, tensors in parts.items():
            values = after[name]
            values.clear()
            self.loops.collected[id(values)] = _Collected(
                values=values, node=state.lists[name], parts=tensors, loop=state.loop
            )
        self.loops.num_open -= 1
        doubts = tuple(relation for relation in tracer.shape_env.doubts if state.loop.index in relation.free_symbols)
        self.loops.unproven.append(dataclasses.replace(state.loop, doubts=doubts))
        if any(isinstance(relation, sympy.Eq) for relation in doubts):  # torch has replaced the index by it
            self._refuse(f"{doubts[0]} does not hold in all iterations")

    def _check_others(self, state: _LoopState, after: Mapping[str, Any]) -> None:
        """Require that other values are the same in all iterations, and that only tensors are modified."""
        for name in self.source.assigned:
            old, new = state.before.get(name, _MISSING), after.get(name)
            is_same = new is old or (type(new) is type(old) and type(new) in _PLAIN and new == old)
            if old is not _MISSING and not isinstance(old, torch.Tensor) and not is_same:
                self._refuse(f"{name} changes between iterations and is not a tensor")
        for name in self.source.written:
            if not isinstance(after.get(name), torch.Tensor):
                self._refuse(f"{name} is modified and is not a tensor")

    def _carried(
        self, state: _LoopState, name: str, after: Mapping[str, Any], body: Mapping[fx.Node, None]
    ) -> torch.Tensor | None:
        """Return a variable's value for the next iteration; None if it is unchanged or never read."""
        old, variable, _ = state.variables[name]
        new = after.get(name)
        if new is old or not variable.users:
            return None
        if not isinstance(new, torch.Tensor) or self.tracer.node_of(new) not in body:
            self._refuse(f"{name} is assigned a value that the body does not compute")
        replace = self.tracer.shape_env.replace
        shapes = [[replace(_sympy(size)) for size in tensor.shape] for tensor in (old, new)]
        if new.device != old.device or shapes[0] != shapes[1]:  # a promoted dtype is covered by the proof
            self._refuse(f"{name} changes its shape or device")
        return new

    def _parts(self, name: str, after: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
        values = after[name]
        replace = self.tracer.shape_env.replace
        if not values or not all(isinstance(value, torch.Tensor) for value in values):
            self._refuse(f"{name} receives no tensors, or other values too")
        kinds = {(value.dtype, value.device, tuple(replace(_sympy(s)) for s in value.shape)) for value in values}
        if len(kinds) > 1:
            self._refuse(f"{name} receives tensors of different shapes, dtypes or devices")
        return tuple(values)

    def _forget_sizes(self, state: _LoopState) -> None:
        """Forget the nodes of sizes first computed in the body, except nodes that were moved before the loop."""
        known = self.tracer.symnode_tracker.sym_node_dict
        body = _nodes_from(state.first)
        kept = {
            key: value
            for key, value in known.items()
            if key in state.sizes or (isinstance(value, fx.Proxy) and value.node not in body)
        }
        known.clear()
        known.update(kept)


def _nodes_from(first: fx.Node) -> dict[fx.Node, None]:
    return dict.fromkeys([first, *nodes_after(first)])


def _hoist(first: fx.Node) -> None:
    """Move lookups and loop-invariant sizes before the loop, because code after the loop may use them, too."""
    body = _nodes_from(first)
    for node in list(body):
        is_size = isinstance(node.meta.get("val"), torch.SymInt) and node.target is not marks.begin
        is_free = not any(source in body for source in node.all_input_nodes)
        if (node.op == "get_attr" or is_size) and is_free:
            first.prepend(node)
            del body[node]
