"""Tensors in safetensors files, which come back with the strides that they had."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


@dataclass(frozen=True, slots=True)
class DiskTensor:
    """A tensor in a file.

    Attributes:
        path: the file.
        key: the tensor's name in it.
        order: the tensor's dimensions in the order in which the file has them.
    """

    path: Path
    key: str
    order: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """Read the tensor into new memory.

        Raises:
            OSError: when the file is missing or damaged.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                stored: torch.Tensor = file.get_tensor(self.key)
        except SafetensorError as error:
            raise OSError(f"{self.path} is damaged: {error}") from error
        inverse = sorted(range(len(self.order)), key=lambda dim: self.order[dim])
        # The copy has torch's alignment, on which the last bits of a matrix product can depend.
        return stored.clone().permute(inverse)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write contiguous tensors on the CPU to a file, which replaces any other of its name.

    Raises:
        OSError: with the error number of the operating system.
    """
    storages: dict[int, None] = {}
    apart = {}
    for key, tensor in tensors.items():  # safetensors rejects tensors that share memory
        place = tensor.untyped_storage().data_ptr()
        apart[key] = tensor.clone() if place in storages else tensor
        storages[place] = None
    try:
        save_file(apart, path, dict(metadata or {}))
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def memory_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """The dimensions of a tensor by decreasing stride."""
    strides = tensor.stride()
    return tuple(sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim)))
