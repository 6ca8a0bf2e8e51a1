"""The values between subgraphs: one set of named values a batch, each where there is room for it.

Values stay on the device while its budget lasts, then go to host memory (pinned, where the device is a GPU), then to
disk. Where a value is does not change while it lives: every pass visits every batch once, so moving values about would
gain nothing. A value that outlives the next subgraph and is equal for all batches, such as a mask or a rotary table, is
stored once. Nothing here changes a bit, nor the order in which a tensor lies in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from runtime.console import parse_bytes
from runtime.errors import UsageError
from runtime.host.streams import SideStream
from runtime.streaming.disk_tensor import DiskTensor

_T = TypeVar("_T")

DEVICE, HOST, DISK = "device", "host", "disk"
TIERS = (DEVICE, HOST, DISK)


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """How many bytes values may take on the device and in host memory; None for as many as there are."""

    device_bytes: int | None = 0
    host_bytes: int | None = None

    @classmethod
    def parse(cls, text: str, option: str = "--activation-memory") -> Budget:
        """Read `16GiB`, which is host memory, or `device=4GiB,host=16GiB`.

        Raises:
            UsageError: when it is neither.
        """
        limits: dict[str, int] = {}
        for part in text.split(","):
            tier, _, size = part.rpartition("=")
            tier = tier.strip() or HOST
            if tier not in (DEVICE, HOST) or tier in limits:
                raise UsageError(f"{option} is {text!r}", hint="write 16GiB, or device=4GiB,host=16GiB")
            limits[tier] = parse_bytes(size, option=option)
        return cls(device_bytes=limits.get(DEVICE, 0), host_bytes=limits.get(HOST))

    @classmethod
    def default(cls, device: torch.device) -> Budget:
        """A quarter of what a GPU has free, then host memory without limit."""
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        return cls(device_bytes=free // 4)


@dataclass(kw_only=True, slots=True)
class Held:
    """A tensor at rest.

    Attributes:
        tier: where it is.
        base: it, without what expanding repeats; None on disk.
        file: where it is on disk.
        shape: of the whole tensor.
        num_bytes: what the base takes.
        users: how many batches have it.
        ready: when a GPU has finished to write it.
    """

    tier: str
    base: torch.Tensor | None
    shape: torch.Size
    num_bytes: int
    file: DiskTensor | None = None
    users: int = 1
    ready: Any = None


class Activations:
    """Named values of each batch.

    Args:
        batches: the model's inputs, one mapping a batch, on the CPU; they are not copied.
        device: where subgraphs run.
        budget: what values may take.
        folder: where values go that there is no memory for; by default a temporary directory.
        lasting: names of values that outlive the next subgraph: only those are compared across batches.
    """

    def __init__(
        self,
        batches: Sequence[Mapping[str, Any]],
        device: torch.device,
        budget: Budget | None = None,
        folder: Path | None = None,
        lasting: Collection[str] = (),
    ) -> None:
        self.device = device
        self.budget = budget or Budget.default(device)
        self.lasting = lasting
        self.used_bytes = dict.fromkeys(TIERS, 0)
        self._folder = folder
        self._own_folder: tempfile.TemporaryDirectory[str] | None = None
        self._num_files = 0
        self._thread: ThreadPoolExecutor | None = None
        self._side = SideStream(device)
        self._values: list[dict[str, Any]] = [
            map_tensors(lambda tensor: Held(tier=HOST, base=tensor, shape=tensor.shape, num_bytes=0), dict(batch))
            for batch in batches
        ]

    def __len__(self) -> int:
        return len(self._values)

    def close(self) -> None:
        """Free everything."""
        for batch in range(len(self)):
            self.drop(batch, tuple(self._values[batch]))
        if self._thread is not None:
            self._thread.shutdown()
        if self._own_folder is not None:
            self._own_folder.cleanup()

    def stream(self, names: Iterable[str], *, private: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every batch with some of its values, on the device; the next batch is fetched while one is worked on.

        Args:
            names: which values.
            private: hand out copies, for code that may work in place on what will be needed again.
        """
        names = tuple(names)
        is_at_hand = not self._side.is_real and not self.used_bytes[DISK]
        if is_at_hand or len(self) < 2:
            yield from ((batch, self.fetch(batch, names, private=private)) for batch in range(len(self)))
            return
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="activations")
        pending = self._thread.submit(self._fetch_ahead, 0, names, private)
        for batch in range(len(self)):
            values, mark = pending.result()
            if batch + 1 < len(self):
                pending = self._thread.submit(self._fetch_ahead, batch + 1, names, private)
            self._side.wait_for(mark)
            map_tensors(self._side.lend, values)
            yield batch, values

    def fetch(self, batch: int, names: Iterable[str], *, private: bool = False) -> dict[str, Any]:
        """Some values of a batch, on the device; see `stream`."""
        return {name: map_held(lambda held: self._take(held, private), self._values[batch][name]) for name in names}

    def store(self, batch: int, values: Mapping[str, Any]) -> None:
        """Keep what a subgraph returned."""
        for name, value in values.items():
            if name in self._values[batch]:
                self.drop(batch, (name,))
            twin = self._values[batch - 1].get(name) if batch and name in self.lasting else None
            if isinstance(twin, Held) and isinstance(value, torch.Tensor) and self._is_equal(twin, value):
                twin.users += 1
                self._values[batch][name] = twin
            else:
                self._values[batch][name] = map_tensors(self.hold, value)

    def drop(self, batch: int, names: Iterable[str]) -> None:
        """Free values that nobody will ask for again."""
        for name in names:
            map_held(self._release, self._values[batch].pop(name))

    def values(self, batch: int) -> Mapping[str, Any]:
        """What is stored of a batch, with a `Held` in the place of each tensor."""
        return self._values[batch]

    def restore(self, batch: int, values: Mapping[str, Any]) -> None:
        """Replace all that is stored of a batch."""
        self.drop(batch, tuple(self._values[batch]))
        self._values[batch] = dict(values)

    def base(self, held: Held) -> torch.Tensor:
        """A stored tensor without its expansion, wherever it is."""
        if held.file is not None:
            return held.file.read()
        assert held.base is not None, "a tensor that was freed is asked for"
        return held.base

    def hold(self, tensor: torch.Tensor) -> Held:
        """Put a tensor where there is room for it."""
        base = _compact(tensor.detach())
        num_bytes = base.numel() * base.element_size()
        tier = self._tier_for(num_bytes)
        held = Held(tier=tier, base=base, shape=tensor.shape, num_bytes=num_bytes)
        self.used_bytes[tier] += num_bytes
        if tier == DISK:
            held.file, held.base = DiskTensor.write(self._new_file(), base.cpu()), None
        elif self._side.is_real:
            if tier == HOST:
                pinned = torch.empty_like(base, device="cpu", pin_memory=True)
                held.base = pinned.copy_(base, non_blocking=True)
            else:
                held.base = base.to(self.device)
            held.ready = self._side.mark()
        return held

    def _new_file(self) -> Path:
        if self._folder is None:
            self._own_folder = tempfile.TemporaryDirectory(prefix="activations-")
            self._folder = Path(self._own_folder.name)
        self._num_files += 1
        return self._folder / f"{self._num_files}.bin"

    def _tier_for(self, num_bytes: int) -> str:
        limits = {DEVICE: self.budget.device_bytes, HOST: self.budget.host_bytes}
        if self.device.type == "cpu":
            del limits[DEVICE]
        rooms = (tier for tier, limit in limits.items() if limit is None or self.used_bytes[tier] + num_bytes <= limit)
        return next(rooms, DISK)

    def _take(self, held: Held, private: bool) -> torch.Tensor:
        self._side.wait_for(held.ready)
        base = self.base(held)
        moved = base.to(self.device, non_blocking=True)
        # An expanded tensor cannot be written in place, and a moved one is a copy already.
        if moved is base and held.file is None and moved.shape == held.shape and (private or held.users > 1):
            moved = moved.clone()
        return moved.expand(held.shape)

    def _fetch_ahead(self, batch: int, names: tuple[str, ...], private: bool) -> tuple[dict[str, Any], Any]:
        with torch.no_grad(), self._side.active():
            return self.fetch(batch, names, private=private), self._side.mark()

    def _is_equal(self, held: Held, tensor: torch.Tensor) -> bool:
        base = _compact(tensor.detach())
        other = self.base(held)
        if (held.shape, other.shape, other.dtype) != (tensor.shape, base.shape, base.dtype):
            return False
        if held.ready is not None:
            held.ready.synchronize()
        return other.stride() == base.stride() and torch.equal(other, base.to(other.device))

    def _release(self, held: Held) -> None:
        held.users -= 1
        if not held.users:
            self.used_bytes[held.tier] -= held.num_bytes
            held.base = None
            if held.file is not None:
                held.file.path.unlink(missing_ok=True)


def map_tensors(function: Callable[[torch.Tensor], Any], value: _T) -> _T:
    """The same nest of containers with something else in the place of every tensor: store, move and pin are this."""
    mapped: _T = pytree.tree_map_only(torch.Tensor, function, value)
    return mapped


def map_held(function: Callable[[Held], Any], value: _T) -> _T:
    """Likewise for tensors at rest."""
    mapped: _T = pytree.tree_map_only(Held, function, value)
    return mapped


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without what expanding repeats, and without memory that it does not show."""
    base = tensor
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            base = base.narrow(dim, 0, 1)
    is_whole = base.untyped_storage().nbytes() <= base.numel() * base.element_size()
    return base if is_whole else base.clone()
