"""What this machine has, and what this process takes of it."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

_MEMINFO, _STATM = Path("/proc/meminfo"), Path("/proc/self/statm")
# Of control groups, version 2 and 1: the limit, and what is used of it.
_GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def resident_bytes() -> int:
    """Resident memory of this process; where the system does not tell, the most that it ever was."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most resident memory that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_bytes() -> int | None:
    """Memory that this process may still take, by the machine and by the group it is in; None where nobody tells."""
    limits = []
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", _MEMINFO.read_text())
        limits += [int(found[1]) * 1024] if found else []
    except OSError:
        pass
    for most, used in _GROUPS:
        try:
            limits.append(int(most.read_text()) - int(used.read_text()))
        except (OSError, ValueError):
            continue  # no such group, or one without a limit
    return max(min(limits), 0) if limits else None


def trim_heap() -> None:
    """Hand memory that was freed back to the system.

    The C library keeps what is freed in the middle of its heap, and asks for more where a large tensor fits into none
    of the holes; over many layers a process would come to hold much more than it uses. To be called between steps of a
    run: inside of one, memory that is kept is memory that need not be cleared again. Nothing happens where the C
    library is not glibc.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    return found
