"""Execute the recorded code of a module on small real values, to compare it with the module itself."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx, nn

from runtime.errors import TraceError
from runtime.language.program import Run, compile_program
from seqbuild.chain.emit import emit
from seqbuild.trace.real.dry_run import LIMIT_BYTES
from seqbuild.trace.real.replay import mapped, plain_execution
from seqbuild.trace.real.used_parameters import RealTensors, real_tensors
from seqbuild.trace.real.weightless import attributes_restored
from seqbuild.trace.sizes.trials import Sizes

if TYPE_CHECKING:
    from seqbuild.trace.recorder import Recorder
    from seqbuild.trace.sizes.symbols import Known

SIZE = torch.ops.aten.sym_size.int


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A recorded call of a module.

    Attributes:
        module: the module.
        args: its positional arguments, fake.
        kwargs: its named arguments, fake.
        inputs: the tensors among the arguments by their nodes before the call.
        nodes: the recorded nodes.
        output: the fake result.
        known: the assumptions about sizes before the call.
        attributes: the attributes of the module and its submodules before the call.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: Mapping[fx.Node, torch.Tensor]
    nodes: tuple[fx.Node, ...]
    output: Any
    known: Known
    attributes: Sequence[tuple[nn.Module, Mapping[str, Any]]]


class RecordedProgram:
    """The code recorded for a call.

    Args:
        tracer: the tracer with the graph.
        call: the call.

    Raises:
        TraceError: if inputs of the call cannot be generated, or its results cannot be compared.
    """

    def __init__(self, tracer: Recorder, call: Call) -> None:
        self.tracer = tracer
        self.call = call
        self.nodes = [node for node in call.nodes if not self._is_from_outside(node)]
        self.sources: list[fx.Node] = []
        self.sizes: list[torch.SymInt] = []
        self.results = self._results()
        self.graph = self._graph()
        code = emit(self.graph, traced_dtype=tracer.dtype)
        self.forward = compile_program(code.source, f"<{type(call.module).__name__}>")
        self.symbols = tuple(self._symbols())

    def _is_from_outside(self, node: fx.Node) -> bool:
        """Return whether a node reads a size of a tensor outside the call; it may be the first read of that size."""
        return node.target is SIZE and node.args[0] not in self.call.inputs and node.args[0] not in self.call.nodes

    def _results(self) -> dict[str, tuple[fx.Node, torch.Tensor]]:
        inside = dict.fromkeys(self.nodes)
        found: dict[str, tuple[fx.Node, torch.Tensor]] = {}
        for index, value in enumerate(leaves(self.call.output)):
            if isinstance(value, torch.Tensor):
                node = self.tracer.known_node(value)
                if node is None or (node not in inside and node not in self.call.inputs):
                    raise TraceError("a result of the module is neither new nor an argument")
                found[str(index)] = (node, value)
            elif value is not None and not isinstance(value, (bool, int, float, str)):
                raise TraceError(f"the module returns a value of type {type(value).__name__}")
        return found

    def _graph(self) -> fx.Graph:
        """Copy the call's nodes to a graph of their own."""
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        inside = dict.fromkeys(self.nodes)
        needed = [source for node in self.nodes for source in node.all_input_nodes]
        for source in dict.fromkeys([*needed, *(node for node, _ in self.results.values())]):
            if source in inside or source.op == "get_attr":
                continue
            if source not in self.call.inputs and not isinstance(source.meta.get("val"), torch.SymInt):
                raise TraceError(f"{source.name} enters the module other than as an argument")
            copies[source] = graph.placeholder(f"source_{len(self.sources)}")
            self.sources.append(source)
        for node in dict.fromkeys([*needed, *self.nodes]):
            if node.op == "get_attr":
                copies[node] = graph.node_copy(node)
        for node in self.nodes:
            if node not in copies:
                copies[node] = graph.node_copy(node, lambda source: copies[source])
        outputs: dict[str, Any] = {name: copies[node] for name, (node, _) in self.results.items()}
        for node, axis, size in self._new_sizes():
            self.sizes.append(size)
            outputs[f"{node.name} {axis}"] = graph.call_function(SIZE, (copies[node], axis))
        graph.output(outputs)
        graph.owning_module = self.tracer.root  # type: ignore[assignment]
        return graph

    def _new_sizes(self) -> Iterator[tuple[fx.Node, int, torch.SymInt]]:
        """Yield sizes that first occur in the recorded nodes; code after the call may read them there."""
        seen = dict.fromkeys(size.node.expr for source in self.sources for size in sizes_in(source.meta.get("val")))
        for node in self.nodes:
            value = node.meta.get("val")
            if node.op == "get_attr" or not isinstance(value, torch.Tensor):
                continue
            sizes: Sequence[Any] = value.shape
            for axis, size in enumerate(sizes):
                if isinstance(size, torch.SymInt) and size.node.expr not in seen:
                    seen[size.node.expr] = None
                    yield node, axis, size

    def _symbols(self) -> Iterator[sympy.Symbol]:
        """Yield the symbols in sizes of arguments."""
        values = [*leaves((self.call.args, self.call.kwargs)), *(source.meta.get("val") for source in self.sources)]
        found: dict[sympy.Symbol, None] = {}
        for value in values:
            for size in sizes_in(value):
                found.update(dict.fromkeys(self.tracer.shape_env.replace(size.node.expr).free_symbols))
        yield from sorted(found, key=str)

    def is_equal(self, sizes: Sizes) -> bool:
        """Return whether the code and the module have the same results for arguments of these sizes."""
        module, args, kwargs = self.call.module, self.call.args, self.call.kwargs
        with plain_execution(), attributes_restored(module), real_tensors([module], LIMIT_BYTES) as real:
            ours, theirs = (MadeUpValues(sizes, real) for _ in range(2))
            output = module.forward(*theirs.of(tuple(args)), **theirs.of(dict(kwargs)))
            wanted = [value for value in leaves(output) if isinstance(value, torch.Tensor)]
            got = list(self._run(ours).values())
            got, got_sizes = got[: len(self.results)], got[len(self.results) :]
            return (
                len(got) == len(wanted)
                and got_sizes == [sizes.number(size) for size in self.sizes]
                and all(map(_is_same, got, wanted))
                and all(_is_same(ours.made[key], value) for key, value in theirs.made.items() if key in ours.made)
                and [sizes.shape(fake) for _, fake in self.results.values()] == [tuple(value.shape) for value in wanted]
                and _has_finite_value(wanted)
            )

    def _run(self, made: MadeUpValues) -> dict[str, Any]:
        inputs = [made.of(self.call.inputs.get(source, source.meta.get("val"))) for source in self.sources]
        run = Run(
            device=torch.device("cpu"),
            dtype=self.tracer.dtype or torch.get_default_dtype(),
            constants=self.tracer.constants,
            opaque={node.meta["opaque"]: node.target for node in self.graph.nodes if "opaque" in node.meta},
        )
        return self.forward(self.tracer.root, *inputs, run=run)


