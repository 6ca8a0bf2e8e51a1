"""Sizes to try a module with: some for which a relation holds, and some for which it does not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch

from runtime.errors import TraceError
from seqbuild.trace.sizes import sample_sizes

if TYPE_CHECKING:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from seqbuild.trace.sizes import Known

_NUM_EACH = 2
_MOST_SYMBOLS = 2
_MOST = 8192  # the most that sizes may come to, multiplied
_POWERS = [2**exponent for exponent in range(4, 14)]
_SIZES = sorted({*range(2, 16), *(size + step for size in _POWERS for step in (-1, 0, 1, size // 2))})


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """A number for each symbol."""

    shape_env: ShapeEnv
    numbers: Mapping[sympy.Symbol, sympy.Integer]

    def number(self, size: int | torch.SymInt) -> int:
        """What a size is.

        Raises:
            TraceError: when it is made of other symbols.
        """
        if not isinstance(size, torch.SymInt):
            return int(size)
        value = self.shape_env.replace(size.node.expr).xreplace(self.numbers)
        if not value.is_Integer:
            raise TraceError("a size that comes from values")
        return int(value)

    def shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """What the shape of a fake tensor is."""
        return tuple(self.number(size) for size in tensor.shape)


def trials(shape_env: ShapeEnv, known: Known, symbols: Sequence[sympy.Symbol], questions: Sequence[Any]) -> list[Sizes]:
    """Sizes for all questions, each once; none when there is no telling by small ones.

    Args:
        shape_env: holds the symbols.
        known: what the sizes must respect.
        symbols: those to choose numbers for.
        questions: relations, which must hold for some of the sizes and not for others.
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


def _for_question(shape_env: ShapeEnv, known: Known, usual: Mapping[Any, Any], question: Any) -> list[dict[Any, Any]]:
    own = sorted(question.free_symbols, key=str)
    if not own or len(own) > _MOST_SYMBOLS or any(symbol not in usual for symbol in own):
        return []
    missing: dict[bool | None, int] = {True: _NUM_EACH, False: _NUM_EACH}
    chosen: list[dict[Any, Any]] = []
    for numbers in _candidates(own):
        answer = _answer(question, numbers)
        if missing.get(answer, 0) and _is_possible(shape_env, known, {**usual, **numbers}):
            missing[answer] -= 1
            chosen.append({**usual, **numbers})
            if not any(missing.values()):
                break
    return chosen if max(missing.values()) < _NUM_EACH else []


def _candidates(symbols: Sequence[Any]) -> Iterator[dict[Any, Any]]:
    """Sizes for the symbols, small ones first."""
    tuples = [sizes for sizes in itertools.product(_SIZES, repeat=len(symbols)) if _product(sizes) <= _MOST]
    for sizes in sorted(tuples, key=lambda sizes: (_product(sizes), sizes)):
        yield dict(zip(symbols, map(sympy.Integer, sizes), strict=True))


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _answer(question: Any, numbers: Mapping[Any, Any]) -> bool | None:
    try:
        return bool(question.xreplace(numbers))
    except ZeroDivisionError:
        return None


def _is_possible(shape_env: ShapeEnv, known: Known, numbers: Mapping[Any, Any]) -> bool:
    """Whether sizes respect everything that had been assumed before."""
    for symbol, number in numbers.items():
        bounds = known.ranges.get(symbol)
        if bounds is not None and not bounds.lower <= number <= bounds.upper:
            return False
    relations = (shape_env.replace(guard.expr).xreplace(numbers) for guard in shape_env.guards[: known.num_guards])
    return all(relation != sympy.false for relation in relations)
