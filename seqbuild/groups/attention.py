"""Which attention modules a chain computes, so that a host can round what they keep in the key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import fx

from runtime.manifest import Attention
from seqbuild.groups.flow import operator_name

if TYPE_CHECKING:
    from seqbuild.subgraph import Subgraph

OPERATOR = "scaled_dot_product_attention"


def attentions(subgraphs: Sequence[Subgraph]) -> tuple[Attention, ...]:
    """The attention modules, in the order in which subgraphs call the operator; none where one has no name or runs
    several times.

    An attention module is the one that holds the Linear whose output the values are.
    """
    found: list[Attention] = []
    for index, subgraph in enumerate(subgraphs):
        for module in _modules(subgraph.graph):
            if not module or any(entry.module == module for entry in found):
                return ()  # unknown, or run several times: one scale would have to serve all of them
            found.append(Attention(subgraph=index, module=module))
    return tuple(found)


def _modules(graph: fx.Graph) -> Iterator[str]:
    for node in graph.nodes:
        if operator_name(node) == OPERATOR:
            yield _linear_behind(node.args[2]).rpartition(".")[0]


def _linear_behind(value: object) -> str:
    """The module whose output a value is, moved about at most; "" when there is none."""
    while isinstance(value, fx.Node):
        if value.op == "call_module":
            return str(value.target)
        value = value.args[0] if value.op == "call_function" and value.args else None
    return ""
