"""Types of a recipe's fields, and errors that name a field, its line and what it may be.

Validation itself is pydantic's. An error has the location of a value in the recipe; `reported` looks up its line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from runtime.console import shown
from runtime.errors import RecipeError
from runtime.patterns import fault
from runtime.recipe.yaml import Items, Table, Text

if TYPE_CHECKING:
    from typing_extensions import Self


def rejection(message: str, *location: int | str, hint: str = "", value: Any = None) -> ValidationError:
    """Return an error for a validator to raise.

    Args:
        message: the problem; `{name}` and `{value}` stand for the name of the field and for `value`.
        location: of the field, seen from the value that is validated.
        hint: what to do.
        value: the invalid value.
    """
    details = PydanticCustomError("recipe", "{message}", {"message": message, "hint": hint})
    return ValidationError.from_exception_data("recipe", [InitErrorDetails(type=details, loc=location, input=value)])


@contextlib.contextmanager
def located(*location: str) -> Iterator[None]:
    """Give errors about quantization schemes the location of a field."""
    try:
        yield
    except RecipeError as error:
        raise rejection(error.message, *location, hint=error.hint) from error
    except (NotImplementedError, TypeError) as error:  # of compressed-tensors
        raise rejection(f"{{name}}: {error}", *location) from error


@contextlib.contextmanager
def reported(table: Table, origin: str) -> Iterator[None]:
    """Report the first invalid value of a table of the file `origin`, with its line, if it has one."""
    try:
        yield
    except ValidationError as error:
        found = [(*_place(table, details["loc"]), details) for details in error.errors(include_url=False)]
        line, name, details = min(found, key=lambda entry: entry[0])
        message, hint = details["msg"].removeprefix("Value error, ").partition("\n")[0], ""
        if details["type"] == "recipe":
            message, hint = details["ctx"]["message"], details["ctx"]["hint"]
            message = message.replace("{name}", name).replace("{value}", shown(details["input"]))
        elif details["type"] == "missing":
            message = f"{name} has no {details['loc'][-1]}"
        elif message.startswith("Input should be "):
            expected = message.removeprefix("Input should be ").replace("a valid dictionary", "a mapping")
            message = f"{name} must be {expected}, not {shown(details['input'])}"
        else:
            message = f"{name}: {message}"
        if line:
            message = f"{origin}:{line}: {message}"
        elif origin not in message:
            message = f"{origin}: {message}"
        raise RecipeError(message, hint=hint) from error


def _place(value: Any, location: tuple[int | str, ...]) -> tuple[int, str]:
    """Find the line and the name of a value; what pydantic adds to the location is skipped."""
    line, name = value.line, value.name
    for key in location:
        if isinstance(value, Table) and key in value:
            line, name, value = value.lines[str(key)], str(key), value[str(key)]
        elif isinstance(value, Items) and isinstance(key, int):
            line, name, value = value.lines[key], f"an element of {name}", value[key]
    return line, name


class Only(PlainValidator):
    """Accepts an unsupported field with the values that change nothing."""


def only(*values: Any, reason: str) -> Only:
    """Accept an unsupported field with these values; `reason` says why other values are rejected."""

    def check(value: Any) -> Any:
        # In Python, 0 equals False.
        if any(value == other and isinstance(value, bool) is isinstance(other, bool) for other in values):
            return value
        raise rejection(f"{{name}} {{value}} is not supported: {reason}", value=value, hint="remove it")

    return Only(check)


def allowed(expected: str, *, hint: str = "") -> WrapValidator:
    """State in words what a field may be, for the error about anything else."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise rejection(f"{{name}} must be {expected}, not {{value}}", value=value, hint=hint) from error

    return WrapValidator(check)


