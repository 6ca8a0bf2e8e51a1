"""Convert assumptions of a trace about sizes to conditions that a host can check."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    pass

RELATIONS: dict[Any, str] = {
    sympy.Eq: "==",
    sympy.Ne: "!=",
    sympy.StrictLessThan: "<",
    sympy.LessThan: "<=",
    sympy.StrictGreaterThan: ">",
    sympy.GreaterThan: ">=",
}
_ROUNDED: dict[Any, str] = {CeilToInt: "ceil", FloorToInt: "floor", RoundToInt: "round", TruncToInt: "trunc"}
# First size and step to the next one: sizes that a relation is tried on.
_TRIALS = ((1, 0), (2, 1), (3, 4), (7, -1), (16, 13), (31, 5), (64, 64), (127, 1), (1000, 17), (4099, 101), (65537, 3))

_ENOUGH_TRIALS = 4
_MOST_SUMMED = 2000


def is_statable(relation: Any) -> bool:
    """Whether a relation between sizes could be a condition, or needs none."""
    if type(relation) not in RELATIONS or not relation.free_symbols or is_range(relation):
        return True
    names = {symbol: str(symbol) for symbol in relation.free_symbols}
    return all(written(side, names) is not None for side in relation.args) or is_certain(relation)


def is_implied(relation: Any, known: Iterable[Any]) -> bool:
    """Whether a relation holds whenever those known do that are about the same sizes, as far as a few sizes show."""
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


def with_equalities(relation: Any, known: Iterable[Any]) -> Any:
    """A relation, with numbers for those parts of it that are known to be equal to numbers.

    Torch itself puts in numbers for single symbols only, not for products such as the patches of an image.
    """
    for other in known:
        if relation.free_symbols and isinstance(other, sympy.Eq) and other.rhs.is_Integer:
            relation = relation.subs(other.lhs, other.rhs)
    return relation


def is_assumption(relation: Any, *, is_decided: bool = False) -> bool:
    """Whether a relation between sizes makes a trace hold for some data only: it is not true for all sizes, nor does it
    only say that two inputs belong together.

    Args:
        relation: between sizes.
        is_decided: whether the model's code decided by it. Then it is no matter of how a tensor lies in memory, and a
            few sizes for which it holds say nothing: who asks for one length in particular asks for a rare one.
    """
    if type(relation) not in RELATIONS or not relation.free_symbols:
        return False
    is_match = isinstance(relation, sympy.Eq) and all(side.is_Symbol for side in relation.args)
    return not is_match and (is_decided or not is_certain(relation))


def holds_in_turns(relation: Any, turns: Mapping[sympy.Symbol, Any]) -> bool:
    """Whether a relation holds in every turn of loops, whatever the sizes.

    Args:
        relation: with numbers of turns in it.
        turns: how many turns each such number counts.
    """
    inner = [symbol for symbol in turns if symbol in relation.free_symbols]
    counts = [turns[symbol] for symbol in inner]
    sizes = {symbol for part in (relation, *counts) for symbol in part.free_symbols if symbol not in turns}
    if any(symbol in turns for count in counts for symbol in count.free_symbols):
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
    """What a size comes to over all turns of a loop; None where that is not known."""
    if index not in size.free_symbols:
        return size * count
    symbols = sorted((size.free_symbols | count.free_symbols) - {index}, key=str)
    trials = [trial for trial in _trials(symbols) if int(count.xreplace(trial)) <= _MOST_SUMMED]
    totals = [
        sum(int(size.xreplace({**trial, index: sympy.Integer(turn)})) for turn in range(int(count.xreplace(trial))))
        for trial in trials
    ]
    matches = (s for s in symbols if all(int(trial[s]) == total for trial, total in zip(trials, totals, strict=True)))
    return next(matches, None) if len(trials) > 2 else None


def _trials(symbols: Sequence[sympy.Symbol]) -> list[dict[sympy.Symbol, Any]]:
    """Return several assignments of numbers to the symbols."""
    return [{s: sympy.Integer(base + step * place) for place, s in enumerate(symbols)} for base, step in _TRIALS]


def is_range(relation: Any, *, is_decided: bool = False) -> bool:
    """Whether the relation only bounds a symbol: the dims state that. They have no gaps."""
    left, right = relation.args
    if is_decided and isinstance(relation, sympy.Ne):
        return any(side.is_Integer and side < 1 for side in relation.args) and left.is_Symbol | right.is_Symbol
    return bool(left.is_Symbol and right.is_Integer) or bool(right.is_Symbol and left.is_Integer)


def is_certain(relation: Any) -> bool:
    """Whether the relation holds for all sizes, as far as a few show: then there is nothing to state."""
    try:
        return all(bool(relation.xreplace(trial)) for trial in _trials(sorted(relation.free_symbols, key=str)))
    except ZeroDivisionError:
        return False


def written(expression: Any, names: Mapping[sympy.Symbol, str]) -> str | None:
    """An expression as Python writes it; None for what a condition cannot hold."""
    if expression.is_Integer:
        return str(int(expression))
    if expression.is_Symbol:
        return names.get(expression)
    if expression.is_Float:
        return repr(float(expression))
    if expression.is_Rational:
        return f"({int(expression.p)} / {int(expression.q)})"
    parts = [written(part, names) for part in expression.args]
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
