"""References of one library function: the edges of the graph that `runtime.language.reach` walks.

Every reference counts as a call, because a function may call whatever it can name, or pass it on to be called.
"""

from __future__ import annotations

import ast
import builtins
import functools
from dataclasses import dataclass, field

from runtime.language.library import (
    ClassDefinition,
    Definition,
    ExternalName,
    FunctionDefinition,
    LibrarySource,
    ValueDefinition,
    bases,
    find,
    methods,
    resolve,
)
from runtime.language.reviewed import BUILTINS, DUNDERS, is_computing, is_known, is_known_elsewhere

_BUILTINS = frozenset(dir(builtins))
_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler, ast.MatchAs)
_EXCEPTIONS = frozenset(
    name for name in _BUILTINS if isinstance(kind := getattr(builtins, name), type) and issubclass(kind, BaseException)
)


@dataclass(slots=True)
class References:
    """References of a function.

    Attributes:
        functions: functions of the library that it names.
        classes: classes of the library that it names.
        called: names of methods or submodules that it calls on objects of unknown class.
        read: names of attributes that it reads from objects of unknown class.
        stored: names of attributes that it assigns to.
        problems: actions that are not known to be harmless, as `verb object`.
    """

    functions: dict[str, FunctionDefinition] = field(default_factory=dict)
    classes: dict[str, ClassDefinition] = field(default_factory=dict)
    called: dict[str, None] = field(default_factory=dict)
    read: dict[str, None] = field(default_factory=dict)
    stored: dict[str, None] = field(default_factory=dict)
    problems: dict[str, None] = field(default_factory=dict)


@functools.lru_cache(maxsize=16384)
def summary(function: FunctionDefinition) -> References:
    """Collect the references of a function, including its decorators."""
    found = References()
    owner = function.source.classes.get(function.qualified.rpartition(".")[0])
    inherited = bases(owner)[1:] if owner is not None else ()
    _Walk(function.source, found, _bound(function.node), inherited).function(function.node)
    return found


@functools.lru_cache(maxsize=4096)
def value_summary(value: ValueDefinition) -> References:
    """Collect the references of an expression that a module assigns to a name."""
    found = References()
    _Walk(value.source, found, frozenset()).visit(value.node)
    return found


def _bound(node: ast.AST) -> frozenset[str]:
    """Names that a function binds: variables, parameters, and nested functions and classes."""
    names = []
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and not isinstance(part.ctx, ast.Load):
            names.append(part.id)
        elif isinstance(part, ast.arg):
            names.append(part.arg)
        elif isinstance(part, _NAMED) and part.name is not None:
            names.append(part.name)
    return frozenset(names)


