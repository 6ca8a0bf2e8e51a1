"""The groups of a modifier: targets, and the arguments by which compressed-tensors quantizes them."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from runtime.recipe.fields import Located, Targets, allowed, located, only, rejection, require_known, require_table

if TYPE_CHECKING:
    from typing_extensions import Self

_LOWER = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)
_STRATEGIES = ", ".join(strategy.value for strategy in QuantizationStrategy)
Output = Annotated[None, only(None, reason="outputs are not quantized")]
Observer = Annotated[str | None, _LOWER, allowed("the name of an observer")]


class _ArgumentTypes(BaseModel):
    """Strict types of quantization arguments: compressed-tensors accepts "4" for 4 and 1 for true."""

    model_config = ConfigDict(strict=True, extra="allow")

    num_bits: Annotated[int | None, allowed("an integer")] = None
    type: Annotated[Literal["int", "float"] | None, _LOWER, allowed("int or float")] = None
    symmetric: Annotated[bool | None, allowed("true or false")] = None
    strategy: Annotated[QuantizationStrategy | None, Field(strict=False), _LOWER, allowed(_STRATEGIES)] = None
    group_size: Annotated[int | None, allowed("an integer")] = None
    observer: Observer = None


def _read_arguments(value: Any) -> QuantizationArgs | None:
    if value is None:
        return None
    table, known = require_table(value), QuantizationArgs.model_fields
    require_known(table, known, known)
    with located():
        return QuantizationArgs(**_ArgumentTypes.model_validate(table).model_dump(exclude_unset=True))


Arguments = Annotated[Any, PlainValidator(_read_arguments)]


class ConfigGroup(Located):
    """Targets and how they are quantized; a group without weights is for attention."""

    targets: Targets
    weights: Arguments = None
    input_activations: Arguments = None
    output_activations: Output = None
    format: Any = None

    @cached_property
    def scheme(self) -> QuantizationScheme:
        """The scheme as compressed-tensors defines it, not checked for support."""
        return QuantizationScheme(
            targets=[str(target) for target in self.targets],
            weights=self.weights,
            input_activations=self.input_activations,
            format=self.format,
        )

    @property
    def is_attention(self) -> bool:
        """Whether it rounds the inputs of modules without quantizing weights."""
        return self.weights is None and self.input_activations is not None

    @model_validator(mode="after")
    def _check(self) -> Self:
        with located():
            _ = self.scheme
        if self.is_attention and self.format is not None:
            raise rejection("{name} is not supported in a group for attention", "format", hint="remove it")
        return self


class Observers(Located):
    """Observers that replace those of the schemes."""

    weights: Observer = None
    input: Observer = None
    output: Output = None
