"""Symbolic sizes that know who turned them into numbers."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    free_unbacked_symbols,
)
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from runtime.errors import TraceError
from seqbuild.blame import Culprit, find_culprit, is_models_code
from seqbuild.trace.decide.decisions import Decisions
from seqbuild.trace.sizes.relations import holds_in_turns, is_assumption, is_implied, is_statable, with_equalities

# Where a comparison of symbols becomes true or false, and what lies between it and whoever asks.
_NUMBERS = inspect.getfile(torch.SymBool)
_EVALUATES = (
    __file__,
    functools.__file__,
    inspect.getfile(torch.fx.experimental.symbolic_shapes),
    inspect.getfile(torch.fx.experimental.sym_node),
    inspect.getfile(torch.fx.experimental.recording),
)
_FUNCTIONS = (inspect.getfile(torch.nn.functional), inspect.getfile(torch.functional))
# Functions of torch in which one operator is executed, their `func`.
_EXECUTES = (
    (inspect.getfile(torch._subclasses.fake_tensor), "dispatch"),
    (inspect.getfile(torch.fx.experimental.proxy_tensor), "proxy_call"),
)
_MOST_COORDINATES = 4
# Of an expression. Sympy takes its time to simplify quotients and remainders in each other, a power of their depth.
_MOST_PARTS = 1000
# Where a result's memory layout is noted down.
_DESCRIBES = (inspect.getfile(torch.fx.experimental.proxy_tensor), "set_meta")


class SizeBurntInError(RuntimeError):
    """A symbol is about to become a number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """What is assumed of sizes at some point of a trace."""

    ranges: Mapping[Any, Any]
    axioms: Mapping[Any, Any]
    num_guards: int


