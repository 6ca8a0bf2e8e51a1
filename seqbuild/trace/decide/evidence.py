"""What the samples show of a decision, or of a number that must be known, where these follow from values.

They show something of a decision about the layout of data: one that follows, by recorded operators alone, from inputs
of whole numbers (ids of tokens, grids of images) and from sizes. They show nothing where the contents take part, such
as pixels or what a layer has calculated, nor where an input is the same everywhere, as a mask without padding is. A
number among the results of a step, such as that of a layer, is taken for no content.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from runtime.errors import TraceError
from seqbuild.trace.real.replay import Replay, for_real

_SIZES = (torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default)


def agreed(node: fx.Node, replay: Replay) -> Any:
    """What a node's result, a number or a truth, is in all samples; None where they differ or show nothing."""
    if node in _following_from_contents(node.graph, replay):
        return None
    try:
        found = replay.known(node)
    except TraceError:
        return None
    return found[0] if all(type(value) is type(found[0]) and value == found[0] for value in found) else None


def _following_from_contents(graph: fx.Graph, replay: Replay) -> set[fx.Node]:
    """Nodes whose values the samples do not show."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_number = node.target is operator.getitem and isinstance(node.meta.get("val"), torch.SymInt)
        if node.target in _SIZES or is_number:
            continue
        is_unknown = node.op == "call_module" or bool(node.meta.get("uses"))
        if node.op == "placeholder":
            is_unknown = not _tells([sample[str(node.target)] for sample in replay.samples])
        elif node.op == "get_attr":
            is_unknown = isinstance(replay.lookup(node), (torch.nn.Parameter, FakeTensor))
        if is_unknown or any(source in found for source in node.all_input_nodes):
            found.add(node)
            target = node.target
            if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
                found.update(node.all_input_nodes)  # written to: whoever reads it afterwards
    return found


def _tells(values: Sequence[Any]) -> bool:
    """Whether an input is a tensor of whole numbers that are not all the same."""
    tensors = [value for value in values if isinstance(value, torch.Tensor) and not value.is_floating_point()]
    with for_real():
        numbers = {number for value in tensors for number in value.flatten().tolist()}
    return len(tensors) == len(values) and len(numbers) > 1
