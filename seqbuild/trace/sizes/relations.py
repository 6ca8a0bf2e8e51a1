"""Analyze relations between symbolic sizes: which always hold, and which an artifact can state as conditions."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy
from torch.utils._sympy.functions import (
    CeilToInt,
    FloatPow,
    FloatTrueDiv,
    FloorDiv,
    FloorToInt,
    IntTrueDiv,
    Mod,
    PythonMod,
    RoundToInt,
    ToFloat,
    TruncToInt,
)

RELATIONS: dict[Any, str] = {
    sympy.Eq: "==",
    sympy.Ne: "!=",
    sympy.StrictLessThan: "<",
    sympy.LessThan: "<=",
    sympy.StrictGreaterThan: ">",
    sympy.GreaterThan: ">=",
}
_ROUNDED: dict[Any, str] = {CeilToInt: "ceil", FloorToInt: "floor", RoundToInt: "round", TruncToInt: "trunc"}
# Sizes for testing a relation: the first size, and the step to each further one.
_TRIALS = ((1, 0), (2, 1), (3, 4), (7, -1), (16, 13), (31, 5), (64, 64), (127, 1), (1000, 17), (4099, 101), (65537, 3))

_ENOUGH_TRIALS = 4
_MOST_SUMMED = 2000


def is_expressible(relation: Any) -> bool:
    """Return whether a relation can be expressed as a condition or needs none."""
    if type(relation) not in RELATIONS or not relation.free_symbols or is_range(relation):
        return True
    names = {symbol: str(symbol) for symbol in relation.free_symbols}
    return all(as_python(side, names) is not None for side in relation.args) or always_holds(relation)


def is_implied(relation: Any, known: Iterable[Any]) -> bool:
    """Return whether known relations of the same symbols imply a relation, judging by a few sizes."""
    same = [other for other in known if other.free_symbols and other.free_symbols <= relation.free_symbols]
    try:
        trials = [
            trial
            for trial in _trials(sorted(relation.free_symbols, key=str))
            if all(bool(other.xreplace(trial)) for other in same)
        ]
        return len(trials) >= _ENOUGH_TRIALS and all(bool(relation.xreplace(trial)) for trial in trials)
    except (TypeError, ZeroDivisionError):
        return False


def substitute_equalities(relation: Any, known: Iterable[Any]) -> Any:
    """Substitute numbers for the parts of a relation that are known to equal them.

    Torch substitutes single symbols only, not products such as the number of patches of an image.
    """
    for other in known:
        if relation.free_symbols and isinstance(other, sympy.Eq) and other.rhs.is_Integer:
            relation = relation.subs(other.lhs, other.rhs)
    return relation


def is_assumption(relation: Any, *, is_decided: bool = False) -> bool:
    """Return whether a relation restricts a trace to some data.

    This is not the case if it holds for all sizes, or only states that two sizes of inputs are equal.

    Args:
        relation: a relation between sizes.
        is_decided: whether the model's code branched on it. If so, it is not about memory layout, and testing a few
            sizes is not enough, because code that tests for one particular length tests for a rare one.
    """
    if type(relation) not in RELATIONS or not relation.free_symbols:
        return False
    is_match = isinstance(relation, sympy.Eq) and all(side.is_Symbol for side in relation.args)
    return not is_match and (is_decided or not always_holds(relation))


def holds_in_all_iterations(relation: Any, iteration_counts: Mapping[sympy.Symbol, Any]) -> bool:
    """Return whether a relation holds in all iterations of loops for all sizes, judging by a few sizes.

    Args:
        relation: a relation that contains loop indices.
        iteration_counts: the number of iterations for each index.
    """
    inner = [symbol for symbol in iteration_counts if symbol in relation.free_symbols]
    counts = [iteration_counts[symbol] for symbol in inner]
    sizes = {symbol for part in (relation, *counts) for symbol in part.free_symbols if symbol not in iteration_counts}
    if any(symbol in iteration_counts for count in counts for symbol in count.free_symbols):
        return False
    try:
        for trial in _trials(sorted(sizes, key=str)):
            numbers = [int(count.xreplace(trial)) for count in counts]
            for indices in itertools.product(*({0, 1, 2, n // 2, n - 2, n - 1} & set(range(n)) for n in numbers)):
                if not bool(relation.xreplace({**trial, **dict(zip(inner, map(sympy.Integer, indices), strict=True))})):
                    return False
    except (TypeError, ZeroDivisionError):
        return False
    return True


def summed(size: Any, index: sympy.Symbol, count: Any) -> Any:
    """Return the sum of a size over all iterations of a loop, or None if it is unknown."""
    if index not in size.free_symbols:
        return size * count
    symbols = sorted((size.free_symbols | count.free_symbols) - {index}, key=str)
    trials = [trial for trial in _trials(symbols) if int(count.xreplace(trial)) <= _MOST_SUMMED]
    totals = [
        sum(int(size.xreplace({**trial, index: sympy.Integer(i)})) for i in range(int(count.xreplace(trial))))
        for trial in trials
    ]
    matches = (s for s in symbols if all(int(trial[s]) == total for trial, total in zip(trials, totals, strict=True)))
    return next(matches, None) if len(trials) > 2 else None


def _trials(symbols: Sequence[sympy.Symbol]) -> list[dict[sympy.Symbol, Any]]:
    """Return assignments of test sizes to the symbols."""
    return [{s: sympy.Integer(base + step * place) for place, s in enumerate(symbols)} for base, step in _TRIALS]


def is_range(relation: Any, *, is_decided: bool = False) -> bool:
    """Return whether a relation only bounds a symbol, which the manifest's dims state. A range has no gaps."""
    left, right = relation.args
    if is_decided and isinstance(relation, sympy.Ne):
        return any(side.is_Integer and side < 1 for side in relation.args) and left.is_Symbol | right.is_Symbol
    return bool(left.is_Symbol and right.is_Integer) or bool(right.is_Symbol and left.is_Integer)


