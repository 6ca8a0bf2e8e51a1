"""Standard output and standard error that never raise an exception.

A run may take a day. It must not end because its terminal or the reader of its pipe is gone, the disk is full, or the
encoding has no character for a path. Characters that cannot be encoded are escaped. After the first failed write all
later text is dropped, and the reason is kept in `Output.failure`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

GONE = "its reader has closed it"
# For encodings without the signs that this project prints; all of them take as many columns.
_PLAIN = str.maketrans({"…": "~", "‖": "|", "−": "-", "–": "-", "×": "x"})


class Output:
    """A text stream that drops text that it cannot write, instead of raising an exception.

    Args:
        stream: the stream to write to.

    Attributes:
        failure: the system's reason why writing failed; empty if it did not.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure = ""

    def write(self, text: str) -> int:
        """Write a text, or drop it if it cannot be written."""
        if not self.failure:
            try:
                try:
                    self._stream.write(text)
                except UnicodeEncodeError:
                    encoding = self._stream.encoding or "ascii"
                    self._stream.write(text.translate(_PLAIN).encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError) as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, or drop the text that cannot be written."""
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
        """Redirect a failed stream to the null device: Python would write its buffer again at exit, and complain."""
        with contextlib.suppress(OSError, ValueError):
            descriptor = self._stream.fileno()
            null_device = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null_device, descriptor)
            os.close(null_device)
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)


@contextlib.contextmanager
def unfailing() -> Iterator[tuple[Output, Output]]:
    """Replace `sys.stdout` and `sys.stderr` by an `Output` each while the block runs, and yield both.

    A closed stream is replaced by the null device.
    """
    _open_closed()
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        # A stream whose descriptor was closed when the process began is None in Python.
        real = [found or stack.enter_context(open(os.devnull, "w", encoding="utf-8")) for found in before]
        out, errors = map(Output, real)
        sys.stdout, sys.stderr = out, errors
        try:
            yield out, errors
        finally:
            for output in (out, errors):
                output.flush()
                if output.failure:
                    output.drop_rest()
            sys.stdout, sys.stderr = before


def _open_closed() -> None:
    """Open those of the first three descriptors that are closed, so that no file of the run gets a number that native
    code prints to.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:  # another thread was faster
                os.close(opened)
