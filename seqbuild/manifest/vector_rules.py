"""What operators do to vectors of a space, where that does not depend on parameters.

Each rule returns the vectors that result, or None if the operator treats channels one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from seqbuild.manifest.channels import WEIGHTED_SUMS, executed, operator_name, size_of
from seqbuild.manifest.spaces import Vectors

REDUCTIONS = frozenset(("mean", "sum"))
SPREADS = frozenset(("var", "std"))
NORM = "linalg_vector_norm"
# Stands for numbers that no rotation changes, computed from vectors that one may change.
NUMBERS: Any = object()


def without_mean(vectors: Vectors, size: Sequence[int]) -> Vectors | None:
    """Handle a number that is added to all channels of a vector, or taken from all of them."""
    if not vectors.is_plain:
        return None
    vectors.space.restrict(vectors.rows)
    vectors.space.root.keeps_mean = True
    return replace(vectors, channels=vectors.channels.expand(tuple(size)))


def joined(one: Vectors, two: Vectors | None, size: Sequence[int]) -> Vectors | None:
    """Handle a sum of vectors, or a choice between them, which makes one space of two."""
    if two is None or one.space.size != two.space.size:
        return None
    for vectors in (one, two):
        if vectors.gain is not None:
            vectors.space.root.is_sum = True  # but for the gain, which is then the reason
    first, second = one.row, two.row
    if not one.is_plain or not two.is_plain or first is None or second is None:
        return None
    if not torch.equal(first, second) or len(first) != size[-1]:
        return None
    one.space.join(two.space)
    return one.spread(size)


def reduced(node: fx.Node, name: str, vectors: Vectors) -> Any:
    """Handle means, sums and norms over the last axis, which are numbers that no rotation changes."""
    size = size_of(node)
    axes = node.args[2 if name == NORM else 1] if len(node.args) > 1 else node.kwargs.get("dim")
    if size is None or vectors.gain is not None or not isinstance(axes, (list, tuple)):
        return None
    if not all(isinstance(axis, int) for axis in axes):
        return None
    num_dims = vectors.channels.dim()
    over = {axis % num_dims for axis in axes if isinstance(axis, int)}
    if name in REDUCTIONS and num_dims - 1 not in over and vectors.row is not None and not vectors.is_square:
        return vectors.spread(size)
    is_of_numbers = name in SPREADS or (name == NORM and node.args[1:2] in ((), (2,)))
    if over != {num_dims - 1} or (vectors.is_square if is_of_numbers else name not in REDUCTIONS):
        return None
    vectors.space.restrict(vectors.rows)
    if name != NORM and not vectors.is_square:
        vectors.space.root.keeps_mean = True
    return NUMBERS


def weighted_sum(node: fx.Node, name: str, vectors: Vectors) -> Vectors | None:
    """Handle a sum of vectors over tokens, weighted by other numbers."""
    summed, size, channels = node.args[WEIGHTED_SUMS[name]], size_of(node), vectors.channels
    if size is None or not vectors.is_plain or list(node.all_input_nodes).count(summed) != 1:  # type: ignore[arg-type]
        return None
    if channels.dim() < 2 or bool((channels != channels[..., :1, :]).any()):
        return None
    first = channels[..., :1, :]
    if node.kwargs.get("enable_gqa") and first.shape[-3] != size[-3]:
        first = first.repeat_interleave(size[-3] // first.shape[-3], dim=-3)
    try:
        result = replace(vectors, channels=first.expand(size))
    except RuntimeError:
        return None
    vectors.space.restrict(vectors.rows)
    vectors.space.root.summed[vectors.seen] = True
    return result


def moved(node: fx.Node, states: Mapping[fx.Node, Vectors]) -> Any:
    """Execute data movement on the channels."""
    first, *others = states.values()
    if any((state.gain, state.is_square) != (first.gain, first.is_square) for state in others):
        return None
    if any(state.space.root is not first.space.root for state in others) and not _joined_all(node, [first, *others]):
        return None
    made = executed(node, {entry: state.channels for entry, state in states.items()})
    if isinstance(made, (tuple, list)):
        return [replace(first, channels=part) for part in made]
    return replace(first, channels=made) if made is not None else None


def _joined_all(node: fx.Node, states: Sequence[Vectors]) -> bool:
    """Join the spaces of whole vectors that are put into one tensor."""
    first, axis = states[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    num_dims = first.channels.dim()
    is_along = isinstance(axis, int) and axis % num_dims != num_dims - 1
    if operator_name(node) not in ("cat", "concat") or not is_along:
        return False
    if not all(state.is_plain and state.is_whole and state.space.size == first.space.size for state in states):
        return False
    for state in states[1:]:
        first.space.join(state.space)
    return True


def is_constant_on_last_axis(value: Any) -> bool:
    """Whether a value is expanded along its last axis, or has one number there."""
    found = value.meta.get("val") if isinstance(value, fx.Node) else None
    if not isinstance(found, torch.Tensor) or not found.dim():
        return False
    size = size_of(value)
    return (size is not None and size[-1] == 1) or found.stride()[-1] == 0
