"""Whether a forward is a loop over experts that does the same for each, watched on tensors without values.

Where transformers marks a class it promises that. Elsewhere it is looked at: the forward is run once with a token for
each expert and some more for the first one, and every operation on tensors without values is noted. For each expert
there must be the same operations, with the expert's own number, its own tokens, and its parts of the parameters, and
the last of them must add to the sum. Experts without weights come after the others, and are alike among themselves.
Before the first and after the last one nothing may happen to states and sum but that their axes are put together and
apart, and that the sum gets the dtype of the states.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

# Dtypes of hidden states and routing weights while a forward is watched: the sum has one of them, or its own.
HIDDEN, WEIGHTS = torch.bfloat16, torch.float16
_RESHAPING = ("view", "reshape", "flatten", "to", "size", "dim")
_READ = ("shape", "dtype", "device", "ndim")
_MAKING = ("zeros_like", "zeros", "new_zeros")


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """What is known of a loop over experts.

    Attributes:
        num_experts: how many have weights; 0 where the parameters tell.
        num_identity: how many there are besides, numbered after those.
        num_dims: of the hidden states.
    """

    num_experts: int = 0
    num_identity: int = 0
    num_dims: int = 2


class _OtherwiseError(Exception):
    """The forward does something else than what it is watched for."""


class _CountedError(Exception):
    """Carries the number of classes of experts away."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count


def watched_loop(module: nn.Module, width: int) -> Loop:
    """Run a module's forward, and see what it does for each expert.

    Args:
        module: its forward takes hidden states, indices and weights.
        width: of the hidden states.

    Raises:
        ValueError: when experts differ, or more is done than to add up what they return.
    """
    for num_dims in (2, 3):
        count = _num_classes(module, width, num_dims)
        for num_all in (count, count - 1):  # the last class may be for no expert at all
            blocks = _blocks(module, width, num_dims, num_all)
            if len(blocks) == num_all > 0:
                return _understood(blocks, num_dims)
    raise ValueError("the forward is no loop over experts")


def _understood(blocks: Sequence[_Block], num_dims: int) -> Loop:
    num_experts = sum(block.has_own for block in blocks)
    groups = blocks[:num_experts], blocks[num_experts:]
    if not num_experts or any(block.notes != group[0].notes for group in groups for block in group):
        raise ValueError("what the forward does differs from expert to expert")
    return Loop(num_experts=num_experts, num_identity=len(blocks) - num_experts, num_dims=num_dims)


def _num_classes(module: nn.Module, width: int, num_dims: int) -> int:
    """How many numbers the forward tells apart."""
    try:
        _run(module, width, num_dims, [[0, 0], [0, 0]], _Counting())
    except _CountedError as counted:
        return counted.count
    except Exception:  # whatever it does with other sizes, or without values: no list of errors is complete
        return 0
    return 0


def _blocks(module: nn.Module, width: int, num_dims: int, num_all: int) -> list[_Block]:
    """What is done for each expert; nothing where more is done, or another result comes of it."""
    if num_all < 1:
        return []
    index = [0] * (3 - num_all % 2) + list(range(1, num_all))  # an even number, to be two axes
    index_KT = [index, [0] * len(index)]  # some forwards need more than one for each token
    chosen = [
        [(place, token) for place, own_T in enumerate(index_KT) for token, own in enumerate(own_T) if own == expert]
        for expert in range(num_all)
    ]
    watching = _Watching(chosen)
    try:
        states, result = _run(module, width, num_dims, index_KT, watching)
    except Exception:
        return []
    is_sum = id(result) in watching.sums and result.shape == states.shape and result.dtype == states.dtype
    return watching.blocks if is_sum and all(block.is_added for block in watching.blocks) else []


