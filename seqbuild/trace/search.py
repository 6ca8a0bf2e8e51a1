"""Climb from one way of tracing a model to the next, until the whole of it is recorded.

Where the model's code cannot be recorded, the innermost function around that line becomes one opaque step, and the
trace is repeated; where that does not help, the function around that one, and so on. Functions that call a target are
out of the question. What cannot be recorded may follow from a size that an earlier line has turned into a number, so
the functions around that line are tried as well. A decision by values that no function surrounds is settled if the
model itself refuses one of its outcomes, if one of them can stand for both, or if all samples have the same one (see
`seqbuild.trace.decide.decisions`). Whether an outcome stands for both is proven by whole traces, so it is hoped for
first; the climb begins anew without that hope when it fails.
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


def climb(
    attempt: Attempt[_T],
    is_candidate: Callable[[Function], bool],
    is_alike: Callable[[_T, _T, Sequence[int]], bool],
) -> _T:
    """The result of the first attempt that succeeds.

    Args:
        attempt: traces with these paths of functions as opaque steps, and these answers to decisions.
        is_candidate: whether a function may become an opaque step.
        is_alike: whether the first of two results can stand for the second, which took the other outcomes of some of
            the decisions whose answers are not required; they are counted among those.

    Raises:
        TraceError: when nothing is left to try: that of the first attempt since which nothing has helped.
    """
    hopeful = _Climb(attempt=attempt, is_candidate=is_candidate, is_hopeful=True)
    try:
        result = hopeful.run()
        if hopeful.is_proven(result, is_alike):
            return result
    except TraceError:
        if not hopeful.has_hoped:
            raise
    return _Climb(attempt=attempt, is_candidate=is_candidate, is_hopeful=False).run()


@dataclass(kw_only=True)
class _Climb(Generic[_T]):
    """One climb.

    Attributes:
        attempt: as for `climb`.
        is_candidate: likewise.
        is_hopeful: let an outcome stand for both where it may.
        has_hoped: whether it has.
        paths: of functions that have become opaque steps.
        answers: to the decisions that are asked for with these.
    """

    attempt: Attempt[_T]
    is_candidate: Callable[[Function], bool]
    is_hopeful: bool
    has_hoped: bool = False
    paths: dict[str, None] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    _known: dict[Any, _T | UntraceableError | UndecidedError] = field(default_factory=dict)

    def run(self) -> _T:
        """The result of the first attempt that succeeds."""
        first: TraceError | None = None
        for _ in range(_MOST_TRACES):
            try:
                return self._try(self.answers)
            except (UntraceableError, UndecidedError) as error:
                first = first or error
                path = self._next(error.culprit) or self._next(error.earlier)
                if path is not None:
                    self.paths[path] = None
                    self.answers.clear()  # which decisions are asked for is another matter now
                    self._known.clear()
                    continue
                answer = self._settle(error) if isinstance(error, UndecidedError) else None
                if answer is None:
                    raise first from None
                self.answers.append(answer)
                first = None
        assert first is not None
        raise first

    def is_proven(self, result: _T, is_alike: Callable[[_T, _T, Sequence[int]], bool]) -> bool:
        """Whether the result stands for the other outcomes of all decisions that it does not require, each by itself
        and all together.
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
            if not is_alike(result, other, places):
                return False
        return True

    def _try(self, answers: Sequence[Answer]) -> _T:
        """The result of an attempt, or the error that it ended in; made once."""
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

    def _settle(self, question: UndecidedError) -> Answer | None:
        """The answer to a decision, or None if it has none."""
        writing = question.writing if self.is_hopeful else None
        answers = [Answer(outcome, is_required=outcome is not writing) for outcome in (True, False)]
        refused = [self._is_refused(answer, question) for answer in answers]
        if refused[0] != refused[1]:
            return Answer(refused[1])
        if refused[0]:
            return None
        if writing is not None:
            self.has_hoped = True
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
