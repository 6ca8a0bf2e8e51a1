"""Fold the rotations of a `transform_config` into the weights of a checkpoint, so that a plain model computes the same.

A reader computes y = ((x M_in) W'^T + b') M_out, so the weight and the bias without transforms are

    W = M_out^T W' M_in^T,   b = b' M_out

Rotations of queries and keys change no weight and are left out. The class of a module is not known without a model: a
weight belongs to a Linear module if it is quantized, or if its module is in the `ignore` of the quantization_config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from runtime.checkpoint.source_formats import FLOATS, Packed, SourceHeaders
from runtime.errors import WeightsError
from runtime.formats.targets import matches_name
from runtime.formats.transforms import (
    INPUT,
    OF_ATTENTION,
    ONLINE,
    OUTPUT,
    RANDOM_HADAMARD,
    ModuleTransform,
    TransformConfigError,
    TransformGroup,
    module_transforms,
    read_transform_config,
    stored_matrix,
)

if TYPE_CHECKING:
    import torch

    from runtime.algorithms.hadamard import Hadamard

_MATRICES = (*FLOATS, "F64")
_AGAIN = "copy or export the checkpoint again"


def without_transforms(
    entry: Mapping[str, Any], headers: SourceHeaders, packed: Mapping[str, Packed], ignore: Sequence[str]
) -> tuple[dict[str, Packed], tuple[str, ...]]:
    """Return the packed tensors of a checkpoint without its transforms, and the tensors that only transforms use.

    Args:
        entry: its quantization_config.
        headers: its tensors.
        packed: its quantized weights by name.
        ignore: patterns of modules that are not quantized.

    Raises:
        WeightsError: if the transform_config is invalid, or does not fit the tensors.
    """
    try:
        groups = read_transform_config(entry.get("transform_config"))
        shapes = dict(_linear_shapes(headers, packed, ignore, groups))

        def features(name: str, location: str) -> int | None:
            if location in OF_ATTENTION:
                return None
            return shapes[name][1 if location == INPUT else 0]

        found = tuple(module_transforms(groups, dict.fromkeys(shapes, "Linear"), features))
    except TransformConfigError as error:
        raise WeightsError(
            f"the transform_config of {headers.origin}: {error}", hint="start from the original checkpoint"
        ) from error
    matrices = tuple(_matrices(headers, groups))
    by_name: dict[str, dict[str, ModuleTransform]] = {}
    for one in found:
        by_name.setdefault(one.module, {})[one.location] = one
    made = dict(packed)
    keys = {one.matrix: _key(one, found, matrices, headers) for one in found}
    for name, own in by_name.items():
        made[f"{name}.weight"] = _unfolded(f"{name}.weight", own, keys, headers, packed.get(f"{name}.weight"))
        if OUTPUT in own and f"{name}.bias" in headers.tensors:
            made[f"{name}.bias"] = _unfolded(f"{name}.bias", own, keys, headers, None)
    return made, matrices


def _linear_shapes(
    headers: SourceHeaders, packed: Mapping[str, Packed], ignore: Sequence[str], groups: Sequence[TransformGroup]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the Linear modules with the shapes of their weights, and other matrices that a pattern names."""
    places = [place for group in groups for place in group.places if place.location in ONLINE]
    for key in headers.tensors:
        name = f"{key.rpartition('.')[0]}.weight"
        if name in packed:
            yield name.removesuffix(".weight"), packed[name].shape
        elif key == name and len(headers.tensors[key].shape) == 2 and headers.tensors[key].dtype in FLOATS:
            module = name.removesuffix(".weight")
            is_named = any(place.matches(module, "") for place in places)
            if is_named or any(matches_name(pattern, module) for pattern in ignore):
                yield module, headers.tensors[key].shape


def _matrices(headers: SourceHeaders, groups: Sequence[TransformGroup]) -> Iterator[str]:
    """Yield the tensors that hold matrices."""
    locations = {(group.name, place.location) for group in groups for place in group.places if place.location in ONLINE}
    endings = tuple(f".{name}_{location}.weight" for name, location in locations)
    return (key for key in headers.tensors if endings and key.endswith(endings))


def _key(
    one: ModuleTransform, found: Sequence[ModuleTransform], matrices: Sequence[str], headers: SourceHeaders
) -> str:
    """Return the tensor of a matrix; empty if it need not be stored."""
    names = {f"{other.module}.{other.tensor}" for other in found if other.matrix == one.matrix}
    key = next((key for key in matrices if key in names), "")
    if not key and one.group.kind == RANDOM_HADAMARD:
        raise WeightsError(
            f"missing tensor {f'{one.module}.{one.tensor}'!r} in {headers.origin}, required by its transform_config",
            hint=_AGAIN,
        )
    if key:
        stored = headers.need(key, _MATRICES, one.module)
        if stored.shape != (one.size, one.size):
            raise headers.misfit(stored, f"a matrix of size {one.size}", "its transform_config")
    return key


def _unfolded(
    key: str,
    own: Mapping[str, ModuleTransform],
    matrices: Mapping[tuple[str, int], str],
    headers: SourceHeaders,
    packed: Packed | None,
) -> Packed:
    parts = {} if packed is not None else {"weight": key}
    parts |= {f"transform_{place}": name for place, one in own.items() if (name := matrices[one.matrix])}
    compute = _Unfold(own=dict(own), packed=packed)
    if packed is not None:
        return replace(packed, parts={**packed.parts, **parts}, compute=compute)
    return Packed(parts=parts, shape=headers.tensors[key].shape, compute=compute)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Unfold:
    """Computes a weight or a bias without its transforms.

    Attributes:
        own: the transforms of the module by location.
        packed: the quantized form of the weight; None if it is plain.
    """

    own: Mapping[str, ModuleTransform]
    packed: Packed | None

    def __call__(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Compute the tensor from its parts by role; each number is rounded once."""
        import torch

        value = parts["weight"] if self.packed is None else self.packed.compute(parts, torch.float32)
        value = value.double()
        if INPUT in self.own and value.dim() == 2:
            value = self._matrix(INPUT, parts).apply(value, inverse=not self.own[INPUT].inverse)
        if OUTPUT in self.own:
            after, inverse = self._matrix(OUTPUT, parts), self.own[OUTPUT].inverse
            value = after.apply(value.T, inverse=inverse).T if value.dim() == 2 else after.apply(value, inverse=inverse)
        return value.to(dtype).contiguous()

    def _matrix(self, location: str, parts: Mapping[str, torch.Tensor]) -> Hadamard:
        import torch

        from runtime.algorithms.hadamard import Hadamard

        one, stored = self.own[location], parts.get(f"transform_{location}")
        if stored is None:
            return Hadamard(size=one.size, dtype=torch.float64)
        is_random = one.group.kind == RANDOM_HADAMARD
        return stored_matrix(
            lambda first, count: stored[first : first + count], one.size, is_random=is_random, dtype=torch.float64
        )
