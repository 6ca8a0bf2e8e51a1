"""Start a few processes with torchrun, and collect what each of them printed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.runtime.place import ROOT


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run of several workers that has ended: the codes and the outputs of the workers by rank."""

    codes: list[int | None]
    out: list[str]
    complaints: list[str]
    seconds: float


class Torchrun:
    """Processes of `tests.runtime.worker`.

    Args:
        folder: for their outputs, empty.
        size: the number of processes.
        arguments: of the script.
        behavior: the environment variable BEHAVIOR of each, such as `1:kill` for rank 1.
    """

    def __init__(self, folder: Path, size: int, arguments: Sequence[str | Path], behavior: str = "") -> None:
        self.folder, self.size, self._begin = folder, size, time.monotonic()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "BEHAVIOR": behavior}
        environment |= {"WORKER_FOLDER": str(folder)}
        options = ["--nproc-per-node", str(size), "--redirects", "3", "--log-dir", str(folder / "log")]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options]
        self._process = subprocess.Popen(
            [*command, "-m", "tests.runtime.worker", *map(str, arguments)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
        )

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            for path in self.folder.glob("pid-*"):
                with_pid = int(path.read_text())
                try:
                    os.kill(with_pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        self._process.wait()

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 60) -> None:
        """Wait until a condition is true."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert self._process.poll() is None or condition(), "torchrun ended too early"
            assert time.monotonic() < end, "nothing happened"
            time.sleep(0.05)

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to torchrun, or to a worker."""
        os.kill(self._process.pid if rank is None else self.pid(rank), number)

    def pid(self, rank: int) -> int:
        return int((self.folder / f"pid-{rank}").read_text())

    def has_mark(self, rank: int) -> bool:
        """Whether a worker has reached the point where it behaves badly."""
        return (self.folder / f"mark-{rank}").exists()

    def code(self, rank: int) -> int | None:
        path = self.folder / f"code-{rank}"
        return int(path.read_text()) if path.exists() else None

    def finish(self, timeout_s: float = 60) -> Finished:
        """Wait for the end of torchrun."""
        self._process.wait(timeout=timeout_s)
        return Finished(
            codes=[self.code(rank) for rank in range(self.size)],
            out=[self._log(rank, "stdout") for rank in range(self.size)],
            complaints=[self._log(rank, "stderr") for rank in range(self.size)],
            seconds=time.monotonic() - self._begin,
        )

    def _log(self, rank: int, stream: str) -> str:
        (path,) = (self.folder / "log").glob(f"*/attempt_0/{rank}/{stream}.log")
        return path.read_text()
