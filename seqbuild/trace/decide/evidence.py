"""Find the value that a data-dependent decision or number has in all samples.

Samples are evidence only for decisions about the layout of data: decisions that recorded operators compute from sizes
and integer inputs such as token ids and image grids. They are no evidence if content is involved (pixels, results of
layers), or an input that is the same everywhere, such as a mask without padding. A number among the results of a step,
such as a layer, does not count as content.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from runtime.errors import TraceError
from seqbuild.trace.real.replay import Replay, plain_execution

_SIZES = (torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default)


def common_value(node: fx.Node, replay: Replay) -> Any:
    """Return the number or boolean that a node has in all samples; None if they differ or are no evidence."""
    if node in _following_from_contents(node.graph, replay):
        return None
    try:
        found = replay.known(node)
    except TraceError:
        return None
    return found[0] if all(type(value) is type(found[0]) and value == found[0] for value in found) else None


def _following_from_contents(graph: fx.Graph, replay: Replay) -> set[fx.Node]:
    """Return the nodes for whose values the samples are no evidence."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_number = node.target is operator.getitem and isinstance(node.meta.get("val"), torch.SymInt)
        if node.target in _SIZES or is_number:
            continue
        is_unknown = node.op == "call_module" or bool(node.meta.get("uses"))
        if node.op == "placeholder":
            is_unknown = not _varies([sample[str(node.target)] for sample in replay.samples])
        elif node.op == "get_attr":
            is_unknown = isinstance(replay.lookup(node), (torch.nn.Parameter, FakeTensor))
        if is_unknown or any(source in found for source in node.all_input_nodes):
            found.add(node)
            target = node.target
            if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
                found.update(node.all_input_nodes)  # modified here and possibly read later
    return found


def _varies(values: Sequence[Any]) -> bool:
    """Return whether an input is an integer tensor with different numbers."""
    tensors = [value for value in values if isinstance(value, torch.Tensor) and not value.is_floating_point()]
    with plain_execution():
        numbers = {number for value in tensors for number in value.flatten().tolist()}
    return len(tensors) == len(values) and len(numbers) > 1
