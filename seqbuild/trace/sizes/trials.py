"""Choose sizes to test a module with: some for which a relation holds, and some for which it does not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch

from runtime.errors import TraceError
from seqbuild.trace.sizes.symbols import sample_sizes

if TYPE_CHECKING:
    from seqbuild.trace.sizes.symbols import Known, WatchedSizes

_NUM_EACH = 2
_COUNTS = (1, 2, 3, 5)
_COUNTS_AT_LEAST = (2, 3)
_MOST_SYMBOLS = 2
_MOST = 8192  # limit of the product of the sizes
_POWERS = [2**exponent for exponent in range(4, 14)]
_SIZES = sorted({*range(2, 16), *(size + step for size in _POWERS for step in (-1, 0, 1, size // 2))})


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Numbers for the symbols.

    Attributes:
        shape_env: the symbols of the trace.
        numbers: the number for each symbol.
        is_before: use sizes as they were before any symbol was replaced by a number or another symbol.
    """

    shape_env: WatchedSizes
    numbers: Mapping[Any, Any]
    is_before: bool = False

    def number(self, size: int | torch.SymInt) -> int:
        """Return the number for a size.

        Raises:
            TraceError: if it contains other symbols.
        """
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node._expr if self.is_before else self.shape_env.replace(size.node.expr)
        value = expression.xreplace(self.numbers)
        if not value.is_Integer:
            raise TraceError("a size depends on data")
        return int(value)

    def shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """Return the shape of a fake tensor in numbers."""
        return tuple(self.number(size) for size in tensor.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class IterationCount:
    """The question whether a recorded loop is correct for any number of iterations."""

    count: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Doubt:
    """The question whether a recorded loop is correct although a relation does not hold in all iterations."""

    relation: Any
    index: sympy.Symbol
    count: Any

    def holds(self, numbers: Mapping[Any, Any]) -> int:
        """Return whether the relation holds in all iterations for these sizes."""
        indices = range(int(self.count.xreplace(numbers)))
        return int(all(self.relation.xreplace({**numbers, self.index: sympy.Integer(index)}) for index in indices))


def trials(
    shape_env: WatchedSizes, known: Known, symbols: Sequence[sympy.Symbol], questions: Sequence[Any]
) -> list[Sizes]:
    """Choose sizes that answer all questions; return none if small sizes cannot answer them.

    Args:
        shape_env: the symbols of the trace.
        known: assumptions that the sizes must satisfy.
        symbols: the symbols to choose numbers for.
        questions: `IterationCount`s, `Doubt`s, and relations, which must hold for some of the sizes and not for others.
    """
    usual = {symbol: sympy.Integer(sample_sizes(shape_env).get(symbol, 3)) for symbol in symbols}
    found: dict[tuple[Any, ...], Sizes] = {}
    for question in questions:
        chosen = _for_question(shape_env, known, usual, question)
        if not chosen:
            return []
        for numbers in chosen:
            found[tuple(numbers.values())] = Sizes(shape_env=shape_env, numbers=numbers)
    return list(found.values())


def counterexamples(
    shape_env: WatchedSizes, known: Known, symbols: Collection[Any], relation: Any, others: Sequence[Any]
) -> list[Sizes]:
    """Choose sizes near the sample's that violate one relation and satisfy the others; the sample's sizes come first.

    Equal sizes change together. Sizes for which one side of the equality is one are skipped, because every operator
    broadcasts them.

    Args:
        shape_env: the symbols of the trace.
        known: assumptions that the sizes must satisfy.
        symbols: the symbols to choose numbers for.
        relation: the equality to violate.
        others: the relations to satisfy.
    """
    usual = {symbol: sympy.Integer(number) for symbol, number in sample_sizes(shape_env).items() if symbol in symbols}
    equalities = [guard.expr for guard in shape_env.guards if isinstance(guard.expr, sympy.Eq)]
    ties = [tie for tie in equalities if not tie.free_symbols <= relation.free_symbols]
    found: list[dict[Any, Any]] = []
    for symbol in sorted(relation.free_symbols, key=str):
        if symbol not in usual:
            return []
        size, same = usual[symbol], _same_as(symbol, ties)
        for number in (2 * size, size // 2, size + 1, size - 1, 3 * size, size // 3):
            numbers = {**usual, **dict.fromkeys(same, sympy.Integer(number))}
            sides = [side.xreplace(numbers) for side in relation.args]
            is_telling = number > 1 and sides[0] != sides[1] and 1 not in sides
            holds = all(
                _answer(other, numbers) == 1 for other in (*others, *ties) if other.free_symbols <= set(numbers)
            )
            if is_telling and holds and shape_env.allows(numbers, known):
                found.append(numbers)
    chosen = [usual, *found] if len(found) >= _NUM_EACH else []
    return [Sizes(shape_env=shape_env, numbers=numbers, is_before=True) for numbers in chosen]


def _same_as(symbol: Any, equalities: Sequence[Any]) -> set[Any]:
    """Return a symbol and the symbols that equal it."""
    same = {symbol}
    for _ in equalities:
        for tie in equalities:
            if all(side.is_Symbol for side in tie.args) and same & set(tie.args):
                same |= set(tie.args)
    return same


def _for_question(
    shape_env: WatchedSizes, known: Known, usual: Mapping[Any, Any], question: Any
) -> list[dict[Any, Any]]:
    own = sorted(_symbols_of(question), key=str)
    if not own or len(own) > _MOST_SYMBOLS or any(symbol not in usual for symbol in own):
        return []
    wanted = dict.fromkeys(_COUNTS, 1) if isinstance(question, IterationCount) else dict.fromkeys((1, 0), _NUM_EACH)
    missing, chosen = dict(wanted), list[dict[Any, Any]]()
    for numbers in _candidates(own):
        answer = _answer(question, numbers)
        if missing.get(answer, 0) and shape_env.allows({**usual, **numbers}, known):
            missing[answer] -= 1
            chosen.append({**usual, **numbers})
            if not any(missing.values()):
                break
    needed = _COUNTS_AT_LEAST if isinstance(question, IterationCount) else (1, 0)
    return chosen if all(missing[answer] < wanted[answer] for answer in needed) else []


def _candidates(symbols: Sequence[Any]) -> Iterator[dict[Any, Any]]:
    """Yield sizes for the symbols, small ones first."""
    tuples = [sizes for sizes in itertools.product(_SIZES, repeat=len(symbols)) if math.prod(sizes) <= _MOST]
    for sizes in sorted(tuples, key=lambda sizes: (math.prod(sizes), sizes)):
        yield dict(zip(symbols, map(sympy.Integer, sizes), strict=True))


def _symbols_of(question: Any) -> set[Any]:
    if isinstance(question, Doubt):
        return set((question.relation.free_symbols | question.count.free_symbols) - {question.index})
    return set((question.count if isinstance(question, IterationCount) else question).free_symbols)


def _answer(question: Any, numbers: Mapping[Any, Any]) -> int:
    """Return whether a relation holds (1 or 0), or the number of iterations; -1 if it is undefined."""
    try:
        if isinstance(question, IterationCount):
            return int(question.count.xreplace(numbers))
        return question.holds(numbers) if isinstance(question, Doubt) else int(bool(question.xreplace(numbers)))
    except ZeroDivisionError:
        return -1
