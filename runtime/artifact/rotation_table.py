"""The rotation spaces of a manifest; see docs/format.md."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RotatedParameter:
    """A parameter and its axis along the channels of a rotation space. `gain` is the weight of the norm that scales
    what the parameter reads; empty without a norm, and for a parameter that writes.
    """

    name: str
    axis: int
    gain: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldedNorm:
    """A norm whose gain the readers of a rotation space take over: its weight, to which the model adds `offset`, and
    its bias, or "".
    """

    weight: str
    bias: str = ""
    offset: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RotationSpace:
    """Channels that one orthogonal matrix may rotate without changing the model.

    `rotation` is `R1` for a residual stream, `R2` for values that attention sums over tokens. The matrix has `block`
    rows. It rotates the `block` channels from each of `starts` on of what `writers` compute, and every `block`
    consecutive channels of what `readers` multiply. If `keeps_mean`, it must not change the mean of the channels, which
    a norm subtracts.
    """

    rotation: str
    block: int
    starts: tuple[int, ...]
    writers: tuple[RotatedParameter, ...]
    readers: tuple[RotatedParameter, ...]
    norms: tuple[FoldedNorm, ...] = ()
    keeps_mean: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RotationTable:
    """The rotation spaces of a model. `untied` lists parameters that need a tensor of their own when they are rotated,
    and `missing` states for each rotation why the model has no such space, or why one of them cannot be rotated.
    """

    spaces: tuple[RotationSpace, ...]
    untied: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