def _run(
    module: nn.Module, width: int, num_dims: int, index_KT: Sequence[Sequence[int]], mode: TorchFunctionMode
) -> tuple[torch.Tensor, torch.Tensor]:
    """The forward's hidden states and its result, when tokens are sent to these experts."""
    num_tokens = len(index_KT[0])
    shape = (num_tokens,) if num_dims == 2 else (num_tokens // 2, 2)
    states = torch.empty(*shape, width, dtype=HIDDEN, device="meta")
    weights = torch.empty(num_tokens, len(index_KT), dtype=WEIGHTS, device="meta")
    values = {name: torch.empty(p.shape, dtype=HIDDEN, device="meta") for name, p in module.named_parameters()}
    if isinstance(mode, _Watching):
        mode.know({"states": states, "weights": weights, **values})
    forward = inspect.unwrap(type(module).forward)
    with torch.no_grad(), replaced_parameters(module, values), mode:
        result: torch.Tensor = forward(module, states, torch.tensor(index_KT).T, weights)
    return states, result


class _Counting(TorchFunctionMode):
    """Stop where indices become masks, one for each class."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.one_hot:
            count = args[1] if len(args) > 1 else kwargs.get("num_classes", 0)
            raise _CountedError(int(count))
        return func(*args, **kwargs)


class _Block:
    """What is done for one expert.

    Attributes:
        notes: its operations.
        has_own: whether it takes the expert's part of something.
        is_added: whether its last operation adds to the sum.
    """

    def __init__(self) -> None:
        self.notes: list[Any] = []
        self.has_own = False
        self.is_added = False


class _Watching(TorchFunctionMode):
    """Note operations on tensors without values, expert by expert.

    Args:
        chosen: for each expert the tokens that are sent to it, each with its place among that token's experts.
    """

    def __init__(self, chosen: Sequence[Sequence[tuple[int, int]]]) -> None:
        super().__init__()
        self.chosen = chosen
        self.blocks: list[_Block] = []
        self.sums: dict[int, torch.Tensor] = {}  # what experts' results are added to, and that in other shapes
        self._names: dict[int, Any] = {}
        self._kept: list[torch.Tensor] = []  # an id is one tensor's as long as that lives

    def know(self, values: Mapping[str, torch.Tensor]) -> None:
        """Name the inputs and the parameters."""
        for name, value in values.items():
            self._name(value, name)

    def _name(self, value: torch.Tensor, name: Any) -> None:
        self._kept.append(value)
        self._names.setdefault(id(value), name)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.where and len(args) == 1:
            self.blocks.append(_Block())
        if func is torch.Tensor.index_add_:
            return self._added(args, kwargs)
        result = func(*args, **kwargs)
        made = [value for value in pytree.tree_leaves(result) if _has_no_values(value)]
        if not made and not any(_has_no_values(value) for value in pytree.tree_leaves((args, kwargs))):
            return result
        if not self.blocks or self.blocks[-1].is_added:
            self._outside(func, args, made)
        else:
            block = self.blocks[-1]
            block.notes.append((func, self._described(args, func), self._described(kwargs)))
            for place, value in enumerate(made):
                self._name(value, (len(block.notes), place))
        return result

    def _added(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if not self.blocks or self.blocks[-1].is_added or kwargs or id(args[0]) not in self.sums:
            raise _OtherwiseError
        block = self.blocks[-1]
        block.notes.append(("added", self._described(args)))
        block.is_added = True
        return args[0]

    def _outside(self, func: Callable[..., Any], args: Sequence[Any], made: Sequence[torch.Tensor]) -> None:
        """What is done before the first expert, and after the last one."""
        name = getattr(func, "__name__", "")
        if name == "__get__" and getattr(getattr(func, "__self__", None), "__name__", "") in _READ:
            return
        is_early = not self.blocks
        if name not in _RESHAPING and not (is_early and name in _MAKING):
            raise _OtherwiseError
        for value in made:  # nothing, where a size is asked for
            if name in _MAKING or (args and id(args[0]) in self.sums):
                self.sums[id(value)] = value
            self._name(value, ("outside", len(self._kept)))

    def _described(self, value: Any, func: Any = None) -> Any:
        """A value so that those which different experts get can be compared."""
        expert = len(self.blocks) - 1
        if func is torch.Tensor.__getitem__:
            owner, place = value
            if type(place) is int and place == expert:
                place = torch.tensor(place)
            described = self._described(place)
            if described == "number":
                self.blocks[-1].has_own = True
            return self._described(owner), described
        if isinstance(value, torch.Tensor):
            if _has_no_values(value):
                return self._names[id(value)]
            if value.is_floating_point():
                raise _OtherwiseError
            own = self.chosen[expert] if expert < len(self.chosen) else ()
            known = {"number": expert, "tokens": [token for _, token in own], "places": [place for place, _ in own]}
            return next((name for name, numbers in known.items() if value.tolist() == numbers), value.tolist())
        if isinstance(value, (tuple, list)):
            return [self._described(part) for part in value]
        if isinstance(value, dict):
            return {name: self._described(part) for name, part in value.items()}
        if isinstance(value, slice):
            return "slice", self._described([value.start, value.stop, value.step])
        return value


def _has_no_values(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


class replaced_parameters:  # noqa: N801
    """For a while, the parameters of a module are these tensors."""

    def __init__(self, module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
        self.module = module
        self.values = values
        self.before: list[tuple[dict[str, Any], str, Any]] = []

    def __enter__(self) -> None:
        for name, value in self.values.items():
            owner, _, own = name.rpartition(".")
            table: Any = self.module.get_submodule(owner).__dict__["_parameters"]
            self.before.append((table, own, table[own]))
            table[own] = value

    def __exit__(self, *_: object) -> None:
        for table, own, value in self.before:
            table[own] = value
