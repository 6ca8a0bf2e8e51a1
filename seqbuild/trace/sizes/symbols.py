"""Symbolic sizes that record which line of the model's code assumed something about them."""

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
from seqbuild.trace.sizes.relations import (
    holds_in_all_iterations,
    is_assumption,
    is_expressible,
    is_implied,
    substitute_equalities,
)

# Files in which a comparison of symbols is evaluated, and files between these and the caller.
_NUMBERS = inspect.getfile(torch.SymBool)
_EVALUATES = (
    __file__,
    functools.__file__,
    inspect.getfile(torch.fx.experimental.symbolic_shapes),
    inspect.getfile(torch.fx.experimental.sym_node),
    inspect.getfile(torch.fx.experimental.recording),
)
_FUNCTIONS = (inspect.getfile(torch.nn.functional), inspect.getfile(torch.functional))
# Functions of torch that execute one operator, `func`.
_EXECUTES = (
    (inspect.getfile(torch._subclasses.fake_tensor), "dispatch"),
    (inspect.getfile(torch.fx.experimental.proxy_tensor), "proxy_call"),
)
_MOST_COORDINATES = 4
# Limit of an expression's size: the time sympy takes to simplify nested quotients and remainders is exponential.
_MOST_PARTS = 1000
# The function of torch that stores a result's memory layout.
_DESCRIBES = (inspect.getfile(torch.fx.experimental.proxy_tensor), "set_meta")


