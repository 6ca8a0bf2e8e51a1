"""Describe a trace in a manifest: names, shapes and sizes of everything that a run needs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import nn

from runtime.artifact.manifest import (
    UNBOUNDED,
    UNKNOWN_ABSENCE,
    DimEntry,
    InputEntry,
    ModelEntry,
    ParameterEntry,
    Shape,
    SubgraphEntry,
    TensorEntry,
)
from runtime.errors import TraceError
from seqbuild.chain.emit import EmittedCode
from seqbuild.chain.partition import DRY_RUN, target_of
from seqbuild.model.from_config import TRACE_DTYPE
from seqbuild.trace.real.weightless import kept_in_float32
from seqbuild.trace.sizes.relations import (
    RELATIONS,
    always_holds,
    as_python,
    is_expressible,
    is_range,
    substitute_equalities,
)

if TYPE_CHECKING:
    from torch import fx

    from seqbuild.chain.subgraph import Subgraph
    from seqbuild.model.checkpoint_keys import KeyTable
    from seqbuild.trace.model import Trace


class Symbols:
    """Names of the trace's symbolic sizes: `batch` and `sequence` where they apply, else `<input>_<axis>`.

    Args:
        trace: the trace that defines the symbols.
        marker: the dtype that represents the weights' dtype in the trace; None if the trace is valid for its own dtypes
            only.
    """

    def __init__(self, trace: Trace, marker: torch.dtype | None) -> None:
        self.marker = marker
        self.shape_env = trace.tracer.shape_env
        self.names: dict[sympy.Symbol, str] = {}
        self.fixed: dict[str, int] = {}
        for node in trace.graph.find_nodes(op="placeholder"):
            value = node.meta["val"]
            is_text = value.dim() == 2 and not value.is_floating_point()
            for axis, size in enumerate(value.shape):
                expression = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
                usual = "batch" if axis == 0 else "sequence" if axis == 1 and is_text else ""
                self._name(str(node.target), axis, expression, usual)

    def _name(self, name: str, axis: int, expression: sympy.Expr, usual: str) -> None:
        label = usual if usual and usual not in (*self.names.values(), *self.fixed) else f"{name}_{axis}"
        if isinstance(expression, sympy.Symbol):
            self.names.setdefault(expression, label)
        elif expression.is_Integer and usual and usual not in self.names.values():
            self.fixed.setdefault(usual, int(expression))

    def shape(self, tensor: torch.Tensor) -> Shape:
        """Describe a shape, with data-dependent sizes as expressions."""
        return tuple(self._size(size) for size in tensor.shape)

    def _size(self, size: int | torch.SymInt) -> int | str:
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = self.shape_env.replace(size.node.expr)
        if expression.is_Integer:
            return int(expression)
        names = {symbol: sympy.Symbol(self.names.get(symbol, str(symbol))) for symbol in expression.free_symbols}
        return str(expression.xreplace(names))

    def dtype(self, dtype: torch.dtype) -> str:
        """Return a dtype's name in the manifest."""
        return _dtype_name(dtype, self.marker)

    def dims(self) -> tuple[DimEntry, ...]:
        """Return the ranges in which the trace is valid.

        Tracing assumes sizes above one. Operators broadcast axes of size one, so that size is included unless the
        model's code tests for it.
        """
        above_one = {self.shape_env.replace(symbol) for symbol in self.shape_env.more_than_one}
        entries = [DimEntry(name=name, min=size, max=size) for name, size in self.fixed.items()]
        for symbol, name in self.names.items():
            bounds = self.shape_env.var_to_range[symbol]
            lower, upper = bounds.lower, bounds.upper
            entries.append(
                DimEntry(
                    name=name,
                    min=1 if int(lower) <= 2 and symbol not in above_one else int(lower),
                    max=int(upper) if upper.is_Integer and int(upper) < 2**62 else UNBOUNDED,
                )
            )
        return tuple(entries)

    def conditions(self) -> tuple[str, ...]:
        """Return the relations between input sizes, besides their ranges, under which the trace is valid.

        Relations with other symbols are about values and are ensured by the code that computes them.

        Raises:
            TraceError: if a relation cannot be expressed as a condition.
        """
        replace = self.shape_env.replace
        relations = list(dict.fromkeys(replace(guard.expr) for guard in self.shape_env.guards))
        decided = {replace(relation) for relation in self.shape_env.decided}
        equalities: list[Any] = []
        for relation in relations:
            if (
                isinstance(relation, sympy.Eq)
                and is_expressible(relation)
                and substitute_equalities(relation, equalities) != sympy.true
            ):
                equalities.append(relation)
        found: dict[str, None] = {}
        for relation in relations:
            symbols = relation.free_symbols
            if type(relation) not in RELATIONS or not symbols or any(symbol not in self.names for symbol in symbols):
                continue
            known = substitute_equalities(relation, (other for other in equalities if other is not relation))
            is_decided = relation in decided
            if known == sympy.true or is_range(relation, is_decided=is_decided):
                continue
            if not is_decided and (always_holds(relation) or always_holds(known)):
                continue
            left, right = (as_python(side, self.names) for side in relation.args)
            if left is None or right is None:
                named = relation.xreplace({symbol: sympy.Symbol(name) for symbol, name in self.names.items()})
                raise TraceError(
                    f"the model's code depends on {named}, which a condition of an artifact cannot express",
                    hint="make the function that depends on it one opaque step with --ignore NAME",
                )
            found.setdefault(f"{left} {RELATIONS[type(relation)]} {right}")
        return tuple(found)


