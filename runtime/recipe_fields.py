"""Fields that several modifiers of a recipe have, read with the line of every value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.console import shown
from runtime.errors import RecipeError
from runtime.yaml_lines import Value

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

_ROLES = {"weights": "weight_observer", "input": "input_observer", "output": "output_observer"}


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
    from runtime.presets import MIN_MAX_OBSERVERS, checked

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
