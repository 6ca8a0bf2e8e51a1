"""Rewrite an artifact's code so that it computes the same with less work.

The code has been checked before (`runtime.language.grammar`), and cannot name what is inserted here.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Sequence
from typing import Any

from runtime.language.attention import attention, repeated
from runtime.language.operators import changes_in_place
from runtime.language.regions import TILED, find_regions
from runtime.language.syntax import names_in, operator_of, target_of
from runtime.language.tiles import Tiles

_ATTENTION, _REPEATED = "__attention", "__repeated"  # no program can define these names
_CALLED = "scaled_dot_product_attention.default"


def rewrite(tree: ast.Module, hooked: Collection[str]) -> dict[str, Any]:
    """Rewrite a guarded program in place, and return the functions that the rewritten program calls, by name.

    Programs that change values in place are left alone, apart from attention.

    Args:
        tree: the program.
        hooked: names whose values a hook gets or replaces.
    """
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef), "a checked program is one function"
    functions: dict[str, Any] = {_ATTENTION: attention}
    calls = [operator_of(node) for node in ast.walk(function) if isinstance(node, ast.Call)]
    if not any(changes_in_place(name.partition(".")[0]) for name in calls):
        _leave_repeats(function.body, hooked)
        functions |= {_REPEATED: repeated, TILED: Tiles(find_regions(tree, hooked))}
    _InsertAttention().visit(tree)
    return functions


class _InsertAttention(ast.NodeTransformer):
    """Call attention through the host; `run` tells it the device."""

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if operator_of(node) == _CALLED:
            node.func = ast.copy_location(ast.Name(_ATTENTION, ast.Load()), node)
            node.args.insert(0, ast.copy_location(ast.Name("run", ast.Load()), node))
        return node


def _leave_repeats(body: Sequence[ast.stmt], hooked: Collection[str]) -> None:
    """Let the host reshape values that are read once, as keys or values of attention, if no statement in between could
    change them.
    """
    readers: dict[str, list[int]] = {}
    for place, statement in enumerate(body):
        for read in names_in(statement, ast.Load):
            readers.setdefault(read, []).append(place)
    for place, statement in enumerate(body):
        name, call = target_of(statement), statement.value if isinstance(statement, ast.Assign) else None
        if operator_of(call) != "reshape.default" or not isinstance(call, ast.Call) or call.keywords or name in hooked:
            continue
        reader, *others = readers.get(name, [place])
        if not others and reader > place and _is_operand(name, body[reader]):
            between = body[place + 1 : reader]
            if all(isinstance(one, ast.Delete) or _is_operator(one) for one in between):
                call.func = ast.copy_location(ast.Name(_REPEATED, ast.Load()), call)


def _is_operand(name: str, statement: ast.stmt) -> bool:
    """Whether a statement reads a value once, as the key or value of attention."""
    call = statement.value if isinstance(statement, ast.Assign) else None
    if operator_of(call) != _CALLED or not isinstance(call, ast.Call):
        return False
    read = [part.id for part in ast.walk(call) if isinstance(part, ast.Name)]
    return read.count(name) == 1 and any(isinstance(one, ast.Name) and one.id == name for one in call.args[1:3])


def _is_operator(statement: ast.stmt) -> bool:
    """Whether a statement assigns the result of a torch operator, or of a value that was left to attention."""
    call = statement.value if isinstance(statement, ast.Assign) else None
    is_left = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == _REPEATED
    return is_left or bool(operator_of(call))
