"""What is done to the modules of a step: measure, over as many passes of the batches as it takes, then change weights.

A run has a list of modifiers and applies each to every step, in order. One that rescales weights before they are
rounded stands before the one that rounds them, and measures in passes of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from runtime.streaming.work import Work


class Modifier(Protocol):
    """One thing that is done to the modules of each step."""

    def measures(self, names: Sequence[str]) -> bool:
        """Whether batches must run to do it to these modules."""

    def rewrites(self, names: Sequence[str]) -> Sequence[str]:
        """The parameters, besides the weights of these modules, that it will change with `Work.rewrite`."""

    def apply(self, work: Work) -> None:
        """Do it to the modules of one step."""
