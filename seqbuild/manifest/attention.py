"""Find the values of a chain that enter the key-value cache, so that a host can measure and quantize them there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from runtime.artifact.cached_values import PARTS, hooked, wrong_parts
from runtime.artifact.manifest import CachedValue
from seqbuild.manifest.channels import operator_name
from seqbuild.trace.record.cached_values import marked_nodes

if TYPE_CHECKING:
    from seqbuild.chain.emit import EmittedCode
    from seqbuild.chain.subgraph import Subgraph

_OPERATOR = "scaled_dot_product_attention"
_OPERANDS = {"q": 0, "k": 1, "v": 2}


def cached_values(
    model: nn.Module, subgraphs: Sequence[Subgraph], codes: Sequence[EmittedCode]
) -> tuple[CachedValue, ...]:
    """Return keys, values and queries of every attention module that keeps a cache, in order of execution.

    The result is empty if one of them cannot be determined: a module that runs several times would need one scale for
    all of its runs, and a value may have no name where it is complete.

    Args:
        model: the model, for the classes of its modules.
        subgraphs: its chain.
        codes: the code of each subgraph.
    """
    found: list[CachedValue] = []
    for index, (subgraph, code) in enumerate(zip(subgraphs, codes, strict=True)):
        marks = list(marked_nodes(subgraph.graph)) or list(_handed_over(model, subgraph.graph))
        writers = [node for node in subgraph.graph.nodes if _is_writer(node)] if marks else []
        inside = [
            CachedValue(
                subgraph=index,
                module=module,
                kind=type(model.get_submodule(module)).__name__,
                part=part,
                name=code.names[node],
                after=code.names[_whole_after(node, writers)],
                heads=_heads(node),
            )
            for node, module, part in marks
        ]
        if hooked(code.source, inside) is None:
            return ()
        found += sorted(inside, key=lambda entry: (inside.index(_first(inside, entry)), PARTS.index(entry.part)))
    # A layer that shares the keys of another layer keeps no cache, although other layers compare several queries with
    # these keys. In that case attention cannot be quantized in every layer.
    queries = [entry.module for entry in found if entry.part == "q"]
    if sorted(queries) != sorted(entry.module for entry in found if entry.part == "k"):
        found = [entry for entry in found if entry.part != "q"]
    return () if any(wrong_parts(found)) else tuple(found)


def _first(entries: Sequence[CachedValue], like: CachedValue) -> CachedValue:
    return next(entry for entry in entries if entry.module == like.module)


def _heads(node: fx.Node) -> int:
    """Return the second size of a four-dimensional value; 0 if the value has another rank or the size is not fixed."""
    value = node.meta.get("val")
    size = value.shape[1] if isinstance(value, torch.Tensor) and value.dim() == 4 else 0
    return size if isinstance(size, int) else 0


def _is_writer(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _whole_after(node: fx.Node, writers: Sequence[fx.Node]) -> fx.Node:
    """Return the last step that writes into a value; some values are allocated empty and then filled."""
    return next((writer for writer in reversed(writers) if _is_part_of(writer.args[0], node)), node)


def _is_part_of(value: object, node: fx.Node) -> bool:
    """Return whether a value shares memory with the result of `node`, according to the operators' schemas."""
    while isinstance(value, fx.Node) and value is not node:
        target = value.target
        is_view = isinstance(target, torch._ops.OpOverload) and any(
            result.alias_info is not None for result in target._schema.returns
        )
        value = value.args[0] if is_view and value.args else None
    return value is node


def _handed_over(model: nn.Module, graph: fx.Graph) -> Iterator[tuple[fx.Node, str, str]]:
    """Find the values that the model's own code passes to attention, which may keep tuples instead of a cache.

    The attention module is the one that contains the Linear whose output the values are.
    """
    for node in graph.nodes:
        if operator_name(node) != _OPERATOR:
            continue
        module = _linear_behind(node.args[2]).rpartition(".")[0]
        if not module or type(model.get_submodule(module)).__module__.startswith("transformers."):
            continue  # transformers' own classes keep a cache that they update, or none
        for part, place in _OPERANDS.items():
            operand = node.args[place]
            if isinstance(operand, fx.Node) and operand.op == "call_function":
                yield operand, module, part


def _linear_behind(value: object) -> str:
    """Return the module whose output a value is, apart from data movement; "" if there is none."""
    while isinstance(value, fx.Node):
        if value.op == "call_module":
            return str(value.target)
        value = value.args[0] if value.op == "call_function" and value.args else None
    return ""
