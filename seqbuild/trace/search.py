"""Search for a set of opaque steps and decisions with which the whole forward of a model can be recorded.

If a line of the model's code cannot be recorded, the innermost function around it becomes one opaque step and the trace
is repeated; if that does not help, the function around that one, and so on. Functions that call a target are excluded.
The cause may be an earlier line that converted a size to a number, so the functions around that line are tried as well.

A data-dependent decision that no such function contains is answered if the model itself rejects one outcome, if one
outcome is valid for all data, or if all samples have the same outcome (see `seqbuild.trace.decide.decisions`). Proving
that an outcome is valid for all data takes complete traces, so it is assumed first. If the proof fails, the search
starts again without that assumption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from runtime.errors import TraceError
from seqbuild.blame import Culprit, Function, UntraceableError
from seqbuild.trace.decide.decisions import Answer, UndecidedError

_MOST_TRACES = 64
_T = TypeVar("_T")

Attempt = Callable[[Sequence[str], Sequence[Answer]], _T]


def find_trace(
    attempt: Attempt[_T],
    is_candidate: Callable[[Function], bool],
    is_equivalent: Callable[[_T, _T, Sequence[int]], bool],
) -> _T:
    """Return the result of the first attempt that succeeds.

    Args:
        attempt: traces with the functions at these paths as opaque steps and with these answers to decisions.
        is_candidate: whether a function may become an opaque step.
        is_equivalent: whether the first of two results can replace the second, which took the other outcome of the
            decisions with these indices. Only decisions whose answers are not required are counted.

    Raises:
        TraceError: if nothing is left to try: the error of the first attempt since the last progress.
    """
    optimistic = _Search(attempt=attempt, is_candidate=is_candidate, is_optimistic=True)
    try:
        result = optimistic.run()
        if optimistic.is_proven(result, is_equivalent):
            return result
    except TraceError:
        if not optimistic.has_assumed:
            raise
    return _Search(attempt=attempt, is_candidate=is_candidate, is_optimistic=False).run()


@dataclass(kw_only=True)
class _Search(Generic[_T]):
    """One search.

    Attributes:
        attempt: as for `find_trace`.
        is_candidate: as for `find_trace`.
        is_optimistic: assume that an outcome is valid for all data if a proof is possible.
        has_assumed: whether this was assumed.
        paths: paths of the functions that became opaque steps.
        answers: answers to the decisions that the model makes with these steps.
    """

    attempt: Attempt[_T]
    is_candidate: Callable[[Function], bool]
    is_optimistic: bool
    has_assumed: bool = False
    paths: dict[str, None] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    _known: dict[Any, _T | UntraceableError | UndecidedError] = field(default_factory=dict)

    def run(self) -> _T:
        """Return the result of the first attempt that succeeds."""
        first: TraceError | None = None
        for _ in range(_MOST_TRACES):
            try:
                return self._try(self.answers)
            except (UntraceableError, UndecidedError) as error:
                first = first or error
                path = self._next(error.culprit) or self._next(error.earlier)
                if path is not None:
                    self.paths[path] = None
                    self.answers.clear()  # the new step may change which decisions there are
                    self._known.clear()
                    continue
                answer = self._answer(error) if isinstance(error, UndecidedError) else None
                if answer is None:
                    raise first from None
                self.answers.append(answer)
                first = None
        assert first is not None
        raise first

    def is_proven(self, result: _T, is_equivalent: Callable[[_T, _T, Sequence[int]], bool]) -> bool:
        """Return whether the result is valid for the other outcome of each decision that is not required, and of all
        of them together.
        """
        free = [index for index, answer in enumerate(self.answers) if not answer.is_required]
        everything = range(len(free))
        for places in [[place] for place in everything] + ([list(everything)] if len(free) > 1 else []):
            answers = list(self.answers)
            for place in places:
                answers[free[place]] = Answer(not answers[free[place]].outcome, is_required=False)
            try:
                other = self._try(answers)
            except TraceError:
                return False
            if not is_equivalent(result, other, places):
                return False
        return True

    def _try(self, answers: Sequence[Answer]) -> _T:
        """Make an attempt once, and return its result or raise its error every time."""
        key = tuple(self.paths), tuple(answers)
        if key not in self._known:
            try:
                self._known[key] = self.attempt(tuple(self.paths), answers)
            except (UntraceableError, UndecidedError) as error:
                self._known[key] = error
        known = self._known[key]
        if isinstance(known, (UntraceableError, UndecidedError)):
            raise known
        return known

    def _next(self, culprit: Culprit | None) -> str | None:
        around = culprit.around if culprit is not None else ()
        return next((f.path for f in around if self.is_candidate(f) and f.path not in self.paths), None)

    def _answer(self, question: UndecidedError) -> Answer | None:
        """Return the answer to a decision, or None if there is none."""
        writing = question.writing if self.is_optimistic else None
        answers = [Answer(outcome, is_required=outcome is not writing) for outcome in (True, False)]
        refused = [self._is_refused(answer, question) for answer in answers]
        if refused[0] != refused[1]:
            return Answer(refused[1])
        if refused[0]:
            return None
        if writing is not None:
            self.has_assumed = True
            return Answer(writing, is_required=False)
        return None if question.by_samples is None else Answer(question.by_samples)

    def _is_refused(self, answer: Answer, question: UndecidedError) -> bool:
        try:
            self._try([*self.answers, answer])
        except UntraceableError as error:
            place, asked = error.culprit, question.culprit
            is_there = place is not None and asked is not None and (place.file, place.name) == (asked.file, asked.name)
            return error.is_refusal and is_there
        except TraceError:
            pass
        return False
