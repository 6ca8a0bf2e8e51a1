"""Run a program in a process of its own and ask the kernel what it took."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


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
