"""The expressions that an artifact's code may use; the statements are in `runtime.language.grammar`."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from runtime.errors import ArtifactError
from runtime.language.literals import (
    FORBIDDEN_KEYWORDS,
    argument_problem,
    is_field,
    is_power,
    submodule_call_problem,
)
from runtime.language.opaque import is_opaque_path, step_call_problem
from runtime.language.operators import changes_in_place, is_allowed, is_view

NESTING_LIMIT = 32
RESERVED = ("self", "run", "torch", "slice", "range")
_INT_LIMIT = 2**63
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}\Z")
_TORCH_VALUES = frozenset(
    (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"),
        *("strided", "contiguous_format", "preserve_format", "channels_last", "channels_last_3d"),
        *("inf", "nan"),
    )
)
_TORCH_FUNCTIONS = frozenset(("sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "sym_ite", "sym_sqrt"))
_RUN_VALUES = frozenset(("device", "dtype", "lowest", "highest", "eps", "tiny"))
_BINARY = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.BitAnd, ast.BitOr)
_COMPARE = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Allowed:
    """The names that one program may use, from its manifest entry."""

    input_names: Collection[str]
    output_names: Collection[str]
    submodules: Collection[str] = ()
    attributes: Collection[str] = ()
    objects: Collection[str] = ()
    constants: Collection[str] = ()
    opaque: Collection[str] = ()
    own_modules: Collection[str] = ()  # modules of the artifact's own code, which may define opaque steps


@dataclass
class Expressions:
    """The names defined so far in a program, and the check of expressions that use them."""

    allowed: Allowed
    origin: str
    operators: dict[str, None] = field(default_factory=dict)
    used: dict[str, dict[str, None]] = field(default_factory=dict)
    defined: dict[str, None] = field(default_factory=dict)
    objects: dict[str, str | None] = field(default_factory=dict)  # variable -> its module's name; None for a config
    lists: dict[str, None] = field(default_factory=dict)  # variables that hold lists which loops append to
    outside: list[dict[str, None]] = field(default_factory=list)  # per enclosing loop, the names defined before it
    # variables that hold parameters, buffers, constants, or views of them
    persistent: dict[str, None] = field(default_factory=dict)
    may_be_object: bool = False  # whether the expression being checked may be a module or config

    def refuse(self, node: ast.AST, what: str) -> ArtifactError:
        """Return the error that `what` is not allowed, with file and line."""
        line = getattr(node, "lineno", 1)
        return ArtifactError(f"{self.origin}, line {line}: {what} is not allowed in an artifact's code")

    def define(self, node: ast.AST, name: str) -> None:
        """Define or redefine the name of a value."""
        if not _NAME.match(name) or name.startswith("__") or name in RESERVED:
            raise self.refuse(node, f"the name {name!r}")
        self.defined[name] = None
        self.objects.pop(name, None)
        for known in (self.lists, self.persistent):
            known.pop(name, None)

    def is_persistent(self, node: ast.expr) -> bool:
        """Whether an expression is a parameter, buffer or constant, or certainly a view of one."""
        if isinstance(node, ast.Name):
            return node.id in self.persistent
        if not isinstance(node, ast.Call):
            return False
        path = dotted(node.func)
        if path in (["self", "get_parameter"], ["self", "get_buffer"], ["run", "constant"]):
            return True
        return (
            path[:2] == ["torch", "ops"] and is_view(path[3]) and bool(node.args) and self.is_persistent(node.args[0])
        )

    def expression(self, node: ast.expr, depth: int) -> None:
        """Accept an expression or raise ArtifactError."""
        if depth > NESTING_LIMIT:
            raise self.refuse(node, f"nesting deeper than {NESTING_LIMIT}")
        rule = _RULES.get(type(node))
        if rule is None:
            raise self.refuse(node, f"an expression of kind {type(node).__name__}")
        rule(self, node, depth + 1)

    def _constant(self, node: ast.Constant, depth: int) -> None:
        value = node.value
        if value in FORBIDDEN_KEYWORDS and not self.allowed.own_modules:
            raise self.refuse(node, f"the string {value!r}")  # a dict may be unpacked into keywords later
        is_plain = value is None or type(value) in (bool, float, str)
        if not is_plain and not (type(value) is int and abs(value) <= _INT_LIMIT):
            raise self.refuse(node, f"a literal of type {type(value).__name__} or this size")

    def name(self, node: ast.Name, depth: int) -> None:
        """Accept the name of a value."""
        if node.id not in self.defined:
            raise self.refuse(node, f"the name {node.id!r}, which is not defined there,")
        if node.id in self.objects and not self.may_be_object:
            raise self.refuse(node, "a module or config anywhere but as an argument of an opaque step")

    def _sequence(self, node: ast.Tuple | ast.List, depth: int) -> None:
        for item in node.elts:
            self.expression(item, depth)

    def _dictionary(self, node: ast.Dict, depth: int) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            if not isinstance(key, ast.Constant) or type(key.value) not in (str, int, bool):
                raise self.refuse(node, "a dict whose keys are not literals")
            self._constant(key, depth)
            self.expression(value, depth)

    def _arithmetic(self, node: ast.BinOp, depth: int) -> None:
        if isinstance(node.op, ast.Pow):
            exponent = node.right.operand if isinstance(node.right, ast.UnaryOp) else node.right
            if not isinstance(exponent, ast.Constant) or not is_power(exponent.value):
                raise self.refuse(node, "a power other than a small literal float")
        elif not isinstance(node.op, _BINARY):
            raise self.refuse(node, f"the operator {type(node.op).__name__}")
        for operand in (node.left, node.right):
            if isinstance(operand, ast.Constant) and type(operand.value) not in (int, float, bool):
                raise self.refuse(node, "arithmetic on anything but numbers")
            if isinstance(operand, (ast.List, ast.Tuple, ast.Dict)):
                raise self.refuse(node, "arithmetic on anything but numbers")
            self.expression(operand, depth)

    def _negation(self, node: ast.UnaryOp, depth: int) -> None:
        if not isinstance(node.op, ast.USub):
            raise self.refuse(node, f"the operator {type(node.op).__name__}")
        self.expression(node.operand, depth)

    def _comparison(self, node: ast.Compare, depth: int) -> None:
        if len(node.ops) != 1 or not isinstance(node.ops[0], _COMPARE):
            raise self.refuse(node, "this comparison")
        self.expression(node.left, depth)
        self.expression(node.comparators[0], depth)

    def _subscript(self, node: ast.Subscript, depth: int) -> None:
        self._require_result(node.value)
        if not isinstance(node.value, (ast.Name, ast.Call, ast.Subscript, ast.Attribute)):
            raise self.refuse(node, "a subscript of a literal")
        self.expression(node.value, depth)
        self.expression(node.slice, depth)

    def _attribute(self, node: ast.Attribute, depth: int) -> None:
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
        """Refuse access to parts of modules, configs and lists, which may only be passed whole."""
        if is_object(node) or (isinstance(node, ast.Name) and (node.id in self.objects or node.id in self.lists)):
            raise self.refuse(node, "access to a part of a module, config or list")

    def _require_place_of_object(self, node: ast.expr) -> None:
        if not self.may_be_object:
            raise self.refuse(node, "a module or config anywhere but as an argument of an opaque step")

    def _call(self, node: ast.Call, depth: int) -> None:
        self._callee(node, depth)
        names = [keyword.arg for keyword in node.keywords]
        if len(set(names)) != len(names) or any(name is None or name.startswith("__") for name in names):
            raise self.refuse(node, "this keyword")
        path, outer = dotted(node.func), self.may_be_object
        is_operator = path[:2] == ["torch", "ops"]
        if is_operator and changes_in_place(path[3]) and node.args and self.is_persistent(node.args[0]):
            raise self.refuse(node, "changing a parameter, buffer or constant in place")
        for argument in node.args:
            if isinstance(argument, ast.Starred):
                raise self.refuse(node, "an unpacked argument")
        is_step, is_own = isinstance(node.func, ast.Subscript), False
        if is_step:
            is_own = self._step(node)
        elif _is_lookup(node.func):
            is_whole = self._module_name(node.func) == ""
            # the artifact's own modules, which the user has allowed, may take any string
            problem = "" if self.allowed.own_modules else submodule_call_problem(node)
            problem = "a call of the whole model" if is_whole else problem
            if problem:
                raise self.refuse(node, problem)
        for keyword, argument in (*((None, value) for value in node.args), *((k.arg, k.value) for k in node.keywords)):
            problem = argument_problem(argument, keyword) if is_operator else ""
            if problem:
                raise self.refuse(node, problem)
            self.may_be_object = is_step and (is_own or is_object(argument) or isinstance(argument, ast.Name))
            self.expression(argument, depth)
        self.may_be_object = outer

    def _step(self, node: ast.Call) -> bool:
        """Check the arguments of an opaque step: the only module is the one it is a method of, never the whole model.

        Returns:
            Whether it is a function of the artifact's own code, which the user has allowed with any arguments.
        """
        step = str(ast.literal_eval(node.func.slice)) if isinstance(node.func, ast.Subscript) else ""
        if step.partition(":")[0] in self.allowed.own_modules:
            return True
        problem = step_call_problem(node, step)
        if problem:
            raise self.refuse(node, problem)
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            if self._module_name(argument) == "":
                raise self.refuse(node, "the whole model as an argument")
            is_first = bool(node.args) and argument is node.args[0]
            if not is_first and self._module_name(argument) is not None:
                raise self.refuse(node, "a module anywhere but as the first argument of an opaque step")
        return False

    def _module_name(self, node: ast.expr) -> str | None:
        """The dotted name of the module that an expression evaluates to; None if it is not a module."""
        if isinstance(node, ast.Name):
            return self.objects.get(node.id)
        if not _is_lookup(node):
            return None
        first = node.args[0] if isinstance(node, ast.Call) and node.args else None
        return str(first.value) if isinstance(first, ast.Constant) else ""

    def _callee(self, node: ast.Call, depth: int) -> None:
        path = dotted(node.func)
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
        elif isinstance(node.func, ast.Subscript) and dotted(node.func.value) == ["run", "opaque"]:
            step = node.func.slice.value if isinstance(node.func.slice, ast.Constant) else None
            if not isinstance(step, str) or not is_opaque_path(step, self.allowed.own_modules):
                raise self.refuse(node, f"the opaque step {step!r}")
            self._use(node, "opaque", step)
        elif isinstance(node.func, ast.Name) and node.func.id == "slice":
            pass  # a program cannot define this name, so it is Python's slice
        else:
            raise self.refuse(node, f"a call of {'.'.join(path) or type(node.func).__name__}")

    def _text(self, node: ast.Call, kind: str, *, is_recorded: bool = True) -> str:
        """Return the literal name in a lookup, which must be its only argument."""
        if len(node.args) != 1 or node.keywords or not isinstance(node.args[0], ast.Constant):
            raise self.refuse(node, "a lookup of anything but one literal name")
        name = node.args[0].value
        if is_recorded:
            self._use(node, kind, name)
        return str(name)

    def _plain(self, node: ast.Call, num_arguments: int) -> None:
        if len(node.args) != num_arguments or node.keywords or any(is_object(argument) for argument in node.args):
            raise self.refuse(node, "a call with these arguments")

    def _use(self, node: ast.AST, kind: str, name: object) -> None:
        if not isinstance(name, str) or name not in getattr(self.allowed, kind):
            raise self.refuse(node, f"{name!r}, which the manifest does not list among {kind},")
        self.used.setdefault(kind, {})[name] = None


def is_object(node: ast.expr) -> bool:
    """Whether an expression is a whole module or config."""
    return _is_lookup(node) or (isinstance(node, ast.Attribute) and _is_lookup(node.value))


def _is_lookup(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and dotted(node.func) == ["self", "get_submodule"]


def dotted(node: ast.expr) -> list[str]:
    """The parts of `a.b.c`; empty for any other expression."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


_RULES: dict[type[ast.expr], Callable[..., None]] = {
    ast.Constant: Expressions._constant,
    ast.Name: Expressions.name,
    ast.Tuple: Expressions._sequence,
    ast.List: Expressions._sequence,
    ast.Dict: Expressions._dictionary,
    ast.BinOp: Expressions._arithmetic,
    ast.UnaryOp: Expressions._negation,
    ast.Compare: Expressions._comparison,
    ast.Subscript: Expressions._subscript,
    ast.Attribute: Expressions._attribute,
    ast.Call: Expressions._call,
}
