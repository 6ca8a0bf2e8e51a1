"""Standard output and standard error that never end a run.

A run may take a day. That its terminal has gone, that nobody reads its pipe any more, that the disk is full
or that its encoding has no character for a path is no reason to lose it. What cannot be encoded is escaped. After the
first text that cannot be written the rest is dropped, and what went wrong is remembered for whoever wants to say so.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

GONE = "nobody reads it any more"


class Output:
    """A text stream of the process, for everybody who prints.

    Args:
        stream: what is written to.

    Attributes:
        failure: why it takes no more text, in the system's words; empty while it does.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure = ""

    def write(self, text: str) -> int:
        """Write, or drop what cannot be written."""
        if not self.failure:
            try:
                try:
                    self._stream.write(text)
                except UnicodeEncodeError:
                    encoding = self._stream.encoding or "ascii"
                    self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError) as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what cannot be written."""
        if not self.failure:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def _give_up(self, error: OSError | ValueError) -> None:
        self.failure = getattr(error, "strerror", None) or str(error)
        if getattr(error, "errno", None) == errno.EPIPE:
            self.failure = GONE

    def drop_rest(self) -> None:
        """Let what is left in the buffer of a stream that failed lead nowhere: Python would try to write it once more
        when the process ends, and complain.
        """
        with contextlib.suppress(OSError, ValueError):
            descriptor = self._stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)


@contextlib.contextmanager
def unfailing() -> Iterator[tuple[Output, Output]]:
    """Let `sys.stdout` and `sys.stderr` never raise while the block runs; those that are closed lead nowhere.

    Yields:
        Both.
    """
    _fill_closed()
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        # None is what Python has for a descriptor that was closed when the process began.
        real = [found or stack.enter_context(open(os.devnull, "w", encoding="utf-8")) for found in before]
        out, complaints = map(Output, real)
        sys.stdout, sys.stderr = out, complaints
        try:
            yield out, complaints
        finally:
            for output in (out, complaints):
                output.flush()
                if output.failure:
                    output.drop_rest()
            sys.stdout, sys.stderr = before


def _fill_closed() -> None:
    """Open what was closed among the first three descriptors, lest a file of the run gets the number that native code
    prints to.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:  # another thread was faster
                os.close(opened)
