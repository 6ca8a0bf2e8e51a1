"""The group of workers around a command that torchrun may have started several times."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from runtime.console import parse_seconds
from runtime.errors import UsageError
from runtime.workers.comparison import require_same_options
from runtime.workers.group import Alone, Workers
from runtime.workers.start import device_name, launch, started


def join_group(stack: ExitStack, device: str, timeout: str, options: Mapping[str, Any]) -> tuple[Workers, str]:
    """Form the group of workers, and return it and the name of this worker's device.

    Args:
        stack: ends the group.
        device: the option `--device`.
        timeout: the option `--worker-timeout`.
        options: the command, and options that decide what the workers do before they compare all others.
    """
    seconds = parse_seconds(timeout, option="--worker-timeout")
    if launch().size == 1:
        return Alone(), device
    from runtime.host.devices import resolve_device

    name = device_name(device)
    workers = stack.enter_context(started(resolve_device(name), seconds))
    require_same_options(workers, options)
    return workers, name


def require_readable_by(workers: Workers, sources: Iterable[str]) -> None:
    """Reject standard input as data of several workers: each would get a part of it."""
    if workers.size > 1 and any(source.partition("::")[0] == "-" for source in sources):
        raise UsageError(f"{workers.size} workers cannot read standard input", hint="write the data to a file")


def is_resumed(workers: Workers, resume: bool) -> bool:
    """Whether a calibration continues an interrupted run: if the user says so, or torchrun has started it again.

    torchrun counts the restarts of each node, which may differ.
    """
    return resume or any(workers.exchange(launch().num_restarts > 0))
