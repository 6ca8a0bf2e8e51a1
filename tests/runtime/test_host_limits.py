"""What control groups leave to this process, read from a copy of the files that the kernel would show."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime.host import own_process
from runtime.host.limits import available_bytes, usable_processors

GIB = 2**30
MEMINFO = f"MemTotal: {64 * 2**20} kB\nMemAvailable: {32 * 2**20} kB\n"
UNLIMITED = str(2**63 - 4096)


class Machine:
    """A proc file system and mounted control groups, below a directory."""

    def __init__(self, root: Path) -> None:
        self.root, self.proc = root, root / "proc"
        self._mounts: list[str] = []
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "meminfo").write_text(MEMINFO)
        self.own("0::/")

    def own(self, *lines: str) -> None:
        (self.proc / "self/cgroup").write_text("".join(f"{line}\n" for line in lines))

    def mount(self, kind: str, name: str, options: str = "rw", root: str = "/") -> Path:
        point = self.root / name
        point.mkdir(parents=True)
        escaped = str(point).replace(" ", "\\040")
        self._mounts.append(f"31 23 0:28 {root} {escaped} rw - {kind} none {options}\n")
        (self.proc / "self/mountinfo").write_text("1 1 0:1 / / rw - ext4 /dev/x rw\n" + "".join(self._mounts))
        return point


def write(folder: Path, **values: object) -> None:
    """Write the files of a group; `__` stands for the point in their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "a machine")


def test_without_groups_the_machine_decides(machine: Machine) -> None:
    assert available_bytes(machine.proc) == 32 * GIB
    assert available_bytes(machine.root / "nowhere") is None
    assert usable_processors(machine.proc) == len(os.sched_getaffinity(0))


def test_version_2(machine: Machine) -> None:
    point = machine.mount("cgroup2", "unified")
    write(point, memory__stat="file 0")
    write(point / "job", memory__max=8 * GIB, memory__current=5 * GIB, memory__stat="anon 1", memory__high="max")
    write(point / "job/step", memory__max="max", memory__current=GIB, memory__stat="file 1")
    machine.own("0::/job/step")
    assert available_bytes(machine.proc) == 3 * GIB
    stat = f"anon 7\ninactive_file {GIB}\nactive_file {2 * GIB}"
    write(point / "job", memory__stat=stat)
    assert available_bytes(machine.proc) == 6 * GIB, "the page cache is freed when memory is needed"
    write(point / "job/step", memory__high=2 * GIB)
    assert available_bytes(machine.proc) == GIB, "beyond memory.high the kernel slows a process down"
    write(point / "job", memory__max=GIB)
    assert available_bytes(machine.proc) == 0


def test_version_1_beside_an_empty_version_2(machine: Machine) -> None:
    machine.mount("cgroup2", "unified")
    point = machine.mount("cgroup", "memory", "rw,memory")
    machine.mount("cgroup", "cpuset", "rw,cpuset")
    own = point / "slurm/job_1"
    write(point, memory__limit_in_bytes=UNLIMITED, memory__usage_in_bytes=40 * GIB)
    stat = f"inactive_file 1\ntotal_inactive_file {GIB}\ntotal_active_file 0"
    write(own, memory__limit_in_bytes=6 * GIB, memory__usage_in_bytes=4 * GIB, memory__stat=stat)
    machine.own("4:memory:/slurm/job_1", "3:cpuset:/", "0::/")
    assert available_bytes(machine.proc) == 3 * GIB


@pytest.mark.parametrize("path", ["/docker/abc", "/../../kubepods/pod", "/elsewhere"])
def test_a_container_sees_its_group_at_the_mount_point(machine: Machine, path: str) -> None:
    point = machine.mount("cgroup", "memory", "rw,memory", root="/docker/abc")
    write(point, memory__limit_in_bytes=GIB, memory__usage_in_bytes=0)
    machine.own(f"4:memory:{path}")
    assert available_bytes(machine.proc) == GIB


@pytest.mark.parametrize(
    ("limit", "count"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 8), ("garbage", 8), ("0 0", 8)]
)
def test_quotas_of_processors(machine: Machine, monkeypatch: pytest.MonkeyPatch, limit: str, count: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    write(machine.mount("cgroup2", "unified") / "job", cpu__max=limit)
    machine.own("0::/job")
    assert usable_processors(machine.proc) == count


def test_quotas_of_processors_in_version_1(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    point = machine.mount("cgroup", "cpu", "rw,cpu,cpuacct")
    write(point, cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    write(point / "job", cpu__cfs_quota_us=300000, cpu__cfs_period_us=100000)
    machine.own("5:cpu,cpuacct:/job")
    assert usable_processors(machine.proc) == 3


def test_only_a_process_of_our_own_uses_fewer_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    chosen: list[int] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(own_process, "usable_processors", lambda: 2)
    monkeypatch.setattr("gc.freeze", lambda: None)
    own_process.settle()
    monkeypatch.setattr(own_process, "_is_ours", [True])
    own_process.settle()
    assert chosen == [2]
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    own_process.settle()
    assert chosen == [2]
