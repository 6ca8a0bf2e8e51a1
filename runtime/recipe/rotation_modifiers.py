"""The modifiers of a recipe that rotate weights before anything else changes them: SpinQuant and QuIP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from runtime.recipe.fields import Patterns, Positive, Seed, Switch, Targets, allowed, as_tuple, only, rejection
from runtime.recipe.modifier import Modifier
from runtime.recipe.yaml import Text

if TYPE_CHECKING:
    from typing_extensions import Self

TransformType = Literal["hadamard", "random-hadamard", "random-matrix"]
_TRANSFORM_TYPE = allowed("hadamard, random-hadamard or random-matrix")


def _names(*known: str) -> BeforeValidator:
    """Read a list of names in upper or lower case, each once, in the order of `known`."""

    def read(value: Any) -> Any:
        given = as_tuple(value)
        spelled = {name.lower(): name for name in known}
        if not given or not all(isinstance(entry, str) and entry.lower() in spelled for entry in given):
            return value  # an error, whose message shows it as it was written
        return tuple(sorted(dict.fromkeys(spelled[entry.lower()] for entry in given), key=known.index))

    return BeforeValidator(read)


def _dtype(value: Any) -> Any:
    return value.removeprefix("torch.") if isinstance(value, str) else value


class _RotationModifier(Modifier):
    """Fields of modifiers that rotate.

    Attributes:
        randomize: whether every space has a random matrix of its own, instead of one for all spaces of its size.
        precision: the dtype of rotations that stay in the model; those that are fused are computed in float64.
        transform_block_size: the size of the blocks of a block-diagonal matrix; None for the size of the space. R2 and
            R3 always rotate whole heads.
        seed: of random matrices.
    """

    randomize: Switch = False
    learnable: Annotated[bool, only(False, reason="rotations are not trained")] = False
    precision: Annotated[
        Literal["float64", "float32", "bfloat16", "float16"],
        allowed("float64, float32, bfloat16 or float16"),
        BeforeValidator(_dtype),
    ] = "float64"
    transform_block_size: Positive | None = None
    seed: Seed = 0
    min_tokens: Annotated[int, only(0, reason="rotations need no data")] = 0
    requires_calibration_data: Annotated[bool, only(True, False, reason="it must be true or false")] = False
    transform_config: Annotated[None, only(None, reason="it follows from the other fields")] = None


class SpinQuantModifier(_RotationModifier):
    """Rotates the residual stream (R1), values (R2), queries and keys (R3), and inputs of down projections (R4).

    R1 and R2 are fused into weights; R3 and R4 stay in the model.
    """

    rotations: Annotated[
        tuple[Literal["R1", "R2", "R3", "R4"], ...],
        Field(min_length=1),
        allowed("a list of R1, R2, R3 and R4"),
        _names("R1", "R2", "R3", "R4"),
    ] = ("R1", "R2")
    transform_type: Annotated[TransformType, _TRANSFORM_TYPE] = "hadamard"
    mappings: Annotated[None, only(None, reason="the compiler finds what is rotated")] = None
    norm_mappings: Annotated[None, only(None, reason="the compiler finds the norms to fold")] = None
    ignore: Annotated[Patterns, only(None, reason="a rotation changes every module of its space")] = ()

    @model_validator(mode="after")
    def _require_effect(self) -> Self:
        if self.transform_block_size is not None and not {"R1", "R4"} & set(self.rotations):
            raise rejection(
                "{name} has no effect without R1 or R4: R2 and R3 rotate whole heads",
                "transform_block_size",
                hint="leave it out, or add R1 or R4 to rotations",
            )
        return self


class QuIPModifier(_RotationModifier):
    """Rotates the inputs (v) and outputs (u) of each Linear module by transforms that stay in the model."""

    rotations: Annotated[
        tuple[Literal["v", "u"], ...], Field(min_length=1), allowed("a list of v and u"), _names("v", "u")
    ] = ("v",)
    transform_type: Annotated[TransformType, _TRANSFORM_TYPE] = "random-hadamard"
    targets: Targets = (Text("Linear"),)
    ignore: Patterns = (Text("lm_head"),)


Rotation = SpinQuantModifier | QuIPModifier
