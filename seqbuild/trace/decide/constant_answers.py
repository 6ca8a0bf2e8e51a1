"""Answer decisions that depend only on constants in the model's code."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from seqbuild.trace.real.replay import plain_execution

_ON_NUMBERS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.getitem)


def constant_answer(
    condition: fx.Node, constants: Mapping[str, torch.Tensor], marker: torch.dtype | None
) -> bool | None:
    """Return a condition's value in every run; None if it depends on an input, a weight, a random number or a size.

    Args:
        condition: the node of the condition.
        constants: tensors created by the model's code, by name.
        marker: the dtype that represents the run's dtype. Numbers in it are not constant, because their rounding
            depends on the run.
    """
    needed: dict[fx.Node, None] = {}
    open_nodes = [condition]
    while open_nodes:
        node = open_nodes.pop()
        if node not in needed:
            if not _is_constant(node, marker):
                return None
            needed[node] = None
            open_nodes.extend(node.all_input_nodes)
    if _is_written_to(needed):
        return None
    values: dict[fx.Node, Any] = {}
    with disable_proxy_modes_tracing(), plain_execution():
        for node in (node for node in condition.graph.nodes if node in needed):
            target: Any = node.target
            if node.op == "get_attr":
                values[node] = constants[str(target)].clone()
                continue
            args, kwargs = (fx.node.map_arg(part, values.__getitem__) for part in (node.args, node.kwargs))
            values[node] = target(*args, **kwargs)
        return bool(values[condition])


def _is_constant(node: fx.Node, marker: torch.dtype | None) -> bool:
    if node.op != "call_function":
        return "constant" in node.meta
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target in _ON_NUMBERS
    value = node.meta.get("val")
    parts = (*node.args, *node.kwargs.values(), getattr(value, "dtype", None))
    is_rounded = marker is not None and any(part is marker for part in parts)
    is_random = torch.Tag.nondeterministic_seeded in node.target.tags
    return not (is_random or is_rounded or _writes(node))


def _writes(node: fx.Node) -> bool:
    """Return whether an operator modifies an argument; `detach_`, which `torch.tensor` uses, does not."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target is torch.ops.aten.detach_.default:
        return False
    return bool(node.target._schema.is_mutable)


def _is_written_to(nodes: dict[fx.Node, None]) -> bool:
    """Return whether one of these tensors, or a view of one, is modified."""
    seen, open_nodes = dict(nodes), list(nodes)
    while open_nodes:
        for user in open_nodes.pop().users:
            if _writes(user):
                return True
            if user not in seen and all(source in seen for source in user.all_input_nodes):
                seen[user] = None
                open_nodes.append(user)
    return False
