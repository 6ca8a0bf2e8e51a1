"""Small languages in a manifest besides its code: sizes, written as expressions, and patterns of names.

Nothing here calculates or searches; it is decided whether somebody else may.
"""

from __future__ import annotations

import ast
import re

_LENGTH, _DEPTH, _LARGEST, _EXPONENT = 1000, 24, 2**48, 8
_PATTERN_LENGTH, _REPEATS = 500, 4
_PARTS = (ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.Tuple, ast.Name, ast.Constant, ast.Load)
_SIGNS = (ast.operator, ast.unaryop, ast.cmpop)


def is_dimension(size: int | str) -> bool:
    """Whether this can be one axis of a shape: a number, or an expression over named sizes as sympy writes it."""
    if isinstance(size, int):
        return 0 <= size < _LARGEST
    try:
        if len(size) > _LENGTH or not size.isascii():
            return False
        tree = ast.parse(size, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return _depth(tree) <= _DEPTH and all(map(_is_part, ast.walk(tree)))


def is_pattern(pattern: str) -> bool:
    """Whether this is a regular expression whose search ends in time: at most a few repetitions, and none of a group,
    for a repetition of repetitions takes time that doubles with each character.
    """
    if len(pattern) > _PATTERN_LENGTH or not compiles(pattern):
        return False
    # A flag can make another language of what follows.
    has_reference = re.search(r"\\[1-9]|\(\?P=|\(\?\(|\(\?[A-Za-z-]", pattern.replace("(?P<", "(")) is not None
    repeats = len(re.findall(r"[*+{]|(?<![(*+}])\?", _plain(pattern)))
    return not has_reference and repeats <= _REPEATS and not repeats_groups(pattern)


def compiles(pattern: str) -> bool:
    """Whether this is a regular expression at all."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def repeats_groups(pattern: str) -> bool:
    """Whether a group is repeated, which can take time that doubles with each character of a name."""
    return re.search(r"\)\s*[*+{]", _plain(pattern)) is not None


def _plain(pattern: str) -> str:
    """A regular expression with an underscore for what a backslash takes the meaning from, and for classes."""
    return re.sub(r"\[\^?\]?[^\]]*\]", "_", re.sub(r"\\.", "_", pattern))


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
