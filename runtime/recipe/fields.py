"""Fields that several modifiers of a recipe have, read with the line of every value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.console import shown
from runtime.errors import RecipeError
from runtime.recipe.yaml import Value

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

# compressed-tensors would take "4" for 4 and 1 for true.
ARGS_TYPES: dict[str, type] = {
    "num_bits": int,
    "type": str,
    "symmetric": bool,
    "strategy": str,
    "group_size": int,
    "observer": str,
}
_ROLES = {"weights": "weight_observer", "input": "input_observer", "output": "output_observer"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """A target: a module's name, `re:` with a regular expression, or a class; and its line."""

    text: str
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Observers:
    """The observers that a modifier asks for instead of its schemes' own; `None` where it does not."""

    weights: Value | None
    inputs: Value | None


def as_number(value: Any) -> Any:
    """The value, as a number where it can be one: to YAML 1.1, 1e-2 without a point is a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def read_whole(value: Value | None, *, default: int, least: int) -> int:
    """A whole number.

    Raises:
        RecipeError: when it is none, or smaller than `least`.
    """
    if value is None:
        return default
    number = value.plain()
    if type(number) is not int or number < least:
        what = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise value.error(f"{value.name} must be {what}, not {number!r}")
    return number


def read_part(value: Value | None, *, default: float) -> float:
    """A number between 0 and 1.

    Raises:
        RecipeError: when it is none.
    """
    if value is None:
        return default
    number = as_number(value.plain())
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number <= 1:
        raise value.error(f"{value.name} must be a number from 0 to 1, not {shown(value.plain())}")
    return float(number)


def require_no_op(value: Value, harmless: tuple[Any, ...], reason: str) -> None:
    """Accept values that change nothing.

    Raises:
        RecipeError: for any other, with the reason.
    """
    plain = value.plain()
    # The type, because in Python 0 is False.
    if not any(plain == other and type(plain) is type(other) for other in harmless):
        raise value.error(f"{value.name} {shown(plain)} cannot be obeyed: {reason}", hint="leave it out")


def read_observers(fields: Mapping[str, Value]) -> Observers:
    """`weight_observer` and `input_observer`, and `observer`, which goes before them.

    Raises:
        RecipeError: for a role that is none, or an observer of outputs.
    """
    found = {name: fields[name] for name in ("weight_observer", "input_observer") if name in fields}
    entry = fields.get("observer")
    if entry is not None and entry.plain() is not None:
        for role, value in entry.mapping().items():
            if role not in _ROLES:
                raise value.unknown("key of observer", _ROLES)
            if role == "output":
                require_no_op(value, (None,), "outputs are not quantized")
            else:
                found[_ROLES[role]] = value
    given = {name: value for name, value in found.items() if value.plain() is not None}
    return Observers(weights=given.get("weight_observer"), inputs=given.get("input_observer"))


def with_observers(origin: Value, scheme: QuantizationScheme, observers: Observers) -> QuantizationScheme:
    """A scheme with these observers instead of its own.

    Raises:
        RecipeError: for one that is not offered.
    """
    from runtime.formats.presets import MIN_MAX_OBSERVERS, checked

    for field, value in (("weights", observers.weights), ("input_activations", observers.inputs)):
        args = getattr(scheme, field)
        if value is None or args is None:
            continue
        name = value.text().lower()
        if field == "weights" and name in MIN_MAX_OBSERVERS and args.observer in (None, *MIN_MAX_OBSERVERS):
            continue  # a weight is observed once, whole, where these are one and the same
        changed = args.model_copy(update={"observer": name})
        try:
            scheme = checked(scheme.model_copy(update={field: changed}))
        except RecipeError as error:
            raise value.error(error.message, hint=error.hint) from error
    return scheme


def read_patterns(value: Value | None) -> tuple[Pattern, ...]:
    """Names and patterns, each with its line; none where there is no value."""
    items = [] if value is None else value.items()
    return tuple(Pattern(text=item.pattern(), line=item.line) for item in items)


def read_targets(value: Value) -> tuple[Pattern, ...]:
    """The targets of a group.

    Raises:
        RecipeError: when there is none.
    """
    targets = read_patterns(value)
    if not targets:
        raise value.error("targets must name at least one module")
    return targets


def read_args(value: Value) -> QuantizationArgs:
    """How numbers are rounded.

    Raises:
        RecipeError: for what compressed-tensors does not take, with the line.
    """
    from compressed_tensors.quantization import QuantizationArgs

    fields = value.mapping()
    for name, field in fields.items():
        if name not in QuantizationArgs.model_fields:
            raise field.unknown(f"key of {value.name}", QuantizationArgs.model_fields)
        plain = field.plain()
        if name in ARGS_TYPES and plain is not None and type(plain) is not ARGS_TYPES[name]:
            raise field.error(f"{name} must be {ARGS_TYPES[name].__name__}, not {shown(plain)}")
    try:
        given = {name: field.plain() for name, field in fields.items()}
        if isinstance(given.get("observer"), str):
            given["observer"] = given["observer"].lower()  # the peer finds observers in any spelling
        return QuantizationArgs(**given)
    except (ValueError, NotImplementedError, TypeError) as error:
        raise _culprit(value, fields, error).error(f"{value.name}: {reason_of(error)}") from error


def _culprit(value: Value, fields: Mapping[str, Value], error: Exception) -> Value:
    """The field that compressed-tensors' complaint is about, or the whole mapping."""
    errors = error.errors() if hasattr(error, "errors") else []
    location = errors[0]["loc"] if errors else ()
    return fields.get(location[0], value) if location else value


def reason_of(error: Exception) -> str:
    """The first line of what compressed-tensors complains about."""
    message = str(error.errors()[0]["msg"] if hasattr(error, "errors") else error)
    return message.removeprefix("Value error, ").splitlines()[0]
