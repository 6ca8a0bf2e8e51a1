"""Start workers that execute command lines of the host one after the other, some with a fault.

A start takes seconds, so one start executes many command lines. As a program, this file is what each worker executes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_LIMIT_S, _GRACE_S = 300.0, 15.0


@dataclass(frozen=True, kw_only=True)
class Fault:
    """An event on one worker.

    Attributes:
        rank: of the worker.
        kind: `kill` and `stop` send SIGKILL and SIGSTOP to it, `memory` is an error of the allocator.
        target: in whose subgraph it happens, such as `model.layers.1`; empty for any.
        at: the number of the execution of such a subgraph, from 1; 0 for all.
        samples: `memory` happens if a batch has more samples.
        is_repeated: whether it happens again after torchrun has restarted the workers.
    """

    rank: int
    kind: str
    target: str = ""
    at: int = 0
    samples: int = 0
    is_repeated: bool = False


@dataclass(frozen=True)
class Call:
    """A command line of the host, with a fault or without."""

    arguments: Sequence[str]
    fault: Fault | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a start: exit codes and outputs of its processes (of torchrun alone, if it started them)."""

    codes: tuple[int, ...]
    outputs: tuple[str, ...]
    errors: tuple[str, ...]
    seconds: float


def run_workers(
    calls: Sequence[Call], size: int, folder: Path, *, torchrun: Sequence[str] | None = (), limit_s: float = _LIMIT_S
) -> Outcome:
    """Execute command lines on `size` workers, and wait for the end of all processes.

    Args:
        calls: the command lines; the first that fails is the last that is executed.
        size: the number of workers.
        folder: for the list of calls.
        torchrun: further options of torchrun; None starts the workers without it.
        limit_s: seconds after which the processes are killed, and a TimeoutError raised.
    """
    path, start = write_calls(calls, folder), time.monotonic()
    processes = start_workers(path, size, torchrun)
    try:
        ends = [process.communicate(timeout=max(start + limit_s - time.monotonic(), 0.1)) for process in processes]
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{size} workers did not end within {limit_s} s: {path.read_text()}") from None
    finally:
        end_all(processes)
    return Outcome(
        codes=tuple(process.returncode for process in processes),
        outputs=tuple(output for output, _ in ends),
        errors=tuple(error for _, error in ends),
        seconds=time.monotonic() - start,
    )


def write_calls(calls: Sequence[Call], folder: Path) -> Path:
    """Write the file that workers read."""
    path = folder / f"calls-{time.monotonic_ns()}.json"
    path.write_text(json.dumps([asdict(call) for call in calls]))
    return path


def end_all(processes: Sequence[subprocess.Popen[str]]) -> None:
    """End processes that run; torchrun ends its workers if it may."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        os.killpg(process.pid, signal.SIGTERM)
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_GRACE_S)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def start_workers(path: Path, size: int, torchrun: Sequence[str] | None) -> list[subprocess.Popen[str]]:
    """Start the processes, each in a process group of its own."""
    program, here = [str(Path(__file__)), str(path)], [sys.executable]
    if torchrun is not None:
        options = ["--standalone", f"--nproc-per-node={size}", *torchrun]
        return [_start([*here, "-m", "torch.distributed.run", *options, *program], {})]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [_start([*here, *program], {**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in range(size)]


def _start(command: Sequence[str], environment: dict[str, Any]) -> subprocess.Popen[str]:
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        env={**os.environ, **fixed, **{name: str(value) for name, value in environment.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@contextlib.contextmanager
def happening(fault: Fault | None) -> Iterator[None]:
    """Let a fault happen in this process, if it is the worker of the fault."""
    is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if fault is None or fault.rank != int(os.environ.get("RANK", 0)) or not (is_first or fault.is_repeated):
        yield
        return
    import torch

    from runtime.chain import LoadedSubgraph

    real, calls = LoadedSubgraph.forward, [0]

    def forward(self: LoadedSubgraph, model: torch.nn.Module, **inputs: Any) -> dict[str, Any]:
        calls[0] += not fault.target or fault.target in self.entry.targets
        is_now = fault.at in (0, calls[0]) and (not fault.target or fault.target in self.entry.targets)
        rows = next(value.shape[0] for value in inputs.values() if isinstance(value, torch.Tensor))
        if is_now and fault.kind == "memory" and rows > fault.samples:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        if is_now and fault.kind != "memory":
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault.kind])
        return real(self, model, **inputs)

    setattr(LoadedSubgraph, "forward", forward)  # noqa: B010 - a method cannot be assigned to
    try:
        yield
    finally:
        setattr(LoadedSubgraph, "forward", real)  # noqa: B010


def main(path: str) -> int:
    """Execute the calls of a file as one of the workers."""
    from runtime.cli.app import main as run
    from runtime.host.own_process import claim

    claim()  # as the host's program does
    for call in json.loads(Path(path).read_text()):
        with happening(Fault(**call["fault"]) if call["fault"] else None):
            code = run(call["arguments"])
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
