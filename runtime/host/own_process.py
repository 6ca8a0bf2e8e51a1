"""A process that runs one command of this package, and no other code.

Imports make hundreds of thousands of objects that live as long as the process. Searching them for cyclic garbage takes
half a second of each command, a part of it when the process ends. So a process of our own searches rarely while it
imports, and then excludes what it has imported from all later searches. Any other process is left as it is.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys

from runtime.host.huge_pages import use_huge_pages
from runtime.host.limits import usable_processors

# Thresholds of `gc.set_threshold`. RARELY is for work that makes many objects and few reference cycles.
USUALLY, RARELY, _WHILE_IMPORTING = gc.get_threshold(), (100_000, 50, 50), (1_000_000, 50, 50)
_is_ours = [False]


def claim() -> None:
    """State that this process only runs one command of this package; call this before torch is imported."""
    _is_ours[0] = True
    atexit.register(_finish)
    use_huge_pages()
    gc.set_threshold(*_WHILE_IMPORTING)


def is_ours() -> bool:
    """Whether this process only runs one command of this package."""
    return _is_ours[0]


def settle(threshold: tuple[int, int, int] = USUALLY) -> None:
    """In a process of our own, after torch is imported: limit its threads, and exclude imported objects from later
    searches for garbage.
    """
    if not is_ours():
        return
    _use_allowed_processors()
    if gc.get_freeze_count():  # there was work since the first call, which may have left garbage
        gc.collect()
    gc.freeze()
    gc.set_threshold(*threshold)


def _use_allowed_processors() -> None:
    """Let torch use no more threads than the quota of a container allows: it counts the processors of the machine, and
    threads beyond the quota wait for each other while the kernel suspends the process.
    """
    torch = sys.modules.get("torch")
    if torch is None or "OMP_NUM_THREADS" in os.environ:
        return
    count = usable_processors()
    if count < torch.get_num_threads():
        torch.set_num_threads(count)


def _finish() -> None:
    """Skip the search at the end of the process, whose memory is freed anyway; not with triton, whose library complains
    of objects that are never freed.
    """
    if "triton" in sys.modules:
        gc.unfreeze()
    else:
        gc.freeze()