class MadeUpValues:
    """Generates real values of chosen sizes for fake ones; two instances generate the same numbers.

    Args:
        sizes: the sizes.
        real: provides parameters.
    """

    def __init__(self, sizes: Sizes, real: RealTensors) -> None:
        self.sizes = sizes
        self.real = real
        self.made: dict[int, torch.Tensor] = {}

    def of(self, value: Any) -> Any:
        """Return the real value for a fake value or container."""
        if isinstance(value, torch.SymInt):
            return self.sizes.number(value)
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            raise TraceError("the value of a symbolic float or bool is unknown")
        if isinstance(value, nn.Parameter):
            return self.real.of(value)
        if isinstance(value, torch.Tensor):
            if id(value) not in self.made:
                self.made[id(value)] = self._tensor(value)
            return self.made[id(value)]
        return mapped(value, self.of)

    def _tensor(self, fake: torch.Tensor) -> torch.Tensor:
        shape, strides = self.sizes.shape(fake), [self.sizes.number(size) for size in fake.stride()]
        reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        generator = torch.Generator().manual_seed(sum(shape) + len(shape))
        if fake.is_floating_point():
            numbers = torch.randn(reach, generator=generator).to(fake.dtype)
        else:
            numbers = torch.randint(0, 2, (reach,), generator=generator).to(fake.dtype)
        return torch.as_strided(numbers, shape, strides)


def leaves(value: Any) -> Iterator[Any]:
    """Yield the items of nested containers, in order."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, (dict, UserDict)):
        for item in value.values():
            yield from leaves(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name))
    else:
        yield value


def sizes_in(value: Any) -> Iterator[Any]:
    """Yield the symbolic sizes and strides in `value`."""
    sizes = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
    yield from (size for size in sizes if isinstance(size, torch.SymInt))


def _is_same(one: Any, other: torch.Tensor) -> bool:
    if not isinstance(one, torch.Tensor) or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or (one.is_floating_point() and torch.allclose(one, other, 0, 0, equal_nan=True))


def _has_finite_value(values: Sequence[torch.Tensor]) -> bool:
    """Return whether each tensor has a finite number; NaNs would always compare equal."""
    return all(bool(torch.isfinite(value).any()) for value in values if value.numel())
