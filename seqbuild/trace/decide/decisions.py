"""Decisions that depend on values, such as assertions in the model's forward.

A trace contains one outcome of each decision. Three kinds of decisions can be answered:

    rejected    With one outcome the model itself raises an error. The trace takes the other one, and the generated code
                requires it, so the chain rejects the same data as the model.
    writing     "If any element of a mask is set, write there." Writing through an empty mask changes nothing, so the
                outcome that writes is valid for all data; `seqbuild.trace.decide.equivalence` proves it.
    by samples  The decision is about the layout of data (it depends on token ids, grids and the like), and all samples
                have the same outcome. It is taken and required; see `seqbuild.trace.decide.evidence`.

Any other decision is an error, because the chain would silently be wrong for some data.
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
from seqbuild.trace.decide.equivalence import MaskTest, mask_test_of
from seqbuild.trace.decide.evidence import common_value
from seqbuild.trace.real.replay import Replay


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to a decision.

    Attributes:
        outcome: the value of the condition.
        is_required: whether data with the other outcome is rejected.
    """

    outcome: bool
    is_required: bool = True


class UndecidedError(TraceError):
    """A decision that depends on values and has no known answer yet.

    Args:
        message: as for every error.
        culprit: the line that decides.
        by_samples: the outcome of all samples, if they agree.
        writing: the outcome if any element of the tested mask is set, if the decision tests a mask.

    Attributes:
        earlier: as for `UntraceableError`.
    """

    def __init__(self, message: str, culprit: Culprit | None, *, by_samples: bool | None, writing: bool | None) -> None:
        super().__init__(message, hint="move that line into a function of its own and name it with --ignore")
        self.culprit = culprit
        self.by_samples = by_samples
        self.writing = writing
        self.earlier: Culprit | None = None


class Decisions:
    """Answers to the decisions of one trace, in the order of the decisions.

    Args:
        answers: the known answers.
        tracer: records the answers.
        known: returns the value of a condition that is the same in every run; None if it may differ.

    Attributes:
        replay: the values of the graph for the samples; set when the trace begins.
        mask_tests: the masks tested by the decisions whose answers are not required.
    """

    replay: Replay

    def __init__(
        self, answers: Sequence[Answer], tracer: PythonKeyTracer, known: Callable[[fx.Node], bool | None]
    ) -> None:
        self.answers = answers
        self.tracer = tracer
        self.known = known
        self.mask_tests: list[MaskTest] = []
        self._num_decided = 0

    def decide(self, condition: torch.SymBool, culprit: Culprit | None) -> bool:
        """Return the answer to `condition`, and record it unless it is constant.

        Raises:
            UndecidedError: if no answer is known.
        """
        always = self.constant(condition)
        if always is not None:
            return always
        node = self.tracer.create_arg(condition)
        test = mask_test_of(node)
        index = self._num_decided
        if index >= len(self.answers):
            what = f"branches on data: {condition.node.expr}"
            place = f"{culprit.file}, line {culprit.line}" if culprit is not None else ""
            who = f"{culprit.name} cannot be traced ({place}): it" if culprit is not None else "the model's code"
            by_samples, writing = common_value(node, self.replay), None if test is None else test.writing
            raise UndecidedError(f"{who} {what}", culprit, by_samples=by_samples, writing=writing)
        self._num_decided += 1
        answer = self.answers[index]
        if answer.is_required:
            self._require(node, answer.outcome)
        elif test is not None:
            self.mask_tests.append(test)
        return answer.outcome

    def constant(self, condition: torch.SymBool) -> bool | None:
        """Return the value of a condition that depends only on constants in the code; None for any other condition."""
        node = self.tracer.create_arg(condition)
        return self.known(node) if isinstance(node, fx.Node) else None

    def number(self, value: torch.SymInt) -> int | None:
        """Return the value that an integer has in all samples, and require it; None if the samples do not show it."""
        node = self.tracer.create_arg(value)
        number = common_value(node, self.replay) if isinstance(node, fx.Node) else None
        if type(number) is not int:
            return None
        self._require(self.tracer.create_node("call_function", operator.eq, (node, number), {}), True)
        return number

    def _require(self, condition: fx.Node, outcome: bool) -> None:
        self.tracer.create_node("call_function", require, (condition, outcome), {})
