"""Remove unneeded nodes from a recorded graph."""

from __future__ import annotations

import torch
from torch import fx

from seqbuild.chain.marks import STATEMENTS, require
from seqbuild.trace.record.cached_values import CACHED

_DROPOUT = tuple(getattr(torch.ops.aten, name).default for name in ("dropout", "feature_dropout", "alpha_dropout"))


def drop_dropout(graph: fx.Graph) -> None:
    """Remove dropout, which returns its argument in eval mode."""
    for node in list(graph.nodes):
        if node.target in _DROPOUT and not node.args[2]:
            if CACHED in node.meta:
                node.args[0].meta[CACHED] = (*node.args[0].meta.get(CACHED, ()), *node.meta[CACHED])
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def drop_dead_code(graph: fx.Graph) -> None:
    """Remove unused operators without side effects; calls of the model's own code always stay."""
    for node in reversed(graph.nodes):
        if not node.users and (node.op == "get_attr" or (node.op == "call_function" and _is_pure(node))):
            graph.erase_node(node)


def _is_pure(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target._schema.is_mutable
    return "opaque" not in node.meta and node.target not in (require, *STATEMENTS)
