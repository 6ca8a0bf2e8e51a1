"""Climb from one way of tracing a model to the next, until the whole of it is recorded.

Where the model's code cannot be recorded, the innermost function around that line becomes one opaque step, and the
trace is repeated; where that does not help, the function around that one, and so on. Functions that call a target are
out of the question. What cannot be recorded may follow from a size that an earlier line has turned into a number, so
the functions around that line are tried as well. A decision by values that no function surrounds is settled if the
model itself refuses one of its outcomes, or all samples have the same one (see `seqbuild.trace.decisions`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from runtime.errors import TraceError
from seqbuild.trace.blame import Culprit, Function, UntraceableError
from seqbuild.trace.decisions import UndecidedError

_MOST_TRACES = 64
_T = TypeVar("_T")

Attempt = Callable[[Sequence[str], Sequence[bool]], _T]


def climb(attempt: Attempt[_T], is_candidate: Callable[[Function], bool]) -> _T:
    """The result of the first attempt that succeeds.

    Args:
        attempt: traces with these paths of functions as opaque steps, and these answers to decisions.
        is_candidate: whether a function may become an opaque step.

    Raises:
        TraceError: when nothing is left to try: that of the first attempt since which nothing has helped.
    """
    paths: dict[str, None] = {}
    answers: list[bool] = []
    first: TraceError | None = None
    for _ in range(_MOST_TRACES):
        try:
            return attempt(tuple(paths), answers)
        except (UntraceableError, UndecidedError) as error:
            first = first or error
            path = _next(error.culprit, is_candidate, paths) or _next(error.earlier, is_candidate, paths)
            if path is not None:
                paths[path] = None
                continue
            answer = _settle(attempt, tuple(paths), answers, error) if isinstance(error, UndecidedError) else None
            if answer is None:
                raise first from None
            answers.append(answer)
            first = None
    assert first is not None
    raise first


def _next(culprit: Culprit | None, is_candidate: Callable[[Function], bool], tried: dict[str, None]) -> str | None:
    around = culprit.around if culprit is not None else ()
    return next((f.path for f in around if is_candidate(f) and f.path not in tried), None)


def _settle(
    attempt: Attempt[_T], paths: Sequence[str], answers: Sequence[bool], question: UndecidedError
) -> bool | None:
    """The answer to a decision whose other outcome the model refuses. Where it refuses neither, that of the samples;
    None where they show none, or the model refuses both.
    """
    refused = [_is_refused(attempt, paths, [*answers, answer], question) for answer in (True, False)]
    if refused[0] != refused[1]:
        return refused[1]
    return None if refused[0] else question.by_samples


def _is_refused(attempt: Attempt[_T], paths: Sequence[str], answers: Sequence[bool], question: UndecidedError) -> bool:
    try:
        attempt(paths, answers)
    except UntraceableError as error:
        place, asked = error.culprit, question.culprit
        is_there = place is not None and asked is not None and (place.file, place.name) == (asked.file, asked.name)
        return error.is_refusal and is_there
    except TraceError:
        pass
    return False
