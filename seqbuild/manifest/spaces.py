"""Spaces of channels that an orthogonal matrix may rotate, and the parameters that write and read them.

A space has the output channels of a parameter: of a Linear module, of an embedding, of a mixture's experts. Values that
are added to each other share one space. Operations restrict what may be rotated together: channels that never meet in
one vector belong to different blocks, and channels that an operation treats one by one have escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from seqbuild.manifest.channels import FREE


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """The parameters of a norm that multiply (`weight` plus `offset`) and shift (`bias`) a normalized vector."""

    weight: str
    offset: int = 0
    bias: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpaceWriter:
    """A parameter whose `axis` is along a space's channels: what it computes, or looks up, is a value of the space."""

    name: str
    axis: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SpaceReader:
    """A parameter that multiplies a value of a space along an axis.

    Attributes:
        name: the parameter.
        axis: its axis along the value's channels.
        channels: the space's channel for each index along that axis.
        gain: what has scaled the value before.
    """

    name: str
    axis: int
    channels: tuple[int, ...]
    gain: Gain | None


@dataclass(kw_only=True, eq=False)
class Space:
    """Channels of values that are rotated together; joined spaces refer to one of them, see `root`.

    Attributes:
        size: the number of channels, C.
        writers: the parameters that compute them.
        readings: their uses by other parameters.
        gains: of norms on the way.
        labels: [C], equal for channels of one block.
        escaped: [C], whether an operation treats a channel by itself.
        summed: [C], whether the channel was summed over tokens, as values of attention are.
        is_sum: whether values of several parameters were added.
        keeps_mean: whether a norm subtracts the mean, so that the matrix must not change it.
        reason: the first operation that treats a channel by itself.
        is_used: whether anything has happened to it since it was written.
    """

    size: int
    writers: list[SpaceWriter] = field(default_factory=list)
    readings: list[SpaceReader] = field(default_factory=list)
    gains: list[Gain] = field(default_factory=list)
    labels: torch.Tensor
    escaped: torch.Tensor
    summed: torch.Tensor
    is_sum: bool = False
    keeps_mean: bool = False
    reason: str = ""
    is_used: bool = False
    _joined: Space | None = None

    @classmethod
    def of(cls, size: int, *writers: SpaceWriter) -> Space:
        """Return a new space that these parameters write."""
        labels = torch.zeros(size, dtype=torch.int64)
        return cls(size=size, writers=list(writers), labels=labels, escaped=labels.bool(), summed=labels.bool())

    @property
    def root(self) -> Space:
        """The space that all joined ones refer to."""
        space = self
        while space._joined is not None:
            space = space._joined
        return space

    def join(self, other: Space) -> None:
        """Make one space of two whose values are added."""
        one, two = self.root, other.root
        one.is_sum = one.is_used = True
        if one is two:
            return
        one.labels = _refined(one.labels, two.labels)
        one.escaped, one.summed = one.escaped | two.escaped, one.summed | two.summed
        one.keeps_mean |= two.keeps_mean
        one.reason = one.reason or two.reason
        one.writers += two.writers
        one.readings += two.readings
        one.gains += two.gains
        two._joined = one

    def escape(self, channels: torch.Tensor, reason: str) -> None:
        """Exclude channels from rotation."""
        root = self.root
        root.is_used = True
        root.escaped[channels] = True
        root.reason = root.reason or reason

    def restrict(self, rows: torch.Tensor) -> None:
        """Allow only matrices that act inside of each of these vectors of channels, [N, L]."""
        root = self.root
        root.is_used = True
        for row in rows:
            found = row[row != FREE].long()
            if len(found) == root.size or not len(found):
                continue
            is_inside = torch.zeros_like(root.labels)
            is_inside[found] = 1
            root.labels = _refined(root.labels, is_inside)

    def blocks(self) -> list[list[int]]:
        """The channels of each block, in ascending order, without those of which a channel has escaped."""
        root = self.root
        found: dict[int, list[int]] = {}
        for channel, label in enumerate(root.labels.tolist()):
            found.setdefault(label, []).append(channel)
        escaped = {label for label, is_out in zip(root.labels.tolist(), root.escaped.tolist(), strict=True) if is_out}
        return [channels for label, channels in found.items() if label not in escaped]


@dataclass(frozen=True, kw_only=True, slots=True)
class Vectors:
    """Values of a space.

    Attributes:
        space: the space.
        channels: its channel for each number, in the shape of the value; FREE for zeros.
        gain: what has scaled them since they were normalized.
        is_square: whether each number was squared.
    """

    space: Space
    channels: torch.Tensor
    gain: Gain | None = None
    is_square: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the value may be added to others of its space."""
        return self.gain is None and not self.is_square

    @property
    def rows(self) -> torch.Tensor:
        """The different vectors of channels, [N, L]."""
        channels = self.channels
        for axis, stride in enumerate(channels.stride()[:-1]):
            if stride == 0:  # repetitions that take no memory
                channels = channels.narrow(axis, 0, min(1, channels.shape[axis]))
        flat = channels.reshape(-1, channels.shape[-1])
        return flat if len(flat) == 1 else torch.unique(flat, dim=0)

    @property
    def seen(self) -> torch.Tensor:
        """The channels that occur, each once."""
        found: torch.Tensor = torch.unique(self.rows)
        return found[found != FREE].long()

    @property
    def row(self) -> torch.Tensor | None:
        """The channels of every vector, [L]; None if they differ or are not all of some channel."""
        rows = self.rows
        return rows[0] if len(rows) == 1 and not bool((rows == FREE).any()) else None

    @property
    def is_whole(self) -> bool:
        """Whether every vector consists of all channels in order."""
        row = self.row
        return row is not None and torch.equal(row, torch.arange(self.space.size, dtype=row.dtype))

    def spread(self, size: Sequence[int]) -> Vectors:
        """Return them in another shape, which every vector of is the same."""
        row = self.row
        assert row is not None, "the vectors differ"
        return replace(self, channels=row.expand(tuple(size)))


def _refined(labels: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return labels that are equal where both are."""
    pairs = labels * (int(others.max()) + 1) + others
    found: torch.Tensor = torch.unique(pairs, return_inverse=True)[1]
    return found
