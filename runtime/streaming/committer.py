"""Have the disk keep a finished step while the next one computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Committer:
    """Runs one function after the other in a thread; an error comes out of the next call."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Committer:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def submit(self, function: Callable[[], None]) -> None:
        """Begin with a function when the one before it is done."""
        self.wait()
        self._pending = self._thread.submit(function)

    def wait(self) -> None:
        """Return when everything is done."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()
