"""The result of a module whose rounding was tuned, before it is packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.algorithms.result import QuantizedWeight


@dataclass(frozen=True, kw_only=True, slots=True)
class TunedModule:
    """The result of a module.

    Attributes:
        result: its weight.
        reason: why it was tuned alone; "" if it was not.
        seconds: its share of the time that tuning took.
    """

    result: QuantizedWeight
    reason: str = ""
    seconds: float = 0.0
