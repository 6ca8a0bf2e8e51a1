"""The activations between subgraphs: named values for each batch, on the device, in host memory or on disk.

Values stay on the device while its budget lasts, then go to host memory (pinned if the device is a GPU), then to disk.
A value never moves: every pass visits every batch once, so moving values would gain nothing. A value that outlives the
next subgraph and is equal for all batches, such as a mask or a rotary table, is stored once. Values come back with the
same bits and strides.

A run may carry the values of the original model beside those of the quantized one. They are further batches here, with
the same budget, and exist from the first quantized step on; before it the values of both models are the same.
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
from runtime.streaming.disk_tensor import DiskTensor, memory_order, write_tensors

_T = TypeVar("_T")

DEVICE, HOST, DISK = "device", "host", "disk"
TIERS = (DEVICE, HOST, DISK)


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """The bytes that values may take on the device and in host memory; None for no bound."""

    device_bytes: int | None = 0
    host_bytes: int | None = None

    @classmethod
    def parse(cls, text: str, option: str = "--activation-memory") -> Budget:
        """Parse `16GiB`, which is host memory, or `device=4GiB,host=16GiB`.

        Raises:
            UsageError: for any other text.
        """
        limits: dict[str, int] = {}
        for part in text.split(","):
            tier, _, size = part.rpartition("=")
            tier = tier.strip() or HOST
            if tier not in (DEVICE, HOST) or tier in limits:
                raise UsageError(f"{option} must be like 16GiB or device=4GiB,host=16GiB; got {text!r}")
            limits[tier] = parse_bytes(size, option=option)
        return cls(device_bytes=limits.get(DEVICE, 0), host_bytes=limits.get(HOST))

    def share(self, count: int) -> Budget:
        """The budget of each of `count` users of the same memory."""
        limits = (None if limit is None else limit // count for limit in (self.device_bytes, self.host_bytes))
        device_bytes, host_bytes = limits
        return Budget(device_bytes=device_bytes, host_bytes=host_bytes)

    @classmethod
    def default(cls, device: torch.device) -> Budget:
        """A quarter of the free memory of a GPU, then host memory without bound."""
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        return cls(device_bytes=free // 4)


@dataclass(kw_only=True, slots=True)
class Held:
    """A stored tensor.

    Attributes:
        tier: the device, host memory or the disk.
        base: the tensor without expanded dimensions, or its file; None when it is freed.
        shape: of the whole tensor.
        num_bytes: size of the base.
        users: number of batches that share it.
        ready: the event after which a GPU has written it.
    """

    tier: str
    base: torch.Tensor | DiskTensor | None
    shape: torch.Size
    num_bytes: int
    users: int = 1
    ready: Any = None


class Activations:
    """The named values of each batch.

    Args:
        batches: the model's inputs, one mapping a batch, on the CPU; they are not copied.
        device: where subgraphs run.
        budget: the memory that values may take.
        folder: for values beyond the budget; by default a temporary directory.
        lasting: names of values that outlive the next subgraph; only these are compared across batches.
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
        self._num_batches = len(self._values)

    def __len__(self) -> int:
        return self._num_batches

    @property
    def is_split(self) -> bool:
        """Whether the original model has values of its own."""
        return len(self._values) > len(self)

    def original(self, batch: int) -> int:
        """The index of the original model's values of a batch, for all methods that get the index of a batch."""
        return batch + len(self)

    def split(self, without: Collection[str] = ()) -> None:
        """Begin to hold values of the original model: the present ones, shared, but for those of these names."""
        assert not self.is_split, "the values are split already"
        kept = [{name: value for name, value in values.items() if name not in without} for values in self._values]
        map_held(_count_user, kept)
        self._values += kept

    def join(self) -> None:
        """Free the values of the original model."""
        for batch in range(len(self), len(self._values)):
            self.drop(batch, tuple(self._values[batch]))
        del self._values[len(self) :]

    def close(self) -> None:
        """Free all values."""
        self.join()
        for batch in range(len(self)):
            self.drop(batch, tuple(self._values[batch]))
        if self._thread is not None:
            self._thread.shutdown()
        if self._own_folder is not None:
            self._own_folder.cleanup()

    def stream(
        self, names: Iterable[str], *, private: bool = False, of_original: bool = False
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield every batch with some of its values, on the device; the next batch is fetched while one is used.

        Args:
            names: of the values.
            private: copy values, so that in-place operations do not change the stored ones.
            of_original: yield the values of the original model.
        """
        names, first = tuple(names), self.original(0) if of_original else 0
        is_at_hand = not self._side.is_real and not self.used_bytes[DISK]
        if is_at_hand or len(self) < 2:
            yield from ((batch, self.fetch(first + batch, names, private=private)) for batch in range(len(self)))
            return
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="activations")
        pending = self._thread.submit(self._fetch_ahead, first, names, private)
        for batch in range(len(self)):
            values, mark = pending.result()
            if batch + 1 < len(self):
                pending = self._thread.submit(self._fetch_ahead, first + batch + 1, names, private)
            self._side.wait_for(mark)
            map_tensors(self._side.lend, values)
            yield batch, values

    def fetch(self, batch: int, names: Iterable[str], *, private: bool = False) -> dict[str, Any]:
        """Return some values of a batch, on the device; see `stream`."""
        return {name: map_held(lambda held: self._take(held, private), self._values[batch][name]) for name in names}

    def store(self, batch: int, values: Mapping[str, Any]) -> None:
        """Store the outputs of a subgraph."""
        for name, value in values.items():
            if name in self._values[batch]:
                self.drop(batch, (name,))
            twin = self.twin(batch, name)
            if isinstance(value, torch.Tensor):
                self._values[batch][name] = self.hold(value, twin)
            else:
                self._values[batch][name] = map_tensors(self.hold, value)

    def twin(self, batch: int, name: str) -> Held | None:
        """The tensor of the previous batch that a lasting value may share; the first has that of the original model."""
        previous = batch - 1 if batch else self.original(0)
        if name not in self.lasting or not 0 <= previous < len(self._values):
            return None
        value = self._values[previous].get(name)
        return value if isinstance(value, Held) else None

    def drop(self, batch: int, names: Iterable[str]) -> None:
        """Free some values of a batch."""
        for name in names:
            map_held(self._release, self._values[batch].pop(name))

    def keep(self, batch: int, names: Iterable[str]) -> dict[str, Any]:
        """Return some values of a batch that stay stored after they are dropped, until they are released."""
        kept = {name: self._values[batch][name] for name in names}
        map_held(_count_user, kept)
        return kept

    def fetch_kept(self, kept: dict[str, Any], *, private: bool = False) -> dict[str, Any]:
        """Return kept values, on the device; see `stream`."""
        return map_held(lambda held: self._take(held, private), kept)

    def release(self, kept: dict[str, Any]) -> None:
        """Free kept values, unless they are still stored for a batch."""
        map_held(self._release, kept)

    def values(self, batch: int) -> Mapping[str, Any]:
        """The stored values of a batch, with a `Held` for each tensor."""
        return self._values[batch]

    def restore(self, batch: int, values: Mapping[str, Any]) -> None:
        """Replace all values of a batch."""
        self.drop(batch, tuple(self._values[batch]))
        self._values[batch] = dict(values)

    def base(self, held: Held) -> torch.Tensor:
        """The base of a stored tensor, read from disk if it is there, when all of it has arrived."""
        if held.ready is not None:
            held.ready.synchronize()
        return self._stored(held)

    def _stored(self, held: Held) -> torch.Tensor:
        assert held.base is not None, "the tensor was freed"
        return held.base.read() if isinstance(held.base, DiskTensor) else held.base

    def hold(self, tensor: torch.Tensor, twin: Held | None = None) -> Held:
        """Store a tensor in the first tier that has room, or return the twin if that is equal."""
        if twin is not None and self._is_equal(twin, tensor):
            twin.users += 1
            return twin
        base = _compact(tensor.detach())
        num_bytes = base.numel() * base.element_size()
        tier = self._tier_for(num_bytes)
        held = Held(tier=tier, base=base, shape=tensor.shape, num_bytes=num_bytes)
        self.used_bytes[tier] += num_bytes
        if tier == DISK:
            held.base = self._write(base.cpu())
        elif self._side.is_real:
            if tier == HOST:
                held.base = self._side.pinned_like(base)
                self._side.copy_(held.base, base)
            else:
                held.base = base.to(self.device)
            held.ready = self._side.mark()
        return held

    def _write(self, base: torch.Tensor) -> DiskTensor:
        if self._folder is None:
            self._own_folder = tempfile.TemporaryDirectory(prefix="activations-")
            self._folder = Path(self._own_folder.name)
        self._num_files += 1
        file = DiskTensor(self._folder / f"{self._num_files}.safetensors", "value", memory_order(base))
        write_tensors(file.path, {file.key: base.permute(file.order).contiguous()})
        return file

    def _tier_for(self, num_bytes: int) -> str:
        limits = {DEVICE: self.budget.device_bytes, HOST: self.budget.host_bytes}
        if self.device.type == "cpu":
            del limits[DEVICE]
        rooms = (tier for tier, limit in limits.items() if limit is None or self.used_bytes[tier] + num_bytes <= limit)
        return next(rooms, DISK)

    def _take(self, held: Held, private: bool) -> torch.Tensor:
        self._side.wait_for(held.ready)
        base = self._stored(held)
        moved = base.to(self.device, non_blocking=True)
        # Expanded tensors cannot be changed in place, and moved ones are copies already.
        if moved is held.base and moved.shape == held.shape and (private or held.users > 1):
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
        return other.stride() == base.stride() and torch.equal(other, base.to(other.device))

    def _release(self, held: Held) -> None:
        held.users -= 1
        if not held.users:
            self.used_bytes[held.tier] -= held.num_bytes
            if isinstance(held.base, DiskTensor):
                held.base.path.unlink(missing_ok=True)
            held.base = None


def map_tensors(function: Callable[[torch.Tensor], Any], value: _T) -> _T:
    """Apply a function to every tensor of nested containers."""
    mapped: _T = pytree.tree_map_only(torch.Tensor, function, value)
    return mapped


def map_held(function: Callable[[Held], Any], value: _T) -> _T:
    """Apply a function to every stored tensor of nested containers."""
    mapped: _T = pytree.tree_map_only(Held, function, value)
    return mapped


def _count_user(held: Held) -> None:
    held.users += 1


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without expanded dimensions, and without memory that it does not use."""
    base = tensor
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            base = base.narrow(dim, 0, 1)
    is_whole = base.untyped_storage().nbytes() <= base.numel() * base.element_size()
    return base if is_whole else base.clone()