class SizeSpecializedError(RuntimeError):
    """A symbol would be replaced by a number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """The assumptions about sizes at some point of a trace."""

    ranges: Mapping[Any, Any]
    axioms: Mapping[Any, Any]
    num_guards: int


class WatchedSizes(ShapeEnv):
    """Shape environment that records or prevents assumptions about sizes.

    Args:
        decisions: answers data-dependent questions of code outside steps.

    Attributes:
        culprits: the line that converted a symbol to a number.
        is_strict: raise an error instead of such a conversion.
        is_noting: record assumptions instead of answering decisions: the code must be valid for all data.
        assumed: the recorded assumptions and their lines.
        decided: relations on which the model's own code branched.
        more_than_one: symbols of sizes that must be larger than one.
        required_equalities: equalities without which the model fails.
        inexpressible: relations on which the code branched and that no condition can express.
        iteration_counts: for each index of a loop, the number of iterations.
        doubts: relations that do not hold in all iterations.
        own: symbols of sizes fixed by the model, such as the width of a vector.
    """

    def __init__(self, decisions: Decisions | None = None) -> None:
        super().__init__()
        self.decisions = decisions
        self.culprits: dict[Any, Culprit | None] = {}
        self.is_strict = False
        self.is_noting = False
        self.assumed: list[tuple[Any, Culprit | None]] = []
        self.decided: set[Any] = set()
        self.more_than_one: set[Any] = set()
        self.required_equalities: list[Any] = []
        self.inexpressible: list[tuple[Any, Culprit | None]] = []
        self.iteration_counts: dict[Any, Any] = {}
        self.doubts: list[Any] = []
        self.own: set[Any] = set()

    @contextlib.contextmanager
    def sizes_kept_free(self) -> Iterator[None]:
        """Raise `SizeSpecializedError` if an input's size would become a number, and drop a step's assumptions.

        A step may branch on sizes, because it is executed in every run and branches again.
        """
        before, self.is_strict = self.is_strict, True
        known = self.known()
        try:
            yield
        finally:
            self.forget(known, lambda relation: True)
            self.is_strict = before

    def allows(self, numbers: Mapping[Any, int], known: Known | None = None) -> bool:
        """Return whether numbers for symbols satisfy the current assumptions, or those in `known`."""
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
        """Return the current assumptions."""
        return Known(ranges=dict(self.var_to_range), axioms=dict(self.axioms), num_guards=len(self.guards))

    def forget(self, known: Known, is_forgotten: Callable[[Any], bool]) -> None:
        """Drop relations assumed since `known`, so that code which needs them assumes them again.

        Args:
            known: the earlier assumptions.
            is_forgotten: whether to drop a relation.
        """
        fresh = self.guards[known.num_guards :]
        if not any(is_forgotten(guard.expr) for guard in fresh) and self.var_to_range.items() >= known.ranges.items():
            return
        self.guards[known.num_guards :] = [guard for guard in fresh if not is_forgotten(guard.expr)]
        self.var_to_range.update(known.ranges)
        self.axioms.clear()
        self.axioms.update(known.axioms)
        self.fake_tensor_cache.clear()  # otherwise an operator with the same sizes would not add guards again
        answered: Any = ShapeEnv._inner_evaluate_expr
        answered.cache_clear()  # for the same reason
        self._version_counter += 1

    def is_fixed(self, size: torch.SymInt) -> bool:
        """Return whether the trace is valid for one value of `size` only."""
        expression = self.replace(size.node.expr)
        bounds = self.bound_sympy(expression)
        return bool(expression.is_number or bounds.lower == bounds.upper)

    def evaluate_sym_node(self, sym_node: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate `sym_node`; a data-dependent question goes to `decisions`.

        Raises:
            TraceError: if the expression is too large for sympy.
        """
        if _has_more_parts(sym_node.expr, _MOST_PARTS):
            raise TraceError(f"the expression of a size has more than {_MOST_PARTS} terms")
        num_guards = len(self.guards)
        try:
            found = super().evaluate_sym_node(sym_node, *args, **kwargs)
            self._drop_iteration_guards(num_guards)
            fresh = [] if self.is_strict else [guard.expr for guard in self.guards[num_guards:]]
            if not self.is_strict and sym_node.pytype is bool and _is_asked_by_code():
                self._note_decision(sym_node.expr, found, fresh)
            self.inexpressible += [(relation, find_culprit()) for relation in fresh if not is_expressible(relation)]
            if self.is_noting and len(self.guards) > num_guards and get_proxy_mode() is not None:
                before = [guard.expr for guard in self.guards[:num_guards]]
                added = [
                    guard.expr
                    for guard in self.guards[num_guards:]
                    if is_assumption(substitute_equalities(guard.expr, before), is_decided=guard.expr in self.decided)
                ]
                if not _is_asked_by_kernel() or any(_is_new_equality(relation, before) for relation in added):
                    self.assumed += [(relation, find_culprit()) for relation in added]
            return found
        except GuardOnDataDependentSymNode:
            if get_proxy_mode() is None or self.decisions is None or sym_node.pytype not in (bool, int):
                raise
            if self.is_noting:
                is_bool = sym_node.pytype is bool
                constant = self.decisions.constant(torch.SymBool(sym_node)) if is_bool else None  # type: ignore[no-untyped-call]
                if constant is None:
                    raise
                return sympy.true if constant else sympy.false
            if sym_node.pytype is bool:
                condition = torch.SymBool(sym_node)  # type: ignore[no-untyped-call]
                return sympy.true if self.decisions.decide(condition, find_culprit()) else sympy.false
            number = self.decisions.number(torch.SymInt(sym_node))  # type: ignore[no-untyped-call]
            if number is None:
                raise
            if isinstance(sym_node.expr, sympy.Symbol):
                self._set_replacement(sym_node.expr, sympy.Integer(number), "it is the same in all samples")
            return sympy.Integer(number)

    def is_assumption(self, relation: Any) -> bool:
        """Apply `relations.is_assumption` to a relation in the form in which it was assumed."""
        return is_assumption(self.replace(relation), is_decided=relation in self.decided)

    def _note_decision(self, relation: Any, found: Any, fresh: Iterable[Any]) -> None:
        """Record a relation on which the model's code branched, and sizes for which one would change the outcome.

        Torch assumes that sizes are larger than one without adding a guard.
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

    def new_iteration_index(self, count: torch.SymInt) -> torch.SymInt:
        """Create the symbol of a loop's index; branches on it must have the same outcome in all iterations."""
        source = ConstantSource(f"turn_{len(self.iteration_counts)}")
        options: dict[str, Any] = {"positive": None, "do_not_specialize_zero_one": True}
        symbol = self.create_symbol(0, source, DimDynamic.DYNAMIC, None, **options)
        self.var_to_range[symbol] = ValueRanges(0, int_oo)
        self.iteration_counts[symbol] = self.replace(count.node.expr)
        index = self.create_symintnode(symbol, hint=0, source=source)
        assert isinstance(index, torch.SymInt), "it is a symbol"
        return index

    def num_symbols(self) -> int:
        """Return the number of symbols, without the indices of loops."""
        return len(self.var_to_range) - len(self.iteration_counts)

    def _drop_iteration_guards(self, num_guards: int) -> None:
        """Remove guards on loop indices; those that do not hold in all iterations become doubts about the loop."""
        if not self.iteration_counts or len(self.guards) == num_guards:
            return
        for guard in self.guards[num_guards:]:
            if any(symbol in self.iteration_counts for symbol in guard.expr.free_symbols):
                self.guards.remove(guard)
                if not self.is_strict and not holds_in_all_iterations(guard.expr, self.iteration_counts):
                    self.doubts.append(guard.expr)

    def _set_replacement(self, a: Any, tgt: Any, msg: str) -> None:
        if tgt.is_number and a in sample_sizes(self):
            if self.is_strict and a not in self.own:
                raise SizeSpecializedError(msg)
            self.culprits.setdefault(a, find_culprit())
        super()._set_replacement(a, tgt, msg)


