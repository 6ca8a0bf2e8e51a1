"""Describe the results of a leaf by its arguments, so that they can be made again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from seqbuild.trace.record.looks import PLAIN, Look, UnknownValueError


@dataclass(frozen=True, slots=True)
class Description:
    """A result, described so that it can be made again."""

    content: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class _Argument:
    """An argument that is handed through: its place among the tensors."""

    place: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tensor:
    """A tensor that the leaf made."""

    sizes: tuple[Any, ...]
    strides: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device


class Describer:
    """Describes a result so that it can be made again."""

    def __init__(self, look: Look) -> None:
        self.look = look
        self.arguments = {id(tensor): place for place, tensor in enumerate(look.tensors[: look.num_arguments])}
        self.storages = {_storage(tensor) for tensor in look.tensors}

    def of(self, value: Any) -> Any:
        """The description of a part of the result.

        Raises:
            UnknownValueError: when it cannot be made again.
        """
        kind = type(value)
        if kind in PLAIN or kind in (float, complex):
            return value
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if id(value) in self.look.containers:
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
        self.look.require_plain(tensor)
        sizes, strides = tuple(tensor.shape), tuple(tensor.stride())
        symbols = {symbol for size in (*sizes, *strides) for symbol in _symbols(size)}
        storage = _storage(tensor)
        offset: Any = tensor.storage_offset()
        is_new = storage not in self.storages and not tensor.requires_grad and type(offset) is int and offset == 0
        if not is_new or not symbols <= self.look.symbols:
            raise UnknownValueError
        self.storages.add(storage)
        return _Tensor(sizes=sizes, strides=strides, dtype=tensor.dtype, device=tensor.device)


def _symbols(size: Any) -> set[Any]:
    return set() if type(size) is int else set(size.node.expr.free_symbols)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def made(described: Any, arguments: Sequence[torch.Tensor]) -> Any:
    """Make a described result again, of these arguments."""
    if isinstance(described, _Argument):
        return arguments[described.place]
    if isinstance(described, _Tensor):
        dtype, device = described.dtype, described.device
        return torch.empty_strided(described.sizes, described.strides, dtype=dtype, device=device)
    if isinstance(described, tuple) and hasattr(described, "_fields"):
        return type(described)(*(made(item, arguments) for item in described))
    if isinstance(described, (tuple, list)):
        return type(described)(made(item, arguments) for item in described)
    if isinstance(described, dict):
        return {key: made(item, arguments) for key, item in described.items()}
    return described
