"""Choose the rotations R1 and R2 of a recipe for the rotation spaces of an artifact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from runtime.algorithms.rotation import Rotation, largest_hadamard, rotation
from runtime.errors import RecipeError
from runtime.quantize.rotated_weights import RotatedModel, Turn
from runtime.recipe.recipe import some
from runtime.recipe.rotation_modifiers import SpinQuantModifier

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest
    from runtime.artifact.rotation_table import RotationSpace
    from runtime.recipe.recipe import Recipe
    from runtime.weights.parameters import Weights

FUSED = ("R1", "R2")
_OF_MEDIA = ("vision_config", "audio_config", "video_config", "speech_config", "encoder_config")
_PLACES = {"R1": "residual stream", "R2": "values of attention"}


def rotated_model(manifest: Manifest, recipe: Recipe) -> RotatedModel | None:
    """Return what the rotations of a recipe change in a model's weights; None if it has no such rotations.

    Raises:
        RecipeError: the model has no space for a rotation, or there is no matrix of the space's size.
    """
    modifier = next((entry for entry in recipe.rotations if isinstance(entry, SpinQuantModifier)), None)
    wanted = [name for name in FUSED if modifier is not None and name in modifier.rotations]
    if modifier is None or not wanted:
        return None
    where = f"{recipe.source}:{modifier.line}: {modifier.name}"
    if manifest.rotations is None:
        raise RecipeError(
            f"{where} needs the rotation spaces of the model, and this artifact is older than they are",
            hint="compile the model again",
        )
    spaces = [space for space in manifest.rotations.spaces if space.rotation in wanted]
    for name in wanted:
        if not any(space.rotation == name for space in spaces):
            reasons = [text for text in manifest.rotations.missing if text.startswith(name)]
            reasons = reasons or list(manifest.rotations.missing[:1])
            raise RecipeError(
                f"{where} cannot rotate the {_PLACES[name]} of this model: {'; '.join(reasons) or 'it was not found'}",
                hint=f"remove {name} from rotations",
            )
    missing = [text for text in manifest.rotations.missing if text.startswith(tuple(wanted))]
    return _turned(spaces, manifest.rotations.untied, _Matrices(modifier, where), missing)


def require_whole_stream(rotated: RotatedModel, weights: Weights, recipe: Recipe) -> Iterator[str]:
    """Yield a warning for tensors that use the residual stream outside of the artifact, and so are not rotated.

    Raises:
        RecipeError: for a model of several modalities that was compiled for text only: its projectors write the stream.
    """
    manifest = weights.artifact.manifest
    called = {name for subgraph in manifest.subgraphs for name in subgraph.parameters}
    called |= {manifest.parameters[name].tied_to for name in called if name in manifest.parameters}
    idle = (name for name, entry in manifest.parameters.items() if len(entry.shape) > 1 and not entry.tied_to)
    left = [name for name in idle if name not in called]
    left += [key for key in weights.unused if len(weights.checkpoint.shape(key)) > 1 and key not in manifest.parameters]
    if not left or not any(space.startswith("R1 ") for space in rotated.spaces):
        return
    what = f"the artifact does not contain {some(left)}, and R1 rotates the residual stream that they use"
    config: Mapping[str, object] = weights.checkpoint.config or {}
    if any(isinstance(config.get(name), Mapping) for name in _OF_MEDIA):
        raise RecipeError(
            f"{recipe.source}: {what}, so the checkpoint would be wrong for images, sounds and videos",
            hint="remove R1 from rotations",
        )
    yield f"warning: {what}: their results will be wrong"


class _Matrices:
    """The matrices of a modifier; spaces of one size share theirs unless `randomize`."""

    def __init__(self, modifier: SpinQuantModifier, where: str) -> None:
        self._modifier, self._where = modifier, where
        self._known: dict[tuple[int, bool, int], Rotation] = {}

    def of(self, space: RotationSpace, number: int) -> Rotation:
        """Return the matrix of a space."""
        modifier, size = self._modifier, space.block
        if modifier.transform_block_size is not None and space.rotation == "R1":
            size = modifier.transform_block_size
            if space.block % size:
                raise RecipeError(
                    f"{self._where}: transform_block_size {size} does not divide the {space.block} channels of the "
                    "residual stream",
                    hint=f"use {largest_hadamard(space.block)}, for instance",
                )
        seed = modifier.seed + ((number + 1) << 32 if modifier.randomize else 0)
        key = size, space.keeps_mean, seed
        if key not in self._known:
            try:
                self._known[key] = rotation(size, modifier.transform_type, seed, keeps_mean=space.keeps_mean)
            except ValueError as error:
                hint = "use transform_type random-matrix"
                if space.rotation == "R1" and largest_hadamard(size) > 1:
                    hint += f", or transform_block_size {largest_hadamard(size)}"
                raise RecipeError(f"{self._where} cannot rotate {space.rotation}: {error}", hint=hint) from error
        return self._known[key]


def _turned(
    spaces: list[RotationSpace], untied: tuple[str, ...], matrices: _Matrices, missing: list[str]
) -> RotatedModel:
    turns: dict[str, tuple[Turn, ...]] = {}
    half: dict[str, tuple[Turn, ...]] = {}
    norms = {}
    for number, space in enumerate(spaces):
        made = matrices.of(space, number)
        by_weight = {norm.weight: norm for norm in space.norms}
        norms.update({weight: (norm, made) for weight, norm in by_weight.items()})
        starts = None if space.rotation == "R1" else space.starts
        for parameter in space.writers:
            turn = Turn(axis=parameter.axis, rotation=made, starts=starts)
            turns[parameter.name] = (*turns.get(parameter.name, ()), turn)
        for parameter in space.readers:
            turn = Turn(axis=parameter.axis, rotation=made, norm=by_weight.get(parameter.gain))
            if space.rotation == "R2":
                half[parameter.name] = turns.get(parameter.name, ())
            turns[parameter.name] = (*turns.get(parameter.name, ()), turn)
    return RotatedModel(
        turns=turns,
        norms=norms,
        untied=tuple(name for name in untied if name in turns),
        remarks=tuple(f"warning: not rotated: {text}" for text in missing),
        half=half,
        spaces=tuple(f"{space.rotation} of {space.writers[0].name}" for space in spaces),
    )