def _is_new_equality(relation: Any, known: Iterable[Any]) -> bool:
    """Return whether torch may simplify sizes by an equality that earlier assumptions do not imply.

    Comparisons of a stride with the maximum of one and itself, which torch makes for every tensor, do not count.
    """
    if not isinstance(relation, sympy.Eq):
        return False
    bounds = [side for side in relation.args if type(side).__name__ == "Max"]
    is_bound = len(bounds) == 1 and set(bounds[0].args) == {sympy.S.One, *(set(relation.args) - set(bounds))}
    return not is_bound and not is_implied(relation, known)


def _has_more_parts(expression: Any, count: int) -> bool:
    """Return whether an expression has more than `count` terms, counting repeated ones each time."""
    return next(itertools.islice(sympy.preorder_traversal(expression), count, None), None) is not None


def _is_asked_by_kernel() -> bool:
    """Return whether torch asks while it computes the shape of one operator's result.

    These branches concern memory layout or errors, and the operator makes them again in every run. Operators that
    return a list are an exception, because the trace fixes the number of tensors.
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
    """Return whether Python code of the model, or a Python function of torch, branches on a comparison.

    Operators, which ask from C++ or during execution, branch on memory layout or to raise errors.
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
    """Make data-dependent numbers hashable while the block runs, if they are the same in all samples."""
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
    """Return the sample's size for each symbol of a size; the attribute's name depends on torch's version."""
    name = "backed_var_to_val" if hasattr(shape_env, "backed_var_to_val") else "var_to_val"
    sizes: Mapping[Any, int] = getattr(shape_env, name)
    return sizes


def model_sizes(inputs: Mapping[str, Any]) -> Iterator[Any]:
    """Yield symbols of axes whose size is fixed by every model: vector widths, image channels, coordinates."""
    own_axis = {3: 2, 4: 1, 5: 2}
    for value in inputs.values():
        if not isinstance(value, torch.Tensor) or value.dim() not in own_axis:
            continue
        size: Any = value.shape[own_axis[value.dim()]]
        if value.is_floating_point():
            is_own = value.dim() != 3 or type(value.shape[1]) is not int or value.shape[1] != 1  # 1: mono sound
        else:
            is_own = value.dim() == 3 and isinstance(size, torch.SymInt) and size.node.hint <= _MOST_COORDINATES
        if is_own and isinstance(size, torch.SymInt):
            yield size.node._expr
