"""The modifier of a recipe that learns how weights are rounded, by gradients of the outputs of blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

from compressed_tensors.quantization import QuantizationScheme

from runtime.recipe.fields import Switch, only
from runtime.recipe.modifiers import Algorithm, AutoRoundOptions, Group, Location, QuantizationModifier
from runtime.recipe.yaml import Text


class AutoRoundModifier(QuantizationModifier, AutoRoundOptions):
    """Rounds weights by AutoRound."""

    algorithm: ClassVar[Algorithm] = "auto_round"

    # Accepted and ignored: the artifact's code is compiled already.
    enable_torch_compile: Switch = True
    device_ids: Annotated[None, only(None, reason="a run uses one device for each worker")] = None
    requires_calibration_data: Annotated[bool, only(True, reason="it always does")] = True

    def _group(self, scheme: QuantizationScheme, targets: tuple[Text, ...], location: Location) -> Group:
        group = super()._group(scheme, targets, location)
        return replace(group, tuning=AutoRoundOptions(**self.model_dump(include=set(AutoRoundOptions.model_fields))))
