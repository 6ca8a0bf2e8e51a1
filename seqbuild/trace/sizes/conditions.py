"""Turn what a trace assumed about sizes into conditions that a host checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import sympy

from runtime.errors import TraceError
from seqbuild.trace.sizes.relations import RELATIONS, is_certain, is_range, is_statable, with_equalities, written

if TYPE_CHECKING:
    from seqbuild.trace.sizes.symbols import WatchedSizes


def conditions(shape_env: WatchedSizes, names: Mapping[sympy.Symbol, str]) -> Iterator[str]:
    """Relations between sizes of inputs that the trace needs besides their ranges, each once.

    Args:
        shape_env: of the trace.
        names: of the symbols that stand for sizes of inputs; a relation with others is about values, and made sure of
            by the code that made them.

    Raises:
        TraceError: for one that cannot be written down.
    """
    seen: dict[str, None] = {}
    relations = list(dict.fromkeys(shape_env.replace(guard.expr) for guard in shape_env.guards))
    decided = {shape_env.replace(relation) for relation in shape_env.decided}
    equalities: list[Any] = []
    for relation in relations:
        if (
            isinstance(relation, sympy.Eq)
            and is_statable(relation)
            and with_equalities(relation, equalities) != sympy.true
        ):
            equalities.append(relation)
    for relation in relations:
        symbols = relation.free_symbols
        if type(relation) not in RELATIONS or not symbols or any(symbol not in names for symbol in symbols):
            continue
        known = with_equalities(relation, (other for other in equalities if other is not relation))
        is_decided = relation in decided
        if known == sympy.true or is_range(relation, is_decided=is_decided):
            continue
        if not is_decided and (is_certain(relation) or is_certain(known)):
            continue
        left, right = (written(side, names) for side in relation.args)
        if left is None or right is None:
            raise TraceError(
                f"the model's code decides by {relation.xreplace({s: sympy.Symbol(n) for s, n in names.items()})}, "
                "which an artifact cannot state",
                hint="make the function that decides one opaque step with --ignore NAME",
            )
        seen.setdefault(f"{left} {RELATIONS[type(relation)]} {right}")
    yield from seen
