"""Sections of a trace: the nodes recorded inside one layer, copied for every equal layer.

A model with a hundred layers has at most a dozen different ones. The first of each kind is traced through; for the
others the nodes are copied, with their own weights and modules. `leaf_cache` decides whether layers are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import track_tensor_tree
from torch.utils import _pytree as pytree

from seqbuild.chain.marks import require
from seqbuild.chain.partition import DRY_RUN, WITHIN
from seqbuild.trace.record.cached_values import CACHED, is_marked_outside, moved
from seqbuild.trace.record.call_state import CallState
from seqbuild.trace.record.descriptions import Description
from seqbuild.trace.record.leaf_cache import LeafCache
from seqbuild.trace.recorder import Recorder, nodes_after


@dataclass(frozen=True, kw_only=True, slots=True)
class _Section:
    """The nodes of one layer.

    Attributes:
        name: the layer's name.
        nodes: its nodes in order, except `get_attr` nodes.
        places: for each value from outside, its index among the compared tensors.
        description: the description of the result.
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
        tracer: the tracer with the graph.
        cache: decides which layers are equal.
    """

    def __init__(self, tracer: Recorder, cache: LeafCache) -> None:
        self.tracer = tracer
        self.cache = cache
        self._known: dict[Any, _Section] = {}

    def call(
        self, name: str, layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], run: Callable[[], Any]
    ) -> Any:
        """Copy an earlier section and return its result, or that of `run`, which calls `layer` with these arguments."""
        state = self.cache.state_of(layer, args, kwargs)
        if state is None:
            return run()
        if state.key in self._known:
            return self._repeat(self._known[state.key], name, state)
        last = next(iter(reversed(self.tracer.graph.nodes)))
        output, after, description = self.cache.run_and_describe(layer, args, kwargs, state, run)
        if description is not None:
            section = self._section(name, after, last, output, description)
            if section is not None:
                self._known[after.key] = section
        return output

    def _section(
        self, name: str, state: CallState, last: fx.Node, output: Any, description: Description
    ) -> _Section | None:
        """Return the nodes after `last` as a section; None if they cannot be copied for another layer."""
        nodes = list(nodes_after(last))
        if is_marked_outside(nodes, name, self.tracer.graph):
            return None
        inside = dict.fromkeys(nodes)
        known = {self.tracer.known_node(tensor): place for place, tensor in enumerate(state.tensors)}
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
                    return None  # not an argument
        arguments = {id(tensor) for tensor in state.tensors}
        found = [self.tracer.known_node(tensor) for tensor in _tensors(output) if id(tensor) not in arguments]
        results = [node for node in found if node is not None and node in inside]
        if len(results) != len(found):
            return None
        body = tuple(node for node in nodes if node.op != "get_attr")
        return _Section(name=name, nodes=body, places=places, description=description, results=tuple(results))

    def _repeat(self, section: _Section, name: str, state: CallState) -> Any:
        tracer = self.tracer
        copies: dict[fx.Node, fx.Node] = {}
        for node, place in section.places.items():
            found = tracer.outer_node(state.tensors[place])
            assert found is not None, "every compared tensor has a node"
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
        output = self.cache.recreate(section.description, state)
        arguments = {id(tensor) for tensor in state.tensors}
        new = [tensor for tensor in _tensors(output) if id(tensor) not in arguments]
        for tensor, node in zip(new, section.results, strict=True):
            track_tensor_tree(tensor, fx.Proxy(copies[node], tracer), constant=None, tracer=tracer)
        return output


def _is_repeatable(node: fx.Node, layer: str) -> bool:
    """Return whether a node is no step with a dry run, opaque step, decision, or call of a module outside the layer."""
    if node.op == "call_module" and not str(node.target).startswith(f"{layer}."):
        return False
    return DRY_RUN not in node.meta and "opaque" not in node.meta and node.target is not require


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
