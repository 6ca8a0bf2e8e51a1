"""Prepare a model for a run: one preparation for calibration, evaluation, planning and the doctor.

rotate     the checkpoint, as a view, if the recipe has rotations that are fused
split      stacked experts, as far as the checkpoint stores them separately or the recipe needs them
build      the empty module tree
map        each parameter to the checkpoint tensors it is made from
assign     a scheme to each module that the recipe quantizes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from runtime.errors import RecipeError
from runtime.experts.split import SplitArtifact, split_experts
from runtime.formats.transformed_modules import attach_transforms
from runtime.quantize.assignments import assign_jobs
from runtime.quantize.needs import RecipeNeeds
from runtime.quantize.online_transforms import online_transforms
from runtime.quantize.rotated_weights import RotatedCheckpoint, RotatedModel
from runtime.quantize.rotations import require_whole_stream, rotated_model
from runtime.quantize.transformed_weights import stored_matrices, transformed_view
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
        rotated: what the recipe's rotations changed in the weights before anything else, or None.
        original: the checkpoint before that.
    """

    artifact: Artifact
    model: nn.Module
    source: ParameterSource
    jobs: dict[str, Assignment] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)
    rotated: RotatedModel | None = None
    original: Checkpoint | None = None

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
    rotated = rotated_model(artifact.manifest, recipe)
    if rotated is None:
        return _split(artifact, checkpoint, recipe, dtype, device, assign, splits_named=splits_named)
    if checkpoint is None:
        prepared = _split(artifact, None, recipe, dtype, device, assign, rotated, splits_named=splits_named)
    else:
        built = _plain(_build(artifact, checkpoint, dtype, device))
        outside = tuple(require_whole_stream(rotated, built.weights, recipe))
        view = RotatedCheckpoint(built.weights, rotated)
        prepared = _split(artifact, view, recipe, dtype, device, assign, splits_named=splits_named)
        prepared.weights.remarks += (*rotated.remarks, *outside)
    return replace(prepared, rotated=rotated, original=checkpoint)


def _split(
    artifact: Artifact,
    checkpoint: Checkpoint | None,
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device,
    assign: Assign,
    rotated: RotatedModel | None = None,
    *,
    splits_named: bool,
) -> Prepared:
    """Prepare a model with its experts split where the recipe changes them."""
    prepared = _assigned(split_experts(artifact, checkpoint), checkpoint, recipe, dtype, device, assign, rotated)
    if checkpoint is None or not isinstance(prepared.artifact, SplitArtifact):
        return prepared
    owners = _owners_to_split(prepared.artifact, prepared, recipe, splits_named=splits_named)
    if len(owners) == len(prepared.artifact.mixtures):
        return prepared
    # The other experts stay stacked: they are not changed, and stacked experts run faster.
    fewer = split_experts(artifact, checkpoint, only=owners)
    return _assigned(fewer, checkpoint, recipe, dtype, device, assign)


def _build(
    artifact: Artifact,
    checkpoint: Checkpoint | None,
    dtype: torch.dtype,
    device: torch.device,
    rotated: RotatedModel | None = None,
) -> Prepared:
    model = artifact.empty_model(dtype)
    place_buffers(model, device)
    if checkpoint is None:
        changed, untied = (rotated.changed, rotated.untied) if rotated is not None else ((), ())
        return Prepared(
            artifact=artifact, model=model, source=StatedParameters(artifact, dtype, changed=changed, untied=untied)
        )
    return Prepared(artifact=artifact, model=model, source=Weights(artifact, checkpoint, dtype, model))


def _assigned(
    artifact: Artifact,
    checkpoint: Checkpoint | None,
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device,
    assign: Assign,
    rotated: RotatedModel | None = None,
) -> Prepared:
    built = _plain(_build(artifact, checkpoint, dtype, device, rotated))
    source = built.source
    jobs, unreached = assign(artifact, built.model, source, recipe)
    if recipe.rotations:
        _transform(artifact, built.model, source, recipe)
    return Prepared(artifact=artifact, model=built.model, source=source, jobs=jobs, unreached=unreached)


def _plain(built: Prepared) -> Prepared:
    """Reject a checkpoint that is quantized."""
    source = built.source
    if isinstance(source, Weights) and (source.schemes or source.cache_scheme is not None):
        where = source.checkpoint.directory
        raise RecipeError(f"{where} is quantized already", hint="calibrate from the original checkpoint")
    return built


def _transform(artifact: Artifact, model: nn.Module, source: ParameterSource, recipe: Recipe) -> None:
    """Rotate weights, and let the model compute the rotations that stay in it."""
    found = online_transforms(artifact, model, source, recipe)
    attach_transforms(model, found.transforms, found.matrices)
    if isinstance(source, Weights):
        source.look_through(transformed_view(found, source, source.checkpoint))
    elif isinstance(source, StatedParameters):
        source.add(stored for stored, _ in stored_matrices(found, source))
    source.transforms = found


def _owners_to_split(artifact: SplitArtifact, prepared: Prepared, recipe: Recipe, *, splits_named: bool) -> list[str]:
    """The modules whose experts are quantized, or rescaled unless the checkpoint stores them stacked."""
    owners = dict.fromkeys(artifact.owners(prepared.jobs))
    if recipe.transforms and len(owners) < len(artifact.mixtures):
        needs = RecipeNeeds(artifact, prepared.source, recipe, prepared.jobs)
        rescaled = artifact.owners(needs.rescaled_modules())
        owners |= dict.fromkeys(name for name in rescaled if artifact.mixtures[name].is_named)
    named = [name for name, mixture in artifact.mixtures.items() if splits_named and mixture.is_named]
    return [name for name in artifact.mixtures if name in owners or name in named]
