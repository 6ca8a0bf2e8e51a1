"""The origin of a parameter: the checkpoint tensors it is made from, or what the manifest states of them."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from runtime.checkpoint.dtypes import dtype_name
from runtime.checkpoint.source_formats import stated
from runtime.checkpoint.stored import Stored
from runtime.formats.transforms import ModelTransforms
from runtime.host.regular_files import open_regular

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationScheme

    from runtime.chain import Artifact


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The origin of a parameter in one checkpoint.

    Attributes:
        keys: names of its tensors; empty for a parameter whose default value is in the artifact.
        conversion: index of the program that computes the parameter from them, or -1.
        packed: the scheme of compressed tensors; `keys` then are all tensors of the module.
    """

    keys: tuple[str, ...]
    conversion: int
    packed: QuantizationScheme | None = None


class ParameterSource(Protocol):
    """Where parameters are stored: `Weights` for a checkpoint, `StatedParameters` where there is none yet."""

    transforms: ModelTransforms  # the rotations that are computed while the model runs

    @property
    def origins(self) -> Mapping[str, Origin]:
        """The origin of each parameter."""

    def stored_names(self) -> Iterable[str]:
        """The names of all stored tensors."""

    def stored(self, key: str) -> Stored:
        """Name, dtype and shape of a stored tensor."""

    def source_bytes(self, key: str) -> int:
        """The bytes on disk that a tensor is read from: fewer than of the tensor if it is stored quantized."""

    def computed(self, key: str) -> int:
        """The numbers of a tensor that are computed, in float64, whenever it is read."""

    def plain_key(self, name: str) -> str | None:
        """The stored tensor that equals the parameter, or None if the parameter must be computed."""

    def is_table(self, name: str) -> bool:
        """Whether a parameter is only used to look up rows, and stored as the run uses it."""


def required_key(source: ParameterSource, name: str) -> str:
    """The stored tensor that equals a parameter which was checked to have one."""
    key = source.plain_key(name)
    assert key is not None, f"{name} is not one tensor of the checkpoint"
    return key


def checkpoint_prefix(source: ParameterSource, module: str) -> str:
    """The checkpoint's name of a module that contains others."""
    name = next(name for name in source.origins if name.startswith(f"{module}."))
    key, inner = source.origins[name].keys[0], name.removeprefix(module)
    if source.origins[name].packed is not None:  # the last names of its tensors differ
        key, inner = key.rpartition(".")[0], inner.rpartition(".")[0]
    return key.removesuffix(inner)


_MOST_CONFIG_BYTES = 2**24
_NOT_QUANTIZED = ("lm_head", "embed", "norm", "gate.weight")


def _fp8_of(artifact: Artifact) -> tuple[tuple[int, int] | None, tuple[str, ...]]:
    """The FP8 blocks that the model's config states, and parts of the names of weights that are plain beside them."""
    try:
        with open_regular(artifact.companions_path / "config.json") as file:
            config: Any = json.loads(file.read(_MOST_CONFIG_BYTES))
        entry = stated(config)
        block = entry.get("weight_block_size") if entry.get("quant_method") == "fp8" else None
        if not isinstance(block, list) or not all(isinstance(size, int) and size > 0 for size in block):
            return None, ()
        rows, columns = block
        plain = [name for name in entry.get("modules_to_not_convert") or () if isinstance(name, str) and name]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None, ()  # no such config, or another quantization: weights count as the manifest states them
    return (rows, columns), (*_NOT_QUANTIZED, *plain)


class StatedParameters:
    """The parameters of an artifact as its manifest states them, for a plan without a checkpoint.

    A parameter that is made from several tensors counts as one tensor of its own name.

    Args:
        artifact: the compiled model.
        dtype: of weights and activations in the run.
        changed: parameters that are computed when they are read, and so cannot stay on disk.
        untied: those of them that have a tensor of their own instead of a shared one.
    """

    def __init__(
        self, artifact: Artifact, dtype: torch.dtype, *, changed: Iterable[str] = (), untied: Collection[str] = ()
    ) -> None:
        import torch

        self.transforms = ModelTransforms()
        self._lookups = frozenset(artifact.manifest.lookups) - frozenset(changed)
        self._parameters = artifact.manifest.parameters
        own = artifact.run_dtype(None)
        self._is_own_dtype = dtype == own
        self._fp8_block, self._plain = _fp8_of(artifact)
        self.origins: dict[str, Origin] = {}
        self._stored: dict[str, Stored] = {}
        self._computed: set[str] = set()
        computed = frozenset(changed)
        for name, entry in self._parameters.items():
            is_shared = entry.tied_to in self._parameters and name not in untied
            key = name if name in untied else self._key(entry.tied_to if is_shared else name)
            self.origins[name] = Origin(keys=(key,), conversion=entry.conversion)
            stored: torch.dtype = own if entry.dtype == "model" else getattr(torch, entry.dtype)
            if name in computed:
                self._computed.add(key)
            self._stored.setdefault(key, Stored(key, dtype_name(stored), entry.shape))

    def add(self, stored: Iterable[Stored]) -> None:
        """Add tensors that no parameter is made from."""
        self._stored |= {tensor.name: tensor for tensor in stored}

    def _key(self, name: str) -> str:
        return self.plain_key(name) or name

    def stored_names(self) -> Iterable[str]:
        """The names of all stored tensors."""
        return self._stored

    def stored(self, key: str) -> Stored:
        """Name, dtype and shape of a stored tensor."""
        return self._stored[key]

    def source_bytes(self, key: str) -> int:
        """The bytes on disk that a tensor is read from, by the quantization that the model's config states."""
        stored = self.stored(key)
        if self._fp8_block is None or len(stored.shape) != 2 or not key.endswith(".weight"):
            return stored.num_bytes
        if any(name in key for name in self._plain) or any(self.plain_key(name) == key for name in self._lookups):
            return stored.num_bytes
        blocks = math.prod(-(-size // side) for size, side in zip(stored.shape, self._fp8_block, strict=True))
        return math.prod(stored.shape) + 4 * blocks

    def computed(self, key: str) -> int:
        """The numbers of a tensor that are computed: those of a parameter that is changed."""
        return math.prod(self.stored(key).shape) if key in self._computed else 0

    def plain_key(self, name: str) -> str | None:
        """The checkpoint tensor that equals the parameter, or None if the parameter must be computed."""
        entry = self._parameters[name]
        return entry.sources[0] if len(entry.sources) == 1 and entry.conversion < 0 else None

    def is_table(self, name: str) -> bool:
        """Whether a parameter is only used to look up rows, and stored as the run uses it."""
        entry = self._parameters[name]
        is_stored_as_used = entry.dtype != "model" or self._is_own_dtype
        is_plain = len(entry.shape) == 2 and self.plain_key(name) is not None
        return name in self._lookups and is_stored_as_used and is_plain
