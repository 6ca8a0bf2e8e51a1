"""The values between subgraphs: one set of named values a batch, moved to the device when they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

_T = TypeVar("_T")


class Activations:
    """Named values of each batch, kept in host memory.

    Args:
        batches: the model's inputs, one mapping a batch.
        device: where subgraphs run.
    """

    def __init__(self, batches: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        self.device = device
        self._values: list[dict[str, Any]] = [dict(batch) for batch in batches]

    def __len__(self) -> int:
        return len(self._values)

    def fetch(self, batch: int, names: Iterable[str]) -> dict[str, Any]:
        """Some values of a batch, on the device."""
        return {name: move(self._values[batch][name], self.device) for name in names}

    def store(self, batch: int, values: Mapping[str, Any]) -> None:
        """Keep what a subgraph returned."""
        self._values[batch].update({name: move(value, torch.device("cpu")) for name, value in values.items()})

    def drop(self, batch: int, names: Iterable[str]) -> None:
        """Free values that nobody will ask for again."""
        for name in names:
            del self._values[batch][name]


def move(value: _T, device: torch.device) -> _T:
    """The same nest of containers with every tensor on `device`."""
    moved: _T = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), value)
    return moved


def cloned(value: _T) -> _T:
    """The same nest of containers with every tensor copied: code that works in place must not reach the original."""
    copied: _T = pytree.tree_map_only(torch.Tensor, torch.clone, value)
    return copied
