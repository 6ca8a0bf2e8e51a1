"""What this machine has, and what this process takes of it."""

from __future__ import annotations

import os
import re
import resource
import sys
import threading
from pathlib import Path

from runtime.errors import DeviceError

# Of a run, besides those that torch calculates with: one reads weights, one values, one commits finished subgraphs.
OWN_THREADS = 3
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


def require_threads(count: int) -> None:
    """Check that this process may have so many threads more, by starting them: native libraries that cannot start one
    end the process without a word from Python.

    Raises:
        DeviceError: when it may not.
    """
    done, threads = threading.Event(), []
    try:
        for _ in range(count):
            thread = threading.Thread(target=done.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except RuntimeError as error:
        raise DeviceError(
            f"this process can start only {len(threads)} of the {count} threads that a run takes",
            hint="raise the limit of processes (ulimit -u, or pids of the container), or lower OMP_NUM_THREADS",
        ) from error
    finally:
        done.set()
        for thread in threads:
            thread.join()
