"""Find the Linear modules whose inputs are made inside a block, number by number, from outputs of other Linear modules.

Those are the down projections of MLPs. Their inputs, such as silu(gate) * up, are neither in the residual stream nor in
the space of an attention head, and a rotation of them cannot be fused into the modules that compute them, because the
functions between are not linear. They are found in the programs, not by names.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence

from runtime.language.operators import POINTWISE, SHAPE
from runtime.language.syntax import operator_of


def inner_linears(source: str, linears: Sequence[str]) -> list[str]:
    """Return those modules of a program, in the order of their calls.

    Args:
        source: the checked program.
        linears: the paths in the program of its Linear modules.
    """
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef), "a checked program is one function"
    found: dict[str, None] = {}
    values: dict[str, ast.expr] = {}
    for statement in function.body:
        if not isinstance(statement, ast.Assign):
            continue
        module, argument = _called(statement.value)
        if module in linears and isinstance(argument, ast.Name) and _is_inner(argument.id, values, linears):
            found[module] = None
        for target in statement.targets:
            for node in ast.walk(target):
                if isinstance(node, ast.Name):
                    values[node.id] = statement.value
    return list(found)


def _called(node: ast.expr) -> tuple[str, ast.expr | None]:
    """Return the path of the module that an expression calls, and its first argument."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Call) and node.func.args:
        getter, path = node.func.func, node.func.args[0]
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        if isinstance(getter, ast.Attribute) and getter.attr == "get_submodule" and isinstance(path, ast.Constant):
            return str(path.value), arguments[0] if arguments else None
    return "", None


def _is_inner(name: str, values: Mapping[str, ast.expr], linears: Sequence[str]) -> bool:
    """Whether a value follows from outputs of Linear modules by operators on single numbers, at least one of them."""
    pending, seen = [name], {name}
    has_source = is_changed = False
    while pending:
        value = values.get(pending.pop())
        if value is None:
            return False  # an input of the program
        if _called(value)[0] in linears:
            has_source = True
            continue
        operator = operator_of(value).partition(".")[0].rstrip("_")
        if not isinstance(value, ast.Subscript) and operator not in POINTWISE | SHAPE and not _is_constant(value):
            return False
        is_changed |= operator in POINTWISE
        for used in _tensors_in(value):
            if used not in seen and not _is_size(values.get(used)):
                seen.add(used)
                pending.append(used)
    return has_source and is_changed


def _tensors_in(value: ast.expr) -> Iterator[str]:
    """Yield the names of the values that an expression reads, without `torch`, `self` and `run`."""
    for node in ast.walk(value):
        if isinstance(node, ast.Name) and node.id not in ("torch", "self", "run"):
            yield node.id


def _is_size(value: ast.expr | None) -> bool:
    """Whether a value is a number of elements."""
    return value is not None and operator_of(value).partition(".")[0] in ("sym_size", "size", "sym_numel", "numel")


def _is_constant(value: ast.expr) -> bool:
    """Whether a value is a parameter, a buffer or a constant of the artifact."""
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and not operator_of(value)
