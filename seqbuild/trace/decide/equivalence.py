"""Prove that one trace can stand for another, which took other outcomes of some decisions.

Models ask whether anything is marked before they write there:

    if mask.any():
        x[mask] = value

Writing where nothing is marked changes nothing, so the trace that writes is right for all data. The proof compares it
with the whole trace of the other outcome: both must do the same, in the same order, but for operators that only the
first has and that either change nothing, or write through a mask in which nothing is marked when the other outcome is
the right one.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from seqbuild.trace.real.replay import for_real

_aten = torch.ops.aten
# What a decision looks at is made of marks by these.
_COUNTED = (_aten.any.default, _aten.sum.default, _aten.count_nonzero.default)
_READ = (_aten.item.default, _aten._local_scalar_dense.default, _aten.to.dtype, _aten.to.dtype_layout, _aten.to.device)
_ABOVE = (operator.ne, operator.gt, _aten.ne.Scalar, _aten.gt.Scalar)
_EQUAL = (operator.eq, _aten.eq.Scalar)
# And a mask of another of the same marks, or of fewer, by these.
_SHAPED = (
    _aten.alias.default,
    _aten.clone.default,
    _aten.contiguous.default,
    _aten.expand.default,
    _aten.expand_as.default,
    _aten.reshape.default,
    _aten.squeeze.dim,
    _aten.to.device,
    _aten.to.dtype,
    _aten.to.dtype_layout,
    _aten.unsqueeze.default,
    _aten.view.default,
)
_NEGATED = (_aten.bitwise_not.default, _aten.logical_not.default)
_BOTH = (_aten.bitwise_and.Tensor, _aten.logical_and.default, _aten.__and__.Tensor)
# Operators that write where a mask says, and the place of the mask among their arguments.
_WRITES: dict[Any, int] = {
    _aten.index_put_.default: 1,
    _aten.masked_fill_.Scalar: 1,
    _aten.masked_fill_.Tensor: 1,
    _aten.masked_scatter_.default: 1,
}
_COPIES: dict[Any, int] = {
    _aten.index_put.default: 1,
    _aten.masked_fill.Scalar: 1,
    _aten.masked_fill.Tensor: 1,
    _aten.masked_scatter.default: 1,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Marks:
    """What a decision asks for: whether anything in a mask is true (or false).

    Attributes:
        mask: the node of the mask.
        is_negated: whether what is false counts as marked.
        writing: the outcome of the decision where anything is marked.
    """

    mask: fx.Node
    is_negated: bool
    writing: bool


def asked_for(condition: fx.Node) -> Marks | None:
    """The marks that a decision asks for, or None where it asks for something else."""
    node: Any = condition
    writing, is_counted = True, False
    while isinstance(node, fx.Node):
        if is_counted and _is_mask(node):
            return _marks(node, is_negated=False, writing=writing)
        if node.op != "call_function":
            return None
        source: Any = node.args[0] if node.args else None
        if node.target is _aten.all.default and not is_counted:
            is_mask = isinstance(source, fx.Node) and _is_mask(source)
            return _marks(source, is_negated=True, writing=not writing) if is_mask else None
        if node.target in _EQUAL and node.args[1] == 0:
            writing = not writing
        elif node.target in _COUNTED:
            is_counted = True
        elif not _is_same_truth(node):
            return None
        node = source
    return None


def _marks(mask: Any, *, is_negated: bool, writing: bool) -> Marks:
    while mask.target in _NEGATED:
        mask, is_negated = mask.args[0], not is_negated
    return Marks(mask=mask, is_negated=is_negated, writing=writing)


def _is_mask(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype is torch.bool and value.dim() > 0


def _is_same_truth(node: fx.Node) -> bool:
    """Whether a node is true, or not zero, just when its first argument is; that is no negative number."""
    if node.target in _ABOVE:
        return bool(node.args[1] == 0)
    if node.target in _EQUAL:  # torch has it for the truth of a tensor's only element
        source: Any = node.args[0]
        read: Any = source.args[0] if source.target in _READ[:2] else None
        return bool(node.args[1] == 1) and read is not None and read.meta["val"].dtype is torch.bool
    return node.target in _READ


def stands_for(one: fx.Graph, other: fx.Graph, marks: Sequence[Marks]) -> bool:
    """Whether `one` calculates what `other` does when nothing is marked."""
    comparison = _Comparison(marks=marks)
    comparison.pair_attributes(one, other)
    ours, theirs = ([node for node in graph.nodes if node.op != "get_attr"] for graph in (one, other))
    return comparison.run(ours, theirs)


@dataclass(kw_only=True)
class _Comparison:
    """Walks two traces side by side.

    Attributes:
        marks: what the decisions asked for whose other outcomes are taken in the second.
        same: nodes of the first trace to nodes of the second that have the same value.
        unmarked: masks of the first in which nothing is true.
        copied: nodes of the second that the first has a copy of.
    """

    marks: Sequence[Marks]
    same: dict[fx.Node, fx.Node] = field(default_factory=dict)
    unmarked: set[fx.Node] = field(default_factory=set)
    copied: set[fx.Node] = field(default_factory=set)

    def pair_attributes(self, one: fx.Graph, other: fx.Graph) -> None:
        """Parameters, buffers and constants stand wherever they are first used."""
        for node in one.find_nodes(op="get_attr"):
            for candidate in other.find_nodes(op="get_attr"):
                if _is_same_attribute(node, candidate):
                    self.same[node] = candidate
                    break

    def run(self, ours: Sequence[fx.Node], theirs: Sequence[fx.Node]) -> bool:
        """Whether they come to the same."""
        place = 0
        for node in ours:
            if self._is_unmarked(node):
                self.unmarked.add(node)
            if place < len(theirs) and self._matches(node, theirs[place]):
                if _is_writing(node) and (_is_mask(node) or self.copied.intersection(theirs[place].all_input_nodes)):
                    return False  # marks would be others, or the copy would not follow
                self.same[node] = theirs[place]
                place += 1
            elif self._is_through_unmarked(node, _WRITES):
                self._follow(node)
            elif self._is_copy(node):
                self.copied.update(self._follow(node))
            elif not self._is_idle(node):
                return False
        return place == len(theirs)

    def _follow(self, node: fx.Node) -> list[fx.Node]:
        """A node is what its first argument is."""
        kept = [self.same[source] for source in node.all_input_nodes[:1] if source in self.same]
        self.same.update((node, other) for other in kept)
        return kept

    def _matches(self, node: fx.Node, other: fx.Node) -> bool:
        if (node.op, node.meta.get("opaque")) != (other.op, other.meta.get("opaque")):
            return False
        if node.target != other.target or any(source not in self.same for source in node.all_input_nodes):
            return False
        args, kwargs = (fx.node.map_arg(given, lambda source: self.same[source]) for given in (node.args, node.kwargs))
        return repr((args, kwargs)) == repr((other.args, other.kwargs))  # which tells 1 from 1.0

    def _is_unmarked(self, node: fx.Node) -> bool:
        for marks in self.marks:
            if node is marks.mask and not marks.is_negated:
                return True
            if node.target in _NEGATED and node.args[0] is marks.mask and marks.is_negated:
                return True
        if node.target in _SHAPED and _is_mask(node):
            return node.args[0] in self.unmarked
        return node.target in _BOTH and any(source in self.unmarked for source in node.args)

    def _is_through_unmarked(self, node: fx.Node, places: dict[Any, int]) -> bool:
        where: Any = node.args[places[node.target]] if node.target in places else None
        masks = where if isinstance(where, (list, tuple)) else (where,)
        return any(isinstance(mask, fx.Node) and mask in self.unmarked for mask in masks)

    def _is_copy(self, node: fx.Node) -> bool:
        """Whether a node is its first argument, copied."""
        if not self._is_through_unmarked(node, _COPIES) or node.args[0] not in self.same:
            return False
        made, source = node.meta["val"], node.args[0].meta["val"]  # type: ignore[union-attr]
        return str(made.shape) == str(source.shape) and made.dtype == source.dtype

    def _is_idle(self, node: fx.Node) -> bool:
        """Whether a node changes nothing."""
        if isinstance(node.target, torch._ops.OpOverload):
            is_random = torch.Tag.nondeterministic_seeded in node.target.tags
            return not node.target._schema.is_mutable and not is_random
        return node.op == "call_function" and getattr(node.target, "__module__", "") in ("_operator", "math")


def _is_writing(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_same_attribute(node: fx.Node, other: fx.Node) -> bool:
    one, two = node.meta.get("constant"), other.meta.get("constant")
    if one is None or two is None:
        return one is two and node.target == other.target
    with for_real():
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
