"""What a trace assumed of sizes, as a host reads it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import sympy
from torch.utils._sympy.functions import FloorDiv

from runtime.errors import TraceError
from seqbuild.manifest.describe import Symbols
from seqbuild.trace.sizes.relations import is_expressible, is_implied

H, W, N = sympy.symbols("h w n", integer=True, positive=True)
PATCHES = FloorDiv(H, 14) * FloorDiv(W, 14)


def stated(*relations: Any) -> list[str]:
    shape_env: Any = SimpleNamespace(
        decided=(), guards=[SimpleNamespace(expr=r) for r in relations], replace=lambda relation: relation
    )
    symbols: Any = SimpleNamespace(shape_env=shape_env, names={H: "height", W: "width", N: "batch"})
    return list(Symbols.conditions(symbols))


def test_what_is_certain_or_a_range_is_not_stated() -> None:
    assert stated(N >= 2, sympy.Gt(N + 1, 0), sympy.Eq(N, 2 * H)) == ["batch == (2 * height)"]


def test_what_follows_from_an_equality_is_not_stated() -> None:
    found = stated(sympy.Ne(64 * N * PATCHES, 0), sympy.Eq(PATCHES, 16), sympy.Eq(3 * PATCHES, 48), PATCHES > 1)
    assert found == ["((height // 14) * (width // 14)) == 16"]


def test_equalities_do_not_take_each_other_away() -> None:
    assert stated(sympy.Eq(3 * PATCHES, 48), sympy.Eq(PATCHES, 16)) == ["((height // 14) * (width // 14)) == 16"]
    assert len(stated(sympy.Eq(PATCHES, 16), sympy.Eq(H, 2 * W))) == 2


def test_what_contradicts_an_equality_is_stated() -> None:
    assert len(stated(sympy.Eq(PATCHES, 16), PATCHES > 20)) == 2


def test_what_cannot_be_stated_is_refused() -> None:
    relation = H ** sympy.Rational(3, 2) > 4
    assert not is_expressible(relation)
    with pytest.raises(TraceError, match="cannot express"):
        stated(relation)


def test_what_is_implied_holds_wherever_the_rest_does() -> None:
    known = [sympy.Eq(sympy.Max(1, FloorDiv(H, 14)), FloorDiv(H, 14))]
    assert is_implied(FloorDiv(H, 14) >= 1, known)
    assert not is_implied(FloorDiv(H, 14) >= 1, [])
    assert not is_implied(FloorDiv(H, 14) >= 5, known)
    assert not is_implied(FloorDiv(H, 14) >= 1, [sympy.Eq(H, 16)])  # too few sizes to tell by
