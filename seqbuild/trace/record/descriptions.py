"""Describe a leaf's result in terms of its arguments, so that it can be recreated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from seqbuild.trace.experts.signature import UnknownValueError
from seqbuild.trace.record.call_state import PLAIN, CallState


@dataclass(frozen=True, slots=True)
class Description:
    """A description from which a result can be recreated."""

    content: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class _Argument:
    """An argument that is returned unchanged: its index among the tensors."""

    place: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tensor:
    """A new tensor."""

    sizes: tuple[Any, ...]
    strides: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device


class Describer:
    """Describes the result of one call."""

    def __init__(self, state: CallState) -> None:
        self.state = state
        self.arguments = {id(tensor): place for place, tensor in enumerate(state.tensors[: state.num_arguments])}
        self.storages = {_storage(tensor) for tensor in state.tensors}

    def of(self, value: Any) -> Any:
        """Describe a part of the result.

        Raises:
            UnknownValueError: if it cannot be recreated.
        """
        kind = type(value)
        if kind in PLAIN or kind in (float, complex):
            return value
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if id(value) in self.state.containers:
            raise UnknownValueError
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return kind(*(self.of(item) for item in value))
        if kind in (tuple, list):
            return kind(self.of(item) for item in value)
        if kind is dict and all(type(key) in (str, int, bool) for key in value):
            return {key: self.of(item) for key, item in value.items()}
        raise UnknownValueError

    def _tensor(self, tensor: torch.Tensor) -> Any:
        if id(tensor) in self.arguments:
            return _Argument(place=self.arguments[id(tensor)])
        self.state.require_plain(tensor)
        sizes, strides = tuple(tensor.shape), tuple(tensor.stride())
        symbols = {symbol for size in (*sizes, *strides) for symbol in _symbols(size)}
        storage = _storage(tensor)
        offset: Any = tensor.storage_offset()
        is_new = storage not in self.storages and not tensor.requires_grad and type(offset) is int and offset == 0
        if not is_new or not symbols <= self.state.symbols:
            raise UnknownValueError
        self.storages.add(storage)
        return _Tensor(sizes=sizes, strides=strides, dtype=tensor.dtype, device=tensor.device)


def _symbols(size: Any) -> set[Any]:
    return set() if type(size) is int else set(size.node.expr.free_symbols)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def recreated(described: Any, arguments: Sequence[torch.Tensor]) -> Any:
    """Recreate a described result for these arguments."""

    def part(described: Any) -> Any:
        if isinstance(described, _Argument):
            return arguments[described.place]
        if isinstance(described, _Tensor):
            dtype, device = described.dtype, described.device
            return torch.empty_strided(described.sizes, described.strides, dtype=dtype, device=device)
        return described

    return pytree.tree_map(part, described)
