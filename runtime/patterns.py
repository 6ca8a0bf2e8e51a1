"""Regular expressions on names, written by others: in recipes, checkpoints' configs and artifacts.

They mean what Python's `re` means by them, and are searched by the `regex` package, which stops after a time: an
expression like `(a+)+$` may take time that doubles with each character, and no look at its text tells that for sure.
What the two packages read differently is rejected when an expression is read: an expression is one for both.
"""

from __future__ import annotations

import functools
import math
import re
import time
import warnings
from typing import Any

from runtime.errors import PatternError

LONGEST = 10_000
_LARGEST_REPETITION = 10_000
# Of one search, of the processor's time; a usual one takes some millionths of a second.
_LIMIT_S = 1.0
# Of all searches of one expression together that are no usual ones.
_SLOW_S, _TOTAL_S = 0.01, 5.0
_ESCAPE = re.compile(r"\\.", re.DOTALL)
_CLASS = re.compile(r"\[\^?\]?[^\]]*\]")
_COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")


def starts_with(expression: str, name: str) -> bool:
    """Whether a regular expression matches a name from its beginning, not necessarily to its end.

    Raises:
        PatternError: when it is none, or takes too long.
    """
    return _searched(expression).is_found(name, from_start=True)


def is_in(expression: str, name: str) -> bool:
    """Whether a regular expression matches somewhere in a name.

    Raises:
        PatternError: when it is none, or takes too long.
    """
    return _searched(expression).is_found(name, from_start=False)


def fault(expression: str) -> str:
    """Why this is no regular expression that can be searched for; empty when it is one. Nothing is searched."""
    if len(expression) > LONGEST:
        return f"it has {len(expression)} characters, more than {LONGEST}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what may mean something else in a future Python: it is rejected below
            re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error) or type(error).__name__
    plain = _ESCAPE.sub("_", expression)
    outside = _CLASS.sub("_", plain)
    if any("[" in found[0][1:] for found in _CLASS.finditer(plain)) or "{" in _COUNT.sub("", outside):
        return "a [ in a class or a { that is no repetition must be written with a backslash"
    repetitions = math.prod(max(int(found[3] or found[1] or 1), 1) for found in _COUNT.finditer(outside))
    if repetitions > _LARGEST_REPETITION:
        return f"its repetitions {{...}} multiply to {_short(repetitions)}, more than {_LARGEST_REPETITION}"
    try:
        _compiled(expression)
    except Exception as error:  # of the package, which has one of its own, and of the interpreter's limits
        return " ".join(str(error).split()) or type(error).__name__
    return ""


class _Searched:
    """An expression that is searched for, and the time that slow searches took."""

    def __init__(self, expression: str) -> None:
        wrong = fault(expression)
        if wrong:
            raise PatternError(f"{_shown(expression)} is no regular expression: {wrong}")
        self.expression = expression
        self.compiled = _compiled(expression)
        self.slow_s = 0.0

    def is_found(self, name: str, *, from_start: bool) -> bool:
        search = self.compiled.match if from_start else self.compiled.search
        start = time.thread_time()
        try:
            found = search(name, timeout=_LIMIT_S) is not None
        except TimeoutError as error:
            raise self._too_slow(name) from error
        seconds = time.thread_time() - start
        if seconds > _SLOW_S:
            self.slow_s += seconds
            if self.slow_s > _TOTAL_S:
                raise self._too_slow(name)
        return found

    def _too_slow(self, name: str) -> PatternError:
        return PatternError(
            f"the regular expression {_shown(self.expression)} takes too long on {_shown(name)}",
            hint="this regular expression may backtrack without bound: write it without repetitions of repetitions",
        )


@functools.lru_cache(maxsize=4096)
def _searched(expression: str) -> _Searched:
    return _Searched(expression)


def _compiled(expression: str) -> Any:
    import regex

    return regex.compile(expression, regex.VERSION0)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "...")


def _short(number: int) -> str:
    return str(number) if number < 10**12 else "more than a million million"
