"""A tensor as a checkpoint states it. This needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Bits of a number by safetensors' name of its dtype. Inside a shard, tensors are stored in the reverse of this order.
BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
BITS |= dict.fromkeys(("U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
BITS |= dict.fromkeys(("I16", "U16", "F16", "BF16"), 16)
BITS |= dict.fromkeys(("I32", "U32", "F32"), 32)
BITS |= dict.fromkeys(("C64", "F64", "I64", "U64"), 64)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a checkpoint states it: safetensors' name of the dtype, and the shape in numbers of that dtype."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * BITS[self.dtype] // 8
