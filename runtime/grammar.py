"""The small part of Python that an artifact's code may use. This file is the definition; what it does not list is
refused.

A program is one function, `forward(self, <inputs>, *, run)`, of assignments, deletions, loops over a size and one
return of a dict (see docs/format.md). The check walks the syntax tree and accepts node by node; it never executes or
imports anything.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from runtime.errors import ArtifactError
from runtime.literals import is_field, wrong_argument
from runtime.opaque_paths import is_opaque_path
from runtime.operators import changes_in_place, is_allowed, is_view

SOURCE_LIMIT_BYTES = 4 * 2**20
NESTING_LIMIT = 32
_INT_LIMIT = 2**63
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}\Z")
LOOP_LIMIT = 4
RESERVED = ("self", "run", "torch", "slice", "range")
_TORCH_VALUES = frozenset(
    (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"),
        *("strided", "contiguous_format", "preserve_format", "channels_last", "channels_last_3d"),
        *("inf", "nan"),
    )
)
_TORCH_FUNCTIONS = frozenset(("sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "sym_ite"))
_RUN_VALUES = frozenset(("device", "dtype", "lowest", "highest", "eps", "tiny"))
_RESULTS = (ast.Call, ast.Attribute, ast.Subscript, ast.BinOp, ast.UnaryOp, ast.Compare)
_BINARY = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.BitAnd, ast.BitOr)
_COMPARE = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Allowed:
    """The names that one program may use, as its manifest entry states them."""

    input_names: Collection[str]
    output_names: Collection[str]
    submodules: Collection[str] = ()
    attributes: Collection[str] = ()
    objects: Collection[str] = ()
    constants: Collection[str] = ()
    opaque: Collection[str] = ()
    own_modules: Collection[str] = ()  # of the model's own code, which opaque steps may lie in


def check_program(source: bytes, allowed: Allowed, origin: str) -> tuple[str, ...]:
    """Check one program.

    Args:
        source: the file's content.
        allowed: what the manifest says it uses; the code must use exactly that.
        origin: the file's name in messages.

    Returns:
        The operators it calls, as `operator.overload`, each once, for a check that they exist.

    Raises:
        ArtifactError: naming file, line and what is not allowed.
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
            warnings.simplefilter("error")  # code about which Python itself has doubts
            tree = ast.parse(text, filename=origin)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ArtifactError(f"{origin} is not a program of an artifact: {error or type(error).__name__}") from error
    checker = _Checker(allowed=allowed, origin=origin)
    checker.module(tree)
    _require_compilable(text, origin)
    return tuple(checker.operators)


