"""Signals that stop a command: each unwinds the stack as Ctrl-C does, so that incomplete files are removed.

    SIGHUP      129     the terminal was closed, or the connection to it was lost
    SIGINT      130     Ctrl-C
    SIGTERM     143     kill, a scheduler, a container runtime

A signal that is ignored when the process begins (SIGHUP with nohup, SIGINT in a background job of a script) stays so,
except SIGTERM, which nobody sends without a reason. While the command cleans up, further signals are ignored; if that
takes longer than `_PATIENCE_S`, the next one ends the process at once, as SIGKILL would.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from runtime.host.event_log import SIGNALS

WORDS = {"SIGHUP": "terminated by SIGHUP", "SIGINT": "interrupted", "SIGTERM": "terminated"}
_PATIENCE_S = 5.0


class Stopping:
    """The handler of the signals.

    Args:
        at_once: called with the exit code before the process is ended without unwinding.

    Attributes:
        code: the exit code of the first signal; 0 without one.
        is_over: whether the command has ended, so that a signal changes nothing any more.
    """

    def __init__(self, at_once: Callable[[int], None]) -> None:
        self.code = 0
        self.is_over = False
        self._at_once = at_once
        self._since = 0.0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Unwind the stack, or end the process if that takes too long."""
        if self.is_over:
            return
        if not self.code:
            self.code, self._since = 128 + number, time.monotonic()
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(self.code)
        if time.monotonic() - self._since > _PATIENCE_S:
            self._at_once(self.code)
            os._exit(self.code)


@contextlib.contextmanager
def stoppable(at_once: Callable[[int], None]) -> Iterator[Stopping]:
    """Handle the signals while the block runs, in the main thread."""
    stopping = Stopping(at_once)
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in SIGNALS.values():
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and (name == "SIGTERM" or signal.getsignal(number) is not signal.SIG_IGN):
                before[number] = signal.signal(number, stopping.handle)
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            # A worker that has failed ignores signals until the process ends.
            if signal.getsignal(number) == stopping.handle:
                signal.signal(number, handler)
