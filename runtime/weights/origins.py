"""The origin of a parameter: the checkpoint tensors it is made from."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a parameter comes from in one checkpoint.

    Attributes:
        keys: its tensors, by the checkpoint's names; none for one that the checkpoint lacks and the artifact has.
        conversion: index of the program that makes the parameter from them, or -1.
        packed: the scheme under which the tensors are compressed; `keys` then are all of the module's tensors.
    """

    keys: tuple[str, ...]
    conversion: int
    packed: QuantizationScheme | None = None
