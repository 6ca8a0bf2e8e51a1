"""Sections of a trace: what was recorded inside of one layer, repeated for every layer that is like it.

A model of a hundred layers has a dozen different ones at most. The first of each kind is traced through; for the others
the nodes are copied, with the weights and modules of the layer in question. That a layer is like another one is for
`leaf_memory` to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import track_tensor_tree

from seqbuild.chain.marks import require
from seqbuild.chain.partition import WITHIN
from seqbuild.trace.record.cached_values import CACHED, is_marked_outside, moved
from seqbuild.trace.record.descriptions import Description
from seqbuild.trace.record.leaf_memory import LeafMemory
from seqbuild.trace.record.looks import Look

if TYPE_CHECKING:
    from seqbuild.trace.recorder import Recorder


@dataclass(frozen=True, kw_only=True, slots=True)
class _Section:
    """What one layer did.

    Attributes:
        name: of the layer.
        nodes: in order; without those that look up parameters.
        places: of the values that come from outside: which of the tensors that were compared each is.
        description: of the result.
        results: the nodes of the result's new tensors, in order.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    places: Mapping[fx.Node, int]
    description: Description
    results: tuple[fx.Node, ...]


class Sections:
    """Records each kind of layer once.

    Args:
        tracer: owns the graph.
        memory: says which layers are alike.
    """

    def __init__(self, tracer: Recorder, memory: LeafMemory) -> None:
        self.tracer = tracer
        self.memory = memory
        self._known: dict[Any, _Section] = {}

    def call(
        self, name: str, layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], run: Callable[[], Any]
    ) -> Any:
        """What `run` returns, which calls `layer` with these arguments, or a copy of an earlier section."""
        look = self.memory.look(layer, args, kwargs)
        if look is None:
            return run()
        if look.key in self._known:
            return self._repeat(self._known[look.key], name, look)
        last = next(iter(reversed(self.tracer.graph.nodes)))
        output, after, description = self.memory.described(layer, args, kwargs, look, run)
        if description is not None:
            section = self._section(name, after, last, output, description)
            if section is not None:
                self._known[after.key] = section
        return output

    def _section(self, name: str, look: Look, last: fx.Node, output: Any, description: Description) -> _Section | None:
        """The nodes after `last`; None when they cannot be repeated for another layer."""
        nodes, node = [], last.next
        while node.op != "root":
            nodes.append(node)
            node = node.next
        if is_marked_outside(nodes, name, self.tracer.graph):
            return None
        inside = dict.fromkeys(nodes)
        known = {self.tracer.known_node(tensor): place for place, tensor in enumerate(look.tensors)}
        places: dict[fx.Node, int] = {}
        for node in nodes:
            if not _is_repeatable(node, name):
                return None
            for source in node.all_input_nodes:
                if source in known:
                    places[source] = known[source]
                elif source.op == "get_attr" and "constant" not in source.meta:
                    return None
                elif source not in inside and isinstance(source.meta.get("val"), torch.Tensor):
                    return None  # it came by another way than as an argument
        arguments = {id(tensor) for tensor in look.tensors}
        found = [self.tracer.known_node(tensor) for tensor in _tensors(output) if id(tensor) not in arguments]
        results = [node for node in found if node is not None and node in inside]
        if len(results) != len(found):
            return None
        body = tuple(node for node in nodes if node.op != "get_attr")
        return _Section(name=name, nodes=body, places=places, description=description, results=tuple(results))

    def _repeat(self, section: _Section, name: str, look: Look) -> Any:
        tracer = self.tracer
        copies: dict[fx.Node, fx.Node] = {}
        for node, place in section.places.items():
            found = tracer.outer_node(look.tensors[place])
            assert found is not None, "what was compared has a node"
            copies[node] = found
        for node in section.nodes:
            copy = tracer.graph.node_copy(node, lambda source: copies.get(source, source))
            if node.op == "call_module":
                inner = tracer.root.get_submodule(name + str(node.target).removeprefix(section.name))
                copy.target = tracer.name_of(inner)
                copy.name = tracer.graph._graph_namespace.create_name(copy.target.replace(".", "_"), copy)
            if WITHIN in copy.meta:
                copy.meta[WITHIN] = name
            if CACHED in copy.meta:
                copy.meta[CACHED] = moved(copy.meta[CACHED], section.name, name)
            copies[node] = copy
        output = self.memory.made_again(section.description, look)
        arguments = {id(tensor) for tensor in look.tensors}
        new = [tensor for tensor in _tensors(output) if id(tensor) not in arguments]
        for tensor, node in zip(new, section.results, strict=True):
            track_tensor_tree(tensor, fx.Proxy(copies[node], tracer), constant=None, tracer=tracer)
        return output


def _is_repeatable(node: fx.Node, layer: str) -> bool:
    """Not a step whose result was learned from real values, a decision, or a call of what lies outside the layer."""
    if node.op == "call_module" and not str(node.target).startswith(f"{layer}."):
        return False
    return "rung" not in node.meta and "opaque" not in node.meta and node.target is not require


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Tensors of a result, in the order of its description."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
