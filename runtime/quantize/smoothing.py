"""Rescale groups of modules: the part that SmoothQuant and AWQ share.

The arithmetic is done on copies in float32. Weights that are quantized afterwards are not rounded to the checkpoint's
dtype in between. Other parameters are stored in that dtype; columns are then multiplied by the factor that the rounded
parameter actually gives, so that the model computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from runtime.algorithms.awq import search_scales
from runtime.algorithms.products import has_quick_bfloat16
from runtime.algorithms.smoothquant import smoothing_factors
from runtime.artifact.scale_groups import numbers_of
from runtime.errors import QuantizationError

if TYPE_CHECKING:
    from runtime.artifact.manifest import ScaleGroup
    from runtime.quantize.statistics import InputStatistics
    from runtime.recipe.recipe import Assignment
    from runtime.recipe.rescaling_modifiers import Transform


@dataclass(kw_only=True)
class Rescaled:
    """The changed parameters of a step.

    Changed vectors are stored. For matrices only the factors are stored, and the matrices are computed on demand: those
    of a mixture's experts would take twice as much memory in float32 as the model itself.

    Attributes:
        read: returns an original parameter by name.
        stored_dtype: returns the dtype of a parameter in the checkpoint by name.
        jobs: the modules that are quantized.
        tensors: changed vectors, float32.
        factors: the factors of each changed matrix, applied in order.
    """

    read: Callable[[str], torch.Tensor]
    stored_dtype: Callable[[str], torch.dtype]
    jobs: Mapping[str, Assignment]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    factors: dict[str, list[_Factor]] = field(default_factory=dict)

    def get(self, name: str) -> torch.Tensor:
        """Return a parameter with its changes; float32 if it has any."""
        tensor = self.tensors[name] if name in self.tensors else self.read(name)
        return self._multiplied(tensor, self.factors[name]) if name in self.factors else tensor

    def changed(self) -> list[str]:
        """List the names of all changed parameters."""
        return [*self.tensors, *self.factors]

    def rounded(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return a parameter with its changes in this dtype; stacks are computed expert by expert."""
        tensor = self.read(name)
        if name not in self.factors or tensor.dim() < 3:
            return self.get(name).to(dtype)
        result = torch.empty_like(tensor, dtype=dtype)
        for place, part in enumerate(tensor):
            result[place] = self._multiplied(part[None], self.factors[name])[0]
        return result

    @staticmethod
    def _multiplied(tensor: torch.Tensor, factors: Sequence[_Factor]) -> torch.Tensor:
        """Apply factors to a copy in float32."""
        copy = tensor.to(torch.float32, copy=True)
        for factor in factors:
            factor.apply_(copy)
        return copy

    def forget(self, name: str) -> None:
        """Drop the changes of a parameter that has been written."""
        self.tensors.pop(name, None)
        self.factors.pop(name, None)

    def copy(self) -> Rescaled:
        """Copy the current state."""
        factors = {name: list(own) for name, own in self.factors.items()}
        return replace(self, tensors=dict(self.tensors), factors=factors)

    def apply(self, group: ScaleGroup, scale_I: torch.Tensor) -> torch.Tensor:
        """Divide the producer of a group by these factors, and multiply the parameters that read its channels.

        Args:
            group: a group with a producer.
            scale_I: one positive factor for each feature, equal for features of one channel.

        Returns:
            The factors [I] by which inputs are actually divided.
        """
        producer = self.read(group.producer)
        channels = torch.tensor(numbers_of(group.channels), device=producer.device)
        factor_C = torch.ones(len(producer), device=producer.device)
        factor_C[channels] = scale_I.to(producer.device, torch.float32)
        if producer.dim() == 1:
            weight = self.get(group.producer).to(torch.float32)
            divided = (weight + group.offset) / factor_C - group.offset
            rounded = divided.to(self.stored_dtype(group.producer)).to(torch.float32)
            actual_C = (weight + group.offset) / (rounded + group.offset)
            is_valid = torch.isfinite(actual_C) & (actual_C > 0)
            factor_C = torch.where(is_valid, actual_C, factor_C)
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
    """A factor of a matrix, or a divisor; it has as many dimensions, all but one of size 1."""

    values: torch.Tensor
    is_division: bool

    def apply_(self, tensor: torch.Tensor) -> None:
        values = self.values.to(tensor.device)
        if self.is_division:
            tensor.div_(values)
        else:
            tensor.mul_(values)


def find_scales(
    transform: Transform,
    group: ScaleGroup,
    rescaled: Rescaled,
    statistics: InputStatistics,
    scale_dtypes: Mapping[str, torch.dtype],
) -> torch.Tensor:
    """Compute the factors [I] that a modifier chooses for a group, from its weights and the statistics of its inputs.

    `scale_dtypes` are the dtypes in which the checkpoint stores the scales of the group's quantized modules.

    Raises:
        QuantizationError: naming the group's first module.
    """
    channels = torch.tensor(numbers_of(group.channels), device=statistics.device)
    try:
        if transform.algorithm == "smoothquant":
            low_I, high_I = statistics.feature_span()
            weights = (rescaled.get(f"{name}.weight") for name in group.modules)
            return smoothing_factors(
                torch.maximum(-low_I, high_I), weights, strength=transform.smoothing_strength, channel_I=channels
            )
        quantized = [name for name in group.modules if name in rescaled.jobs]
        found = search_scales(
            (_narrowed(rescaled.get(f"{name}.weight")) for name in quantized),
            statistics.hessian_II,
            statistics.mean_abs_I,
            [rescaled.jobs[name].scheme.weights for name in quantized],
            scale_dtype=scale_dtypes[quantized[0]],
            n_grid=transform.n_grid,
            duo_scaling=transform.duo_scaling,
            channel_I=channels,
            race_dtype=_race_dtype(statistics.device),
        )
    except QuantizationError as error:
        raise QuantizationError(f"{group.modules[0]}: {error.message}", hint=error.hint) from error
    return found.scale_I


def _narrowed(weight: torch.Tensor) -> torch.Tensor:
    """Convert float64 to float32."""
    return weight.to(torch.float32) if weight.dtype == torch.float64 else weight


def _race_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which a device multiplies most candidates of AWQ's search: bf16 if it has instructions for it."""
    return torch.float32 if device.type == "cpu" and not has_quick_bfloat16() else torch.bfloat16
