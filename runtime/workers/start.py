"""Start the group of workers that torchrun has started as processes, and leave it.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Without them there is one worker.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import __version__
from runtime.errors import UsageError, WorkerError
from runtime.host.event_log import SIGNALS
from runtime.terminal import printable
from runtime.workers.group import Alone, Workers

if TYPE_CHECKING:
    import torch

    from runtime.workers.torch_group import TorchGroup
    from runtime.workers.watch import Peer, Watch

DEFAULT_TIMEOUT_S = 600.0
_POLL_S = 0.05
_STARTED: list[TorchGroup] = []  # the group of this process
_is_broken = [False]
_num_groups = [0]  # that this process has formed
_LIMIT_BYTES = 10_000  # of an announcement


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """Place of this process among those of the run.

    Attributes:
        rank: its number.
        size: the number of processes.
        local_rank: its number on this machine.
        local_size: the number of processes on this machine.
        num_restarts: how often torchrun has started the run again.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    num_restarts: int = 0


def launch() -> Launch:
    """Read the environment of torchrun.

    Raises:
        UsageError: when it is incomplete.
    """
    if _number("WORLD_SIZE", 1) == 1:
        return Launch(num_restarts=_number("TORCHELASTIC_RESTART_COUNT", 0))
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            hint = "start the command with torchrun, or unset WORLD_SIZE"
            raise UsageError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {name} is not set", hint=hint)
    if not 0 < _number("MASTER_PORT", 0) < 2**16:
        raise UsageError(
            f"MASTER_PORT is {os.environ['MASTER_PORT'][:40]!r} in the environment", hint="use a number from 1 to 65535"
        )
    _number("MASTER_PORT", 0)
    found = Launch(
        rank=_number("RANK", 0),
        size=_number("WORLD_SIZE", 1),
        local_rank=_number("LOCAL_RANK", 0),
        local_size=_number("LOCAL_WORLD_SIZE", 1),
        num_restarts=_number("TORCHELASTIC_RESTART_COUNT", 0),
    )
    if found.rank >= found.size:
        raise UsageError(
            f"RANK is {found.rank}, but WORLD_SIZE is {found.size}", hint="start the command with torchrun"
        )
    return found


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdecimal()):
        raise UsageError(f"{name} is {text[:40]!r} in the environment", hint="torchrun sets it to a number")
    return int(text)


def require_one_process(what: str) -> None:
    """Reject a call that torchrun has started several times, if it includes a compilation, which is not distributed.

    Args:
        what: the command or function.

    Raises:
        UsageError: naming the two commands to use instead.
    """
    size = launch().size
    if size > 1:
        raise UsageError(
            f"{what} runs in one process, but torchrun has started {size}",
            hint="use seqbuild compile in one process, then torchrun --nproc-per-node N -m runtime calibrate",
        )


def is_first() -> bool:
    """Whether this process is the one that prints; also if the environment is invalid, which it reports."""
    return os.environ.get("RANK", "0") in ("", "0") or os.environ.get("WORLD_SIZE", "1") in ("", "1")


def is_broken() -> bool:
    """Whether this process has left a group after a failure, so that a thread may wait for a message without end."""
    return _is_broken[0]


def device_name(name: str) -> str:
    """The device of this worker: `cuda`, or `auto` where CUDA is available, is the device with the local rank.

    Raises:
        UsageError: when workers would share a device.
    """
    place = launch()
    if place.size == 1:
        return name
    import torch

    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return f"cuda:{place.local_rank}"
    if name.startswith("xpu") or (name.startswith("cuda:") and place.local_size > 1):
        what = f"{place.local_size} workers of this machine cannot share the device {name}"
        what = what if name.startswith("cuda") else f"{name} is not supported with several workers"
        raise UsageError(what, hint="use --device cuda, which gives each worker one device, or cpu")
    return name


def current() -> Workers:
    """The workers of this process: those of `started`, or of a process group that the caller has initialized.

    Every process must call it at the same point.

    Raises:
        UsageError: when torchrun has started several processes, and they have no process group.
    """
    if _STARTED:
        return _STARTED[0]
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        if "TORCHELASTIC_RUN_ID" in os.environ and launch().size > 1:
            problem = f"torchrun has started {launch().size} processes, but this program has not connected them"
            raise UsageError(problem, hint="call torch.distributed.init_process_group() first, or use one process")
        return Alone()
    if dist.get_world_size() == 1:
        return Alone()
    from runtime.workers.torch_group import TorchGroup

    on_cpu = None if "cpu:gloo" in dist.get_backend_config() else dist.new_group(backend="gloo")
    return TorchGroup(dist.get_rank(), dist.get_world_size(), DEFAULT_TIMEOUT_S, on_cpu)