def _require_compilable(text: str, origin: str) -> None:
    """Parsing finds some mistakes only when names are resolved; nothing is executed here either."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compile(text, origin, "exec", dont_inherit=True)
    except (ValueError, SyntaxError, RecursionError, MemoryError, OverflowError) as error:
        raise ArtifactError(f"{origin} is not a program of an artifact: {error or type(error).__name__}") from error


@dataclass
class _Checker:
    allowed: Allowed
    origin: str
    operators: dict[str, None] = field(default_factory=dict)
    used: dict[str, dict[str, None]] = field(default_factory=dict)
    defined: dict[str, None] = field(default_factory=dict)
    objects: dict[str, None] = field(default_factory=dict)  # names that stand for whole modules and configs
    lists: dict[str, None] = field(default_factory=dict)  # names of lists that loops append to
    outside: list[dict[str, None]] = field(default_factory=list)  # for each loop around, the names defined before it
    kept: dict[str, None] = field(default_factory=dict)  # names of parameters, buffers and constants, and views of them
    may_be_object: bool = False  # whether a module or config may stand here

    def refuse(self, node: ast.AST, what: str) -> ArtifactError:
        line = getattr(node, "lineno", 1)
        return ArtifactError(f"{self.origin}, line {line}: {what} is not allowed in an artifact's code")

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
                raise ArtifactError(f"{self.origin} uses other {kind} than its manifest states")

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
            raise self.refuse(function, "a signature other than the manifest's")
        for name in names[1:]:
            if name in self.defined:
                raise self.refuse(function, f"a second input {name!r}")
            self._define(function, name)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign):
            self._assignment(node)
        elif isinstance(node, ast.Delete):
            for target in node.targets:
                if not isinstance(target, ast.Name) or target.id not in self.defined:
                    raise self.refuse(node, "deletion of anything but a value")
                if self.outside and target.id in self.outside[-1]:
                    raise self.refuse(node, "deletion, inside of a loop, of a value from outside")
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
        if self.outside and (is_list or _is_object(value) or name in self.objects or name in self.lists):
            raise self.refuse(node, "assignment of this kind inside of a loop")
        self.may_be_object = _is_object(value)
        self._expression(value, 0)
        self.may_be_object = False
        is_kept = self._is_kept(value)
        self._define(node, name)
        if is_kept:
            self.kept[name] = None
        if _is_object(value):
            self.objects[name] = None
        elif is_list:
            self.lists[name] = None

    def _loop(self, node: ast.For) -> None:
        """`for name in range(size):`, whose body defines nothing for what comes after it: it may be left out."""
        if len(self.outside) >= LOOP_LIMIT:
            raise self.refuse(node, f"nesting of more than {LOOP_LIMIT} loops")
        if not isinstance(node.target, ast.Name) or node.target.id in self.defined or node.type_comment is not None:
            raise self.refuse(node, "a loop over anything but one new name")
        if node.orelse:
            raise self.refuse(node, "an else of a loop")
        turns = node.iter
        is_range = isinstance(turns, ast.Call) and _dotted(turns.func) == ["range"]
        if not is_range or not isinstance(turns, ast.Call) or len(turns.args) != 1 or turns.keywords:
            raise self.refuse(node, "a loop over anything but range(size)")
        if not isinstance(turns.args[0], ast.Name):
            raise self.refuse(node, "a loop over anything but range(size)")
        self._plain_name(turns.args[0])
        for _ in range(2):  # what a name stands for in the second turn may come from the end of the first
            self.outside.append(dict(self.defined))
            self._define(node, node.target.id)
            for statement in node.body:
                if isinstance(statement, ast.Assign) and _assigns(statement, node.target.id):
                    raise self.refuse(statement, "assignment to the number of a turn")
                self._statement(statement)
            self.defined = self.outside.pop()

    def _append(self, node: ast.Expr) -> None:
        """`list.append(value)`, in a loop, to a list from outside of all loops."""
        call = node.value
        path = _dotted(call.func) if isinstance(call, ast.Call) else []
        if not isinstance(call, ast.Call) or len(path) != 2 or path[1] != "append" or path[0] not in self.lists:
            raise self.refuse(node, "a statement of kind Expr")
        if len(call.args) != 1 or call.keywords or not isinstance(call.args[0], ast.Name):
            raise self.refuse(node, "an append of anything but a value")
        self._plain_name(call.args[0])

    def _plain_name(self, node: ast.Name) -> None:
        """The name of a value that is no module, config or list."""
        self.name(node, 0)
        if node.id in self.objects or node.id in self.lists:
            raise self.refuse(node, f"the name {node.id!r} in this place")

    def _return(self, node: ast.stmt) -> None:
        if not isinstance(node, ast.Return) or not isinstance(node.value, ast.Dict):
            raise self.refuse(node, "an end other than the return of a dict")
        keys = [key.value if isinstance(key, ast.Constant) else None for key in node.value.keys]
        if keys != list(self.allowed.output_names):
            raise self.refuse(node, "a result other than the manifest's")
        for value in node.value.values:
            self._expression(value, 0)

    def _define(self, node: ast.AST, name: str) -> None:
        if not _NAME.match(name) or name.startswith("__") or name in RESERVED:
            raise self.refuse(node, f"the name {name!r}")
        self.defined[name] = None
        for known in (self.objects, self.lists, self.kept):
            known.pop(name, None)

    def _is_kept(self, node: ast.expr) -> bool:
        """Whether an expression is a parameter, buffer or constant, or shares its memory for certain."""
        if isinstance(node, ast.Name):
            return node.id in self.kept
        if not isinstance(node, ast.Call):
            return False
        path = _dotted(node.func)
        if path in (["self", "get_parameter"], ["self", "get_buffer"], ["run", "constant"]):
            return True
        return path[:2] == ["torch", "ops"] and is_view(path[3]) and bool(node.args) and self._is_kept(node.args[0])

    def _expression(self, node: ast.expr, depth: int) -> None:
        if depth > NESTING_LIMIT:
            raise self.refuse(node, f"nesting deeper than {NESTING_LIMIT}")
        rule = _RULES.get(type(node))
        if rule is None:
            raise self.refuse(node, f"an expression of kind {type(node).__name__}")
        rule(self, node, depth + 1)

    def constant(self, node: ast.Constant, depth: int) -> None:
        value = node.value
        is_plain = value is None or type(value) in (bool, float, str)
        if not is_plain and not (type(value) is int and abs(value) <= _INT_LIMIT):
            raise self.refuse(node, f"a literal of type {type(value).__name__}, or of that size,")

    def name(self, node: ast.Name, depth: int) -> None:
        if node.id not in self.defined:
            raise self.refuse(node, f"the name {node.id!r}, which is not defined there,")
        if node.id in self.objects and not self.may_be_object:
            raise self.refuse(node, "a module or config anywhere but as an argument of an opaque step")

    def sequence(self, node: ast.Tuple | ast.List, depth: int) -> None:
        for item in node.elts:
            self._expression(item, depth)

    def dictionary(self, node: ast.Dict, depth: int) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            if not isinstance(key, ast.Constant) or type(key.value) not in (str, int, bool):
                raise self.refuse(node, "a dict whose keys are not literals")
            self._expression(value, depth)

    def arithmetic(self, node: ast.BinOp, depth: int) -> None:
        if not isinstance(node.op, _BINARY):
            raise self.refuse(node, f"the operator {type(node.op).__name__}")
        for operand in (node.left, node.right):
            if isinstance(operand, ast.Constant) and type(operand.value) not in (int, float, bool):
                raise self.refuse(node, "arithmetic on anything but numbers")
            if isinstance(operand, (ast.List, ast.Tuple, ast.Dict)):
                raise self.refuse(node, "arithmetic on anything but numbers")
            self._expression(operand, depth)

    def negation(self, node: ast.UnaryOp, depth: int) -> None:
        if not isinstance(node.op, ast.USub):
            raise self.refuse(node, f"the operator {type(node.op).__name__}")
        self._expression(node.operand, depth)

    def comparison(self, node: ast.Compare, depth: int) -> None:
        if len(node.ops) != 1 or not isinstance(node.ops[0], _COMPARE):
            raise self.refuse(node, "this comparison")
        self._expression(node.left, depth)
        self._expression(node.comparators[0], depth)

    def subscript(self, node: ast.Subscript, depth: int) -> None:
        self._require_result(node.value)
        if not isinstance(node.value, (ast.Name, ast.Call, ast.Subscript, ast.Attribute)):
            raise self.refuse(node, "taking a part out of a literal")
        self._expression(node.value, depth)
        self._expression(node.slice, depth)

    def attribute(self, node: ast.Attribute, depth: int) -> None:
        owner = node.value
        if isinstance(owner, ast.Name) and owner.id == "torch":
            if node.attr not in _TORCH_VALUES:
                raise self.refuse(node, f"torch.{node.attr}")
        elif isinstance(owner, ast.Name) and owner.id == "run":
            if node.attr not in _RUN_VALUES:
                raise self.refuse(node, f"run.{node.attr}")
        elif _is_lookup(owner) and node.attr == "config":
            assert isinstance(owner, ast.Call)
            self._require_place_of_object(node)
            module = self._text(owner, "objects", is_recorded=False)
            name = f"{module}.{node.attr}" if module else node.attr
            self._use(node, "objects", name)
        elif isinstance(owner, ast.Name) and is_field(node.attr):
            self._require_result(owner)
            self.name(owner, depth)
        else:
            raise self.refuse(node, f"the attribute {node.attr!r}")

    def _require_result(self, node: ast.expr) -> None:
        """Modules and configs are for opaque steps, lists for operators: nothing of theirs may be taken out."""
        if _is_object(node) or (isinstance(node, ast.Name) and (node.id in self.objects or node.id in self.lists)):
            raise self.refuse(node, "access to the inside of a module, config or list")

    def _require_place_of_object(self, node: ast.expr) -> None:
        if not self.may_be_object:
            raise self.refuse(node, "a module or config anywhere but as an argument of an opaque step")

    def call(self, node: ast.Call, depth: int) -> None:
        self._callee(node, depth)
        names = [keyword.arg for keyword in node.keywords]
        if len(set(names)) != len(names) or any(name is None or name.startswith("__") for name in names):
            raise self.refuse(node, "this keyword")
        path, outer = _dotted(node.func), self.may_be_object
        is_operator = path[:2] == ["torch", "ops"]
        if is_operator and changes_in_place(path[3]) and node.args and self._is_kept(node.args[0]):
            raise self.refuse(node, "changing a parameter, buffer or constant in place")
        self.may_be_object = isinstance(node.func, ast.Subscript)  # an opaque step
        for argument in node.args:
            if isinstance(argument, ast.Starred):
                raise self.refuse(node, "an unpacked argument")
        for keyword, argument in (*((None, value) for value in node.args), *((k.arg, k.value) for k in node.keywords)):
            wrong = wrong_argument(argument, keyword) if is_operator else ""
            if wrong:
                raise self.refuse(node, wrong)
            self._expression(argument, depth)
        self.may_be_object = outer

    def _callee(self, node: ast.Call, depth: int) -> None:
        path = _dotted(node.func)
        if path[:3] == ["torch", "ops", "aten"] and len(path) == 5:
            if not is_allowed(path[3], path[4]) or not _NAME.match(path[4]):
                raise self.refuse(node, f"the operator {path[3]}")
            self.operators[f"{path[3]}.{path[4]}"] = None
        elif len(path) == 2 and path[0] == "torch" and path[1] in _TORCH_FUNCTIONS:
            pass
        elif path in (["self", "get_parameter"], ["self", "get_buffer"]):
            self._text(node, "attributes")
        elif path == ["self", "get_submodule"]:
            self._require_place_of_object(node)
            self._text(node, "objects")
        elif path == ["run", "copied"]:
            self._plain(node, 1)
        elif path == ["run", "require"]:
            self._plain(node, 2)
        elif path == ["run", "constant"]:
            self._text(node, "constants")
        elif _is_lookup(node.func):
            assert isinstance(node.func, ast.Call)
            self._text(node.func, "submodules")
        elif isinstance(node.func, ast.Subscript) and _dotted(node.func.value) == ["run", "opaque"]:
            step = node.func.slice.value if isinstance(node.func.slice, ast.Constant) else None
            if not isinstance(step, str) or not is_opaque_path(step, self.allowed.own_modules):
                raise self.refuse(node, f"the opaque step {step!r}")
            self._use(node, "opaque", step)
        elif isinstance(node.func, ast.Name) and node.func.id == "slice":
            pass  # a name that no program can define
        else:
            raise self.refuse(node, f"a call of {'.'.join(path) or type(node.func).__name__}")

    def _text(self, node: ast.Call, kind: str, *, is_recorded: bool = True) -> str:
        """The one literal name that a lookup takes."""
        if len(node.args) != 1 or node.keywords or not isinstance(node.args[0], ast.Constant):
            raise self.refuse(node, "a lookup of anything but one literal name")
        name = node.args[0].value
        if is_recorded:
            self._use(node, kind, name)
        return str(name)

    def _plain(self, node: ast.Call, num_arguments: int) -> None:
        if len(node.args) != num_arguments or node.keywords or any(_is_object(argument) for argument in node.args):
            raise self.refuse(node, "a call with these arguments")

    def _use(self, node: ast.AST, kind: str, name: object) -> None:
        if not isinstance(name, str) or name not in getattr(self.allowed, kind):
            raise self.refuse(node, f"{name!r}, which the manifest does not list among {kind},")
        self.used.setdefault(kind, {})[name] = None


def _assigns(node: ast.Assign, name: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in node.targets)


def _is_object(node: ast.expr) -> bool:
    return _is_lookup(node) or (isinstance(node, ast.Attribute) and _is_lookup(node.value))


def _is_lookup(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and _dotted(node.func) == ["self", "get_submodule"]


def _dotted(node: ast.expr) -> list[str]:
    """The parts of `a.b.c`, or nothing when it is something else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


_RULES: dict[type[ast.expr], Callable[..., None]] = {
    ast.Constant: _Checker.constant,
    ast.Name: _Checker.name,
    ast.Tuple: _Checker.sequence,
    ast.List: _Checker.sequence,
    ast.Dict: _Checker.dictionary,
    ast.BinOp: _Checker.arithmetic,
    ast.UnaryOp: _Checker.negation,
    ast.Compare: _Checker.comparison,
    ast.Subscript: _Checker.subscript,
    ast.Attribute: _Checker.attribute,
    ast.Call: _Checker.call,
}