class WatchedSizes(ShapeEnv):
    """Remembers which line of the model's code turned a symbol into a number, or does not let it.

    Args:
        decisions: answers what follows from values, where the glue asks for it.
    """

    def __init__(self, decisions: Decisions | None = None) -> None:
        super().__init__()
        self.decisions = decisions
        self.culprits: dict[Any, Culprit | None] = {}
        self.is_strict = False
        self.is_noting = False  # whether nothing may be decided: what the code assumes of sizes is to be noted
        self.assumed: list[tuple[Any, Culprit | None]] = []
        self.decided: set[Any] = set()  # relations that the model's own code has decided by
        self.more_than_one: set[Any] = set()  # symbols for sizes that may not be one
        self.demanded: list[Any] = []  # equalities without which the model fails
        self.unstatable: list[tuple[Any, Culprit | None]] = []  # what the code decided by, and no artifact can state
        self.turns: dict[Any, Any] = {}  # symbols that count the turns of loops, and how many those are
        self.doubts: list[Any] = []  # relations that do not hold in all turns
        self.own: set[Any] = set()  # symbols that stand for sizes of the model's own, such as the width of a vector

    @contextlib.contextmanager
    def sizes_kept_free(self) -> Iterator[None]:
        """Raise `SizeBurntInError` where an input's size would become a number, and forget what a step assumed.

        Its branches on sizes are its own affair: a step is executed again in every run, and decides anew.
        """
        before, self.is_strict = self.is_strict, True
        known = self.known()
        try:
            yield
        finally:
            self.forget(known, lambda relation: True)
            self.is_strict = before

    def allows(self, numbers: Mapping[Any, int], known: Known | None = None) -> bool:
        """Whether numbers for symbols respect everything that is assumed of sizes, or what was known once."""
        known = known or self.known()
        symbols = {symbol: sympy.Integer(number) for symbol, number in numbers.items()}
        for symbol, number in symbols.items():
            bounds = known.ranges.get(symbol)
            is_in = bounds is None or bounds.lower <= number <= bounds.upper
            if not is_in or (symbol.is_Integer and symbol != number):
                return False
        relations = (self.replace(guard.expr).xreplace(symbols) for guard in self.guards[: known.num_guards])
        return all(relation != sympy.false for relation in relations)

    def known(self) -> Known:
        """What is assumed of sizes by now, to come back to."""
        return Known(ranges=dict(self.var_to_range), axioms=dict(self.axioms), num_guards=len(self.guards))

    def forget(self, known: Known, is_forgotten: Callable[[Any], bool]) -> None:
        """Forget relations assumed since then, so that whoever needs them is asked again.

        Args:
            known: as of then.
            is_forgotten: whether a relation is one of those.
        """
        fresh = self.guards[known.num_guards :]
        if not any(is_forgotten(guard.expr) for guard in fresh) and self.var_to_range.items() >= known.ranges.items():
            return
        self.guards[known.num_guards :] = [guard for guard in fresh if not is_forgotten(guard.expr)]
        self.var_to_range.update(known.ranges)
        self.axioms.clear()
        self.axioms.update(known.axioms)
        self.fake_tensor_cache.clear()  # or an operator of the same sizes would not ask again
        answered: Any = ShapeEnv._inner_evaluate_expr
        answered.cache_clear()  # likewise whoever asks torch the same question
        self._version_counter += 1

    def is_fixed(self, size: torch.SymInt) -> bool:
        """Whether the trace holds for one value of `size` only."""
        expression = self.replace(size.node.expr)
        bounds = self.bound_sympy(expression)
        return bool(expression.is_number or bounds.lower == bounds.upper)

    def evaluate_sym_node(self, sym_node: Any, *args: Any, **kwargs: Any) -> Any:
        """What `sym_node` is; a question that only values answer goes to `decisions`.

        Raises:
            TraceError: for one that it would take sympy too long to think about.
        """
        if _has_more_parts(sym_node.expr, _MOST_PARTS):
            raise TraceError(f"a size is calculated in more than {_MOST_PARTS} steps")
        num_guards = len(self.guards)
        try:
            found = super().evaluate_sym_node(sym_node, *args, **kwargs)
            self._set_turns_aside(num_guards)
            fresh = [] if self.is_strict else [guard.expr for guard in self.guards[num_guards:]]
            if not self.is_strict and sym_node.pytype is bool and _is_asked_by_code():
                self._note_decision(sym_node.expr, found, fresh)
            self.unstatable += [(relation, find_culprit()) for relation in fresh if not is_statable(relation)]
            if self.is_noting and len(self.guards) > num_guards and get_proxy_mode() is not None:
                before = [guard.expr for guard in self.guards[:num_guards]]
                added = [guard.expr for guard in self.guards[num_guards:]]
                added = [relation for relation in added if self._is_open(relation, before)]
                if not _is_asked_by_kernel() or any(_is_new_equality(relation, before) for relation in added):
                    self.assumed += [(relation, find_culprit()) for relation in added]
            return found
        except GuardOnDataDependentSymNode:
            if get_proxy_mode() is None or self.decisions is None or sym_node.pytype not in (bool, int):
                raise
            if self.is_noting:
                is_bool = sym_node.pytype is bool
                stated = self.decisions.stated(torch.SymBool(sym_node)) if is_bool else None  # type: ignore[no-untyped-call]
                if stated is None:
                    raise
                return sympy.true if stated else sympy.false
            if sym_node.pytype is bool:
                condition = torch.SymBool(sym_node)  # type: ignore[no-untyped-call]
                return sympy.true if self.decisions.decide(condition, find_culprit()) else sympy.false
            number = self.decisions.number(torch.SymInt(sym_node))  # type: ignore[no-untyped-call]
            if number is None:
                raise
            if isinstance(sym_node.expr, sympy.Symbol):
                self._set_replacement(sym_node.expr, sympy.Integer(number), "all samples have it")
            return sympy.Integer(number)

    def is_assumption(self, relation: Any) -> bool:
        """As `guards.is_assumption`, for a relation as it was when it was assumed."""
        return is_assumption(self.replace(relation), is_decided=relation in self.decided)

    def _is_open(self, relation: Any, known: Iterable[Any]) -> bool:
        return is_assumption(with_equalities(relation, known), is_decided=relation in self.decided)

    def _note_decision(self, relation: Any, found: Any, fresh: Iterable[Any]) -> None:
        """Remember what the model's code has decided by, and sizes that may not be one for it to come out so.

        Torch takes it for granted that sizes are larger than one, and need not be told so.
        """
        self.decided.update(fresh)
        sizes = {symbol: sympy.Integer(size) for symbol, size in sample_sizes(self).items()}
        if list(fresh) or not relation.free_symbols or not relation.free_symbols <= set(sizes):
            return
        symbols = sorted(relation.free_symbols, key=str)
        for ones in (*([symbol] for symbol in symbols), symbols):
            numbers = {**sizes, **dict.fromkeys(ones, sympy.S.One)}
            if bool(relation.xreplace(numbers)) != bool(found) and all(
                self.replace(guard.expr).xreplace(numbers) != sympy.false for guard in self.guards
            ):
                self.more_than_one.update(ones[:1])

    def turn(self, count: torch.SymInt) -> torch.SymInt:
        """The number of a turn of a loop; what is decided by it must be so in all of the turns."""
        source = ConstantSource(f"turn_{len(self.turns)}")
        options: dict[str, Any] = {"positive": None, "do_not_specialize_zero_one": True}
        symbol = self.create_symbol(0, source, DimDynamic.DYNAMIC, None, **options)
        self.var_to_range[symbol] = ValueRanges(0, int_oo)
        self.turns[symbol] = self.replace(count.node.expr)
        index = self.create_symintnode(symbol, hint=0, source=source)
        assert isinstance(index, torch.SymInt), "it is a symbol"
        return index

    def num_symbols(self) -> int:
        """How many symbols there are, those of loops not counted."""
        return len(self.var_to_range) - len(self.turns)

    def _set_turns_aside(self, num_guards: int) -> None:
        """Relations of the number of a turn are no assumptions: they hold in all turns, or the loop is in doubt."""
        if not self.turns or len(self.guards) == num_guards:
            return
        for guard in self.guards[num_guards:]:
            if any(symbol in self.turns for symbol in guard.expr.free_symbols):
                self.guards.remove(guard)
                if not self.is_strict and not holds_in_turns(guard.expr, self.turns):
                    self.doubts.append(guard.expr)

    def _set_replacement(self, a: Any, tgt: Any, msg: str) -> None:
        if tgt.is_number and a in sample_sizes(self):
            if self.is_strict and a not in self.own:
                raise SizeBurntInError(msg)
            self.culprits.setdefault(a, find_culprit())
        super()._set_replacement(a, tgt, msg)


