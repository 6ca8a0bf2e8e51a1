"""Rescale groups of modules: what SmoothQuant and AWQ have in common.

All is done on copies in float32. Weights that are quantized afterwards are never rounded to the checkpoint's dtype in
between; parameters that are not are written in it, and then columns are multiplied by what the rounded parameter really
gives, so that the model computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from runtime.algorithms.awq import search_scales
from runtime.algorithms.smoothquant import smoothing_factors
from runtime.artifact.scale_groups import numbers_of
from runtime.errors import QuantizationError

if TYPE_CHECKING:
    from runtime.artifact.manifest import ScaleGroup
    from runtime.quantize.statistics import InputStatistics
    from runtime.recipe.modifiers import AWQModifier, Transform
    from runtime.recipe.recipe import Assignment


@dataclass(kw_only=True)
class Rescaled:
    """Parameters of a step that differ from the checkpoint's.

    Vectors are kept as they are now; of matrices only what has become of them, and they are made when they are asked
    for: those of a mixture's experts would take twice as much memory in float32 as the model itself.

    Attributes:
        read: a parameter as it was, by name.
        stored_dtype: the dtype of a parameter in the checkpoint, by name.
        jobs: modules that are quantized.
        tensors: vectors that have changed, float32.
        factors: by the names of matrices, what to divide or multiply them by, one after the other.
    """

    read: Callable[[str], torch.Tensor]
    stored_dtype: Callable[[str], torch.dtype]
    jobs: Mapping[str, Assignment]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    factors: dict[str, list[_Factor]] = field(default_factory=dict)

    def get(self, name: str) -> torch.Tensor:
        """A parameter as it is now; float32 where it has changed."""
        tensor = self.tensors[name] if name in self.tensors else self.read(name)
        for factor in self.factors.get(name, ()):
            tensor = factor.applied(tensor.to(torch.float32))
        return tensor

    def changed(self) -> list[str]:
        """The names of all that has changed."""
        return [*self.tensors, *self.factors]

    def rounded(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A parameter as it is now, in this dtype; stacks are made expert by expert."""
        tensor = self.read(name)
        if name not in self.factors or tensor.dim() < 3:
            return self.get(name).to(dtype)
        result = torch.empty_like(tensor, dtype=dtype)
        for place, part in enumerate(tensor):
            values = part[None].to(torch.float32)
            for factor in self.factors[name]:
                values = factor.applied(values)
            result[place] = values[0]
        return result

    def forget(self, name: str) -> None:
        """Drop what has become of a parameter that has been written."""
        self.tensors.pop(name, None)
        self.factors.pop(name, None)

    def copy(self) -> Rescaled:
        """The same as it is now."""
        factors = {name: list(own) for name, own in self.factors.items()}
        return replace(self, tensors=dict(self.tensors), factors=factors)

    def apply(self, group: ScaleGroup, scale_I: torch.Tensor) -> torch.Tensor:
        """Divide what makes a group's channels by these factors, and multiply what takes them.

        Args:
            group: with a producer.
            scale_I: one positive factor for each feature, the same for those of one channel.

        Returns:
            The factors [I] by which inputs really are divided.
        """
        producer = self.read(group.producer)
        channels = torch.tensor(numbers_of(group.channels), device=producer.device)
        factor_C = torch.ones(len(producer), device=producer.device)
        factor_C[channels] = scale_I.to(producer.device, torch.float32)
        if producer.dim() == 1:
            weight = self.get(group.producer).to(torch.float32)
            divided = (weight + group.offset) / factor_C - group.offset
            rounded = divided.to(self.stored_dtype(group.producer)).to(torch.float32)
            really = (weight + group.offset) / (rounded + group.offset)
            is_sound = torch.isfinite(really) & (really > 0)
            factor_C = torch.where(is_sound, really, factor_C)
            self.tensors[group.producer] = rounded
        else:
            self._change(group.producer, factor_C, axis=0, is_division=True)
        if group.bias:
            self.tensors[group.bias] = self.get(group.bias).to(torch.float32) / factor_C
        used_I = factor_C[channels]
        for name in group.modules:
            self._change(f"{name}.weight", used_I, axis=1)
        for other in group.others:
            self._change(other.name, used_I, axis=other.axis)
        return used_I

    def _change(self, name: str, values: torch.Tensor, *, axis: int, is_division: bool = False) -> None:
        shape = [1] * self.read(name).dim()
        shape[axis] = -1
        self.factors.setdefault(name, []).append(_Factor(values=values.reshape(shape), is_division=is_division))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Factor:
    """What a matrix is multiplied with, or divided by; as many dimensions, all but one of size 1."""

    values: torch.Tensor
    is_division: bool

    def applied(self, tensor: torch.Tensor) -> torch.Tensor:
        values = self.values.to(tensor.device)
        return tensor / values if self.is_division else tensor * values


def find_scales(
    transform: Transform,
    group: ScaleGroup,
    rescaled: Rescaled,
    statistics: InputStatistics,
    scale_dtypes: Mapping[str, torch.dtype],
) -> torch.Tensor:
    """The factors [I] that a modifier chooses for a group.

    Args:
        transform: the modifier.
        group: whose inputs are rescaled.
        rescaled: has its weights.
        statistics: of its inputs.
        scale_dtypes: in what the checkpoint stores the scales of its quantized modules.

    Raises:
        QuantizationError: naming the group's first module.
    """
    channels = torch.tensor(numbers_of(group.channels), device=statistics.smallest_I.device)
    try:
        if transform.algorithm == "smoothquant":
            low_I, high_I = statistics.feature_span()
            weights = (rescaled.get(f"{name}.weight") for name in group.modules)
            return smoothing_factors(
                torch.maximum(-low_I, high_I), weights, strength=transform.smoothing_strength, channel_I=channels
            )
        quantized = [name for name in group.modules if name in rescaled.jobs]
        return _search(transform, quantized, rescaled, statistics, scale_dtypes, channels)
    except QuantizationError as error:
        raise QuantizationError(f"{group.modules[0]}: {error.message}", hint=error.hint) from error


def _search(
    transform: AWQModifier,
    quantized: Sequence[str],
    rescaled: Rescaled,
    statistics: InputStatistics,
    scale_dtypes: Mapping[str, torch.dtype],
    channels: torch.Tensor,
) -> torch.Tensor:
    found = search_scales(
        (rescaled.get(f"{name}.weight").to(torch.float32) for name in quantized),
        statistics.hessian_II,
        statistics.mean_abs_I,
        [rescaled.jobs[name].scheme.weights for name in quantized],
        scale_dtype=scale_dtypes[quantized[0]],
        n_grid=transform.n_grid,
        duo_scaling=transform.duo_scaling,
        channel_I=channels,
    )
    return found.scale_I
