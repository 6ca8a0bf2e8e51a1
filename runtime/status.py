"""The status line: what a command does at present, below the lines that it has printed on a terminal.

Importing torch, tracing a model or tokenizing takes seconds in which nothing is printed. Library code calls `doing`,
which has no effect outside of a command line. Files and pipes never get a status line.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from runtime.terminal import is_terminal, printable, shortened

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

_DELAY_S = 0.4  # quick commands show nothing
_SHOWS_TIME_S = 2


class _StatusLine:
    """A line that appears after a delay and is erased when it is hidden."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._text = ""
        self._since = 0.0
        self._width = 80
        self._timer: threading.Timer | None = None
        self._live: Live | None = None

    def show(self, text: str) -> None:
        with self._lock:
            if not self._text:
                self._since = time.perf_counter()
            self._text = text
            if self._timer is None:
                self._arm()

    def _arm(self) -> None:
        self._timer = threading.Timer(_DELAY_S, self._start)
        self._timer.daemon = True
        self._timer.start()

    def hide(self, *, is_over: bool) -> None:
        with self._lock:
            self._text = "" if is_over else self._text
            timer, live, self._timer, self._live = self._timer, self._live, None, None
            if timer is not None:
                timer.cancel()
            if live is not None:
                live.stop()
            if self._text:
                self._arm()

    def _start(self) -> None:
        """Start to draw; only then is rich imported, in the timer's thread."""
        from rich.console import Console
        from rich.live import Live

        timer = threading.current_thread()
        with self._lock:
            if self._timer is not timer:  # hidden in the meantime
                return
            is_error_stream = is_terminal(sys.stderr)
            # Text that libraries print on the stream of the status line goes above it; other text is left alone.
            console = Console(stderr=is_error_stream)
            self._width = console.width
            self._live = Live(
                console=console,
                get_renderable=self._rendered,
                refresh_per_second=4,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=is_error_stream,
            )
            self._live.start()

    def _rendered(self) -> Text:
        from rich.text import Text

        seconds = int(time.perf_counter() - self._since)
        elapsed = f" ({seconds} s)" if seconds >= _SHOWS_TIME_S else ""
        return Text(shortened(f"{printable(self._text)}{elapsed}", self._width - 1), no_wrap=True)


_current: list[_StatusLine] = []
followers: list[Callable[[str], None]] = []  # are called with each text, also without a terminal


def doing(text: str) -> None:
    """State what the command does from here on."""
    for line in _current:
        line.show(text)
    for follow in followers:
        follow(text)


def make_room() -> None:
    """Erase the status line, because other text is about to be printed; it returns when nothing else is printed."""
    for line in _current:
        line.hide(is_over=False)


def done() -> None:
    """Erase the status line until the next call of `doing`."""
    for line in _current:
        line.hide(is_over=True)


@contextlib.contextmanager
def status_line(first: str) -> Iterator[None]:
    """Show the status of a command while the block runs, if standard error or standard output is a terminal.

    Args:
        first: the text until the first call of `doing`.
    """
    if not (is_terminal(sys.stderr) or is_terminal(sys.stdout)):
        yield
        return
    _current.append(_StatusLine())
    doing(first)
    try:
        yield
    finally:
        done()
        _current.pop()
