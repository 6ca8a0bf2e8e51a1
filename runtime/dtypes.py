"""Dtypes by the names that safetensors has for them, and tensors as plain bytes."""

from __future__ import annotations

from typing import Any

import torch

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """What safetensors calls a dtype."""
    return _NAMES[dtype]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, not a copy."""
    flat = tensor.detach().reshape(-1)
    flat = flat.as_strided(flat.shape, (1,))  # of a single number, the step to the next may be anything
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def empty_bytes(count: int) -> torch.Tensor:
    """Memory of its own for so many bytes, aligned as torch aligns what it allocates."""
    return torch.empty(count, dtype=torch.uint8)
