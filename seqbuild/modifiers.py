"""Modifiers of a recipe, to create in Python; their names and fields are those of llm-compressor."""

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.recipe.auto_bits_modifier import AutoBitsModifier
from runtime.recipe.auto_round_modifier import AutoRoundModifier
from runtime.recipe.modifiers import GPTQModifier, QuantizationModifier
from runtime.recipe.rescaling_modifiers import AWQModifier, SmoothQuantModifier
from runtime.recipe.rotation_modifiers import QuIPModifier, SpinQuantModifier

__all__ = [
    "AWQMapping",
    "AWQModifier",
    "AutoBitsModifier",
    "AutoRoundModifier",
    "GPTQModifier",
    "QuIPModifier",
    "QuantizationModifier",
    "SmoothQuantModifier",
    "SpinQuantModifier",
]


@dataclass(frozen=True)
class AWQMapping:
    """A mapping of `AWQModifier`: the module whose output is divided, and those whose input is multiplied in turn.

    Attributes:
        smooth_layer: a pattern of the module.
        balance_layers: patterns of the modules that read its output.
        activation_hook_target: accepted as None only: inputs are measured where they are used.
    """

    smooth_layer: str
    balance_layers: Sequence[str]
    activation_hook_target: str | None = None
