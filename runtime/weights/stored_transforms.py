"""Read the transform_config of a checkpoint and its matrices, and let a model compute with them as a reader does."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from runtime.algorithms.hadamard import Hadamard
from runtime.checkpoint.names import spellings
from runtime.errors import WeightsError
from runtime.formats.transformed_modules import attach_transforms
from runtime.formats.transforms import (
    RANDOM_HADAMARD,
    ModelTransforms,
    ModuleTransform,
    TransformConfigError,
    features_in,
    module_transforms,
    read_transform_config,
    stored_matrix,
)

if TYPE_CHECKING:
    from torch import nn

    from runtime.artifact.manifest import Manifest
    from runtime.checkpoint.reader import Checkpoint

_FLOATS = ("BF16", "F16", "F32", "F64")
_COPY_AGAIN = "copy or export the checkpoint again"


def stored_transforms(
    checkpoint: Checkpoint, entry: Mapping[str, Any], model: nn.Module, manifest: Manifest
) -> tuple[ModelTransforms, list[str]]:
    """Attach the transforms of a checkpoint to a module tree, except those of attention.

    Args:
        checkpoint: has the matrices.
        entry: its quantization_config.
        model: the artifact's module tree.
        manifest: of the artifact.

    Returns:
        The transforms, and the names of the tensors that hold their matrices.

    Raises:
        WeightsError: if the config is invalid, does not fit the model, or a matrix is missing or another.
    """
    try:
        groups = read_transform_config(entry.get("transform_config"))
        called = {name for subgraph in manifest.subgraphs for name in subgraph.parameters}
        features = features_in(model, called, {value.module for value in manifest.cached})
        modules = {name: type(module) for name, module in model.named_modules()}
        transforms = tuple(module_transforms(groups, modules, features))
    except TransformConfigError as error:
        raise WeightsError(
            f"the transform_config of {checkpoint.directory}: {error}", hint="quantize the model again"
        ) from error
    names: dict[tuple[str, int], list[str]] = {}
    for one in transforms:
        own = f"{one.module}.{one.tensor}"
        names.setdefault(one.matrix, []).extend(spellings(own, manifest.model.base_model_prefix))
    keys = [key for own in names.values() for key in own if key in checkpoint]
    first = {one.matrix: one for one in reversed(transforms)}
    matrices = {matrix: _matrix(checkpoint, one, names[matrix]) for matrix, one in first.items()}
    attach_transforms(model, transforms, matrices)
    return ModelTransforms(groups=groups, transforms=transforms, matrices=matrices), keys


def _matrix(checkpoint: Checkpoint, one: ModuleTransform, names: Iterable[str]) -> Hadamard:
    """Return a matrix; readers compute a Hadamard matrix without signs themselves, so that it need not be stored."""
    is_random, dtype = one.group.kind == RANDOM_HADAMARD, getattr(torch, one.group.precision)
    stored = [name for name in names if name in checkpoint]
    if not stored and is_random:
        raise WeightsError(
            f"missing tensor {next(iter(names))!r} in {checkpoint.directory}, required by its transform_config",
            hint=_COPY_AGAIN,
        )
    made = [_read_matrix(checkpoint, key, one, dtype, is_random=is_random) for key in stored]
    for key, other in zip(stored, made, strict=True):
        first = made[0].signs
        if other.is_listed != made[0].is_listed or (first is not None and not torch.equal(_signs(other), first)):
            raise WeightsError(
                f"tensors {stored[0]!r} and {key!r} of {checkpoint.directory} differ, and readers have one matrix for "
                "both",
                hint=_COPY_AGAIN,
            )
    return made[0] if made else Hadamard(size=one.size, dtype=dtype)


def _signs(matrix: Hadamard) -> torch.Tensor:
    assert matrix.signs is not None, "all matrices of a group have signs, or none"
    return matrix.signs


def _read_matrix(
    checkpoint: Checkpoint, key: str, one: ModuleTransform, dtype: torch.dtype, *, is_random: bool
) -> Hadamard:
    stored, size = checkpoint.stored(key), one.size
    if stored.shape != (size, size) or stored.dtype not in _FLOATS:
        raise WeightsError(
            f"tensor {key!r} of {checkpoint.directory} is {stored.dtype} {list(stored.shape)}; its transform_config "
            f"needs a floating point matrix of size {size}",
            hint=_COPY_AGAIN,
        )
    try:
        return stored_matrix(functools.partial(checkpoint.read_rows, key), size, is_random=is_random, dtype=dtype)
    except TransformConfigError as error:
        raise WeightsError(f"tensor {key!r} of {checkpoint.directory}: {error}", hint=_COPY_AGAIN) from error