def always_holds(relation: Any) -> bool:
    """Return whether a relation holds for all sizes, judging by a few."""
    try:
        return all(bool(relation.xreplace(trial)) for trial in _trials(sorted(relation.free_symbols, key=str)))
    except ZeroDivisionError:
        return False


def as_python(expression: Any, names: Mapping[sympy.Symbol, str]) -> str | None:
    """Write an expression as Python code; return None if a condition cannot contain it."""
    if expression.is_Integer:
        return str(int(expression))
    if expression.is_Symbol:
        return names.get(expression)
    if expression.is_Float:
        return repr(float(expression))
    if expression.is_Rational:
        return f"({int(expression.p)} / {int(expression.q)})"
    parts = [as_python(part, names) for part in expression.args]
    if any(part is None for part in parts):
        return None
    if isinstance(expression, (FloorDiv, Mod, PythonMod)):
        return f"({parts[0]} {'//' if isinstance(expression, FloorDiv) else '%'} {parts[1]})"
    if isinstance(expression, (IntTrueDiv, FloatTrueDiv)):
        return f"({parts[0]} / {parts[1]})"
    if isinstance(expression, ToFloat):
        return parts[0]
    if type(expression) in _ROUNDED:
        return f"{_ROUNDED[type(expression)]}({parts[0]})"
    if expression.is_Add or expression.is_Mul:
        return f"({(' + ' if expression.is_Add else ' * ').join(map(str, parts))})"
    if isinstance(expression, FloatPow) and expression.args[1] == 0.5:
        return f"sqrt({parts[0]})"
    if expression.is_Pow and expression.args[1] in (2, 3):
        return f"({' * '.join([str(parts[0])] * int(expression.args[1]))})"
    if type(expression).__name__ in ("Max", "Min"):
        return f"{type(expression).__name__.lower()}({', '.join(str(part) for part in parts)})"
    return None