class Located(BaseModel):
    """A mapping of a recipe, which knows its key and its line."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    _name: str = PrivateAttr(default="")
    _line: int = PrivateAttr(default=0)
    _table: Table = PrivateAttr(default_factory=Table)

    @property
    def name(self) -> str:
        """The key of the mapping."""
        return self._name

    @property
    def line(self) -> int:
        """The line of the mapping; the first line of the file is 1."""
        return self._line

    @property
    def table(self) -> Table:
        """The mapping as it was written."""
        return self._table

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Show the fields that were given."""
        return ((key, value) for key, value in super().__repr_args__() if key in self.model_fields_set)

    @model_validator(mode="wrap")
    @classmethod
    def _locate(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        table, fields = require_table(value), cls.model_fields
        require_known(
            table, fields, [key for key in fields if not any(isinstance(e, Only) for e in fields[key].metadata)]
        )
        model = handler(table)
        model._name, model._line, model._table = table.name, table.line, table
        return model


def require_table(value: Any, *location: str) -> Table:
    """Return a value that must be a mapping.

    Raises:
        ValidationError: it is anything else.
    """
    if isinstance(value, Table):
        return value
    raise rejection("{name} must be a mapping, not {value}", *location, value=value)


def python_table(name: str, values: Mapping[Any, Any]) -> Table:
    """Return a mapping that was written in Python as one of a recipe, without lines."""
    table = Table({str(key): _from_python(str(key), value) for key, value in values.items()})
    table.name, table.line, table.lines = name, 0, dict.fromkeys(table, 0)
    return table


def _from_python(name: str, value: Any) -> Any:
    """Convert a value to those that a recipe can have; others are left to the field, which rejects them."""
    if isinstance(value, BaseModel) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        keys = value.model_fields_set if isinstance(value, BaseModel) else [f.name for f in dataclasses.fields(value)]
        given = {key: getattr(value, key) for key in sorted(keys)}
        return _from_python(name, {key: item for key, item in given.items() if item is not None})
    if isinstance(value, Enum):
        return _from_python(name, value.value)
    if isinstance(value, str):
        return Text(value)
    if isinstance(value, Mapping):
        return python_table(name, value)
    if isinstance(value, (list, tuple)):
        items = Items(_from_python(f"an element of {name}", item) for item in value)
        items.line, items.lines = 0, [0] * len(items)
        return items
    if type(value).__module__ == "numpy" and callable(getattr(value, "item", None)):
        return value.item() if getattr(value, "ndim", 0) == 0 else value
    if type(value).__module__ == "torch":  # a device or a dtype
        return Text(str(value).removeprefix("torch."))
    return value


def require_known(table: Table, known: Collection[str], supported: Collection[str]) -> None:
    """Reject a key that is not known.

    Raises:
        ValidationError: at the key, naming the nearest one that is supported.
    """
    for key in table:
        if key not in known:
            raise rejection(f"unknown key {key!r} of {table.name}", key, hint=nearest(key, supported))


def nearest(key: str, supported: Collection[str], cutoff: float = 0.4) -> str:
    """Say which supported key is meant, or list them."""
    near = difflib.get_close_matches(key, supported, n=1, cutoff=cutoff)
    return f"did you mean {near[0]}?" if near else f"supported: {', '.join(supported)}"


def as_number(value: Any) -> Any:
    """Read a string as a number if it is one: to YAML 1.1, 1e-2 without a point is a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def as_tuple(value: Any) -> Any:
    """Make a tuple of a list; any other value stands for a list of one, and null for an empty list."""
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)


def _pattern(value: Any) -> Text:
    if not isinstance(value, Text):
        raise rejection("{name} must be a string, not {value}", value=value)
    if not value.removeprefix("re:"):
        raise rejection("{name} is an empty pattern")
    problem = fault(value.removeprefix("re:")) if value.startswith("re:") else ""
    if problem:
        raise rejection(f"{str(value[:200])!r} is not a valid regular expression: {problem}")
    return value


def _not_empty(value: Any) -> Any:
    if not value:
        raise rejection("{name} must name at least one module")
    return value


Switch = Annotated[bool, allowed("true or false")]
Positive = Annotated[int, Field(ge=1), allowed("a positive integer")]
Count = Annotated[int, Field(ge=0), allowed("an integer of at least 0")]
Seed = Annotated[int, Field(ge=0, lt=2**63), allowed("an integer of at least 0 and below 2**63")]
Fraction = Annotated[float, Field(ge=0, le=1), BeforeValidator(as_number), allowed("a number from 0 to 1")]
# The name of a module, `re:` with a regular expression, or a class.
Pattern = Annotated[Text, PlainValidator(_pattern)]
Patterns = Annotated[tuple[Pattern, ...], BeforeValidator(as_tuple)]
Targets = Annotated[tuple[Pattern, ...], BeforeValidator(as_tuple), AfterValidator(_not_empty)]
