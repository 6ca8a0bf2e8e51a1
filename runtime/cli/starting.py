"""Signals that arrive while the command line is imported: they end the process with one line instead of a traceback.

Nothing has been written yet, so nothing is cleaned up. Only the standard library is imported here, because the imports
that take time come afterwards.
"""

from __future__ import annotations

import os
import signal

# By the name of a signal, what a command prints that it ends.
WORDS = {"SIGHUP": "terminated by SIGHUP", "SIGINT": "interrupted", "SIGTERM": "terminated"}


def end_on_signals(program: str) -> None:
    """Let the signals end this process at once, until `stoppable` handles them; ignored ones stay ignored."""
    is_silent = os.environ.get("RANK", "0") != "0"  # a worker that is not the first one

    def end(number: int, _: object) -> None:
        if not is_silent:
            os.write(2, f"{program}: {WORDS[signal.Signals(number).name]}; nothing was written\n".encode())
        os._exit(128 + number)

    for name in WORDS:
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)
