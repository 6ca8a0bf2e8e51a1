"""The subset of Python that an artifact's code may use: statements here, expressions in `runtime.language.expressions`.
Everything that the two files do not list is refused.

A program is one function, `forward(self, <inputs>, *, run)`, of assignments, deletions, loops over a size and one
return of a dict (see docs/format.md). The check walks the syntax tree and accepts node by node; it never executes or
imports anything.
"""

from __future__ import annotations

import ast
import re
import warnings

from runtime.errors import ArtifactError
from runtime.language.expressions import NESTING_LIMIT, RESERVED, Allowed, Expressions, dotted, is_object
from runtime.language.opaque import is_opaque_path

__all__ = [
    "LOOP_LIMIT",
    "NESTING_LIMIT",
    "RESERVED",
    "SOURCE_LIMIT_BYTES",
    "Allowed",
    "check_program",
    "is_opaque_path",
]

SOURCE_LIMIT_BYTES = 4 * 2**20
LOOP_LIMIT = 4
_RESULTS = (ast.Call, ast.Attribute, ast.Subscript, ast.BinOp, ast.UnaryOp, ast.Compare)


def check_program(source: bytes, allowed: Allowed, origin: str) -> tuple[str, ...]:
    """Check one program.

    Args:
        source: the file's content.
        allowed: the names that the manifest lists; the code must use exactly these.
        origin: the file's name in messages.

    Returns:
        The operators it calls, as `operator.overload`, each once, for `operators.check_operators`.

    Raises:
        ArtifactError: naming the file, the line and the construct that is not allowed.
    """
    if len(source) > SOURCE_LIMIT_BYTES:
        raise ArtifactError(f"{origin} has {len(source)} bytes, more than the {SOURCE_LIMIT_BYTES} allowed")
    try:
        text = source.decode("ascii")
        if re.search(r"[^\x20-\x7e\n\t]", text):
            raise ValueError("control characters")
        if re.search(r"^[ \t]*#.*coding[:=]", text, re.MULTILINE):
            raise ValueError("an encoding declaration")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # code that Python itself warns about
            tree = ast.parse(text, filename=origin)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ArtifactError(f"{origin} is not a valid artifact program: {error or type(error).__name__}") from error
    checker = _Checker(allowed=allowed, origin=origin)
    checker.module(tree)
    _require_compilable(text, origin)
    return tuple(checker.operators)


