"""A mode that records the operations of a forward for each expert, on meta tensors, and rejects unknown operations.

`seqbuild.trace.experts.loop` lists the accepted operations and explains why they are sufficient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

# Dtypes of hidden states and routing weights in an observed forward; they show from which the sum's dtype derives.
HIDDEN, WEIGHTS = torch.bfloat16, torch.float16
_RESHAPING = ("view", "reshape", "flatten")
_READ = ("dtype", "device", "ndim", "dim", "is_floating_point")
_SIZES = ("shape", "size")
# For each kind of index tensor, the accepted operations and the kind of their result; None if that is no tensor.
_INDEX_STEPS: Mapping[str, Mapping[str, str | None]] = {
    "index": {"one_hot": "mask", "numel": None},
    "mask": {"permute": "mask", "sum": "counts", "__getitem__": "own mask"},
    "counts": {"greater": "flags", "gt": "flags", "__gt__": "flags", "nonzero": "number"},
    "flags": {"nonzero": "number"},
    "number": {
        **dict.fromkeys(("flatten", "squeeze", "__getitem__", "__iter__", "unbind"), "number"),
        **dict.fromkeys(("__eq__", "__ne__", "eq", "ne"), "equal"),
        **dict.fromkeys(("tolist", "item", "dim", "__int__", "__index__")),
    },
    "equal": {"__bool__": None, "item": None},
    "own mask": {"squeeze": "own mask", "where": "lists"},
    "tokens": {"numel": None},
    "places": {"numel": None},
}


class UnexpectedForwardError(ValueError):
    """The forward differs from the expected loop over experts."""

    def __init__(self, message: str = "the forward is not a loop with the same operations for each expert") -> None:
        super().__init__(message)


class _Size(int):
    """A size that depends on tokens; it can only be used in shapes and compared with zero.

    Without arithmetic, formatting and other comparisons, no number or branch can depend on it.
    """

    def __eq__(self, other: object) -> bool:
        if type(other) is int and other == 0:
            return False
        raise UnexpectedForwardError

    def __bool__(self) -> bool:
        return True


def _refused(*_: Any) -> Any:
    raise UnexpectedForwardError


for _name, _value in list(vars(int).items()):
    if _name in ("real", "imag", "numerator", "denominator"):
        setattr(_Size, _name, property(_refused))
    elif _name not in ("__eq__", "__bool__", "__new__", "__getattribute__", "__doc__"):
        setattr(_Size, _name, _refused)


class Block:
    """The operations for one expert.

    Attributes:
        expert: the expert's number.
        notes: the operations.
        inputs: the tensors selected for its tokens: states and weights, once each.
        has_own: whether the expert's part of a parameter is selected.
        sum: the tensor of zeros to which the result was added, which ends the block.
    """

    def __init__(self, expert: int) -> None:
        self.expert = expert
        self.notes: list[Any] = []
        self.inputs: list[str] = []
        self.has_own = False
        self.sum: int | None = None


class ForwardWatcher(TorchFunctionMode):
    """Records operations on meta tensors, expert by expert.

    Args:
        states: the forward's hidden states, without values.
        index: the experts of each token, [T, K], with values.
        weights: the weights of these experts, without values.
        parameters: the module's parameters by name, without values.

    Attributes:
        blocks: the operations for each expert, in order.
        is_refused: whether an unknown operation occurred, even if the forward caught the error.
    """

    def __init__(
        self,
        states: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        parameters: Mapping[str, torch.Tensor],
    ) -> None:
        super().__init__()
        self.blocks: list[Block] = []
        self.is_refused = False
        self._is_over = False
        self._index_KT: list[list[int]] = index.T.tolist()
        self._rows = (len(index), states.shape[-1])
        self._weights = weights
        self._states = {id(states)}  # in any shape
        self._sums: dict[int, int] = {}  # for each sum, the number of its tensor of zeros
        self._parameters = {id(value) for value in parameters.values()}  # in any shape
        self._indices = {id(index): "index"}
        self._own_masks: dict[int, int] = {}
        self._names: dict[int, Any] = {id(value): name for name, value in parameters.items()}
        self._own_names: dict[int, Any] = {}  # results of the current expert, which others must not use
        # Keeps tensors alive, so that ids stay unique, with versions, which change when a tensor is modified.
        self._kept: list[tuple[torch.Tensor, int]] = []
        for value in (states, index, weights, *parameters.values()):
            self._keep(value)

    def found(self, result: torch.Tensor) -> dict[int, Block]:
        """Return the operations for each expert by its number, after the forward has returned `result`.

        Raises:
            UnexpectedForwardError: if the result is not the sum of all experts, or another tensor was modified.
        """
        base = self._sums.get(id(result))
        is_sum = base is not None and all(block.sum == base for block in self.blocks)
        if self.is_refused or not is_sum or any(tensor._version != version for tensor, version in self._kept):
            raise UnexpectedForwardError
        return {block.expert: block for block in self.blocks}

    def _keep(self, value: torch.Tensor) -> None:
        self._kept.append((value, value._version))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return self._seen(func, args, kwargs or {})
        except UnexpectedForwardError:
            self.is_refused = True
            raise

    def _seen(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        name = _name_of(func)
        tensors = _tensors((args, kwargs))
        if any(value.is_meta for value in tensors):
            return self._calculated(func, name, args, kwargs)
        if tensors:
            return self._indexed(func, name, args, kwargs)
        result = func(*_plain(args), **_plain(kwargs))
        if _tensors(result):
            if func is not torch.zeros or not result.is_meta or self.blocks:
                raise UnexpectedForwardError
            self._start_sum(result)
        return result

    def _indexed(self, func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Handle an operation on indices."""
        kind = self._indices.get(id(args[0]) if args else 0, "")
        if name not in _INDEX_STEPS.get(kind, {}) or not _is_plain(kind, name, args, kwargs):
            raise UnexpectedForwardError
        result = func(*args, **kwargs)
        made = _INDEX_STEPS[kind][name]
        if name == "numel":
            return _Size(result)
        if name == "where":
            return self._opened(args, result)
        if name == "__iter__":
            result = list(result)
        if made is not None:
            for value in _tensors(result):
                self._keep(value)
                self._indices[id(value)] = made
        elif _tensors(result):
            raise UnexpectedForwardError
        if kind == "mask" and name == "__getitem__":
            self._own_masks[id(result)] = self._expert_of(args[1])
        elif kind == "own mask":
            self._own_masks[id(result)] = self._own_masks[id(args[0])]
        return iter(result) if name == "__iter__" else result

    def _expert_of(self, place: Any) -> int:
        if isinstance(place, torch.Tensor) and self._indices.get(id(place)) == "number" and place.numel() == 1:
            return int(place.item())
        if type(place) is int:
            return place
        raise UnexpectedForwardError

    def _opened(self, args: Sequence[Any], result: Any) -> Any:
        """Begin the block of the next expert, with the lists of its tokens and their places."""
        if len(args) != 1 or len(result) != 2 or self._is_over or (self.blocks and self.blocks[-1].sum is None):
            raise UnexpectedForwardError
        expert = self._own_masks[id(args[0])]
        own = [
            (place, token)
            for place, own_T in enumerate(self._index_KT)
            for token, number in enumerate(own_T)
            if number == expert
        ]
        if [value.tolist() for value in result] != [list(numbers) for numbers in zip(*own, strict=True)]:
            raise UnexpectedForwardError
        self.blocks.append(Block(expert))
        self._own_names = {}
        self._indices = {known: kind for known, kind in self._indices.items() if kind not in ("tokens", "places")}
        for value, kind in zip(result, ("places", "tokens"), strict=True):
            self._keep(value)
            self._indices[id(value)] = kind
        return result

    def _calculated(self, func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Handle an operation on states, weights, parameters or the sum."""
        if name in _READ:
            return func(*args, **kwargs)
        if self.blocks and self.blocks[-1].sum is None:
            return self._inside(func, name, args, kwargs)
        if name in _SIZES and id(args[0]) in self._states:
            return _sizes(func, args, kwargs)
        return self._outside(func, name, args, kwargs)

    def _outside(self, func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Handle an operation before the first expert or after the last one."""
        self._is_over = bool(self.blocks)
        first = id(args[0]) if args else 0
        if _tensors((args[1:], kwargs)) or first not in (self._states | set(self._sums)):
            raise UnexpectedForwardError
        is_made = func in (torch.zeros_like, torch.Tensor.new_zeros) and first in self._states and not self._is_over
        is_cast = name == "to" and first in self._sums and self._is_over
        if not is_made and not is_cast and name not in _RESHAPING:
            raise UnexpectedForwardError
        result = func(*_plain(args), **_plain(kwargs))
        if is_made:
            self._start_sum(result)
            return result
        self._keep(result)
        if first in self._sums:
            self._sums[id(result)] = self._sums[first]
        else:
            self._states.add(id(result))
        return result

    def _start_sum(self, value: torch.Tensor) -> None:
        self._keep(value)
        self._sums[id(value)] = len(self._sums)

    def _inside(self, func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Handle an operation for one expert."""
        block = self.blocks[-1]
        if name == "index_add_":
            return self._added(args, kwargs)
        if _is_in_place(name) or kwargs.get("inplace") or kwargs.get("out") is not None:
            raise UnexpectedForwardError
        note = self._chosen(*args) if name == "__getitem__" else (func, self._described(args), self._described(kwargs))
        result = func(*args, **kwargs)
        made = pytree.tree_leaves(result)
        if not made or not all(isinstance(value, torch.Tensor) and value.is_meta for value in made):
            raise UnexpectedForwardError  # such as a size
        block.notes.append(note)
        for place, value in enumerate(made):
            self._keep(value)
            if id(value) not in self._names:
                self._own_names.setdefault(id(value), (len(block.notes), place))
        if name in _RESHAPING and id(args[0]) in self._parameters:
            self._parameters.add(id(result))
        return result

    def _chosen(self, owner: torch.Tensor, place: Any) -> Any:
        """Describe a selection."""
        block = self.blocks[-1]
        kinds = [self._indices.get(id(p), "") for p in (place if isinstance(place, tuple) else (place,))]
        if id(owner) in self._states:
            if tuple(owner.shape) != self._rows or isinstance(place, tuple) or kinds != ["tokens"]:
                raise UnexpectedForwardError
            block.inputs.append("states")
            return "states", "tokens"
        if owner is self._weights:
            if not isinstance(place, tuple) or kinds[:2] != ["tokens", "places"] or place[2:] not in ((), (None,)):
                raise UnexpectedForwardError
            block.inputs.append("weights")
            return "weights", len(place)
        is_number = type(place) is int or kinds == ["number"]
        if is_number and id(owner) in self._parameters:
            if self._expert_of(place) != block.expert:
                raise UnexpectedForwardError
            block.has_own = True
            return self._described(owner), "number"
        return "__getitem__", self._described(owner), self._described(place)

    def _added(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """End the block with the addition to the sum, and return the sum: on meta tensors it does not change."""
        block = self.blocks[-1]
        if kwargs or len(args) != 4 or id(args[0]) not in self._sums or type(args[1]) is not int or args[1] != 0:
            raise UnexpectedForwardError
        total, _, tokens, output = args
        is_whole = self._indices.get(id(tokens)) == "tokens" and sorted(block.inputs) == ["states", "weights"]
        if not is_whole or tuple(total.shape) != self._rows or tuple(output.shape) != (len(tokens), self._rows[1]):
            raise UnexpectedForwardError
        block.notes.append(("added", self._described(output)))
        block.sum = self._sums[id(total)]
        return total

    def _described(self, value: Any) -> Any:
        """Describe a value so that it can be compared between experts."""
        if isinstance(value, torch.Tensor):
            known = self._own_names.get(id(value), self._names.get(id(value)))
            if known is None:
                raise UnexpectedForwardError  # all states or weights, an index list, or a result of another expert
            return known
        if isinstance(value, (tuple, list)):
            return [self._described(part) for part in value]
        if isinstance(value, dict):
            return {name: self._described(part) for name, part in value.items()}
        if isinstance(value, slice):
            return "slice", self._described([value.start, value.stop, value.step])
        if type(value) is _Size:
            raise UnexpectedForwardError
        return type(value), value


def _is_plain(kind: str, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operation on indices has constant numbers as its only other arguments."""
    others = (args[1:], kwargs)
    if _tensors(others) and (kind, name) != ("mask", "__getitem__"):
        return False
    if kind == "counts" and name != "nonzero" and not (len(args) == 2 and type(args[1]) is int and args[1] == 0):
        return False
    is_sized = any(type(value) is _Size for value in pytree.tree_leaves(others))
    return not is_sized and not (name == "nonzero" and kwargs.get("as_tuple", False))


def _sizes(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return sizes of hidden states; all but the last depend on tokens."""
    whole = args[0].dim()
    result = func(*args, **kwargs)
    if isinstance(result, tuple):
        return tuple(_Size(size) if axis < whole - 1 else size for axis, size in enumerate(result))
    axis = args[1] if len(args) > 1 else kwargs.get("dim")
    return result if axis in (-1, whole - 1) else _Size(result)


def _plain(value: Any) -> Any:
    """Convert sizes in a container to numbers."""
    return pytree.tree_map(lambda item: int.__int__(item) if type(item) is _Size else item, value)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [item for item in pytree.tree_leaves(value) if isinstance(item, torch.Tensor)]


def _name_of(func: Any) -> str:
    """Return the name of a function, or of the attribute that a `__get__` reads."""
    name = str(getattr(func, "__name__", ""))
    return str(getattr(getattr(func, "__self__", None), "__name__", "")) if name == "__get__" else name


def _is_in_place(name: str) -> bool:
    """Return whether a function modifies its first argument, judging by its name."""
    if name.startswith("__"):
        return name in ("__setitem__", "__set__", "__delete__") or (name.startswith("__i") and name != "__invert__")
    return name.endswith("_")
