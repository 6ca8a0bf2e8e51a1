"""Where the progress of one call is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from runtime.console import silent


def _untold(event: str, **facts: Any) -> None:
    """Tell nobody."""


def _unwatched(stack: ExitStack) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Show:
    """Where progress is shown.

    Attributes:
        line: called with each line.
        tell: called with events that no watcher of the calibration gets, see `runtime.streaming.events`.
        watching: makes the arguments `progress` and `watchers` of `calibrate`; the stack is closed after it.
    """

    line: Callable[[str], None] = silent
    tell: Callable[..., None] = _untold
    watching: Callable[[ExitStack], Mapping[str, Any]] = _unwatched
