"""The modifier that leaves the choice of schemes to a search, which replaces it by a modifier with plain groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PlainValidator

from runtime.errors import RecipeError
from runtime.formats.presets import scheme_from_preset
from runtime.recipe.config_groups import Observer
from runtime.recipe.fields import Positive, Targets, allowed, as_tuple, rejection
from runtime.recipe.modifier import Modifier
from runtime.recipe.modifiers import GptqOptions
from runtime.recipe.recipe import Recipe
from runtime.recipe.yaml import Text, in_blocks

UNQUANTIZED = "unquantized"  # the candidate that leaves a module as it is
DEFAULT_CANDIDATES = ("W2A16", "W3A16", "W4A16", "W8A16")


def _read_candidates(value: Any) -> tuple[str, ...]:
    names = as_tuple(value)
    if not names or not all(isinstance(name, str) for name in names):
        raise rejection("{name} must be a list of presets and unquantized, not {value}", value=value)
    spelled = [str(name).lower() if str(name).lower() == UNQUANTIZED else str(name).upper() for name in names]
    for name in spelled:
        if name != UNQUANTIZED:
            _require_weights_only(name)
    if all(name == UNQUANTIZED for name in spelled):
        raise rejection("{name} has no scheme", hint=f"such as {', '.join(DEFAULT_CANDIDATES)}")
    return tuple(dict.fromkeys(spelled))


def _require_weights_only(name: str) -> None:
    try:
        scheme = scheme_from_preset(name, ["Linear"])
    except RecipeError as error:
        raise rejection(error.message, hint=error.hint) from error
    if scheme.input_activations is not None:
        raise rejection(
            f"the candidate {name} rounds inputs, and a search only measures errors of weights",
            hint=f"use schemes with 16 bit inputs, such as {', '.join(DEFAULT_CANDIDATES)}",
        )


def _read_budget(value: Any) -> str:
    from runtime.errors import UsageError
    from runtime.recipe.bit_budget import BitBudget

    if not isinstance(value, str):
        raise rejection("{name} must be a text such as 3.5bits, 2.1GiB or W4A16, not {value}", value=value)
    try:
        return BitBudget.parse(value, option="budget").text
    except UsageError as error:
        raise rejection(error.message, hint=error.hint) from error


class AutoBitsModifier(Modifier, GptqOptions):
    """Chooses one of several schemes for each layer, by a search before the run.

    Attributes:
        budget: average stored bits of the quantized weights, such as 3.5bits, bytes of the checkpoint, or a preset,
            whose size is the budget.
        candidates: presets with 16 bit inputs, and `unquantized`.
        algorithm: that of the modifier that the search writes, and of the errors that it compares.
        sensitivity: how the search weighs errors of layers: by gradients, by forwards with errors, or not at all.
        sensitivity_samples: how many calibration samples it uses for that.
    """

    targets: Targets = (Text("Linear"),)
    budget: Annotated[str, PlainValidator(_read_budget)]
    candidates: Annotated[tuple[str, ...], PlainValidator(_read_candidates)] = DEFAULT_CANDIDATES
    algorithm: Annotated[
        Literal["gptq", "rtn"],
        BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value),
        allowed("gptq or rtn"),
    ] = "gptq"
    weight_observer: Observer = None
    sensitivity: Annotated[Literal["gradient", "forward", "none"], allowed("gradient, forward or none")] = "gradient"
    sensitivity_samples: Positive | None = None

    def candidate_recipe(self, name: str, source: str) -> Recipe:
        """Return the recipe that quantizes all targets with one candidate.

        Raises:
            RecipeError: a field does not fit the candidate.
        """
        return Recipe.from_text(in_blocks(self.plain({name: list(self.targets)}, self.ignore)), source)

    def plain(self, targets: Mapping[str, Sequence[str]], ignore: Sequence[str]) -> dict[str, Any]:
        """Return the modifier that quantizes with presets, as a mapping of its name to its fields.

        Args:
            targets: of each preset.
            ignore: patterns of modules that are not quantized.
        """
        fields: dict[str, Any] = {"scheme": {name: list(map(str, own)) for name, own in targets.items()}}
        fields["ignore"] = list(map(str, ignore))
        kept = ("weight_observer", "min_tokens", *(GptqOptions.model_fields if self.algorithm == "gptq" else ()))
        fields |= {key: getattr(self, key) for key in kept if key in self.model_fields_set}
        return {"GPTQModifier" if self.algorithm == "gptq" else "QuantizationModifier": fields}