def _is_new_equality(relation: Any, known: Iterable[Any]) -> bool:
    """Whether torch may simplify sizes by a relation, in a way that does not follow from what was assumed before.

    Of each stride it asks whether it is the larger of one and itself, for one axis first and then for products.
    """
    if not isinstance(relation, sympy.Eq):
        return False
    bounds = [side for side in relation.args if type(side).__name__ == "Max"]
    is_bound = len(bounds) == 1 and set(bounds[0].args) == {sympy.S.One, *(set(relation.args) - set(bounds))}
    return not is_bound and not is_implied(relation, known)


def _has_more_parts(expression: Any, count: int) -> bool:
    """Whether an expression consists of more parts than this, repeated ones counted each time."""
    return next(itertools.islice(sympy.preorder_traversal(expression), count, None), None) is not None


def _is_asked_by_kernel() -> bool:
    """Whether torch asks while it works out the shape of one operator's result, and not the model's own code.

    What torch decides there is how a tensor lies in memory, or that the operator would fail; in a run the operator is
    executed and decides anew. Not so where it returns a list: how many tensors that has is the trace's then.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if (frame.f_code.co_filename, frame.f_code.co_name) == _DESCRIBES:
            return True
        if (frame.f_code.co_filename, frame.f_code.co_name) in _EXECUTES:
            operator: Any = frame.f_locals.get("func")
            schema = getattr(operator, "_schema", None)
            return schema is not None and not any("[]" in str(result.type) for result in schema.returns)
        if is_models_code(frame.f_code.co_filename):
            return False
        frame = frame.f_back
    return False


def _is_asked_by_code() -> bool:
    """Whether Python code of the model, or a function of torch in its place, asks for the outcome of a comparison.

    Not so an operator, which asks from C++ or while it is executed, for how a tensor lies in memory, or to fail.
    """
    if get_proxy_mode() is None:
        return False
    frame: FrameType | None = sys._getframe(2)
    is_python = False
    while frame is not None:
        file = frame.f_code.co_filename
        if file == _NUMBERS:
            is_python = True
        elif file not in _EVALUATES:
            return is_python and (is_models_code(file) or file in _FUNCTIONS)
        frame = frame.f_back
    return False


@contextlib.contextmanager
def numbers_hashable() -> Iterator[None]:
    """While the block runs, a number that follows from values can be a key where all samples have the same."""
    plain = torch.SymInt.__hash__

    def hashed(value: torch.SymInt) -> int:
        if get_proxy_mode() is not None and free_unbacked_symbols(value.node.expr):
            with contextlib.suppress(GuardOnDataDependentSymNode):
                return hash(int(value))
        return plain(value)

    torch.SymInt.__hash__ = hashed  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.SymInt.__hash__ = plain  # type: ignore[method-assign]


def sample_sizes(shape_env: ShapeEnv) -> Mapping[Any, int]:
    """The sample's size for each symbol that stands for one; torch has renamed the table."""
    name = "backed_var_to_val" if hasattr(shape_env, "backed_var_to_val") else "var_to_val"
    sizes: Mapping[Any, int] = getattr(shape_env, name)
    return sizes


def model_sizes(inputs: Mapping[str, Any]) -> Iterator[Any]:
    """Symbols for axes which no model leaves open: a vector's width, an image's channels, how many coordinates a place
    has.
    """
    own_axis = {3: 2, 4: 1, 5: 2}
    for value in inputs.values():
        if not isinstance(value, torch.Tensor) or value.dim() not in own_axis:
            continue
        size: Any = value.shape[own_axis[value.dim()]]
        if value.is_floating_point():
            is_own = value.dim() != 3 or type(value.shape[1]) is not int or value.shape[1] != 1  # sound of one channel
        else:
            is_own = value.dim() == 3 and isinstance(size, torch.SymInt) and size.node.hint <= _MOST_COORDINATES
        if is_own and isinstance(size, torch.SymInt):
            yield size.node._expr
