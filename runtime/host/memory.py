"""What this machine has, and what this process takes of it."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import resource
import sys
import threading
from pathlib import Path

import torch

from runtime.errors import DeviceError, SeqbuildError

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


class OutOfMemory(SeqbuildError, torch.OutOfMemoryError):  # noqa: N818 - torch's name for it says Error
    """Not even a single sample fits. It is a `torch.OutOfMemoryError` too, for those who catch that."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the machine has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return not isinstance(error, OutOfMemory)
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def trim_heap() -> None:
    """Give freed memory back to the operating system, which glibc keeps in the gaps of its heap.

    Tensors of some megabytes come from that heap, and what little outlives them lies between them; without this the
    process grows from one subgraph to the next.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other systems' libraries have none
    if trim is not None:
        trim(0)


def give_memory_back(device: torch.device) -> None:
    """Free what nobody refers to, also in torch's own cache."""
    gc.collect()
    trim_heap()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_host_bytes() -> int:
    """The most memory that this process has had so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(device: torch.device) -> int:
    """The most memory that torch has had on a device so far; 0 on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
