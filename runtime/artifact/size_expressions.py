"""Evaluate an artifact's conditions on sizes: relations between sums, products and quotients of its dims.

They are written in Python syntax, `sequence % 4 == 0`, and computed by a small dedicated evaluator: no part of an
artifact is executed to decide whether it may run.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping

from runtime.errors import ArtifactError

_LIMIT_CHARACTERS, _LIMIT_DEPTH, _LIMIT_NUMBER = 2**14, 64, 2**63
ANY_SIZE = 7
Number = int | float
_ARITHMETIC: dict[type, Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_RELATIONS: dict[type, Callable[[Number, Number], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_CHOICES: dict[str, Callable[..., Number]] = {"max": max, "min": min}
_OF_ONE: dict[str, Callable[[Number], Number]] = {
    "sqrt": lambda value: value**0.5 if value >= 0 else math.nan,
    "trunc": math.trunc,
    "floor": math.floor,
    "ceil": math.ceil,
    "round": round,
}
# Of a size in the manifest.
_LENGTH, _DEPTH, _LARGEST, _EXPONENT = 1000, 24, 2**48, 8
_PARTS = (ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.Tuple, ast.Name, ast.Constant, ast.Load)
_SIGNS = (ast.operator, ast.unaryop, ast.cmpop)


def holds(condition: str, sizes: Mapping[str, int]) -> bool:
    """Whether a condition holds for these sizes.

    Args:
        condition: one relation.
        sizes: values of its names.

    Raises:
        ArtifactError: when it is not a supported relation, or names an unknown size.
    """
    tree = _parsed(condition)
    try:
        left, right = (_value(side, sizes, condition, 0) for side in (tree.left, tree.comparators[0]))
    except ZeroDivisionError:
        return False  # the expression has no value for these sizes
    return _RELATIONS[type(tree.ops[0])](left, right)


def size_of(expression: str, sizes: Mapping[str, int]) -> int:
    """Evaluate an expression over sizes, as it appears in the shapes of a manifest.

    Raises:
        ArtifactError: when it is not a supported expression, or names an unknown size.
    """
    try:
        size = _value(ast.parse(expression[:_LIMIT_CHARACTERS], mode="eval").body, sizes, expression, 0)
    except (SyntaxError, ValueError, RecursionError, MemoryError, ZeroDivisionError) as error:
        raise _refuse(expression) from error
    if not isinstance(size, int):
        raise _refuse(expression)
    return size


def check_condition(condition: str, sizes: Mapping[str, int]) -> None:
    """Reject a string that is not a condition on these sizes, whose values are placeholders (`ANY_SIZE`).

    Raises:
        ArtifactError: naming it.
    """
    tree = _parsed(condition)
    for side in (tree.left, tree.comparators[0]):
        _value(side, sizes, condition, 0, is_tried=True)


def _parsed(condition: str) -> ast.Compare:
    try:
        if len(condition) > _LIMIT_CHARACTERS:
            raise ValueError("too long")
        tree = ast.parse(condition, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _refuse(condition) from error
    if not isinstance(tree, ast.Compare) or len(tree.ops) != 1 or type(tree.ops[0]) not in _RELATIONS:
        raise _refuse(condition)
    return tree


def _value(node: ast.expr, sizes: Mapping[str, int], condition: str, depth: int, *, is_tried: bool = False) -> Number:
    """Evaluate a node. With `is_tried` the sizes are placeholders, so a zero divisor is not an error."""
    result: Number | None = None
    if depth > _LIMIT_DEPTH:
        raise _refuse(condition)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        assert isinstance(node.value, (int, float)), "it was asked"
        result = node.value
    elif isinstance(node, ast.Name) and node.id in sizes:
        result = sizes[node.id]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        result = -_value(node.operand, sizes, condition, depth + 1, is_tried=is_tried)
    elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right = (_value(side, sizes, condition, depth + 1, is_tried=is_tried) for side in (node.left, node.right))
        is_division = isinstance(node.op, (ast.Div, ast.FloorDiv, ast.Mod))
        result = 1 if is_tried and is_division and right == 0 else _ARITHMETIC[type(node.op)](left, right)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CHOICES and node.args:
        result = _CHOICES[node.func.id](
            [_value(item, sizes, condition, depth + 1, is_tried=is_tried) for item in node.args]
        )
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _OF_ONE:
        if len(node.args) != 1:
            raise _refuse(condition)
        result = _OF_ONE[node.func.id](_value(node.args[0], sizes, condition, depth + 1, is_tried=is_tried))
    if result is None or not abs(result) <= _LIMIT_NUMBER:  # also rejects not-a-number
        raise _refuse(condition)
    return result


def _refuse(condition: str) -> ArtifactError:
    return ArtifactError(f"the manifest has an invalid expression over sizes: {condition[:80]!r}")


def is_dimension(size: int | str) -> bool:
    """Whether a size can be one axis of a shape: a number, or an expression over named sizes in sympy's syntax."""
    if isinstance(size, int):
        return 0 <= size < _LARGEST
    try:
        if len(size) > _LENGTH or not size.isascii():
            return False
        tree = ast.parse(size, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return _depth(tree) <= _DEPTH and all(map(_is_part, ast.walk(tree)))


def _is_part(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        value = node.value
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST
    if isinstance(node, ast.Name):
        return not node.id.startswith("_")
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and not node.keywords
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        exponent = node.right.operand if isinstance(node.right, ast.UnaryOp) else node.right
        power = exponent.value if isinstance(exponent, ast.Constant) else None
        return isinstance(power, (int, float)) and abs(power) <= _EXPONENT
    return isinstance(node, (*_PARTS, *_SIGNS))


def _depth(node: ast.AST, limit: int = _DEPTH + 1) -> int:
    if limit == 0:
        return 1
    return 1 + max((_depth(child, limit - 1) for child in ast.iter_child_nodes(node)), default=0)
