"""Untrusted regular expressions on names, from recipes, checkpoints' configs and artifacts.

They have the meaning of Python's `re`, and are searched by the `regex` package, which supports a timeout: an
expression like `(a+)+$` may take time that doubles with each character, which its text does not reliably show.
Expressions that the two packages read differently are rejected.
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
_LIMIT_S = 1.0  # processor time of one search; a usual one takes microseconds
# Searches that take longer than _SLOW_S are added up for each expression, up to _TOTAL_S.
_SLOW_S, _TOTAL_S = 0.01, 5.0
_ESCAPE = re.compile(r"\\.", re.DOTALL)
_CLASS = re.compile(r"\[\^?\]?[^\]]*\]")
_COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")


def starts_with(expression: str, name: str) -> bool:
    """Whether a regular expression matches a name from its beginning, not necessarily to its end.

    Raises:
        PatternError: if the expression is invalid, or takes too long.
    """
    return _search(expression).is_found(name, from_start=True)


def is_in(expression: str, name: str) -> bool:
    """Whether a regular expression matches somewhere in a name.

    Raises:
        PatternError: if the expression is invalid, or takes too long.
    """
    return _search(expression).is_found(name, from_start=False)


def fault(expression: str) -> str:
    """Say why a regular expression is invalid or unsupported; empty if it is valid."""
    if len(expression) > LONGEST:
        return f"it has {len(expression)} characters, more than {LONGEST}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about syntax that a future Python may read differently: rejected below
            re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error) or type(error).__name__
    plain = _ESCAPE.sub("_", expression)
    outside = _CLASS.sub("_", plain)
    if any("[" in found[0][1:] for found in _CLASS.finditer(plain)) or "{" in _COUNT.sub("", outside):
        return "a [ in a class, and a { that is not a repetition, must be escaped by a backslash"
    repetitions = math.prod(max(int(found[3] or found[1] or 1), 1) for found in _COUNT.finditer(outside))
    if repetitions > _LARGEST_REPETITION:
        return f"its repetitions {{...}} multiply to {_short(repetitions)}, more than {_LARGEST_REPETITION}"
    try:
        _compiled(expression)
    except ImportError:
        raise
    except Exception as error:  # the package has its own exception, and may exceed limits of the interpreter
        return " ".join(str(error).split()) or type(error).__name__
    return ""


class _PatternSearch:
    """A compiled expression, and the time that its slow searches took."""

    def __init__(self, expression: str) -> None:
        wrong = fault(expression)
        if wrong:
            raise PatternError(f"{_shown(expression)} is not a valid regular expression: {wrong}")
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
def _search(expression: str) -> _PatternSearch:
    return _PatternSearch(expression)


def _compiled(expression: str) -> Any:
    import regex

    return regex.compile(expression, regex.VERSION0)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "...")


def _short(number: int) -> str:
    return str(number) if number < 10**12 else "more than 10^12"