class _Walk(ast.NodeVisitor):
    def __init__(
        self, where: LibrarySource, found: References, bound: frozenset[str], owner: tuple[ClassDefinition, ...] = ()
    ) -> None:
        self.where = where
        self.owner = owner
        self.called: set[str] = set()  # local names that the function calls
        self.found = found
        self.bound = bound

    def function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        """Visit everything but annotations, which are not executed when the function is called."""
        self.called |= {
            part.func.id for part in ast.walk(node) if isinstance(part, ast.Call) and isinstance(part.func, ast.Name)
        }
        for decorator in node.decorator_list:
            self.visit(decorator)
        arguments = node.args
        for default in (*arguments.defaults, *arguments.kw_defaults):
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.function(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.visit(node.target)
        if node.value is not None:
            self.visit(node.value)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        self.visit(node.body)

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        self._problem(f"imports {ast.unparse(node)[:60]}")

    visit_ImportFrom = visit_Import

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._problem(f"defines a class {node.name}")

    def visit_Global(self, node: ast.Global) -> None:
        self._problem(f"changes the global {', '.join(node.names)}")

    def visit_Name(self, node: ast.Name) -> None:
        if not isinstance(node.ctx, ast.Load):
            return
        definitions = find(self.where.name, node.id)
        for definition in definitions:
            self._refer(definition)
        if definitions or node.id in self.bound:
            return
        if node.id not in _BUILTINS:
            self._problem(f"names {node.id}, which is not defined")
        elif node.id not in BUILTINS and node.id not in _EXCEPTIONS:
            self._problem(f"names {node.id}")

    def visit_Assign(self, node: ast.Assign) -> None:
        """Record `f = x.method` as a call of the method if the function calls `f`."""
        names = {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node.value, ast.Attribute) and names & self.called:
            self._attribute(node.value, is_called=True)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._attribute(node, is_called=False)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) and node.func.id not in self.bound else ""
        if name in ("getattr", "setattr", "delattr") and len(node.args) > 1:
            self._dynamic(node, name)
        elif isinstance(node.func, ast.Attribute):
            self._attribute(node.func, is_called=True)
        else:
            self.visit(node.func)
        for argument in node.args:
            self.visit(argument)
        for keyword in node.keywords:
            self.visit(keyword.value)

    def _dynamic(self, node: ast.Call, name: str) -> None:
        """Treat `getattr(x, "name")` as `x.name`; a name computed at run time is a problem."""
        key = node.args[1]
        if not isinstance(key, ast.Constant) or not isinstance(key.value, str):
            self._problem(f"calls {name} with {ast.unparse(key)[:60]}")
        elif name == "getattr":
            self.found.read[key.value] = None
        else:
            self.found.stored[key.value] = None

    def _attribute(self, node: ast.Attribute, *, is_called: bool) -> None:
        if isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name) and node.value.func.id == "super":
            self._inherited(node.attr)
            return
        root = _root(node)
        if isinstance(root, ast.Name) and root.id not in self.bound:
            definitions = resolve(self.where, node)
            if definitions:
                for definition in definitions:
                    self._refer(definition)
                return
        if isinstance(node.ctx, ast.Load):
            (self.found.called if is_called else self.found.read)[node.attr] = None
        else:
            self.found.stored[node.attr] = None
        if node.attr.startswith("__") and node.attr not in DUNDERS:
            self._problem(f"reads {node.attr}")
        self.visit(node.value)

    def _inherited(self, name: str) -> None:
        """Refer to `name` in every base class, for `super().name`."""
        for cls in self.owner:
            own = methods(cls)
            if name in own:
                self._refer(own[name])

    def _refer(self, definition: Definition) -> None:
        if isinstance(definition, ExternalName):
            if not is_known_elsewhere(definition.name):
                self._problem(f"names {definition.name}")
        elif is_known(definition.path):
            pass
        elif not is_computing(definition.source.name):
            self._problem(f"names {definition.path}")
        elif isinstance(definition, FunctionDefinition):
            self.found.functions[definition.path] = definition
        elif isinstance(definition, ClassDefinition):
            self.found.classes[definition.path] = definition
        else:
            self._merge(value_summary(definition))

    def _merge(self, other: References) -> None:
        for name in ("functions", "classes", "called", "read", "problems"):
            getattr(self.found, name).update(getattr(other, name))

    def _problem(self, what: str) -> None:
        self.found.problems[what] = None


def _root(node: ast.expr) -> ast.expr:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node


@functools.lru_cache(maxsize=16384)
def stored_values(function: FunctionDefinition) -> tuple[tuple[str, References], ...]:
    """Collect, per attribute that a method assigns to, the functions that the value names without calling them."""
    found: list[tuple[str, References]] = []
    for node in ast.walk(function.node):
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            for part in ast.walk(target):
                if isinstance(part, ast.Attribute) and not isinstance(part.ctx, ast.Load):
                    own = References()
                    walk = _WalkUncalled(function.source, own, _bound(function.node))
                    walk.visit(node.value)
                    own.called.clear()
                    found.append((part.attr, own))
    return tuple(found)


class _WalkUncalled(_Walk):
    """Collects references that are passed on, not called: calling a class makes a module, whose class is known."""

    def visit_Call(self, node: ast.Call) -> None:
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            self.visit(argument)

    def _attribute(self, node: ast.Attribute, *, is_called: bool) -> None:
        for definition in resolve(self.where, node):
            self._refer(definition)