def describe_inputs(
    trace: Trace, symbols: Symbols, absent: Mapping[str, int | None] | None = None
) -> tuple[InputEntry, ...]:
    """Describe the model's inputs, in the order of the sample.

    Args:
        trace: the trace with the inputs.
        symbols: names of their sizes.
        absent: values that represent an absent input, if known, see `seqbuild.sample.plain`.
    """
    entries = []
    for node in trace.graph.find_nodes(op="placeholder"):
        name, value = str(node.target), node.meta["val"]
        shape = symbols.shape(value)
        number = (absent or {}).get(name)
        # A host makes an absent input from rows and tokens alone, so its other axes must have fixed sizes.
        if number is None or any(isinstance(size, str) for size in shape[2:]):
            number = UNKNOWN_ABSENCE
        entries.append(InputEntry(name=name, dtype=symbols.dtype(value.dtype), shape=shape, absent=number))
    return tuple(entries)


def describe_values(trace: Trace, symbols: Symbols) -> dict[str, TensorEntry]:
    """Describe all values that cross a boundary between subgraphs, and the fields of the model's output."""
    values: dict[str, TensorEntry] = {}
    for subgraph in trace.subgraphs:
        (output,) = subgraph.graph.find_nodes(op="output")
        for name, node in output.args[0].items():
            values[name] = _describe_value(node, symbols)
    return values


def _describe_value(node: fx.Node | Any, symbols: Symbols) -> TensorEntry:
    value = getattr(node, "meta", {}).get("val")
    if isinstance(value, torch.Tensor):
        return TensorEntry(dtype=symbols.dtype(value.dtype), shape=symbols.shape(value))
    return TensorEntry(dtype="", shape=())


def describe_subgraph(
    subgraph: Subgraph,
    code: EmittedCode,
    modules: Mapping[str, nn.Module],
    target_names: Sequence[str],
    file: str,
    scope: str | None,
) -> SubgraphEntry:
    """Describe one subgraph.

    Args:
        subgraph: the subgraph.
        code: its code.
        modules: the model's modules, by every name they have.
        target_names: the targets in the subgraph.
        file: the file with the code.
        scope: as for `seqbuild.chain.emit`.
    """
    is_shared = scope is not None
    return SubgraphEntry(
        file=file,
        input_names=tuple(subgraph.input_names),
        consumed_names=tuple(subgraph.consumed_names),
        output_names=code.output_names,
        submodules=code.submodules,
        attributes=code.attributes,
        objects=code.objects,
        constants=code.constants,
        uses=code.uses,
        opaque=code.opaque,
        rehearsed=tuple(
            dict.fromkeys(
                str(node.meta.get("opaque", node.target)) for node in subgraph.graph.nodes if DRY_RUN in node.meta
            )
        ),
        targets=tuple(target_names),
        parameters=tuple(dict.fromkeys(_needed(modules, code))),
        scope=scope or "",
        arguments=code.arguments if is_shared else (),
        results=code.results if is_shared else (),
    )


