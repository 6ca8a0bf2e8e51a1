"""Compare what the workers of a run were given, before anything runs: nodes may have other copies of the files."""

from __future__ import annotations

import importlib.metadata
import socket
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runtime.errors import WorkerError
from runtime.workers.group import Workers

if TYPE_CHECKING:
    import torch

FILE_TIMES = "times of the weights files"  # in an identity: copies of a file have different ones
_WORDS = {"checkpoint": "weights"}
_LIBRARIES = ("transformers", "compressed-tensors", "safetensors", "numpy")
_DIGEST_LENGTH = 40  # longer values are not shown


def require_same(workers: Workers, identity: Mapping[str, str], device: torch.device) -> list[str]:
    """Require that all workers have the same identity, and return warnings about differences between the machines.

    All workers raise the same error, and get the same warnings; the first one tells them.

    Args:
        workers: of the run.
        identity: a digest or a value for each ingredient of the run, see `runtime.streaming.identity`.
        device: of this worker.

    Raises:
        WorkerError: naming the first worker that differs from worker 0, and the ingredients.
    """
    if workers.size == 1:
        return []
    own = {
        "host": socket.gethostname(),
        "identity": {name: value for name, value in identity.items() if name != FILE_TIMES},
        "machine": _machine(device),
    }
    found = workers.exchange(own)
    _require_equal(found, "give all workers the same artifact, weights, recipe, data and options")
    first = found[0]
    warnings: list[str] = []
    for rank, facts in enumerate(found):
        differences = _differences(first["machine"], facts["machine"])
        if differences and not warnings:
            what = f"worker {rank} on {facts['host']} has other {' and '.join(differences)} than worker 0"
            warnings.append(f"warning: {what}: another division of the work may change the last bits of sums")
    return warnings


def require_same_options(workers: Workers, options: Mapping[str, Any]) -> None:
    """Require that all workers have the same options, before anything that depends on them.

    Raises:
        WorkerError: naming the first worker that differs from worker 0, and the options.
    """
    if workers.size > 1:
        identity = {name: str(value) for name, value in options.items()}
        own = {"host": socket.gethostname(), "identity": identity}
        _require_equal(workers.exchange(own), "start all workers with the same command")


def _require_equal(found: Sequence[Mapping[str, Any]], hint: str) -> None:
    first = found[0]
    for rank, facts in enumerate(found):
        differences = _differences(first["identity"], facts["identity"])
        if differences:
            raise WorkerError(
                f"worker {rank} on {facts['host']} has other {' and '.join(differences)} than worker 0 on "
                f"{first['host']}",
                hint=hint,
            )


def _differences(first: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    names = [name for name in dict.fromkeys((*first, *other)) if first.get(name) != other.get(name)]
    return [_difference(_WORDS.get(name, name), first.get(name), other.get(name)) for name in names]


def _difference(name: str, first: str | None, other: str | None) -> str:
    is_digest = max(len(str(first)), len(str(other))) >= _DIGEST_LENGTH
    return name if is_digest else f"{name} ({other} instead of {first})"


def _machine(device: torch.device) -> dict[str, str]:
    """What may change the last bits of sums, besides the identity of the run."""
    import torch

    from runtime.host.half_precision import names_of_slow_halves

    facts = {"slow 16-bit types": ",".join(names_of_slow_halves()) or "none", "threads": str(torch.get_num_threads())}
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
    for name in _LIBRARIES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "none"
    return facts
