"""Convert the assumptions of a trace about sizes to conditions that a host checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import sympy

from runtime.errors import TraceError
from seqbuild.trace.sizes.relations import (
    RELATIONS,
    always_holds,
    as_python,
    is_expressible,
    is_range,
    substitute_equalities,
)

if TYPE_CHECKING:
    from seqbuild.trace.sizes.symbols import WatchedSizes


def conditions(shape_env: WatchedSizes, names: Mapping[sympy.Symbol, str]) -> Iterator[str]:
    """Yield the relations between input sizes, besides their ranges, under which the trace is valid.

    Args:
        shape_env: the symbols of the trace.
        names: names of the symbols for sizes of inputs. A relation with other symbols is about values and is ensured by
            the code that computes them.

    Raises:
        TraceError: if a relation cannot be expressed as a condition.
    """
    seen: dict[str, None] = {}
    relations = list(dict.fromkeys(shape_env.replace(guard.expr) for guard in shape_env.guards))
    decided = {shape_env.replace(relation) for relation in shape_env.decided}
    equalities: list[Any] = []
    for relation in relations:
        if (
            isinstance(relation, sympy.Eq)
            and is_expressible(relation)
            and substitute_equalities(relation, equalities) != sympy.true
        ):
            equalities.append(relation)
    for relation in relations:
        symbols = relation.free_symbols
        if type(relation) not in RELATIONS or not symbols or any(symbol not in names for symbol in symbols):
            continue
        known = substitute_equalities(relation, (other for other in equalities if other is not relation))
        is_decided = relation in decided
        if known == sympy.true or is_range(relation, is_decided=is_decided):
            continue
        if not is_decided and (always_holds(relation) or always_holds(known)):
            continue
        left, right = (as_python(side, names) for side in relation.args)
        if left is None or right is None:
            raise TraceError(
                f"the model's code depends on {relation.xreplace({s: sympy.Symbol(n) for s, n in names.items()})}, "
                "which a condition of an artifact cannot express",
                hint="make the function that depends on it one opaque step with --ignore NAME",
            )
        seen.setdefault(f"{left} {RELATIONS[type(relation)]} {right}")
    yield from seen
