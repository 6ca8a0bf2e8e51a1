"""Decisions that follow from values: what an assertion in the model's forward asks, for instance.

A trace holds one outcome. Where the other one makes the model refuse its input (it raises an error itself), the trace
takes the outcome that goes on, and the generated code requires it: data that the model would refuse is refused by the
chain. Where both outcomes go on, a chain that holds one of them would silently be wrong for some data. If the decision
is about how the data is laid out (it follows from token ids, grids and the like) and all samples have it alike, that
outcome is taken and required likewise; any other such decision is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from runtime.errors import TraceError
from seqbuild.trace.blame import Culprit


def require(value: Any, expected: bool) -> None:
    """Stands in a graph for the check that generated code makes with `run.require`."""


class UndecidedError(TraceError):
    """A decision that follows from values and that no answer is known for yet.

    Args:
        culprit: the line that decides.
        by_samples: the outcome that all samples have, if they show one.

    Attributes:
        earlier: as for `UntraceableError`.
    """

    def __init__(self, message: str, culprit: Culprit | None, by_samples: bool | None) -> None:
        super().__init__(message, hint="move that line into a function of its own and name it with --ignore")
        self.culprit = culprit
        self.by_samples = by_samples
        self.earlier: Culprit | None = None


@dataclass
class Decisions:
    """Answers to the decisions of one trace, in the order in which they are asked for.

    Attributes:
        answers: those that are known.
        record: called with a node's condition and the answer.
        ask: for the outcome that all samples of a condition have, or None.
        num_asked: how many have been asked for.
    """

    answers: Sequence[bool]
    record: Callable[[torch.SymBool, bool], fx.Node]
    ask: Callable[[torch.SymBool], bool | None]
    num_asked: int = field(default=0)

    def decide(self, condition: torch.SymBool, culprit: Culprit | None) -> bool:
        """The answer to `condition`, which is recorded as a requirement.

        Raises:
            UndecidedError: when none is known.
        """
        index = self.num_asked
        if index >= len(self.answers):
            what = f"decides by values: {condition.node.expr}"
            by_samples = self.ask(condition)
            if culprit is None:
                raise UndecidedError(f"the model's code {what}", culprit, by_samples)
            where = f"{culprit.file}, line {culprit.line}"
            raise UndecidedError(f"{culprit.name} cannot be traced ({where}): it {what}", culprit, by_samples)
        self.num_asked += 1
        self.record(condition, self.answers[index])
        return self.answers[index]
