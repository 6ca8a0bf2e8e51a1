"""A view of a checkpoint whose tensors are rotated when they are read, so that a run has one consistent model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from runtime.algorithms.rotation import Rotation, rotate_
from runtime.checkpoint.dtypes import DTYPES, dtype_name
from runtime.checkpoint.stored import Stored
from runtime.checkpoint.view import Derived, DerivedCheckpoint
from runtime.errors import RecipeError, WeightsError

if TYPE_CHECKING:
    from runtime.artifact.manifest import ExpertStack
    from runtime.artifact.rotation_table import FoldedNorm
    from runtime.checkpoint.reader import Checkpoint
    from runtime.weights.parameters import Weights

_TIED = "tie_word_embeddings"
_FLOATS = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A rotation of a parameter along one of its axes.

    Attributes:
        axis: the axis.
        rotation: the matrix.
        starts: see `rotate_`.
        norm: the norm whose gain multiplies before, or None.
    """

    axis: int
    rotation: Rotation
    starts: tuple[int, ...] | None = None
    norm: FoldedNorm | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RotatedModel:
    """What rotations change in a model.

    Attributes:
        turns: the rotations of each parameter.
        norms: the norms whose gains readers take over, by the names of their weights, with the rotation of the space.
        untied: names of parameters that get a tensor of their own, because the one they share is rotated differently.
        remarks: messages to print before the run.
        spaces: a name for each space, for messages.
        half: some parameters with fewer rotations, which must change what the model computes; see `rotation_proof`.
    """

    turns: Mapping[str, tuple[Turn, ...]]
    norms: Mapping[str, tuple[FoldedNorm, Rotation]]
    untied: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    spaces: tuple[str, ...] = ()
    half: Mapping[str, tuple[Turn, ...]] = field(default_factory=dict)

    @property
    def changed(self) -> list[str]:
        """The names of all parameters that differ from those of the checkpoint."""
        biases = [norm.bias for norm, _ in self.norms.values() if norm.bias]
        return [*self.turns, *self.norms, *biases]


