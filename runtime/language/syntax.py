"""Read the syntax tree of an artifact's code."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any


def operator_of(node: ast.expr | None) -> str:
    """The `name.overload` of a call of a torch operator; empty for anything else."""
    path: list[str] = []
    inner = node.func if isinstance(node, ast.Call) else None
    while isinstance(inner, ast.Attribute):
        path.append(inner.attr)
        inner = inner.value
    if isinstance(inner, ast.Name) and inner.id == "torch" and path[2:] == ["aten", "ops"]:
        return f"{path[1]}.{path[0]}"
    return ""


def names_in(nodes: ast.AST | Iterable[ast.AST], context: type[ast.expr_context]) -> list[str]:
    """Names that are read (ast.Load), assigned (ast.Store) or deleted (ast.Del), in order, each once."""
    found: dict[str, None] = {}
    for node in [nodes] if isinstance(nodes, ast.AST) else nodes:
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and isinstance(part.ctx, context) and part.id not in ("torch", "self", "run"):
                found[part.id] = None
    return list(found)


def literal_of(node: ast.expr) -> Any:
    """The value of a literal number or list; None for anything else."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def target_of(statement: ast.stmt) -> str:
    """The name that a statement assigns to; empty if it is no assignment."""
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id
    return ""
