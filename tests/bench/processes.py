"""Run a program in a process of its own and find out what it took, from the kernel."""

from __future__ import annotations

import contextlib
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

_SAMPLE_S = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a process took, children included.

    Attributes:
        wall_s: seconds on the clock, from its start to its end.
        cpu_s: seconds of the processor.
        peak_bytes: the most resident memory at a time.
        disk_bytes: read from the disk, through maps of files as well; what the page cache has does not count.
        call_bytes: read by calls, from wherever.
        page_faults: that did not read the disk; each takes up to two microseconds.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int
    disk_bytes: int
    call_bytes: int
    page_faults: int


def run_process(
    command: Sequence[str], environment: Mapping[str, str], cwd: Path | None = None
) -> tuple[float, resource.struct_rusage]:
    """Seconds on the clock, and what the kernel counted; what the program says is dropped, and its failure is ours."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command[0]} failed: {errors.decode()[-2000:]}")
    return wall_s, usage


def measure(command: Sequence[str], threads: int = 1, cwd: Path | None = None, cold: Path | None = None) -> Cost:
    """Run a command and follow it.

    Args:
        command: the program with its arguments.
        threads: that torch may use.
        cwd: where it runs.
        cold: a directory whose files the page cache is asked to forget first.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if cold is not None:
        forget(cold)
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    watch = _Watch(process.pid)
    watch.start()
    assert process.stderr is not None
    errors = process.stderr.read()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    wall_s = time.perf_counter() - start
    disk_bytes, call_bytes = _traffic(process.pid)
    watch.stop()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command[:4])} failed: {errors.decode()[-2000:]}")
    return Cost(
        wall_s=wall_s,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_bytes=watch.peak_bytes,
        disk_bytes=disk_bytes,
        call_bytes=call_bytes,
        page_faults=usage.ru_minflt,
    )


def medians(costs: Sequence[Cost]) -> Cost:
    """The median of each figure."""
    return Cost(
        **{entry.name: statistics.median(getattr(cost, entry.name) for cost in costs) for entry in fields(Cost)}
    )


def forget(directory: Path) -> None:
    """Ask the page cache to drop a directory's files, so that whoever reads them next reads the disk."""
    for path in sorted(directory.iterdir()):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


class _Watch(threading.Thread):
    """Adds up the resident memory of a process and of its children, again and again.

    What `wait4` says of a peak begins with the memory of the process that started it, so that a small child of a large
    parent looks as large. The kernel's own mark of a process's peak is of that program alone.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._pid = pid
        self._end = threading.Event()

    def run(self) -> None:
        while not self._end.wait(_SAMPLE_S):
            family = _family(self._pid)
            now = sum(_share(pid) for pid in family) if len(family) > 1 else 0
            self.peak_bytes = max(self.peak_bytes, now, _high_water(self._pid))

    def stop(self) -> None:
        self._end.set()
        self.join()


def _family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                children = Path(f"/proc/{parent}/task/{task}/children").read_text()
                found += [int(child) for child in children.split()]
    return found


def _share(pid: int) -> int:
    """Resident memory, where what several processes have counts once: a fork would look like twice the memory."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def _high_water(pid: int) -> int:
    """The most resident memory that a process has had since it began this program."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _traffic(pid: int) -> tuple[int, int]:
    """Bytes from the disk, and bytes by calls; of a process that has ended and was not yet waited for."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return 0, 0
    counts = {name: int(count) for name, _, count in (line.partition(": ") for line in lines)}
    return counts["read_bytes"], counts["rchar"]