def _require_compilable(text: str, origin: str) -> None:
    """Require that the source compiles, because Python finds some errors only after parsing; nothing is executed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compile(text, origin, "exec", dont_inherit=True)
    except (ValueError, SyntaxError, RecursionError, MemoryError, OverflowError) as error:
        raise ArtifactError(f"{origin} is not a valid artifact program: {error or type(error).__name__}") from error


class _Checker(Expressions):
    def module(self, tree: ast.Module) -> None:
        if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
            raise self.refuse(tree, "anything but one function")
        function = tree.body[0]
        self._signature(function)
        *statements, last = function.body
        for statement in statements:
            self._statement(statement)
        self._return(last)
        for kind in ("submodules", "attributes", "objects", "constants", "opaque"):
            stated, used = sorted(set(getattr(self.allowed, kind))), sorted(self.used.get(kind, ()))
            if stated != used:
                raise ArtifactError(f"{self.origin} uses other {kind} than its manifest lists")

    def _signature(self, function: ast.FunctionDef) -> None:
        arguments = function.args
        is_plain = (
            function.name == "forward"
            and not function.decorator_list
            and function.returns is None
            and not getattr(function, "type_params", [])
            and not arguments.posonlyargs
            and not arguments.defaults
            and arguments.vararg is None
            and arguments.kwarg is None
            and arguments.kw_defaults == [None]
            and [argument.arg for argument in arguments.kwonlyargs] == ["run"]
            and all(argument.annotation is None for argument in (*arguments.args, *arguments.kwonlyargs))
        )
        names = [argument.arg for argument in arguments.args]
        if not is_plain or names != ["self", *self.allowed.input_names]:
            raise self.refuse(function, "a signature that differs from the manifest's")
        for name in names[1:]:
            if name in self.defined:
                raise self.refuse(function, f"a second input {name!r}")
            self.define(function, name)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign):
            self._assignment(node)
        elif isinstance(node, ast.Delete):
            for target in node.targets:
                if not isinstance(target, ast.Name) or target.id not in self.defined:
                    raise self.refuse(node, "deletion of anything but a value")
                if self.outside and target.id in self.outside[-1]:
                    raise self.refuse(node, "deletion inside a loop of a value from outside")
                del self.defined[target.id]
                self.lists.pop(target.id, None)
        elif isinstance(node, ast.For):
            self._loop(node)
        elif isinstance(node, ast.Expr) and self.outside:
            self._append(node)
        else:
            raise self.refuse(node, f"a statement of kind {type(node).__name__}")

    def _assignment(self, node: ast.Assign) -> None:
        if len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name) or node.type_comment is not None:
            raise self.refuse(node, "assignment to anything but one name")
        name, value = node.targets[0].id, node.value
        is_list = isinstance(value, ast.List) and not value.elts
        if isinstance(value, ast.Name):
            self._plain_name(value)
        elif not is_list and not isinstance(value, _RESULTS):
            raise self.refuse(node, "assignment of anything but a result")
        if self.outside and (is_list or is_object(value) or name in self.objects or name in self.lists):
            raise self.refuse(node, "assignment of or to a list, module or config inside a loop")
        self.may_be_object = is_object(value)
        self.expression(value, 0)
        self.may_be_object = False
        is_persistent, module = self.is_persistent(value), self._module_name(value)
        self.define(node, name)
        if is_persistent:
            self.persistent[name] = None
        if is_object(value):
            self.objects[name] = module
        elif is_list:
            self.lists[name] = None

    def _loop(self, node: ast.For) -> None:
        """Accept `for name in range(size):`. Names that the body defines end with it, since it may never run."""
        if len(self.outside) >= LOOP_LIMIT:
            raise self.refuse(node, f"nesting of more than {LOOP_LIMIT} loops")
        if not isinstance(node.target, ast.Name) or node.target.id in self.defined or node.type_comment is not None:
            raise self.refuse(node, "a loop over anything but one new name")
        if node.orelse:
            raise self.refuse(node, "an else of a loop")
        call = node.iter
        is_range = isinstance(call, ast.Call) and dotted(call.func) == ["range"]
        if not is_range or not isinstance(call, ast.Call) or len(call.args) != 1 or call.keywords:
            raise self.refuse(node, "a loop over anything but range(size)")
        if not isinstance(call.args[0], ast.Name):
            raise self.refuse(node, "a loop over anything but range(size)")
        self._plain_name(call.args[0])
        for _ in range(2):  # in the second iteration, a name may have the value from the end of the first
            self.outside.append(dict(self.defined))
            self.define(node, node.target.id)
            for statement in node.body:
                if isinstance(statement, ast.Assign) and _assigns(statement, node.target.id):
                    raise self.refuse(statement, "assignment to the loop variable")
                self._statement(statement)
            self.defined = self.outside.pop()

    def _append(self, node: ast.Expr) -> None:
        """Accept `list.append(value)` in a loop, for a list defined outside of all loops."""
        call = node.value
        path = dotted(call.func) if isinstance(call, ast.Call) else []
        if not isinstance(call, ast.Call) or len(path) != 2 or path[1] != "append" or path[0] not in self.lists:
            raise self.refuse(node, "a statement of kind Expr")
        if len(call.args) != 1 or call.keywords or not isinstance(call.args[0], ast.Name):
            raise self.refuse(node, "an append of anything but a value")
        self._plain_name(call.args[0])

    def _plain_name(self, node: ast.Name) -> None:
        """Accept the name of a value that is no module, config or list."""
        self.name(node, 0)
        if node.id in self.objects or node.id in self.lists:
            raise self.refuse(node, f"the name {node.id!r} of a module, config or list")

    def _return(self, node: ast.stmt) -> None:
        if not isinstance(node, ast.Return) or not isinstance(node.value, ast.Dict):
            raise self.refuse(node, "a last statement other than the return of a dict")
        keys = [key.value if isinstance(key, ast.Constant) else None for key in node.value.keys]
        if keys != list(self.allowed.output_names):
            raise self.refuse(node, "a result that differs from the manifest's")
        for value in node.value.values:
            self.expression(value, 0)


def _assigns(node: ast.Assign, name: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
