"""The constant tensors of an artifact: checked before a library parses them, and loaded from the checked bytes.

A safetensors file holds eight bytes of header length, a JSON header, and the tensors' bytes without gaps. JSON and
tensor readers differ in what they accept; this module enforces one strict interpretation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from runtime.artifact.files import CONSTANTS_NAME
from runtime.errors import ArtifactError

if TYPE_CHECKING:
    import torch

_HEADER_LIMIT_BYTES = 16 * 2**20
_WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
_WIDTHS |= {"I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8}


def check_constants(contents: Mapping[str, bytes], names: Collection[str]) -> None:
    """Reject a file of constants that does not contain exactly the tensors `names`.

    Raises:
        ArtifactError: naming the problem.
    """
    data = contents.get(CONSTANTS_NAME)
    if (data is not None) != bool(names):
        what = "contains tensors that the manifest does not list" if data is not None else "is missing"
        raise ArtifactError(f"{CONSTANTS_NAME} {what}")
    if data is None:
        return
    try:
        tensors = _header(data)
        end = 0
        for name, entry in sorted(tensors.items(), key=lambda item: _span(item[1])):
            end = _checked_end(name, entry, end)
        if end != len(data) - 8 - int.from_bytes(data[:8], "little"):
            raise ValueError("unexpected bytes after the last tensor")
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise ArtifactError(f"{CONSTANTS_NAME} cannot be read: {error}") from error
    if sorted(tensors) != sorted(names) or len(set(names)) != len(names):
        raise ArtifactError(f"{CONSTANTS_NAME} does not contain the tensors that the manifest lists")


def load_constants(data: bytes) -> dict[str, torch.Tensor]:
    """Load the tensors of a checked file on the CPU.

    Raises:
        ArtifactError: when the library rejects the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return dict(load(data))
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise ArtifactError(f"{CONSTANTS_NAME} cannot be read: {error}") from error


def _header(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, _HEADER_LIMIT_BYTES):
        raise ValueError(f"its header length is invalid: {length} bytes")
    table = json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=_without_duplicates)
    if not isinstance(table, dict):
        raise ValueError("its header is not a JSON object")
    table.pop("__metadata__", None)
    return table


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("its header has a duplicate key")
    return dict(pairs)


def _span(entry: Any) -> list[int]:
    begin, end = entry["data_offsets"]
    if type(begin) is not int or type(end) is not int:
        raise ValueError("its data_offsets are not integers")
    return [begin, end]


def _checked_end(name: str, entry: Any, begin: int) -> int:
    shape = entry["shape"]
    if sorted(entry) != ["data_offsets", "dtype", "shape"] or entry["dtype"] not in _WIDTHS:
        raise ValueError(f"{name} has the unsupported dtype {entry.get('dtype')!r}, or unknown entries")
    if type(shape) is not list or not all(type(size) is int and 0 <= size < 2**40 for size in shape):
        raise ValueError(f"{name} has the invalid shape {shape!r}")
    num_bytes = math.prod(shape) * _WIDTHS[entry["dtype"]]
    if _span(entry) != [begin, begin + num_bytes]:
        raise ValueError(f"the data_offsets of {name} do not match its shape")
    return begin + num_bytes
