"""Decisions that follow from values: what an assertion in the model's forward asks, for instance.

A trace holds one outcome. Three kinds of decisions are settled:

    refused     where the other outcome makes the model refuse its input (it raises an error itself), the trace takes
                the one that goes on, and the generated code requires it: what the model refuses the chain refuses
    writing     "where anything is marked, write there": writing where nothing is marked changes nothing, so the trace
                takes the outcome that writes, for all data (`seqbuild.trace.decide.equivalence` proves it)
    by samples  where the decision is about how data is laid out (it follows from token ids, grids and the like) and
                all samples have it alike, that outcome is taken and required (`seqbuild.trace.decide.evidence`)

Any other decision is an error: a chain that holds one outcome would silently be wrong for some data.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import PythonKeyTracer

from runtime.errors import TraceError
from seqbuild.blame import Culprit
from seqbuild.chain.marks import require
from seqbuild.trace.decide.equivalence import Marks, asked_for
from seqbuild.trace.decide.evidence import agreed
from seqbuild.trace.real.replay import Replay


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to a decision.

    Attributes:
        outcome: of the condition.
        is_required: whether data with the other outcome is refused.
    """

    outcome: bool
    is_required: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Clues:
    """What is known of the outcome of a decision.

    Attributes:
        by_samples: the outcome that all samples have, if they show one.
        writing: the outcome for data in which anything is marked, where the decision asks for that.
    """

    by_samples: bool | None = None
    writing: bool | None = None


class UndecidedError(TraceError):
    """A decision that follows from values and that no answer is known for yet.

    Args:
        culprit: the line that decides.
        clues: what is known of the outcome.

    Attributes:
        by_samples: of the clues.
        writing: likewise.
        earlier: as for `UntraceableError`.
    """

    def __init__(self, message: str, culprit: Culprit | None, clues: Clues) -> None:
        super().__init__(message, hint="move that line into a separate function and pass that to --ignore")
        self.culprit = culprit
        self.by_samples, self.writing = clues.by_samples, clues.writing
        self.earlier: Culprit | None = None


class Decisions:
    """Answers to the decisions of one trace, in the order in which they are asked for.

    Args:
        answers: those that are known.
        tracer: records them.
        known: the answer to a condition that is the same in every run; None where it may differ.

    Attributes:
        replay: what the samples make of the graph; set when the trace begins.
        marks: what the decisions ask for whose answers are not required.
    """

    replay: Replay

    def __init__(
        self, answers: Sequence[Answer], tracer: PythonKeyTracer, known: Callable[[fx.Node], bool | None]
    ) -> None:
        self.answers = answers
        self.tracer = tracer
        self.known = known
        self.marks: list[Marks] = []
        self._num_asked = 0

    def decide(self, condition: torch.SymBool, culprit: Culprit | None) -> bool:
        """The answer to `condition`, which is recorded where it is not always the same.

        Raises:
            UndecidedError: when none is known.
        """
        always = self.stated(condition)
        if always is not None:
            return always
        node = self.tracer.create_arg(condition)
        marks = asked_for(node)
        index = self._num_asked
        if index >= len(self.answers):
            what = f"decides by values: {condition.node.expr}"
            clues = Clues(by_samples=agreed(node, self.replay), writing=None if marks is None else marks.writing)
            if culprit is None:
                raise UndecidedError(f"the model's code {what}", culprit, clues)
            where = f"{culprit.file}, line {culprit.line}"
            raise UndecidedError(f"{culprit.name} cannot be traced ({where}): it {what}", culprit, clues)
        self._num_asked += 1
        answer = self.answers[index]
        if answer.is_required:
            self._require(node, answer.outcome)
        elif marks is not None:
            self.marks.append(marks)
        return answer.outcome

    def stated(self, condition: torch.SymBool) -> bool | None:
        """The answer that follows from numbers that the code itself states; None where there is more to it."""
        node = self.tracer.create_arg(condition)
        return self.known(node) if isinstance(node, fx.Node) else None

    def number(self, value: torch.SymInt) -> int | None:
        """What an integer is in all samples, which is required; None where they do not show it."""
        node = self.tracer.create_arg(value)
        number = agreed(node, self.replay) if isinstance(node, fx.Node) else None
        if type(number) is not int:
            return None
        self._require(self.tracer.create_node("call_function", operator.eq, (node, number), {}), True)
        return number

    def _require(self, condition: fx.Node, outcome: bool) -> None:
        self.tracer.create_node("call_function", require, (condition, outcome), {})
