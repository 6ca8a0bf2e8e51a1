"""What an artifact's code is not told by its text alone: types, sizes and turns, watched while it runs.

The grammar decides what may be written; it cannot see what a name stands for. So three constructs of a checked program
are executed through the functions below, which cost nothing beside a tensor operation:

    a * b             numbers and tensors only, and no integer beyond 64 bits: no text is formatted or repeated, and no
                      number doubles its length again and again
    value.field       data only: no function, frame, class or module comes out of a result
    range(size)       so many turns in all, in one execution of the program
"""

from __future__ import annotations

import ast
import operator
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from runtime.errors import ArtifactError

TURNS_LIMIT = 2**22
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


class TurnCounter:
    """Counts the turns of all loops of one program, from `restart` on."""

    def __init__(self) -> None:
        self.left = TURNS_LIMIT

    def restart(self) -> None:
        """Begin another execution."""
        self.left = TURNS_LIMIT

    def range(self, size: Any) -> Iterator[int]:
        """`range(size)`.

        Raises:
            ArtifactError: before the first turn, when there would be too many.
        """
        count = max(operator.index(size), 0)
        self.left -= count
        if self.left < 0:
            raise ArtifactError(
                f"a loop of {count} turns is too long: an artifact's code may take {TURNS_LIMIT} in one execution"
            )
        return iter(range(count))


def guarded(source: str, filename: str, hooks: Mapping[str, Sequence[tuple[int, str]]]) -> ast.Module:
    """The syntax tree of a checked program, with its arithmetic and field accesses made calls of the functions below,
    and values handed out by `run.cached`.

    The lines are those of the source, so that tracebacks fit it.

    Args:
        source: the program.
        filename: for tracebacks.
        hooks: for the name that a statement assigns to, the places and names of the values to hand out after it.
    """
    tree = _Guarded().visit(ast.parse(source, filename=filename))
    if hooks:
        _hand_out(tree.body[0], hooks)
    ast.fix_missing_locations(tree)
    assert isinstance(tree, ast.Module)
    return tree


def guards() -> dict[str, Any]:
    """What one guarded program calls, by name."""
    turns = TurnCounter()
    return {"range": turns.range, _BEGIN: turns.restart, _CALCULATE: calculate, _FIELD: field}


def calculate(kind: str, left: Any, right: Any) -> Any:
    """`left <kind> right` of numbers and tensors.

    Raises:
        ArtifactError: for anything else, or an integer that is longer than any size.
    """
    for value in (left, right):
        if type(value) not in _NUMBERS and not _is_number(value):
            raise ArtifactError(f"an artifact's code calculates with {type(value).__name__}, which is no number")
    result = _BY_NAME[kind](left, right)
    if type(result) is complex:
        raise ArtifactError("an artifact's code calculates a root of a negative number")
    if type(result) is int and abs(result) > _LARGEST:
        raise ArtifactError("an artifact's code calculates a number of more than 64 bits")
    return result


def _is_number(value: Any) -> bool:
    import torch

    return isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool))


def field(value: Any, name: str) -> Any:
    """`value.<name>`, if that is data.

    Raises:
        ArtifactError: for a function, a class or anything else that is no data, or the inside of a module.
    """
    from torch import nn

    result = getattr(value, name)
    is_code = callable(result) or isinstance(result, _NOT_DATA)
    if is_code or isinstance(value, (nn.Module, *_NOT_DATA)) or callable(value):
        raise ArtifactError(f"an artifact's code reads the field {name!r} of {type(value).__name__}, which is no data")
    return result


def _hand_out(function: ast.FunctionDef, hooks: Mapping[str, Sequence[tuple[int, str]]]) -> None:
    """Put `name = run.cached(place, name)` behind statements."""
    body: list[ast.stmt] = []
    for statement in function.body:
        body.append(statement)
        target = statement.targets[0] if isinstance(statement, ast.Assign) else None
        for place, name in hooks.get(target.id, ()) if isinstance(target, ast.Name) else ():
            take = ast.Attribute(ast.Name("run", ast.Load()), "cached", ast.Load())
            call = ast.Call(take, [ast.Constant(place), ast.Name(name, ast.Load())], [])
            body.append(ast.copy_location(ast.Assign([ast.Name(name, ast.Store())], call), statement))
    function.body = body


class _Guarded(ast.NodeTransformer):
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
        """A method's name is no field: the grammar knows which methods there are."""
        node.args = [self.visit(argument) for argument in node.args]
        node.keywords = [self.visit(keyword) for keyword in node.keywords]
        if isinstance(node.func, ast.Call):
            node.func = self.visit(node.func)
        return node
