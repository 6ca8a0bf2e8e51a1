"""Prepare a model for a run: one preparation for calibration, evaluation, planning and the doctor.

split      stacked experts, as far as the checkpoint stores them separately or the recipe needs them
build      the empty module tree
map        each parameter to the checkpoint tensors it is made from
assign     a scheme to each module that the recipe quantizes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from runtime.errors import RecipeError
from runtime.experts.split import SplitArtifact, split_experts
from runtime.quantize.assignments import assign_jobs
from runtime.quantize.needs import RecipeNeeds
from runtime.weights.origins import ParameterSource, StatedParameters
from runtime.weights.parameters import Weights, place_buffers

if TYPE_CHECKING:
    from torch import nn

    from runtime.chain import Artifact
    from runtime.checkpoint.reader import Checkpoint
    from runtime.recipe.recipe import Assignment, Recipe

_CPU = torch.device("cpu")
Assign = Callable[["Artifact", "nn.Module", ParameterSource, "Recipe"], "tuple[dict[str, Assignment], list[str]]"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A model that is ready to run.

    Attributes:
        artifact: the artifact, with its experts split where they have to be.
        model: the module tree, its parameters on the meta device.
        source: the origin of each parameter: `Weights`, or without a checkpoint `StatedParameters`.
        jobs: the assignment of each module that is quantized, by module name.
        unreached: modules that the recipe matches and that no subgraph calls.
    """

    artifact: Artifact
    model: nn.Module
    source: ParameterSource
    jobs: dict[str, Assignment] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)

    @property
    def weights(self) -> Weights:
        """The origin of each parameter, of a model that was prepared with a checkpoint."""
        assert isinstance(self.source, Weights), "prepared without a checkpoint"
        return self.source


def prepare(
    artifact: Artifact,
    checkpoint: Checkpoint | None,
    recipe: Recipe | None,
    dtype: torch.dtype,
    device: torch.device = _CPU,
    *,
    assign: Assign = assign_jobs,
    splits_named: bool = False,
) -> Prepared:
    """Prepare a model.

    Args:
        artifact: the compiled model.
        checkpoint: its weights; None for a plan, which needs none.
        recipe: what is quantized; None to run the checkpoint as it is.
        dtype: of weights and activations.
        device: of the buffers that are computed, not loaded.
        assign: gives each module its assignment.
        splits_named: also split the experts that the checkpoint stores separately and the recipe leaves as they are.

    Raises:
        RecipeError: when the recipe does not fit the model, or the checkpoint is quantized already.
        WeightsError: when the checkpoint does not fit the artifact.
    """
    if recipe is None:
        is_split = checkpoint is not None and checkpoint.is_quantized
        return _build(split_experts(artifact, checkpoint) if is_split else artifact, checkpoint, dtype, device)
    prepared = _assigned(split_experts(artifact, checkpoint), checkpoint, recipe, dtype, device, assign)
    if checkpoint is None or not isinstance(prepared.artifact, SplitArtifact):
        return prepared
    owners = _owners_to_split(prepared.artifact, prepared, recipe, splits_named=splits_named)
    if len(owners) == len(prepared.artifact.mixtures):
        return prepared
    # The other experts stay stacked: they are not changed, and stacked experts run faster.
    fewer = split_experts(artifact, checkpoint, only=owners)
    return _assigned(fewer, checkpoint, recipe, dtype, device, assign)


def _build(artifact: Artifact, checkpoint: Checkpoint | None, dtype: torch.dtype, device: torch.device) -> Prepared:
    model = artifact.empty_model(dtype)
    place_buffers(model, device)
    if checkpoint is None:
        return Prepared(artifact=artifact, model=model, source=StatedParameters(artifact, dtype))
    return Prepared(artifact=artifact, model=model, source=Weights(artifact, checkpoint, dtype, model))


def _assigned(
    artifact: Artifact,
    checkpoint: Checkpoint | None,
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device,
    assign: Assign,
) -> Prepared:
    built = _build(artifact, checkpoint, dtype, device)
    source = built.source
    if isinstance(source, Weights) and (source.schemes or source.cache_scheme is not None):
        where = source.checkpoint.directory
        raise RecipeError(f"{where} is quantized already", hint="calibrate from the original checkpoint")
    jobs, unreached = assign(artifact, built.model, source, recipe)
    return Prepared(artifact=artifact, model=built.model, source=source, jobs=jobs, unreached=unreached)


def _owners_to_split(artifact: SplitArtifact, prepared: Prepared, recipe: Recipe, *, splits_named: bool) -> list[str]:
    """The modules whose experts are quantized, or rescaled unless the checkpoint stores them stacked."""
    owners = dict.fromkeys(artifact.owners(prepared.jobs))
    if recipe.transforms and len(owners) < len(artifact.mixtures):
        needs = RecipeNeeds(artifact, prepared.source, recipe, prepared.jobs)
        rescaled = artifact.owners(needs.rescaled_modules())
        owners |= dict.fromkeys(name for name in rescaled if artifact.mixtures[name].is_named)
    named = [name for name, mixture in artifact.mixtures.items() if splits_named and mixture.is_named]
    return [name for name in artifact.mixtures if name in owners or name in named]
