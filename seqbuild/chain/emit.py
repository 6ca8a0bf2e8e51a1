"""Generate readable, deterministic Python source from a graph; an artifact stores it and a host executes it.

Every statement is one of

    name = torch.ops.aten.op.overload(arguments)      an operator
    name = self.get_submodule("dotted.name")(...)     a leaf module
    name = self.get_parameter("dotted.name")          a parameter or buffer that is read directly
    name = run.constant("constant_0")                 a tensor stored in the artifact
    name = run.opaque["module:function"](...)         an opaque step
    name = other[0]   name = a * b + 1                unpacking, arithmetic on sizes
    name = run.copied(other)                          the present content of a dictionary that steps fill
    name = run.require(condition, True)               a check; the model itself rejects other data
    for name in range(size): ...                      a loop, see `seqbuild.chain.marks`
    del name                                          after the last use, so that memory is freed as in the model

`runtime.language.grammar` accepts exactly these statements. `run.device`, `run.dtype`, `run.lowest` and similar names
replace the values of the trace.
"""

from __future__ import annotations

import itertools
import keyword
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from runtime.errors import TraceError
from runtime.language.grammar import RESERVED
from runtime.language.literals import is_power
from runtime.language.operators import is_allowed
from seqbuild.chain import marks
from seqbuild.chain.marks import copy_dict, marked, require

