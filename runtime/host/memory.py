"""Memory and threads of this process: freeing memory, requiring threads, and errors when either runs out."""

from __future__ import annotations

import ctypes
import gc
import threading

import torch

from runtime.errors import DeviceError, SeqbuildError

# Threads of a run besides torch's: they read weights, read values, write tensors, and commit finished subgraphs.
OWN_THREADS = 4


def require_threads(count: int) -> None:
    """Require that this process can start so many more threads, by starting them: native libraries that cannot start
    one end the process without a Python error.

    Raises:
        DeviceError: if a thread cannot be started.
    """
    done, threads = threading.Event(), []
    try:
        for _ in range(count):
            thread = threading.Thread(target=done.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except RuntimeError as error:
        raise DeviceError(
            f"this process can start only {len(threads)} of the {count} threads that a run requires",
            hint="raise the limit of processes (ulimit -u, or pids of the container), or lower OMP_NUM_THREADS",
        ) from error
    finally:
        done.set()
        for thread in threads:
            thread.join()


class OutOfMemory(SeqbuildError, torch.OutOfMemoryError):  # noqa: N818 - torch's name for it says Error
    """Not even a single sample fits into memory. Also a `torch.OutOfMemoryError`, for callers that catch that."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device or the machine has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return not isinstance(error, OutOfMemory)
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def trim_heap() -> None:
    """Return freed memory in the gaps of glibc's heap to the operating system.

    Tensors of a few megabytes are allocated on that heap with longer-lived small objects between them, so that without
    this the process grows from one subgraph to the next.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def give_memory_back(device: torch.device) -> None:
    """Free all unreferenced memory, including torch's cache of the device."""
    gc.collect()
    trim_heap()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_device_bytes(device: torch.device) -> int:
    """The peak memory that torch has allocated on a device so far; 0 on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
