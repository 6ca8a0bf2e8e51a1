"""Prove by execution that rotations that stay in a model do not change its function, before a run starts.

One sample passes through the weights without them, and through the rotated weights with the rotations computed between,
both in float64, as in `runtime.quantize.rotation_proof`. Layers with the same code are rotated in the same way, so the
sample stops after the first layer of each kind.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from runtime.errors import ArtifactError, DataError, RecipeError
from runtime.formats.key_values import KeyValues, attach
from runtime.formats.transformed_modules import attach_transforms
from runtime.quantize.rotation_proof import (
    TOLERANCE,
    WideWeights,
    difference_of,
    outputs_of,
    prove_rotations,
    sample_of,
    wide_tree,
)
from runtime.quantize.transformed_weights import transformed_view
from runtime.recipe.recipe import some
from runtime.status import doing

if TYPE_CHECKING:
    from runtime.chain import Artifact
    from runtime.checkpoint.reader import Checkpoint
    from runtime.formats.transforms import ModelTransforms
    from runtime.quantize.preparation import Prepared
    from runtime.recipe.recipe import Recipe
    from runtime.weights.parameters import Weights
    from runtime.workers.group import Workers


def prove_function(
    artifact: Artifact,
    prepared: Prepared,
    recipe: Recipe,
    batches: Sequence[Mapping[str, torch.Tensor]],
    workers: Workers,
) -> None:
    """Prove that no rotation of a recipe changes what the model computes, whether fused or not; see `prove_rotations`
    and `prove_transforms`.
    """
    prove_rotations(artifact, prepared, recipe, batches, workers)
    if not workers.rank:
        prove_transforms(prepared, recipe, batches)


def prove_transforms(prepared: Prepared, recipe: Recipe, batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Prove the rotations of a prepared model that stay in it, if there are any.

    Raises:
        RecipeError: the outputs differ by more than rounding errors.
    """
    found = prepared.source.transforms
    if not found.transforms:
        return
    doing("checking the transforms on a sample")
    modifier = recipe.rotations[-1]
    where = f"{recipe.source}:{modifier.line}: {modifier.name}"
    names = some([group.name for group in found.groups])
    artifact, inputs = _first_layers(prepared.artifact, found), sample_of(prepared.artifact.manifest, batches)
    exact = replace(found, matrices={key: replace(one, dtype=torch.float64) for key, one in found.matrices.items()})
    plain = prepared.weights.untransformed()
    try:
        before = outputs_of(artifact, wide_tree(prepared.artifact), (_wide(plain, plain.checkpoint),), inputs)
        tree = wide_tree(prepared.artifact)
        attach_transforms(tree, exact.transforms, exact.matrices)
        if exact.attention:
            attach(tree, KeyValues.of(artifact.manifest, None, rotations=exact.attention))
        view = transformed_view(exact, plain, plain.checkpoint, is_exact=True)
        after = outputs_of(artifact, tree, (_wide(plain, view),), inputs)
    except (RuntimeError, IndexError, ValueError, TypeError, KeyError, ArtifactError, DataError) as error:
        reason = str(error).partition("\n")[0]
        hint = "remove the modifier" if batches else "pass --data"
        raise RecipeError(f"{where} cannot be checked on a sample: {reason}", hint=hint) from error
    difference = difference_of(before[0], after[0])
    if not difference <= TOLERANCE:
        raise RecipeError(
            f"{where} would change the model: outputs differ by {difference:.1e} of their size with {names}",
            hint="remove R3 from rotations" if exact.attention else "add the modules that compute otherwise to ignore",
        )


def _first_layers(artifact: Artifact, found: ModelTransforms) -> Artifact:
    """Return the chain up to the first layer of the last kind that is transformed."""
    names = tuple(f"{one.module}." for one in found.transforms)
    first: dict[str, int] = {}
    for index, subgraph in enumerate(artifact.subgraphs):
        if any(name.startswith(names) for name in subgraph.entry.parameters):
            first.setdefault(subgraph.entry.file, index)
    return replace(artifact, subgraphs=artifact.subgraphs[: 1 + max(first.values())])


def _wide(weights: Weights, checkpoint: Checkpoint) -> WideWeights:
    """Return weights that read a checkpoint in float64."""
    wide = WideWeights.__new__(WideWeights)
    wide.__dict__.update(weights.__dict__, checks=copy.copy(weights.checks), dtype=torch.float64)
    wide.look_through(checkpoint)
    return wide
