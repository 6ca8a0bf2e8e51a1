"""The modifier that leaves the choice of schemes to a search, which replaces it by a modifier with plain groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, PlainValidator, model_validator

from runtime.errors import RecipeError
from runtime.formats.presets import scheme_from_preset
from runtime.recipe.config_groups import Observer
from runtime.recipe.fields import Positive, Targets, allowed, as_tuple, rejection
from runtime.recipe.modifier import Modifier
from runtime.recipe.modifiers import GPTQModifier, GptqOptions, QuantizationModifier
from runtime.recipe.yaml import Items, Table, Text

UNQUANTIZED = "unquantized"  # the candidate that leaves a module as it is
DEFAULT_CANDIDATES = ("W2A16", "W3A16", "W4A16", "W5A16", "W6A16", "W8A16")


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

    @model_validator(mode="after")
    def _require_used(self) -> Self:
        unused = [name for name in GptqOptions.model_fields if name in self.model_fields_set]
        if self.algorithm == "rtn" and unused:
            raise rejection("{name} has no effect with algorithm: rtn", unused[0], hint="remove it")
        if self.sensitivity == "none" and self.sensitivity_samples is not None:
            hint = "remove it, or sensitivity: none"
            raise rejection("{name} has no effect with sensitivity: none", "sensitivity_samples", hint=hint)
        return self

    def with_candidate(self, name: str) -> QuantizationModifier:
        """Return the modifier that quantizes all targets with one candidate; its lines are those of this modifier.

        Raises:
            ValidationError: a field does not fit the candidate.
        """
        fields = {"targets": Items(map(Text, ("Linear",))), **self._kept(), "scheme": Text(name, self.line)}
        table = Table({key: self.table.get(key, value) for key, value in fields.items()})
        table.name, table.line = self.name or type(self).__name__, self.line
        table.lines = {key: self.table.lines.get(key, self.line) for key in table}
        return self._kind.model_validate(table)

    def stand_in(self) -> QuantizationModifier:
        """Return the modifier with the largest candidate, for plans and checks before the search."""
        schemes = {name: scheme_from_preset(name, ["Linear"]) for name in self.candidates if name != UNQUANTIZED}
        return self.with_candidate(max(schemes, key=lambda name: int(schemes[name].weights.num_bits)))

    def plain(self, targets: Mapping[str, Sequence[str]], ignore: Sequence[str]) -> dict[str, Any]:
        """Return the modifier that quantizes with presets, as a mapping of its name to its fields.

        Args:
            targets: of each preset.
            ignore: patterns of modules that are not quantized.
        """
        fields: dict[str, Any] = {"scheme": {name: list(map(str, own)) for name, own in targets.items()}}
        fields |= {**self._kept(), "ignore": list(map(str, ignore))}
        return {self._kind.__name__: fields}

    @property
    def _kind(self) -> type[QuantizationModifier]:
        return GPTQModifier if self.algorithm == "gptq" else QuantizationModifier

    def _kept(self) -> dict[str, Any]:
        """Return the given fields that the plain modifier has as well."""
        options = GptqOptions.model_fields if self.algorithm == "gptq" else ()
        known = ("ignore", "weight_observer", "min_tokens", *options)
        return {key: self.table[key] for key in known if key in self.table}
