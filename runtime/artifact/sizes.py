"""Check the syntax of sizes that a manifest states as expressions, without evaluating them."""

from __future__ import annotations

import ast

_LENGTH, _DEPTH, _LARGEST, _EXPONENT = 1000, 24, 2**48, 8
_PARTS = (ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.Tuple, ast.Name, ast.Constant, ast.Load)
_SIGNS = (ast.operator, ast.unaryop, ast.cmpop)


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