def tell_torchrun(line: str) -> None:
    """Give torchrun the error message of this worker, for the summary that it prints when all have ended."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    facts = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
    with contextlib.suppress(OSError):  # the message has been printed
        Path(path).write_text(json.dumps({"message": facts}))


@contextlib.contextmanager
def started(device: torch.device, timeout_s: float = DEFAULT_TIMEOUT_S) -> Iterator[Workers]:
    """Form the group of the processes that torchrun has started, and end it after the block.

    When the block fails on one worker, the others are told, and their blocks end with a WorkerError. A process should
    end soon after that: it ignores SIGTERM, SIGHUP and Ctrl-C from then on.

    Args:
        device: of this worker.
        timeout_s: the longest time that a worker waits for another.

    Raises:
        WorkerError: when another worker is missing, fails, dies or does not respond.
    """
    place = launch()
    if place.size == 1:
        yield Alone()
        return
    from runtime.workers.torch_group import TorchGroup

    _require_interfaces()
    _num_groups[0] += 1
    group = TorchGroup(place.rank, place.size, timeout_s)
    _STARTED.append(group)
    try:
        _form(group, place, device, timeout_s)
        yield group
        _end(group)
    except BaseException as error:
        _is_broken[0] = True
        _ignore_signals()
        _tell_others(group.watch, error)
        raise
    finally:
        _STARTED.remove(group)
        if group.watch is not None:
            group.watch.close()


def _end(group: TorchGroup) -> None:
    """Leave the group, when all workers have received their last message."""
    import torch.distributed as dist

    assert group.watch is not None
    group.watch.is_ending = True
    group.exchange(None)
    group.watch.close()
    group.close()
    dist.destroy_process_group()


def _tell_others(watch: Watch | None, error: BaseException) -> None:
    """Report the error of this worker to the others.

    Raises:
        WorkerError: when torchrun has ended this worker, because another one has failed.
    """
    if watch is None:
        return
    watch.refresh()
    is_ended = isinstance(error, (KeyboardInterrupt, SystemExit))
    if is_ended and watch.failure is not None and not watch.failure.is_interrupt:
        raise watch.error() from None
    watch.report(error)


def _ignore_signals() -> None:
    """Let nothing interrupt the end of a process that has failed."""
    if threading.current_thread() is threading.main_thread():
        for name in SIGNALS.values():
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)


def _form(group: TorchGroup, place: Launch, device: torch.device, timeout_s: float) -> None:
    """Wait until all workers have started, watch them, and connect them."""
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    from runtime.workers.watch import Watch

    is_cuda = device.type == "cuda"
    limit = timedelta(seconds=timeout_s + 60)  # `TorchGroup` ends the waiting earlier

    def connect() -> tuple[Any, Any]:
        return _store(place, limit, is_server=place.rank == 0), _store(place, limit, is_server=False)

    def initialize() -> None:
        if is_cuda:
            torch.cuda.set_device(device)  # of this thread
        backend, fixed = ("cpu:gloo,cuda:nccl", device) if is_cuda else ("gloo", None)
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.size, timeout=limit, device_id=fixed
        )

    if is_cuda:
        torch.cuda.set_device(device)
        # A worker ends with one line when another one fails; NCCL would abort the process.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    group.step = "the start"
    try:
        store, watched = group.call(connect, [0])
    except WorkerError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        hint = "check MASTER_ADDR, MASTER_PORT and the network between the nodes"
        raise WorkerError(f"cannot reach the first node at {address}: {error}", hint=hint, is_resumable=True) from None
    name, peers = _roll(watched, place, device, timeout_s)
    store, watched = PrefixStore(name, store), PrefixStore(name, watched)
    group.watch = Watch(watched, place.rank, peers, timeout_s, lambda: (group.step, group.num_messages))
    group.call(initialize, [other for other in range(place.size) if other != place.rank])
    group.step = "the preparation"


def _require_interfaces() -> None:
    """Require that the network interfaces for gloo exist on this machine; gloo's own error does not name them."""
    names = os.environ.get("GLOO_SOCKET_IFNAME", "")
    known = [name for _, name in socket.if_nameindex()]
    for name in names.split(",") if names else []:
        if name not in known:
            raise UsageError(
                f"GLOO_SOCKET_IFNAME is {names[:100]!r}, but this machine has no network interface {name[:40]!r}",
                hint=f"use one of {', '.join(known[:10])}, or unset it",
            )


