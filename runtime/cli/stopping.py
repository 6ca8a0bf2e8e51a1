"""Signals that stop a command: each unwinds the stack, so that incomplete files are removed.

    SIGHUP      129     the terminal was closed, or the connection to it was lost
    SIGINT      130     Ctrl-C
    SIGTERM     143     kill, a scheduler, a container runtime

A signal that is ignored when the process begins (SIGHUP with nohup, SIGINT in a background job of a script) stays so,
except SIGTERM, which is always a request to stop. While the command cleans up, further signals are ignored; if that
takes longer than `_PATIENCE_S`, the next one ends the process at once, as SIGKILL would.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from runtime.host.event_log import SIGNALS
from runtime.host.own_process import is_ours

_PATIENCE_S = 5.0
_AGAIN_S = 0.25


class Stopping:
    """The handler of the signals.

    Args:
        at_once: called with the exit code before the process is ended without unwinding.

    Attributes:
        code: the exit code of the first signal; 0 without one.
    """

    def __init__(self, at_once: Callable[[int], None]) -> None:
        self.code = 0
        self._at_once = at_once
        self._stop: BaseException | None = None
        self._since = 0.0
        self._is_over = False
        self._alarm: Any = None  # the handler of the timer's signal before the first signal

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Unwind the stack, or end the process if that takes too long."""
        if self._since and time.monotonic() - self._since > _PATIENCE_S:
            if not self._is_over:
                self._at_once(self.code)
            os._exit(self.code or 128 + number)
        if self._since:
            return
        self.code, self._since = 128 + number, time.monotonic()
        # Not KeyboardInterrupt: after one in an `exec`, Python ends with the signal instead of the exit code.
        self._stop = SystemExit(self.code)
        if hasattr(signal, "setitimer"):
            self._alarm = signal.signal(signal.SIGALRM, self._insist)
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S, _AGAIN_S)
        raise self._stop

    def _insist(self, number: int, frame: FrameType | None) -> None:
        """Raise the exception again if other code has suppressed it, as some imports and destructors do."""
        if self._is_over or self._stop is None:
            return
        handled = sys.exc_info()[1]
        while handled is not None and handled is not self._stop:
            handled = handled.__context__
        if handled is None:
            raise self._stop

    def end(self) -> None:
        """State that the command has ended, so that signals change nothing any more."""
        self._is_over, self._since = True, time.monotonic()
        if self._stop is not None and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._alarm)


@contextlib.contextmanager
def stoppable(at_once: Callable[[int], None]) -> Iterator[Stopping]:
    """Handle the signals while the block runs, in the main thread; in a process of our own, until it ends."""
    stopping = Stopping(at_once)
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in SIGNALS.values():
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and (name == "SIGTERM" or signal.getsignal(number) is not signal.SIG_IGN):
                before[number] = signal.signal(number, stopping.handle)
    if is_ours():  # Python restores the usual handlers before the process ends, and these would change its exit code
        atexit.register(_ignore, tuple(before))
    try:
        yield stopping
    finally:
        for number, handler in () if is_ours() else before.items():
            # A worker that has failed ignores signals until the process ends.
            if signal.getsignal(number) == stopping.handle:
                signal.signal(number, handler)


def _ignore(numbers: tuple[int, ...]) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
