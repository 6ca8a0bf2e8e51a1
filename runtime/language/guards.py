"""Run-time checks of an artifact's code: types, sizes and loop iterations, which its text does not show.

The grammar decides what may be written but cannot see a name's value. So three constructs of a checked program
are executed through the functions below, whose cost is small beside that of a tensor operation:

    a * b             numbers and tensors only, and no integer beyond 64 bits: no string is formatted or repeated, and
                      no number grows without bound
    value.field       data only: a program cannot read a function, frame, class or module from a result
    range(size)       a limited number of iterations in one execution of the program
"""

from __future__ import annotations

import ast
import operator
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from runtime.errors import ArtifactError

ITERATIONS_LIMIT = 2**22
_LARGEST = 2**64
_NUMBERS = (int, float, bool)
_BEGIN, _CALCULATE, _FIELD = "__begin", "__calculate", "__field"  # no program can define these names
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
}
_BY_NAME = {kind.__name__: function for kind, function in _BINARY.items()}
_NOT_DATA = (types.ModuleType, types.FrameType, types.CodeType, types.TracebackType, types.GeneratorType)


class IterationCounter:
    """The number of iterations that the loops of one program may still make in this execution."""

    def __init__(self) -> None:
        self.left = ITERATIONS_LIMIT

    def restart(self) -> None:
        """Begin another execution."""
        self.left = ITERATIONS_LIMIT

    def range(self, size: Any) -> Iterator[int]:
        """Return `range(size)`, or raise ArtifactError before the first iteration if the limit would be exceeded."""
        count = max(operator.index(size), 0)
        self.left -= count
        if self.left < 0:
            raise ArtifactError(
                f"a loop of {count} iterations exceeds the limit of {ITERATIONS_LIMIT} per execution of a program"
            )
        return iter(range(count))


def guarded(source: str, filename: str) -> ast.Module:
    """Parse a checked program and replace its arithmetic and field accesses with calls of the functions below.

    Line numbers stay those of the source, so tracebacks match it.

    Args:
        source: the program.
        filename: for tracebacks.
    """
    tree = ast.fix_missing_locations(_InsertGuards().visit(ast.parse(source, filename=filename)))
    assert isinstance(tree, ast.Module)
    return tree


def guards() -> dict[str, Any]:
    """Return the functions that one guarded program calls, by name."""
    counter = IterationCounter()
    return {"range": counter.range, _BEGIN: counter.restart, _CALCULATE: calculate, _FIELD: field}


def calculate(kind: str, left: Any, right: Any) -> Any:
    """Return `left <kind> right` of numbers and tensors.

    Raises:
        ArtifactError: if an operand is neither, or the result is complex or an integer beyond 64 bits.
    """
    for value in (left, right):
        if type(value) not in _NUMBERS and not _is_number(value):
            raise ArtifactError(
                f"an artifact's code may calculate only with numbers and tensors; got {type(value).__name__}"
            )
    result = _BY_NAME[kind](left, right)
    if type(result) is complex:
        raise ArtifactError("an artifact's code takes a root of a negative number")
    if type(result) is int and abs(result) > _LARGEST:
        raise ArtifactError("an artifact's code calculates an integer of more than 64 bits")
    return result


def _is_number(value: Any) -> bool:
    import torch

    return isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool))


def field(value: Any, name: str) -> Any:
    """Return `value.<name>`.

    Raises:
        ArtifactError: if the field is a function, a class or anything else that is not data, or belongs to a module.
    """
    from torch import nn

    result = getattr(value, name)
    is_code = callable(result) or isinstance(result, _NOT_DATA)
    if is_code or isinstance(value, (nn.Module, *_NOT_DATA)) or callable(value):
        raise ArtifactError(
            f"an artifact's code may read only data; got the field {name!r} of an object of type {type(value).__name__}"
        )
    return result


def insert_cached(tree: ast.Module, hooks: Mapping[str, Sequence[tuple[int, str]]]) -> None:
    """Insert `name = run.cached(place, name)` into a program.

    Args:
        tree: the program.
        hooks: for a name that a statement assigns to, the places and names of the values to pass after that statement.
    """
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef), "a checked program is one function"
    body: list[ast.stmt] = []
    for statement in function.body:
        body.append(statement)
        target = statement.targets[0] if isinstance(statement, ast.Assign) else None
        for place, name in hooks.get(target.id, ()) if isinstance(target, ast.Name) else ():
            take = ast.Attribute(ast.Name("run", ast.Load()), "cached", ast.Load())
            call = ast.Call(take, [ast.Constant(place), ast.Name(name, ast.Load())], [])
            taken = ast.Assign([ast.Name(name, ast.Store())], call)
            body.append(ast.fix_missing_locations(ast.copy_location(taken, statement)))
    function.body = body


class _InsertGuards(ast.NodeTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        if any(isinstance(part, ast.For) for part in node.body):
            begin = ast.Expr(ast.Call(ast.Name(_BEGIN, ast.Load()), [], []))
            node.body.insert(0, ast.copy_location(begin, node.body[0]))
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        arguments = [ast.Constant(type(node.op).__name__), node.left, node.right]
        return ast.copy_location(ast.Call(ast.Name(_CALCULATE, ast.Load()), arguments, []), node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        if not isinstance(node.value, ast.Name) or node.value.id in ("self", "run", "torch"):
            return node
        arguments: list[ast.expr] = [node.value, ast.Constant(node.attr)]
        return ast.copy_location(ast.Call(ast.Name(_FIELD, ast.Load()), arguments, []), node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """Guard the arguments only: the grammar allows methods by name, so a method's name is not a field access."""
        node.args = [self.visit(argument) for argument in node.args]
        node.keywords = [self.visit(keyword) for keyword in node.keywords]
        if isinstance(node.func, ast.Call):
            node.func = self.visit(node.func)
        return node
