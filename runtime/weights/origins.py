"""The origin of a parameter: the checkpoint tensors it is made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The origin of a parameter in one checkpoint.

    Attributes:
        keys: names of its tensors; empty for a parameter whose default value is in the artifact.
        conversion: index of the program that computes the parameter from them, or -1.
        packed: the scheme of compressed tensors; `keys` then are all tensors of the module.
    """

    keys: tuple[str, ...]
    conversion: int
    packed: QuantizationScheme | None = None
