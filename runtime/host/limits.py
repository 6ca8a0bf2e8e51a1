"""Memory and processors that this process may use: those of the machine and of its control groups.

A container, a Slurm job and a systemd unit limit a process by control groups (version 1 or 2). The limits of all groups
around the process apply, so they are read from its own group upwards to the mount point. The page cache counts as used
in a group, but is freed when memory is needed, so it counts as available here, as in the kernel's MemAvailable.
`ulimit -v` is left out: it counts addresses that are only reserved, and exceeding it is an ordinary error.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_PROC = Path("/proc")
_ESCAPED = re.compile(r"\\([0-7]{3})")  # a space, tab, newline or backslash in mountinfo


def peak_host_bytes() -> int:
    """The peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """The resident memory of this process; its peak if the system does not report the present value."""
    try:
        return int((_PROC / "self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return peak_host_bytes()


def available_bytes(proc: Path = _PROC) -> int | None:
    """Memory that this process can still allocate without swap; None if unknown.

    Args:
        proc: where the proc file system is mounted.
    """
    limits = []
    with contextlib.suppress(OSError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", (proc / "meminfo").read_text())
        limits += [] if found is None else [int(found[1]) * 1024]
    for group in _groups("memory", proc):
        left = _left_in(group)
        limits += [] if left is None else [left]
    return max(min(limits), 0) if limits else None


def usable_processors(proc: Path = _PROC) -> int:
    """The number of processors that this process may keep busy: its affinity, and the quotas of its control groups.

    Args:
        proc: where the proc file system is mounted.
    """
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    quotas = (_quota_of(group) for group in _groups("cpu", proc))
    return min([count, *(max(math.ceil(quota), 1) for quota in quotas if quota is not None)])


def _left_in(group: Path) -> int | None:
    """Memory that a control group may still allocate; None without a limit."""
    limits = [_number(group / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    used = [_number(group / name) for name in ("memory.current", "memory.usage_in_bytes")]
    most = min((limit for limit in limits if limit is not None), default=None)
    now = next((number for number in used if number is not None), None)
    if most is None or now is None:
        return None
    cached = 0
    with contextlib.suppress(OSError):
        # Version 1 has the numbers of subgroups, which `used` includes, under names of their own.
        sizes = dict(re.findall(r"^(\w+) (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE))
        for name in ("inactive_file", "active_file"):
            cached += int(sizes.get(f"total_{name}") or sizes.get(name, "0"))
    return most - max(now - cached, 0)


def _quota_of(group: Path) -> float | None:
    """Processors that a control group may keep busy; None without a quota."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        quota, period = (str(_number(group / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
    is_limited = quota.isdecimal() and period.isdecimal() and int(quota) > 0 and int(period) > 0
    return int(quota) / int(period) if is_limited else None


def _number(path: Path) -> int | None:
    """The number in a file; None for another text, such as `max`, or without the file."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _groups(controller: str, proc: Path) -> Iterator[Path]:
    """Yield the directories of the control groups around this process that a controller may limit."""
    try:
        mounts = (proc / "self/mountinfo").read_text(errors="surrogateescape").splitlines()
        paths = dict(_own_groups((proc / "self/cgroup").read_text(errors="surrogateescape")))
    except OSError:
        return
    for line in mounts:
        fields, _, rest = line.partition(" - ")
        kind, _, options = (rest.split() + [""] * 3)[:3]
        name = "" if kind == "cgroup2" else controller
        if len(fields.split()) < 5 or name not in paths:
            continue
        if kind == "cgroup2" or (kind == "cgroup" and controller in options.split(",")):
            root, point = (_unescaped(text) for text in fields.split()[3:5])
            yield from _upwards(Path(point), paths[name], root)


def _own_groups(text: str) -> Iterator[tuple[str, str]]:
    """Yield controller and path for each line of /proc/self/cgroup; version 2 has an empty name."""
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        for name in names.split(","):
            yield name, path


def _upwards(point: Path, path: str, root: str) -> Iterator[Path]:
    """Yield the directories from a group to the mount point, where the group `root` is mounted.

    In a container, the path may be outside of what is mounted; the mount point is its own group then.
    """
    inside = path.removeprefix(root.rstrip("/")) if path.startswith(root) else ""
    parts = [part for part in inside.split("/") if part]
    if ".." in parts or not point.joinpath(*parts).is_dir():
        parts = []
    for length in range(len(parts), -1, -1):
        yield point.joinpath(*parts[:length])


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), text)
