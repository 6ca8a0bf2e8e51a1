"""A safetensors file of saved statistics whose tensors are known from a list: their names, dtypes and shapes.

So its header is known as well: a reader compares it byte for byte, and needs no parser of untrusted headers. A
symmetric matrix [I, I] is stored as its upper half, row by row: I (I + 1) / 2 numbers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from runtime.checkpoint.dtypes import DTYPES, bytes_of, dtype_name, empty_bytes
from runtime.checkpoint.layout import Layout
from runtime.checkpoint.stored import Stored
from runtime.host.publish import flush_one
from runtime.host.regular_files import open_regular, reason_of
from runtime.saved_statistics.records import damaged

ROWS_AT_A_TIME = 512  # of a matrix at a time
_PIECE_BYTES = 2**22


def half_size(width: int) -> int:
    """The numbers of a symmetric matrix that are stored."""
    return width * (width + 1) // 2


def file_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """The size of a file with these tensors: dtype and shape by name."""
    return _layout(tensors).file_bytes


def _layout(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Layout:
    return Layout((Stored(name, dtype, shape) for name, (dtype, shape) in tensors.items()), 2**62)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], symmetric: str = "") -> str:
    """Write a file durably.

    Args:
        path: the file; an incomplete one is overwritten.
        tensors: by name.
        symmetric: the name of the matrix of which half is stored.

    Returns:
        The SHA-256 of the file.
    """
    kinds = {
        name: (dtype_name(tensor.dtype), (half_size(len(tensor)),) if name == symmetric else tuple(tensor.shape))
        for name, tensor in tensors.items()
    }
    layout, digest = _layout(kinds), hashlib.sha256()
    with open(path, "wb", buffering=_PIECE_BYTES) as file:

        def put(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        put(layout.shards[0].header)
        for name in sorted(tensors, key=lambda name: layout.slots[name].offset):
            for part in _upper_rows(tensors[name]) if name == symmetric else [tensors[name].contiguous().cpu()]:
                put(bytes_of(part))
    flush_one(path)
    return digest.hexdigest()


def _upper_rows(matrix_II: torch.Tensor) -> Iterator[torch.Tensor]:
    for top in range(0, len(matrix_II), ROWS_AT_A_TIME):
        rows_RI = matrix_II[top : top + ROWS_AT_A_TIME].cpu()
        for row, values_I in enumerate(rows_RI, start=top):
            yield values_I[row:]


class TensorFile:
    """Reads a file from its beginning to its end, and compares its digest. Use as a context manager.

    Args:
        path: the file.
        tensors: the dtype, as safetensors names it, and the shape of each of its tensors.
        digest: the expected SHA-256.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], digest: str) -> None:
        self.path, self._expected, self._layout = path, digest, _layout(tensors)
        self._digest = hashlib.sha256()
        self._file: BinaryIO

    def __enter__(self) -> TensorFile:
        """Open the file, and compare its size and its header.

        Raises:
            DataError: they differ, or it cannot be read.
        """
        shard = self._layout.shards[0]
        try:
            self._file = open_regular(self.path)
        except (OSError, ValueError) as error:
            raise damaged(self.path, reason_of(error)) from error
        try:
            size = os.fstat(self._file.fileno()).st_size
            if size != shard.num_bytes:
                raise damaged(self.path, f"it has {size} bytes, not {shard.num_bytes}")
            if bytes(bytes_of(self._bytes(len(shard.header)))) != shard.header:
                raise damaged(self.path, "its header differs from what the list of its step states")
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str) -> torch.Tensor:
        """Read the next tensor, on the CPU; in the order of `names`."""
        stored = self._layout.slots[name].stored
        return self._bytes(stored.num_bytes).view(DTYPES[stored.dtype]).view(stored.shape)

    @property
    def names(self) -> list[str]:
        """The tensors in the order in which they follow one another."""
        return sorted(self._layout.slots, key=lambda name: self._layout.slots[name].offset)

    def read_symmetric(self, width: int, device: torch.device) -> torch.Tensor:
        """Read the next tensor, which is half of a symmetric matrix in float32, as a whole matrix [I, I].

        Raises:
            DataError: if it cannot be a Gram matrix.
        """
        matrix_II = torch.empty(width, width, dtype=torch.float32, device=device)
        for top in range(0, width, ROWS_AT_A_TIME):
            height = min(ROWS_AT_A_TIME, width - top)
            flat = self._bytes(4 * (half_size(width - top) - half_size(width - top - height))).view(torch.float32)
            rows_RP = torch.zeros(height, width - top)
            begin = 0
            for row in range(height):
                count = width - top - row
                rows_RP[row, row:] = flat[begin : begin + count]
                begin += count
            lower_RR = torch.ones(height, height, dtype=torch.bool).tril(-1)
            rows_RP[:, :height] = torch.where(lower_RR, rows_RP[:, :height].t(), rows_RP[:, :height])
            matrix_II[top : top + height, top:] = rows_RP
            matrix_II[top + height :, top : top + height] = matrix_II[top : top + height, top + height :].t()
        self._require_gram(matrix_II)
        return matrix_II

    def _require_gram(self, matrix_II: torch.Tensor) -> None:
        """Reject a matrix with a number or a 2 x 2 minor that no Gram matrix has, beyond rounding errors."""
        diagonal_I = matrix_II.diagonal()
        if not bool(torch.isfinite(diagonal_I).all()) or bool((diagonal_I < 0).any()):
            raise damaged(self.path, "the diagonal of its Gram matrix is not finite or negative")
        root_I = diagonal_I.sqrt()
        for top in range(0, len(matrix_II), ROWS_AT_A_TIME):
            rows_RI = matrix_II[top : top + ROWS_AT_A_TIME, top:].abs()
            limit_RI = torch.outer(root_I[top : top + ROWS_AT_A_TIME], root_I[top:]).mul_(1.01).add_(1e-30)
            if not bool((rows_RI <= limit_RI).all()):  # also if one is not a number
                raise damaged(self.path, "its matrix is not the Gram matrix of any inputs")

    def finish(self) -> None:
        """Compare the digest, after all tensors were read.

        Raises:
            DataError: it differs.
        """
        if self._digest.hexdigest() != self._expected:
            raise damaged(self.path, "its SHA-256 differs from the one in the list of its step")

    def _bytes(self, count: int) -> torch.Tensor:
        found = empty_bytes(count)
        memory = bytes_of(found)
        try:
            done = 0
            while done < count:
                size = self._file.readinto(memory[done:])  # type: ignore[attr-defined]
                if not size:
                    raise damaged(self.path, "it ends early")
                done += size
        except OSError as error:
            raise damaged(self.path, reason_of(error)) from error
        self._digest.update(memory)
        return found
