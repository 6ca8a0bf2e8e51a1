"""Measure how fast bytes move: in memory, from files to the device, and to files; and how long a process starts."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from runtime.algorithms import grid
from runtime.checkpoint.reader import Checkpoint
from runtime.console import warn
from runtime.planning.stopwatch import Stopwatch

_BYTES = 2**26
_MOST_OF_PROCESSOR = 1.25
_IMPORTS = """
from runtime.cli import imports
from runtime.host import own_process
own_process.claim()
imports.import_alone()
import torch, compressed_tensors, runtime.calibration, runtime.quantize.solves, runtime.data.reading
torch.zeros(1, device={device!r})
"""


def traffic_rates(watch: Stopwatch) -> dict[str, float]:
    """Measure bytes per second."""
    on_device = torch.zeros(_BYTES // 4, device=watch.device)
    target = torch.empty_like(on_device)
    copy_s = watch.best(lambda: target.copy_(on_device))
    on_host = torch.zeros(_BYTES // 2, dtype=torch.bfloat16)
    loading_s = watch.best(lambda: (grid.is_finite(on_host), on_host.to(watch.device)))
    data = on_host.view(torch.uint8).numpy().data
    hash_s = watch.best(lambda: hashlib.sha256(data).digest())
    found = {"memory": 2 * _BYTES / copy_s, "loading": _BYTES / loading_s, "hashing": _BYTES / hash_s}
    try:
        with tempfile.TemporaryDirectory(prefix=".seqbuild-measure-", dir=_folder()) as folder:
            return found | _file_rates(watch, Path(folder), on_host)
    except OSError as error:
        warn(f"reads and writes are not measured: {error.strerror}; usual rates are assumed")
        return found


def _folder() -> Path | None:
    """The present directory, or if it is read-only that of temporary files."""
    return Path.cwd() if os.access(Path.cwd(), os.W_OK) else None


def _file_rates(watch: Stopwatch, folder: Path, tensor: torch.Tensor) -> dict[str, float]:
    data, path = tensor.view(torch.uint8).numpy().data, folder / "written"

    def write() -> None:
        path.unlink(missing_ok=True)
        with path.open("wb", buffering=0) as file:
            file.write(data)

    write_s = watch.best(write)
    start = time.perf_counter()
    with path.open("rb") as file:
        os.fsync(file.fileno())
    flush_s = max(time.perf_counter() - start, 1e-6)
    path.unlink()
    save_file({"read": tensor}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    checkpoint = Checkpoint(folder)
    return {
        "writing": _BYTES / write_s,
        "flushing": _BYTES / flush_s,
        "reading": _BYTES / watch.best(lambda: checkpoint.read("read")),
    }


def start_seconds(device: torch.device) -> float:
    """The seconds in which a process imports what a run needs, and ends."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    used, start = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", _IMPORTS.format(device=str(device))], env=environment, check=True)
    seconds, ended = time.perf_counter() - start, os.times()
    processor_s = ended.children_user + ended.children_system - used.children_user - used.children_system
    # Imports compute in one thread; what is far above their processor time is the time of other processes.
    return min(seconds, _MOST_OF_PROCESSOR * processor_s)