def _needed(modules: Mapping[str, nn.Module], code: EmittedCode) -> Iterator[str]:
    """Return the names of the parameters and persistent buffers that a subgraph needs, in order of first use."""
    for name in code.submodules:
        yield from modules[name].state_dict(prefix=f"{name}." if name else "", keep_vars=True)
    for name in (*code.attributes, *code.uses):
        owner, _, leaf = name.rpartition(".")
        if leaf not in modules[owner]._non_persistent_buffers_set:
            yield name


def describe_parameters(
    model: nn.Module, keys: KeyTable, default_dtype: str, fixed_dtype: torch.dtype | None
) -> dict[str, ParameterEntry]:
    """Describe every parameter and persistent buffer.

    Entries that share memory name the one that is saved: the first that transformers does not tie to another.

    Args:
        model: in the dtype that marks the weights'.
        keys: the checkpoint keys of the parameters.
        default_dtype: the weights' dtype stated by the config.
        fixed_dtype: the only dtype for which the trace is valid; None if it is valid for all.
    """
    entries: dict[str, ParameterEntry] = {}
    tensors = model.state_dict(keep_vars=True)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    saved: dict[int, str] = {}
    for name in (*(name for name in tensors if name not in tied), *tensors):
        saved.setdefault(id(tensors[name]), name)
    keep = kept_in_float32(model)
    model_bytes = getattr(torch, default_dtype).itemsize
    for name, tensor in tensors.items():
        tied_to = saved[id(tensor)]
        dtype = "float32" if tensor.is_floating_point() and any(part in name for part in keep) else ""
        own = fixed_dtype if fixed_dtype is not None and tensor.dtype == TRACE_DTYPE else tensor.dtype
        dtype = dtype or _dtype_name(own, TRACE_DTYPE)
        itemsize = model_bytes if dtype == "model" else getattr(torch, dtype).itemsize
        source = name if name in keys.sources or tied_to == name else tied_to
        entries[name] = ParameterEntry(
            shape=tuple(tensor.shape),
            dtype=dtype,
            bytes=tensor.numel() * itemsize,
            sources=keys.sources.get(source, (source,)),
            conversion=keys.conversion.get(source, -1),
            tied_to="" if tied_to == name else tied_to,
            is_buffer=not isinstance(tensor, nn.Parameter),
        )
    return entries


def describe_model(model: nn.Module, dtype: str, code: tuple[str, ...]) -> ModelEntry:
    """Describe the model; `code` contains the paths of the model's own code."""
    config: Any = model.config
    return ModelEntry(
        class_name=type(model).__name__,
        module=type(model).__module__,
        model_type=str(config.model_type),
        dtype=dtype,
        attn_implementation=str(config._attn_implementation),
        num_parameters=num_parameters(model),
        base_model_prefix=str(getattr(model, "base_model_prefix", "")),
        ignored_keys=ignored_keys(model),
        config_class_name=type(config).__name__,
        config_module=type(config).__module__,
        code=code,
    )


def num_parameters(model: nn.Module) -> int:
    """Count the numbers in the model's parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def ignored_keys(model: nn.Module) -> tuple[str, ...]:
    """Return regular expressions of the checkpoint tensors that transformers ignores for this model.

    Computed rotary tables, which old checkpoints contain, are always included.
    """
    stated: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    stored = model.state_dict(keep_vars=True)
    computed = [name for name, _ in model.named_buffers() if name not in stored]
    return tuple(sorted({*stated, r"rotary_emb\.inv_freq$", *(re.escape(name) + "$" for name in computed)}))


def _dtype_name(dtype: torch.dtype, marker: torch.dtype | None) -> str:
    return "model" if dtype == marker else str(dtype).removeprefix("torch.")


def target_names(model: nn.Module, graphs: Sequence[fx.Graph], targets: Collection[nn.Module]) -> list[list[str]]:
    """Return the dotted names of the targets in each subgraph, in order of execution."""
    names: Mapping[nn.Module, str] = {module: name for name, module in model.named_modules()}
    found = []
    for graph in graphs:
        inside = (target_of(node, model, targets) for node in graph.nodes)
        found.append([names[target] for target in dict.fromkeys(inside) if target is not None])
    return found