class RotatedCheckpoint(DerivedCheckpoint):
    """A checkpoint with rotated tensors.

    Args:
        weights: the original parameters.
        model: what is changed.
        precise: return float64 without rounding to the dtype of the checkpoint.

    Raises:
        RecipeError: for a parameter that is not stored in a form that can be rotated.
    """

    def __init__(self, weights: Weights, model: RotatedModel, *, precise: bool = False) -> None:
        self._inner, self._weights, self._precise = weights.checkpoint, weights, precise
        self._gains: dict[str, torch.Tensor] = {}
        self._needed: dict[str, tuple[str, ...]] = {}
        self._computed: dict[str, int] = {}
        self.untied = tuple(name for name in model.untied if not self._stays_tied(name, model))
        self._gains.clear()  # so that the run reads what its plan says
        tensors: dict[str, Derived] = {}
        made_by: dict[str, tuple[Turn, ...]] = {}
        for name in model.turns:
            for key, source, own in self._turned(name, model):
                if made_by.setdefault(key, own) != own:
                    raise RecipeError(f"{name} shares {key} with a parameter that is rotated in another way")
                tensors[key] = self._rotated(key, source, own)
        for norm, rotation in model.norms.values():
            tensors[self._key(norm.weight)] = self._ones(norm)
            if norm.bias:
                tensors[self._key(norm.bias)] = self._shift(norm, rotation)
        super().__init__(self._inner, tensors, config=self._config() if self.untied else None)

    def _config(self) -> dict[str, Any]:
        """The config for readers: parameters that were shared are loaded separately."""
        compiled: bytes = self._weights.artifact.companions.get("config.json", b"{}")
        return _untied(self._inner.config or json.loads(compiled))

    def source_bytes(self, key: str) -> int:
        """The bytes on disk that a tensor is derived from; gains count where the norm itself is read."""
        return self.inner.source_bytes(self._needed[key][0] if key in self._needed else key)

    def computed(self, key: str) -> int:
        """The numbers of a tensor that are rotated, once for each rotation."""
        return self._computed.get(key, 0)

    def sample(self, key: str, count: int) -> bytes:
        """Return a few bytes of the tensors that a tensor is derived from."""
        return b"".join(self.inner.sample(source, count) for source in self._needed.get(key, (key,)))

    def looked_at(self, key: str) -> Iterator[torch.Tensor]:
        """Yield the numbers of the original tensor; nothing for a tensor that the checkpoint does not have."""
        return self.inner.looked_at(key) if key in self.inner else iter(())

    def announce(self, keys: Iterable[str]) -> None:
        """Ask for the sources of tensors to be read into the page cache."""
        self.inner.announce(dict.fromkeys(self._needed[key][0] if key in self._needed else key for key in keys))

    def _key(self, name: str) -> str:
        key = self._weights.plain_key(name)
        if key is None:
            raise RecipeError(
                f"{name} is made from several tensors of {self._inner.directory} and cannot be rotated",
                hint="remove the rotation, or convert the checkpoint",
            )
        return key

    def _stays_tied(self, name: str, model: RotatedModel) -> bool:
        """Whether a tensor can stay shared: if the gain that this parameter takes over is one."""
        owner = self._weights.artifact.manifest.parameters[name].tied_to
        if not owner or self._weights.plain_key(name) != self._weights.plain_key(owner):
            return False
        norms = [turn.norm for turn in model.turns[name] if turn.norm is not None]
        return all(bool((self._gain(norm) == 1).all()) for norm in norms)

    def _turned(self, name: str, model: RotatedModel) -> Iterator[tuple[str, str, tuple[Turn, ...]]]:
        """Yield each tensor that a parameter is made from: its name in the view, its source, and its rotations."""
        turns = model.turns[name]
        if name in self.untied:
            owner = self._weights.artifact.manifest.parameters[name].tied_to
            is_shared = bool(owner) and self._weights.plain_key(owner) == self._key(name)
            yield name if is_shared else self._key(name), self._key(name), turns
        elif name in model.untied:
            yield self._key(name), self._key(name), tuple(replace(turn, norm=None) for turn in turns)
        elif self._weights.plain_key(name) is not None:
            yield self._key(name), self._key(name), turns
        else:
            stack = self._stack(name)
            if stack is None:
                self._key(name)  # raises
                return
            own = tuple(_of_part(turn, stack, name) for turn in turns)
            for key in self._weights.origins[name].keys:
                yield key, key, own

    def _stack(self, name: str) -> ExpertStack | None:
        """The layout of a stacked parameter whose parts the checkpoint stores one by one."""
        manifest = self._weights.artifact.manifest
        for owner, place in manifest.mixtures.items():
            layout = manifest.expert_layouts[place.layout]
            if name.startswith(f"{owner}.") and layout.is_named:
                own = name.removeprefix(f"{owner}.")
                return next((stack for stack in layout.stacks if stack.name == own), None)
        return None

    def _rotated(self, key: str, source: str, turns: tuple[Turn, ...]) -> Derived:
        stored = self._stored(key, source)
        gains = [self._key(turn.norm.weight) for turn in turns if turn.norm is not None]
        self._needed[key] = (source, *gains)
        self._computed[key] = len(turns) * math.prod(stored.shape)
        is_stack = len(stored.shape) == 3 and all(turn.axis for turn in turns)

        def make(checkpoint: Checkpoint, index: int | None) -> torch.Tensor:
            value = checkpoint.read(source) if index is None else checkpoint.read_part(source, index)
            dtype = value.dtype
            if self._precise or len(turns) > 1:
                value = value.double()
            for turn in turns:
                scale = self._gain(turn.norm) if turn.norm is not None else None
                axis = turn.axis if index is None else turn.axis - 1
                if scale is not None and scale.numel() != value.shape[axis]:
                    raise WeightsError(f"{source} and the gain {gains[0]} differ in size")
                rotate_(value, axis, turn.rotation, starts=turn.starts, scale=scale)
            return value if self._precise else value.to(dtype)

        return Derived(stored=stored, sources=(source,), make=make, is_stack=is_stack)

    def _stored(self, key: str, source: str) -> Stored:
        stored = self._inner.stored(source)
        if stored.dtype not in _FLOATS:
            raise RecipeError(
                f"{source} of {self._inner.directory} has the dtype {stored.dtype}, which cannot be rotated",
                hint=f"the dtypes {', '.join(_FLOATS)} can be",
            )
        return Stored(key, dtype_name(torch.float64) if self._precise else stored.dtype, stored.shape)

    def _gain(self, norm: FoldedNorm) -> torch.Tensor:
        """What a norm multiplies by, in float64; read once."""
        if norm.weight not in self._gains:
            self._gains[norm.weight] = self._inner.read(self._key(norm.weight)).double() + norm.offset
        return self._gains[norm.weight]

    def _ones(self, norm: FoldedNorm) -> Derived:
        key = self._key(norm.weight)
        self._needed[key] = (key,)
        stored = self._stored(key, key)

        def make(checkpoint: Checkpoint, index: int | None) -> torch.Tensor:
            ones = torch.full_like(self._gain(norm), 1 - norm.offset).to(DTYPES[stored.dtype])
            return ones if index is None else ones[index]

        return Derived(stored=stored, sources=(key,), make=make)

    def _shift(self, norm: FoldedNorm, rotation: Rotation) -> Derived:
        """The bias of a norm whose gain is one: its readers multiply by the gain, and so does the bias no longer."""
        key = self._key(norm.bias)
        self._needed[key] = (key, self._key(norm.weight))
        stored = self._stored(key, key)

        def make(checkpoint: Checkpoint, index: int | None) -> torch.Tensor:
            gain, bias = self._gain(norm), checkpoint.read(key).double()
            if bool(((gain == 0) & (bias != 0)).any()):
                raise WeightsError(
                    f"{norm.weight} is zero where {norm.bias} is not, so its gain cannot be folded into other weights",
                    hint="remove the rotation R1",
                )
            shift = torch.where(gain == 0, 0.0, bias / gain)
            rotate_(shift, 0, rotation)
            made = shift.to(DTYPES[stored.dtype])
            return made if index is None else made[index]

        return Derived(stored=stored, sources=(key,), make=make)


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config in which neither the model nor its text model shares embeddings; other parts have none."""
    inner = {name: _untied(own) for name, own in config.items() if isinstance(own, dict) and _TIED in own}
    return {**config, **inner, _TIED: False}


def _of_part(turn: Turn, stack: ExpertStack, name: str) -> Turn:
    """The rotation of an expert's own tensor, instead of the stack that it is joined to."""
    axis, num_dims = turn.axis - 1, 1 if stack.parts[0].endswith(".bias") else 2
    if axis == stack.axis and len(stack.parts) > 1:
        raise RecipeError(f"{name} cannot be rotated: its experts' matrices are joined along the channels")
    return replace(turn, axis=1 - axis if stack.is_transposed and num_dims == 2 else axis)
