"""Decide from the source of a loop whether it can be recorded as a loop.

The body is executed once, so it must do the same in every iteration. It may calculate, assign to plain names, write
into tensors and append to lists. Anything else through which an iteration could depend on the previous ones is
rejected.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_STATEMENTS = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.If, ast.For, ast.Pass)
_NEVER = (ast.Lambda, ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)
_JOINS = ("stack", "cat", "concat")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopSource:
    """The names that a loop uses.

    Attributes:
        index: the name of the iteration's index.
        assigned: names that the body assigns to.
        written: names whose values the body writes into: `name[...] = value`.
        lists: names of lists that the body appends to and that are joined afterwards.
    """

    index: str
    assigned: tuple[str, ...]
    written: tuple[str, ...]
    lists: tuple[str, ...]


def loop_of(frame: FrameType) -> LoopSource | None:
    """Return the loop `for index in range(size):` whose `range` this frame calls, or None if it cannot be recorded."""
    function = _function(frame.f_code.co_filename, frame.f_code.co_firstlineno, frame.f_code.co_name)
    if function is None:
        return None
    calls = [node for node in ast.walk(function) if _is_range(node) and _is_at(node, frame.f_lineno)]
    loops = [node for node in ast.walk(function) if isinstance(node, ast.For) and node.iter in calls]
    if len(calls) != 1 or len(loops) != 1:
        return None
    return _loop_source(loops[0], function)


def _is_range(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range"


def _is_at(node: ast.AST, line: int) -> bool:
    return isinstance(node, ast.expr) and node.lineno <= line <= (node.end_lineno or node.lineno)


@functools.lru_cache(maxsize=64)
def _tree(file: str) -> ast.Module | None:
    try:
        return ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


def _function(file: str, first_line: int, name: str) -> ast.FunctionDef | None:
    """Find the function whose code, including decorators, begins at this line."""
    tree = _tree(file)
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.FunctionDef) and node.name == name and _first_line(node) == first_line:
            return node
    return None


def _first_line(function: ast.FunctionDef) -> int:
    return min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])


def _loop_source(loop: ast.For, function: ast.FunctionDef) -> LoopSource | None:
    if not isinstance(loop.target, ast.Name) or loop.orelse or isinstance(loop.iter, ast.Starred):
        return None
    assigned: dict[str, None] = {}
    written: dict[str, None] = {}
    lists: dict[str, None] = {}
    for statement in _statements(loop.body):
        if not isinstance(statement, _STATEMENTS):
            return None
        if isinstance(statement, ast.For) and statement.orelse:
            return None
        if isinstance(statement, ast.Expr) and not isinstance(statement.value, ast.Constant):
            name = _appended_to(statement.value)
            if name is None:
                return None
            lists[name] = None
        for target in _targets(statement):
            if isinstance(target, ast.Name):
                assigned[target.id] = None
            elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
                written[target.value.id] = None
            else:
                return None
    if any(isinstance(node, _NEVER) for statement in loop.body for node in ast.walk(statement)):
        return None
    names = (loop.target.id, *assigned, *written)
    is_clear = loop.target.id not in assigned and not any(name in lists for name in names)
    if not is_clear or not all(_is_only_joined(name, loop, function) for name in lists):
        return None
    return LoopSource(index=loop.target.id, assigned=tuple(assigned), written=tuple(written), lists=tuple(lists))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        yield statement
        if isinstance(statement, (ast.If, ast.For)):
            yield from _statements([*statement.body, *statement.orelse])


def _targets(statement: ast.stmt) -> Iterator[ast.expr]:
    found: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        found = list(statement.targets)
    elif isinstance(statement, (ast.AugAssign, ast.AnnAssign, ast.For)):
        found = [statement.target]
    while found:
        target = found.pop(0)
        if isinstance(target, (ast.Tuple, ast.List)):
            found.extend(target.elts)
        else:
            yield target


def _appended_to(call: ast.expr) -> str | None:
    """Return the name of the list in `list.append(value)`, or None for any other call."""
    if not isinstance(call, ast.Call) or len(call.args) != 1 or call.keywords:
        return None
    method = call.func
    if not isinstance(method, ast.Attribute) or method.attr != "append" or not isinstance(method.value, ast.Name):
        return None
    return method.value.id


def _is_only_joined(name: str, loop: ast.For, function: ast.FunctionDef) -> bool:
    """Return whether only `append`, `torch.stack` and `torch.cat` use a list."""
    fine: list[ast.AST] = []
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            is_join = isinstance(owner, ast.Name) and owner.id == "torch" and node.func.attr in _JOINS
            fine.extend(node.args[:1] if is_join else ())
            fine.extend([owner] if _appended_to(node) is not None else ())
    last = min((s.end_lineno or 0 for s in function.body if _is_reassigned(name, s, loop)), default=None)
    uses = [node for node in ast.walk(function) if isinstance(node, ast.Name) and node.id == name]
    return all(isinstance(use.ctx, ast.Store) or use in fine or (last and use.lineno > last) for use in uses)


def _is_reassigned(name: str, statement: ast.stmt, loop: ast.For) -> bool:
    """Return whether this statement after the loop assigns another value to the name."""
    is_behind = statement.lineno > (loop.end_lineno or loop.lineno)
    is_plain = isinstance(statement, ast.Assign) and len(statement.targets) == 1
    return is_behind and is_plain and any(isinstance(t, ast.Name) and t.id == name for t in _targets(statement))
