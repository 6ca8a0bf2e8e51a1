"""Fields that all modifiers of a recipe have."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic_core import PydanticUseDefault

from runtime.recipe.fields import Count, Located, Patterns, only, python_table, reported
from runtime.recipe.yaml import Table

_Schedule = Annotated[None, only(None, reason="schedules belong to training")]
_State = Annotated[bool, only(False, reason="it is the state of a modifier, not a setting")]
Derived = Annotated[None, only(None, reason="it is the state of a modifier, not a setting")]


def default_of(value: Any) -> Any:
    """Take the default of a field instead of null."""
    if value is None:
        raise PydanticUseDefault
    return value


class Modifier(Located):
    """Fields of all modifiers. In Python, a modifier is created with these as keyword arguments."""

    ignore: Patterns = ()
    min_tokens: Count = 0
    requires_calibration_data: Annotated[
        bool, only(True, False, reason="it must be true or false, and follows from the algorithm")
    ] = True
    index: _Schedule = None
    group: _Schedule = None
    start: _Schedule = None
    end: _Schedule = None
    update: _Schedule = None
    initialized_: _State = False
    finalized_: _State = False
    started_: _State = False
    ended_: _State = False

    def __init__(self, /, **fields: Any) -> None:
        """Create a modifier in Python.

        Raises:
            RecipeError: for an invalid or unsupported field.
        """
        table = python_table(type(self).__name__, fields)
        with reported(table, table.name):
            self.__pydantic_validator__.validate_python(self._validated(table), self_instance=self)
        self._table = table

    # Else pydantic would call it for a mapping of a file, too.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def _validated(cls, table: Table) -> Table:
        """Return the fields that the modifier itself validates."""
        return table