def _store(place: Launch, limit: timedelta, *, is_server: bool) -> Any:
    """Connect to the store; torchrun has one, otherwise the first worker creates it."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    store = TCPStore(
        os.environ["MASTER_ADDR"],
        _number("MASTER_PORT", 0),
        is_master=is_server and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=limit,
        wait_for_workers=False,
        multi_tenant=True,
    )
    return PrefixStore(f"seqbuild/{_num_groups[0]}", store)


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """Report a store that does not answer: the worker that has it was ended before it could say why."""
    try:
        yield
    except RuntimeError as error:
        problem = str(error).partition("\n")[0][:200]
        text = f"worker 0 has ended or cannot be reached: its store does not answer: {problem}"
        raise WorkerError(text, is_resumable=True) from None


@_answering()
def _roll(store: Any, place: Launch, device: torch.device, timeout_s: float) -> tuple[str, list[Peer]]:
    """Announce this worker, and wait until all have; return the name of this start, and all workers.

    torchrun starts all workers again after a failure, with the same store, so that it has announcements of earlier
    starts, too. So each has a random token, the first worker writes all tokens that it finds, and the others confirm
    them if their own one is among them. The start is complete when all have confirmed the same tokens.

    Raises:
        WorkerError: naming the workers that are missing, or that do not fit to the first one.
    """
    from runtime.workers.watch import Peer

    own = {**asdict(Peer.here()), "version": __version__, "device": device.type, "token": secrets.token_hex(8)}
    keys = [f"worker/{rank}" for rank in range(place.size)]
    store.set(keys[place.rank], json.dumps(own))
    end = time.monotonic() + timeout_s
    tokens: list[str] = []
    while True:
        if place.rank == 0 and store.check(keys):
            tokens = [_announced(store.get(key))["token"] for key in keys]
            store.set("tokens", " ".join(tokens))
        elif store.check(["tokens"]):
            tokens = store.get("tokens")[: 20 * place.size].decode("ascii", "replace").split(" ")
        name = hashlib.sha256(" ".join(tokens).encode()).hexdigest()
        if len(tokens) == place.size and tokens[place.rank] == own["token"]:
            store.set(f"{name}/{place.rank}", "confirmed")
            if store.check([f"{name}/{rank}" for rank in range(place.size)]):
                break
        if time.monotonic() > end:
            raise _missing(store, keys, name, timeout_s)
        time.sleep(_POLL_S)
    found = [_announced(store.get(key)) for key in keys]
    for what in ("version of seqbuild", "device"):
        for rank, facts in enumerate(found):
            first, other = found[0][what.split()[0]], facts[what.split()[0]]
            if other != first:
                raise WorkerError(
                    f"worker {rank} on {facts['host']} has another {what} than worker 0 on {found[0]['host']}: "
                    f"{other} instead of {first}",
                    hint="use the same on all nodes",
                )
    return name, [Peer(host=facts["host"], pid=int(facts["pid"]), machine=facts["machine"]) for facts in found]


def _missing(store: Any, keys: Sequence[str], name: str, timeout_s: float) -> WorkerError:
    """The error for workers that have not started."""
    missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
    missing = missing or [rank for rank in range(len(keys)) if not store.check([f"{name}/{rank}"])]
    names = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
    return WorkerError(
        f"{len(missing)} of {len(keys)} workers have not started within {timeout_s:.0f} s: {names}",
        hint="run the same torchrun command on every node, or raise --worker-timeout",
        is_resumable=True,
    )


def _announced(data: bytes) -> dict[str, str]:
    """Read the announcement of a worker."""
    try:
        found = json.loads(data[:_LIMIT_BYTES])
        names = ("host", "machine", "version", "device", "token")
        return {**{name: printable(str(found[name])[:300]) for name in names}, "pid": str(int(found["pid"]))}
    except (KeyError, TypeError, ValueError, RecursionError):
        raise WorkerError("a worker of another program or version takes part in this run") from None
