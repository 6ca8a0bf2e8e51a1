"""The modifiers of a recipe that rescale weights before they are quantized: AWQ and SmoothQuant."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from runtime.recipe.fields import (
    Fraction,
    Located,
    Pattern,
    Positive,
    Switch,
    Targets,
    allowed,
    as_tuple,
    only,
    rejection,
)
from runtime.recipe.modifier import Derived, Modifier
from runtime.recipe.modifiers import QuantizationModifier
from runtime.recipe.yaml import Items, Table


def _as_table(value: Any) -> Any:
    """Give the pair `[balance_layers, smooth_layer]` the form of a mapping."""
    if not isinstance(value, Items):
        return value
    if len(value) != 2:
        raise rejection("a mapping is a list of balance_layers and smooth_layer, or a mapping with these keys")
    table = Table(zip(("balance_layers", "smooth_layer"), value, strict=True))
    table.name, table.line, table.lines = "a mapping", value.line, {}
    return table


class LayerMapping(Located):
    """A module whose output is divided, and patterns of the modules whose input is multiplied in turn."""

    smooth_layer: Pattern
    balance_layers: Targets
    activation_hook_target: Annotated[None, only(None, reason="inputs are measured where they are used")] = None


class _RescalingModifier(Modifier):
    """Fields of modifiers that rescale."""

    # Empty for those that the compiler found.
    mappings: Annotated[tuple[Annotated[LayerMapping, BeforeValidator(_as_table)], ...], BeforeValidator(as_tuple)] = ()
    requires_calibration_data: Annotated[bool, only(True, reason="it always does")] = True
    resolved_mappings_: Derived = None
    scales_: Derived = None


class SmoothQuantModifier(_RescalingModifier):
    """Divides inputs with outliers by SmoothQuant's scales."""

    smoothing_strength: Fraction = 0.5
    algorithm: Annotated[Literal["smoothquant"], only("smoothquant", reason="log equalization is not implemented")] = (
        "smoothquant"
    )
    num_calibration_steps: Annotated[None, only(None, reason="all data is used; limit it with --samples")] = None
    calibration_function: Annotated[None, only(None, reason="the run feeds the model")] = None


class AWQModifier(_RescalingModifier):
    """Multiplies important columns by AWQ's scales.

    Attributes:
        duo_scaling: whether the search considers the magnitude of weights; "both" tries both.
        n_grid: how many candidates are tried.
        clip: whether ranges are searched for weights that are rounded to nearest.
    """

    algorithm: ClassVar[Literal["awq"]] = "awq"

    duo_scaling: Annotated[bool | Literal["both"], allowed("true, false or both")] = True
    n_grid: Positive = 20
    clip: Switch = True
    offload_device: Annotated[str | None, only(None, "cpu", reason="nothing is cached that could be offloaded")] = None

    @classmethod
    def split(cls, table: Table) -> tuple[Table, list[Table]]:
        """Split a modifier in the older form of the dialect, which also rounds, into one that rescales and one that
        rounds.
        """
        rounds = "scheme" in table or "config_groups" in table
        stray = [key for key in table if key in QuantizationModifier.model_fields and key not in cls.model_fields]
        if stray and not rounds:
            raise rejection("AWQModifier has no scheme", stray[0], hint="give one to the modifier after it")
        if not rounds:
            return table, []
        rescaling = _part(table, (key for key in table if key not in (*stray, "ignore")))
        return rescaling, [_part(table, (key for key in table if key in QuantizationModifier.model_fields))]

    @classmethod
    def _validated(cls, table: Table) -> Table:
        rescaling, rounding = cls.split(table)
        for part in rounding:
            QuantizationModifier.model_validate(part)
        return rescaling


def _part(table: Table, keys: Iterable[str]) -> Table:
    part = Table({key: table[key] for key in keys})
    part.name, part.line, part.lines = table.name, table.line, table.lines
    return part


Transform = AWQModifier | SmoothQuantModifier
