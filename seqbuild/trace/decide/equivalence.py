"""Prove that a trace is equivalent to one with other outcomes of some decisions.

Models test whether any element of a mask is set before they write there:

    if mask.any():
        x[mask] = value

Writing through an empty mask changes nothing, so the trace that writes is valid for all data. The proof compares it
with the complete trace of the other outcome: both must have the same operators in the same order, except for operators
of the first that either have no effect, or write through a mask that is empty whenever the other outcome applies.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from seqbuild.trace.real.replay import plain_execution

_aten = torch.ops.aten
# Operators between a mask and the condition that tests it.
_COUNTED = (_aten.any.default, _aten.sum.default, _aten.count_nonzero.default)
_READ = (_aten.item.default, _aten._local_scalar_dense.default, _aten.to.dtype, _aten.to.dtype_layout, _aten.to.device)
_ABOVE = (operator.ne, operator.gt, _aten.ne.Scalar, _aten.gt.Scalar)
_EQUAL = (operator.eq, _aten.eq.Scalar)
# Operators that derive a mask with the same or fewer elements set.
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
# Operators that write through a mask, and the position of the mask among their arguments.
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
class MaskTest:
    """A decision that tests whether any element of a mask is true (or false).

    Attributes:
        mask: the node of the mask.
        is_negated: whether false elements count as set.
        writing: the outcome of the decision if any element is set.
    """

    mask: fx.Node
    is_negated: bool
    writing: bool


def mask_test_of(condition: fx.Node) -> MaskTest | None:
    """Return the test of a mask that a decision makes, or None for any other decision."""
    node: Any = condition
    writing, is_counted = True, False
    while isinstance(node, fx.Node):
        if is_counted and _is_mask(node):
            return _mask_test(node, is_negated=False, writing=writing)
        if node.op != "call_function":
            return None
        source: Any = node.args[0] if node.args else None
        if node.target is _aten.all.default and not is_counted:
            is_mask = isinstance(source, fx.Node) and _is_mask(source)
            return _mask_test(source, is_negated=True, writing=not writing) if is_mask else None
        if node.target in _EQUAL and node.args[1] == 0:
            writing = not writing
        elif node.target in _COUNTED:
            is_counted = True
        elif not _is_same_truth(node):
            return None
        node = source
    return None


def _mask_test(mask: Any, *, is_negated: bool, writing: bool) -> MaskTest:
    while mask.target in _NEGATED:
        mask, is_negated = mask.args[0], not is_negated
    return MaskTest(mask=mask, is_negated=is_negated, writing=writing)


def _is_mask(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype is torch.bool and value.dim() > 0


def _is_same_truth(node: fx.Node) -> bool:
    """Return whether a node is nonzero exactly if its first argument is, which is never negative."""
    if node.target in _ABOVE:
        return bool(node.args[1] == 0)
    if node.target in _EQUAL:  # torch records `bool(tensor)` this way
        source: Any = node.args[0]
        read: Any = source.args[0] if source.target in _READ[:2] else None
        return bool(node.args[1] == 1) and read is not None and read.meta["val"].dtype is torch.bool
    return node.target in _READ


def is_equivalent(one: fx.Graph, other: fx.Graph, tests: Sequence[MaskTest]) -> bool:
    """Return whether `one` computes the same as `other` if no element of the tested masks is set."""
    comparison = _Comparison(tests=tests)
    comparison.pair_attributes(one, other)
    ours, theirs = ([node for node in graph.nodes if node.op != "get_attr"] for graph in (one, other))
    return comparison.run(ours, theirs)


@dataclass(kw_only=True)
class _Comparison:
    """A comparison of two traces, node by node.

    Attributes:
        tests: the decisions for which the second trace has the other outcome.
        same: for each node of the first trace, the node of the second with the same value.
        empty: masks of the first trace in which no element is set.
        copied: nodes of the second trace that the first copies.
    """

    tests: Sequence[MaskTest]
    same: dict[fx.Node, fx.Node] = field(default_factory=dict)
    empty: set[fx.Node] = field(default_factory=set)
    copied: set[fx.Node] = field(default_factory=set)

    def pair_attributes(self, one: fx.Graph, other: fx.Graph) -> None:
        """Pair parameters, buffers and constants, whose nodes are wherever they are first used."""
        for node in one.find_nodes(op="get_attr"):
            for candidate in other.find_nodes(op="get_attr"):
                if _is_same_attribute(node, candidate):
                    self.same[node] = candidate
                    break

    def run(self, ours: Sequence[fx.Node], theirs: Sequence[fx.Node]) -> bool:
        """Return whether both compute the same."""
        place = 0
        for node in ours:
            if self._is_empty(node):
                self.empty.add(node)
            if place < len(theirs) and self._matches(node, theirs[place]):
                if _is_writing(node) and (_is_mask(node) or self.copied.intersection(theirs[place].all_input_nodes)):
                    return False  # the mask would change, or the copy would not
                self.same[node] = theirs[place]
                place += 1
            elif self._is_through_empty(node, _WRITES):
                self._follow(node)
            elif self._is_copy(node):
                self.copied.update(self._follow(node))
            elif not self._has_no_effect(node):
                return False
        return place == len(theirs)

    def _follow(self, node: fx.Node) -> list[fx.Node]:
        """Pair a node with the node that its first argument is paired with."""
        kept = [self.same[source] for source in node.all_input_nodes[:1] if source in self.same]
        self.same.update((node, other) for other in kept)
        return kept

    def _matches(self, node: fx.Node, other: fx.Node) -> bool:
        if (node.op, node.meta.get("opaque")) != (other.op, other.meta.get("opaque")):
            return False
        if node.target != other.target or any(source not in self.same for source in node.all_input_nodes):
            return False
        args, kwargs = (fx.node.map_arg(given, lambda source: self.same[source]) for given in (node.args, node.kwargs))
        return repr((args, kwargs)) == repr((other.args, other.kwargs))  # repr distinguishes 1 from 1.0

    def _is_empty(self, node: fx.Node) -> bool:
        for test in self.tests:
            if node is test.mask and not test.is_negated:
                return True
            if node.target in _NEGATED and node.args[0] is test.mask and test.is_negated:
                return True
        if node.target in _SHAPED and _is_mask(node):
            return node.args[0] in self.empty
        return node.target in _BOTH and any(source in self.empty for source in node.args)

    def _is_through_empty(self, node: fx.Node, places: dict[Any, int]) -> bool:
        where: Any = node.args[places[node.target]] if node.target in places else None
        masks = where if isinstance(where, (list, tuple)) else (where,)
        return any(isinstance(mask, fx.Node) and mask in self.empty for mask in masks)

    def _is_copy(self, node: fx.Node) -> bool:
        """Return whether a node copies its first argument unchanged."""
        if not self._is_through_empty(node, _COPIES) or node.args[0] not in self.same:
            return False
        made, source = node.meta["val"], node.args[0].meta["val"]  # type: ignore[union-attr]
        return str(made.shape) == str(source.shape) and made.dtype == source.dtype

    def _has_no_effect(self, node: fx.Node) -> bool:
        """Return whether a node has no effect besides its result."""
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
    with plain_execution():
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