_NUMBER = re.compile(r"_?\d+")
_INFIX: dict[Any, str] = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.floordiv: "//",
    operator.truediv: "/",
    operator.mod: "%",
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
    operator.and_: "&",
    operator.or_: "|",
}
_FUNCTIONS: dict[Any, str] = {
    torch.sym_max: "torch.sym_max",
    torch.sym_min: "torch.sym_min",
    torch.sym_int: "torch.sym_int",
    torch.sym_float: "torch.sym_float",
    torch.sym_not: "torch.sym_not",
    torch.sym_ite: "torch.sym_ite",
    math.trunc: "torch.sym_int",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EmittedCode:
    """Source of one subgraph and everything it refers to, in order of first use.

    Attributes:
        source: a module with one function, `forward(self, <arguments>, *, run)`.
        arguments: the function's names for the subgraph's inputs, in order.
        submodules: dotted names of the modules it calls.
        attributes: dotted names of the parameters and buffers it reads directly.
        objects: dotted names of modules or configs that are passed to opaque steps.
        uses: dotted names of the parameters and buffers of these objects that opaque steps use.
        constants: names of the tensors stored in the artifact.
        opaque: paths of the opaque steps.
        output_names: names of the results in the chain.
        results: keys of the returned dict, in the same order.
        names: the function's names for its values, by node.
    """

    source: str
    arguments: tuple[str, ...]
    submodules: tuple[str, ...]
    attributes: tuple[str, ...]
    objects: tuple[str, ...]
    uses: tuple[str, ...]
    constants: tuple[str, ...]
    opaque: tuple[str, ...]
    output_names: tuple[str, ...]
    results: tuple[str, ...]
    names: Mapping[fx.Node, str] = field(compare=False, repr=False)


def emit(
    graph: fx.Graph,
    *,
    traced_dtype: torch.dtype | None = None,
    scope: str | None = None,
    is_last: bool = True,
) -> EmittedCode:
    """Generate the source of a subgraph.

    Args:
        graph: its placeholders are the inputs, its output is a dict; `owning_module` resolves attribute names.
        traced_dtype: the dtype that marks "the run's dtype" in this trace; None writes dtypes unchanged.
        scope: the dotted name of the module passed as `self`, which must contain everything that the subgraph calls and
            reads. Value names then depend on the subgraph only, so that layers with the same computation have the same
            source. None selects the model and the names of the graph.
        is_last: whether the results are the model's own, whose names are kept.

    Raises:
        TraceError: for a value or function that generated code cannot contain.
    """
    return _Emitter(graph, traced_dtype, scope, is_last).emit()


def common_scope(graph: fx.Graph, target: str) -> str:
    """Return `target` if it contains all that a subgraph calls and reads, else the empty name of the whole model."""
    references = (
        str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr") and not _is_constant(node)
    )
    return target if all(name.startswith(f"{target}.") for name in references) else ""


def _is_constant(node: fx.Node) -> bool:
    return "constant" in node.meta


def is_supported(operator_: torch._ops.OpOverload) -> bool:
    """Return whether generated code may call this operator, see `runtime.language.operators`."""
    namespace, name, overload = str(operator_).split(".")
    return namespace == "aten" and is_allowed(name, overload)


# Rounding to integers with operations of the grammar: `//` on floats rounds down.
_ROUNDED: dict[Any, str] = {
    math.ceil: "torch.sym_int(-(-{0} // 1))",
    math.floor: "torch.sym_int({0} // 1)",
}


@dataclass
class _Emitter:
    graph: fx.Graph
    traced_dtype: torch.dtype | None
    scope: str | None
    is_last: bool
    names: dict[fx.Node, str] = field(default_factory=dict)
    taken: dict[str, None] = field(default_factory=dict)
    references: dict[str, dict[str, None]] = field(default_factory=dict)

    def emit(self) -> EmittedCode:
        inputs = self.graph.find_nodes(op="placeholder")
        for node in inputs:
            self._name(node, str(node.target))
        arguments = [self.names[node] for node in inputs]
        for name in arguments:
            if name in RESERVED:
                raise TraceError(f"an input of the model is named {name!r}, which is reserved in generated code")
        lines = [f"def forward({', '.join(['self', *arguments])}, *, run):"]
        last_use, depth = self._last_uses(), 1
        for node in self.graph.nodes:
            if node.op == "output":
                lines.extend(self._return(node.args[0]))
            elif node.op != "placeholder":
                depth -= node.target is marks.end
                lines.extend("    " * depth + line for line in self._statement(node))
                depth += node.target is marks.begin
                finished = [self.names[source] for source in last_use.get(node, ())]
                if finished:
                    lines.append("    " * depth + f"del {', '.join(finished)}")
        (output,) = self.graph.find_nodes(op="output")
        return EmittedCode(
            source="\n".join(lines) + "\n",
            arguments=tuple(arguments),
            output_names=tuple(output.args[0]),
            results=tuple(self._results(output.args[0])),
            names=self.names,
            **{kind: tuple(self.references.get(kind, ())) for kind in _REFERENCE_KINDS},
        )

    def _statement(self, node: fx.Node) -> list[str]:
        if node.target is marks.end:
            return []
        if node.target is marks.assign:
            return [" = ".join(map(self._value, node.args))]
        if node.target is marks.append:
            values, value = map(self._value, node.args)
            return [f"{values}.append({value})"]
        expression = self._expression(node)
        self._name(node, node.name)
        is_loop = node.target is marks.begin
        return [f"for {self.names[node]} in range({expression}):" if is_loop else f"{self.names[node]} = {expression}"]

    def _last_uses(self) -> dict[fx.Node, list[fx.Node]]:
        """For each node, list the values that are not needed after it.

        A loop needs values from outside of it in every iteration.
        """
        last: dict[fx.Node, fx.Node] = {}
        around = dict(marks.paths(self.graph.nodes))
        end_of = {node.args[0]: node for node in self.graph.nodes if node.target is marks.end}
        for node in self.graph.nodes:
            if node.op not in ("placeholder", "output") and node.target not in marks.STATEMENTS:
                last[node] = node  # an unused result is deleted at once
            for source in node.all_input_nodes:
                if source.target is not marks.begin:
                    others = around[node][len(around[source]) :]
                    last[source] = end_of[others[0]] if others else node
        ends: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last.items():
            ends.setdefault(node, []).append(source)
        return ends

    def _return(self, fields: dict[str, Any]) -> list[str]:
        named = zip(self._results(fields), fields.values(), strict=True)
        items = [f"        {_text(name)}: {self._value(value)}," for name, value in named]
        return ["    return {", *items, "    }"] if items else ["    return {}"]

    def _results(self, fields: dict[str, Any]) -> list[str]:
        """Return the keys of the returned dict: the chain's value names, or the names in this function."""
        return list(fields) if self.scope is None or self.is_last else [self.names[value] for value in fields.values()]

    def _name(self, node: fx.Node, name: str) -> None:
        """Choose a value's name. In names that depend on the subgraph only, numbers count within the subgraph."""
        if self.scope is not None:
            own = self._relative(str(node.target)).replace(".", "_") if node.op in ("call_module", "get_attr") else name
            base = own if node.op in ("call_module", "get_attr") else _NUMBER.sub("", own)
            base = (
                base if base.isidentifier() and not base.startswith("__") and not keyword.iskeyword(base) else "value"
            )
            taken = itertools.chain([base], (f"{base}_{index}" for index in itertools.count(1)))
            name = next(free for free in taken if free not in self.taken and free not in RESERVED)
        self.taken[name] = None
        self.names[node] = name

    def _relative(self, name: str) -> str:
        return name.removeprefix(f"{self.scope}.") if self.scope else name

    def _expression(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return f"{self._submodule(str(node.target))}({self._arguments(node)})"
        if node.op == "get_attr":
            return self._attribute(node)
        if "opaque" in node.meta:
            path = self._refer("opaque", node.meta["opaque"])
            for name in node.meta.get("uses", ()):
                self._refer("uses", name)
            return f"run.opaque[{_text(path)}]({self._arguments(node)})"
        if isinstance(node.target, torch._ops.OpOverload):
            return self._operator(node, node.target)
        return self._python(node)

    def _operator(self, node: fx.Node, operator_: torch._ops.OpOverload) -> str:
        if not is_supported(operator_):
            raise TraceError(
                f"the model's code calls torch.ops.{operator_}, which an artifact does not support",
                hint="make the function that calls it one opaque step with --ignore NAME",
            )
        return f"torch.ops.{operator_}({self._arguments(node)})"

    def _python(self, node: fx.Node) -> str:
        target: Any = node.target
        operands = [self._value(argument) for argument in node.args]
        if target is operator.getitem:
            return f"{operands[0]}[{operands[1]}]"
        if target is getattr and str(node.args[1]).isidentifier() and not str(node.args[1]).startswith("_"):
            return f"{operands[0]}.{node.args[1]}"
        if target is copy_dict:
            return f"run.copied({operands[0]})"
        if target is require:
            return f"run.require({operands[0]}, {operands[1]})"
        if target is marks.collected:
            return "[]"
        if target in (marks.variable, marks.begin):
            return operands[0]
        if target is operator.neg:
            return f"-{operands[0]}"
        if target in _INFIX and len(operands) == 2:
            return f"{operands[0]} {_INFIX[target]} {operands[1]}"
        if target is operator.pow and type(node.args[1]) is int and node.args[1] in (2, 3, 4):
            return " * ".join([operands[0]] * int(operands[1]))
        if target is operator.pow and is_power(exponent := _fractional(node.args[1])):
            return f"{operands[0]} ** {exponent!r}"
        if target in _ROUNDED and not node.kwargs:
            return _ROUNDED[target].format(*operands)
        if target in _FUNCTIONS and not node.kwargs:
            return f"{_FUNCTIONS[target]}({', '.join(operands)})"
        raise TraceError(
            f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)} on sizes cannot be saved",
            hint="make the function that computes it one opaque step with --ignore NAME",
        )

    def _attribute(self, node: fx.Node) -> str:
        name = str(node.target)
        if _is_constant(node):
            return f"run.constant({_text(self._refer('constants', name))})"
        root: Any = self.graph.owning_module
        value = operator.attrgetter(name)(root) if name else root
        if isinstance(value, nn.Module):
            self._refer("objects", name)
            return self._submodule(name, is_called=False)
        if not isinstance(value, torch.Tensor):
            self._refer("objects", name)
            owner, _, attribute = name.rpartition(".")
            return f"{self._submodule(owner, is_called=False)}.{attribute}"
        kind = "parameter" if isinstance(value, nn.Parameter) else "buffer"
        return f"self.get_{kind}({_text(self._relative(self._refer('attributes', name)))})"

    def _submodule(self, name: str, is_called: bool = True) -> str:
        if is_called:
            self._refer("submodules", name)
        return f"self.get_submodule({_text(self._relative(name))})"

    def _refer(self, kind: str, name: str) -> str:
        self.references.setdefault(kind, {})[name] = None
        return name

    def _arguments(self, node: fx.Node) -> str:
        positional = [self._value(argument) for argument in node.args]
        named = [f"{name}={self._value(argument)}" for name, argument in node.kwargs.items()]
        return ", ".join([*positional, *named])

    def _value(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.names[value]
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return f"slice({', '.join(self._value(part) for part in parts)})"
        if isinstance(value, tuple):
            return _tuple([self._value(item) for item in value])
        if isinstance(value, (list, fx.immutable_collections.immutable_list)):
            return f"[{', '.join(self._value(item) for item in value)}]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{self._value(key)}: {self._value(item)}" for key, item in value.items()) + "}"
        return self._literal(value)

    def _literal(self, value: Any) -> str:
        if isinstance(value, torch.device):
            return "run.device"
        if isinstance(value, torch.dtype):
            return "run.dtype" if value == self.traced_dtype else str(value)
        if isinstance(value, (torch.layout, torch.memory_format)):
            return str(value)
        if isinstance(value, str):
            return _text(value)
        if value is None or isinstance(value, (bool, int)):
            return repr(value)
        if isinstance(value, float):
            return self._float(value)
        raise TraceError(f"a value of type {type(value).__qualname__} cannot be written into generated code")

    def _float(self, value: float) -> str:
        if self.traced_dtype is not None:
            limits = torch.finfo(self.traced_dtype)
            names = {limits.min: "run.lowest", limits.max: "run.highest"}
            names |= {marked(self.traced_dtype, "tiny"): "run.tiny", marked(self.traced_dtype, "eps"): "run.eps"}
            if value in names:
                return names[value]
        if math.isnan(value):
            return "torch.nan"
        if math.isinf(value):
            return "torch.inf" if value > 0 else "-torch.inf"
        return repr(value)


def _fractional(exponent: Any) -> Any:
    """Return a negative integer exponent as a float, and any other exponent unchanged."""
    return float(exponent) if type(exponent) is int and exponent < 0 else exponent


_REFERENCE_KINDS: Sequence[str] = ("submodules", "attributes", "objects", "uses", "constants", "opaque")


def _tuple(items: list[str]) -> str:
    return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"


def _text(text: str) -> str:
    """Quote a text as a double-quoted ASCII literal."""
    return '"' + text.encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'
