"""Rescale groups of modules: what SmoothQuant and AWQ have in common.

All is done on copies in float32. Weights that are quantized afterwards are never rounded to the checkpoint's dtype in
between; parameters that are not are written in it, and then columns are multiplied by what the rounded parameter really
gives, so that the model computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from runtime.algorithms.awq import search_scales
from runtime.algorithms.smoothquant import smoothing_factors
from runtime.errors import QuantizationError
from runtime.scale_groups import channels_of

if TYPE_CHECKING:
    from runtime.manifest import ScaleGroup
    from runtime.recipe import Assignment
    from runtime.recipe_transforms import Transform
    from runtime.statistics import InputStatistics


@dataclass(kw_only=True)
class Rescaled:
    """Parameters of a step that differ from the checkpoint's.

    Attributes:
        read: a parameter as it was, by name.
        stored_dtype: the dtype of a parameter in the checkpoint, by name.
        jobs: modules that are quantized.
        tensors: those that have changed, float32.
        factors: what the inputs of each module were divided by in all, [I].
    """

    read: Callable[[str], torch.Tensor]
    stored_dtype: Callable[[str], torch.dtype]
    jobs: Mapping[str, Assignment]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def get(self, name: str) -> torch.Tensor:
        """A parameter as it is now."""
        return self.tensors[name] if name in self.tensors else self.read(name)

    def apply(self, group: ScaleGroup, scale_I: torch.Tensor) -> torch.Tensor:
        """Divide what makes a group's channels by these factors, and multiply what takes them.

        Args:
            group: with a producer.
            scale_I: one positive factor for each feature, the same for those of one channel.

        Returns:
            The factors [I] by which inputs really are divided.
        """
        weight = self.get(group.producer).to(torch.float32)
        channels = torch.tensor(channels_of(group), device=weight.device)
        factor_C = torch.ones(len(weight), device=weight.device)
        factor_C[channels] = scale_I.to(weight.device, torch.float32)
        is_kept = group.producer.removesuffix(".weight") in self.jobs
        if weight.dim() == 1 and not is_kept:
            divided = (weight + group.offset) / factor_C - group.offset
            rounded = divided.to(self.stored_dtype(group.producer)).to(torch.float32)
            really = (weight + group.offset) / (rounded + group.offset)
            is_sound = torch.isfinite(really) & (really > 0)
            factor_C = torch.where(is_sound, really, factor_C)
            self.tensors[group.producer] = rounded
        else:
            column = factor_C.reshape(-1, *[1] * (weight.dim() - 1))
            self.tensors[group.producer] = (weight + group.offset) / column - group.offset
        if group.bias:
            self.tensors[group.bias] = self.get(group.bias).to(torch.float32) / factor_C
        used_I = factor_C[channels]
        takers = [(f"{name}.weight", 1) for name in group.modules] + [(o.name, o.axis) for o in group.others]
        for name, axis in takers:
            tensor = self.get(name).to(torch.float32)
            shape = [1] * tensor.dim()
            shape[axis] = -1
            self.tensors[name] = tensor * used_I.reshape(shape)
        return used_I


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
    channels = torch.tensor(channels_of(group), device=statistics.smallest_I.device)
    try:
        if transform.algorithm == "smoothquant":
            low_I, high_I = statistics.feature_span()
            weights = [rescaled.get(f"{name}.weight") for name in group.modules]
            return smoothing_factors(
                torch.maximum(-low_I, high_I), weights, strength=transform.strength, channel_I=channels
            )
        quantized = [name for name in group.modules if name in rescaled.jobs]
        return _search(transform, quantized, rescaled, statistics, scale_dtypes, channels)
    except QuantizationError as error:
        raise QuantizationError(f"{group.modules[0]}: {error.message}", hint=error.hint) from error


def _search(
    transform: Transform,
    quantized: Sequence[str],
    rescaled: Rescaled,
    statistics: InputStatistics,
    scale_dtypes: Mapping[str, torch.dtype],
    channels: torch.Tensor,
) -> torch.Tensor:
    found = search_scales(
        [rescaled.get(f"{name}.weight").to(torch.float32) for name in quantized],
        statistics.hessian_II,
        statistics.mean_abs_I,
        [rescaled.jobs[name].scheme.weights for name in quantized],
        scale_dtype=scale_dtypes[quantized[0]],
        n_grid=transform.n_grid,
        duo_scaling=transform.duo_scaling,
        channel_I=channels,
    )
    return found.scale_I
