"""Prove by execution that what a trace took for granted inside of a module does not matter.

A trace follows one sample. Where the model's code, or a kernel of torch, decides by a relation of sizes, the recorded
code holds the one outcome; often it is right for the other one, too: `if padding > 0: out = out[:, :length]` cuts off
nothing where there is no padding. So, when such a module returns, what was recorded of it is made into code and
executed on small random weights and inputs of sizes for which the relation holds and of sizes for which it does not,
and compared, bit for bit, with the module itself. The same is done for loops (`loops.py`), for several numbers of
turns.

What is proven is forgotten: whoever decides by the same relation elsewhere is noted, and proven, for itself. Equalities
are never proven, for torch simplifies sizes by them from then on. But the module may insist on one, as a vision tower
does on the size of images that its position table is made for: if it fails for other sizes, the equality is the
model's own, and becomes a condition of the artifact.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode

from runtime.errors import TraceError
from runtime.language.program import Run, compile_program
from seqbuild.blame import UntraceableError
from seqbuild.chain.emit import emit
from seqbuild.trace.real.rehearse import LIMIT_BYTES
from seqbuild.trace.real.replay import for_real, mapped
from seqbuild.trace.real.used_parameters import Real, really_there
from seqbuild.trace.real.weightless import kept_as_found
from seqbuild.trace.sizes.relations import is_assumption, is_statable
from seqbuild.trace.sizes.trials import Sizes, otherwise, trials

if TYPE_CHECKING:
    from seqbuild.blame import Culprit
    from seqbuild.trace.loops.record import Loops
    from seqbuild.trace.recorder import Recorder
    from seqbuild.trace.sizes.symbols import Known

_SIZE = torch.ops.aten.sym_size.int
_MOST_TRIED = 2**26  # parameters of a module that is executed to see which sizes it accepts
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A call of a module while it was recorded.

    Attributes:
        module: the module.
        args: its arguments, fake.
        kwargs: likewise.
        inputs: the nodes of tensors among the arguments, before the call.
        nodes: what was recorded.
        output: the fake result.
        known: what was assumed of sizes before.
        attributes: of the module and those inside it, before the call.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: Mapping[fx.Node, torch.Tensor]
    nodes: tuple[fx.Node, ...]
    output: Any
    known: Known
    attributes: Sequence[tuple[nn.Module, Mapping[str, Any]]]


class Proofs:
    """Watches the modules of one trace.

    Args:
        tracer: owns the graph.
        loops: of the same trace.
    """

    def __init__(self, tracer: Recorder, loops: Loops) -> None:
        self.tracer = tracer
        self.loops = loops
        self._closed: list[_Closed] = []

    def watched(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward that is proven, where that is needed, whenever it is recorded inside of a target."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if get_proxy_mode() is None or not self.tracer.shape_env.is_noting:
                return forward(*args, **kwargs)
            return self._call(module, forward, args, kwargs)

        return call

    def _call(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        shape_env = self.tracer.shape_env
        known, num_assumed, num_loops = shape_env.known(), len(shape_env.assumed), len(self.loops.unproven)
        last = next(iter(reversed(self.tracer.graph.nodes)))
        tensors = [value for value in leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        inputs = {node: tensor for tensor in tensors if (node := self.tracer.known_node(tensor)) is not None}
        attributes = [(inner, dict(inner.__dict__)) for inner in module.modules()]
        output = forward(*args, **kwargs)
        call = Call(
            module=module,
            args=args,
            kwargs=kwargs,
            inputs=inputs,
            nodes=tuple(nodes_after(last)),
            output=output,
            known=known,
            attributes=attributes,
        )
        self._set_demands_aside(call, num_assumed)
        assumed = [relation for relation, _ in shape_env.assumed[num_assumed:] if shape_env.is_assumption(relation)]
        turns = [question for loop in self.loops.unproven[num_loops:] for question in loop.questions()]
        questions = [*dict.fromkeys(map(shape_env.replace, assumed)), *turns]
        is_provable = questions and not any(isinstance(relation, sympy.Eq) for relation in questions)
        if is_provable and self._is_proven(call, questions):
            culprits = [culprit for _, culprit in shape_env.assumed[num_assumed:]]
            self._close(call, [*culprits, *(loop.culprit for loop in self.loops.unproven[num_loops:])][0])
            del self.loops.unproven[num_loops:]
            del shape_env.assumed[num_assumed:]
            shape_env.forget(known, shape_env.is_assumption)
        return output

    def _set_demands_aside(self, call: Call, num_assumed: int) -> None:
        """Take from what is assumed the equalities that the call's module insists on."""
        assumed = self.tracer.shape_env.assumed
        fresh = assumed[num_assumed:]
        decided = self.tracer.shape_env.decided
        found = (relation for relation, _ in fresh if is_assumption(relation, is_decided=relation in decided))
        relations = list(dict.fromkeys(found))
        equalities = [relation for relation in relations if isinstance(relation, sympy.Eq) and is_statable(relation)]
        if not equalities or sum(p.numel() for p in call.module.parameters()) > _MOST_TRIED:
            return
        demanded = [equality for equality in equalities if self._is_demanded(call, equality, relations)]
        self.tracer.shape_env.demanded += demanded
        assumed[num_assumed:] = [known for known in fresh if known[0] not in demanded]

    def _is_demanded(self, call: Call, equality: Any, relations: Sequence[Any]) -> bool:
        """Whether the call's module works with the sample's sizes, and fails whenever this does not hold of them."""
        shape_env = self.tracer.shape_env
        values = list(leaves((call.args, call.kwargs)))
        symbols = {symbol for value in values for size in _sizes(value) for symbol in size.node._expr.free_symbols}
        sizes = otherwise(shape_env, call.known, symbols, equality, [r for r in relations if r is not equality])
        try:
            with disable_proxy_modes_tracing(), shape_env.sizes_kept_free(), _as_before(call):
                return bool(sizes) and [_works(call, chosen) for chosen in sizes] == [True] + [False] * (len(sizes) - 1)
        except Exception as error:
            _logger.debug("%s may not insist on %s: %s", type(call.module).__name__, equality, error)
            return False

    def _is_proven(self, call: Call, questions: Sequence[Any]) -> bool:
        try:
            program = _Program(self.tracer, call)
            sizes = trials(self.tracer.shape_env, call.known, program.symbols, questions)
            with disable_proxy_modes_tracing(), self.tracer.shape_env.sizes_kept_free(), _as_before(call):
                return bool(sizes) and all(program.is_right(chosen) for chosen in sizes)
        except Exception as error:
            _logger.debug("%s is not proven: %s", type(call.module).__name__, error)
            return False

    def _close(self, call: Call, culprit: Culprit | None) -> None:
        results = (self.tracer.known_node(value) for value in leaves(call.output) if isinstance(value, torch.Tensor))
        compared = dict.fromkeys(node for node in results if node is not None)
        self._closed.append(_Closed(inside=dict.fromkeys(call.nodes), compared=compared, culprit=culprit))

    def require_closed(self) -> None:
        """Refuse a trace in which a value that was not compared leaves a proven call.

        Raises:
            UntraceableError: naming it.
        """
        for closed in self._closed:
            for node in closed.inside:
                is_value = node.op != "get_attr" and isinstance(node.meta.get("val"), torch.Tensor)
                outside = (user for user in node.users if user not in closed.inside and user.target is not _SIZE)
                if is_value and node not in closed.compared and any(outside):
                    raise UntraceableError(
                        f"{node.name} leaves the module that calculates it by another way than as a result",
                        culprit=closed.culprit,
                    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Closed:
    """A proven call: what was recorded of it, what of that was compared, and the line that made it necessary."""

    inside: Mapping[fx.Node, None]
    compared: Mapping[fx.Node, None]
    culprit: Culprit | None


def _works(call: Call, sizes: Sizes) -> bool:
    """Whether the call's module accepts arguments of these sizes."""
    with for_real(), kept_as_found(call.module), really_there([call.module], LIMIT_BYTES) as real:
        made = _MadeUp(sizes, real)
        args, kwargs = made.of(tuple(call.args)), made.of(dict(call.kwargs))
        try:
            call.module.forward(*args, **kwargs)
        except (ValueError, RuntimeError, AssertionError):
            return False
    return True


@contextlib.contextmanager
def _as_before(call: Call) -> Iterator[None]:
    """The call's modules have the attributes that they had before it: it may have kept a state in them."""
    found = [(module, dict(module.__dict__)) for module, _ in call.attributes]
    try:
        for module, attributes in call.attributes:
            _set_attributes(module, attributes)
        yield
    finally:
        for module, attributes in found:
            _set_attributes(module, attributes)


def _set_attributes(module: nn.Module, attributes: Mapping[str, Any]) -> None:
    module.__dict__.clear()
    module.__dict__.update(attributes)


def nodes_after(last: fx.Node) -> Iterator[fx.Node]:
    """What has been recorded since."""
    node = last.next
    while node.op != "root":
        yield node
        node = node.next


class _Program:
    """Code of what was recorded of a call.

    Args:
        tracer: owns the graph.
        call: the call.

    Raises:
        TraceError: when the call takes or gives what cannot be made up or compared.
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
        """Whether a node asks for a size of some tensor outside: it may be the first to ask for that size."""
        return node.target is _SIZE and node.args[0] not in self.call.inputs and node.args[0] not in self.call.nodes

    def _results(self) -> dict[str, tuple[fx.Node, torch.Tensor]]:
        inside = dict.fromkeys(self.nodes)
        found: dict[str, tuple[fx.Node, torch.Tensor]] = {}
        for index, value in enumerate(leaves(self.call.output)):
            if isinstance(value, torch.Tensor):
                node = self.tracer.known_node(value)
                if node is None or (node not in inside and node not in self.call.inputs):
                    raise TraceError("a result is neither new nor an argument")
                found[str(index)] = (node, value)
            elif value is not None and not isinstance(value, (bool, int, float, str)):
                raise TraceError(f"a result of type {type(value).__name__}")
        return found

    def _graph(self) -> fx.Graph:
        """The call's nodes as a graph of their own."""
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        inside = dict.fromkeys(self.nodes)
        needed = [source for node in self.nodes for source in node.all_input_nodes]
        for source in dict.fromkeys([*needed, *(node for node, _ in self.results.values())]):
            if source in inside or source.op == "get_attr":
                continue
            if source not in self.call.inputs and not isinstance(source.meta.get("val"), torch.SymInt):
                raise TraceError(f"{source.name} comes by another way than as an argument")
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
            outputs[f"{node.name} {axis}"] = graph.call_function(_SIZE, (copies[node], axis))
        graph.output(outputs)
        graph.owning_module = self.tracer.root  # type: ignore[assignment]
        return graph

    def _new_sizes(self) -> Iterator[tuple[fx.Node, int, torch.SymInt]]:
        """Sizes that are first found in what was recorded: code behind the call may take them from there."""
        seen = dict.fromkeys(size.node.expr for source in self.sources for size in _sizes(source.meta.get("val")))
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
        """All symbols that sizes of arguments are made of."""
        values = [*leaves((self.call.args, self.call.kwargs)), *(source.meta.get("val") for source in self.sources)]
        found: dict[sympy.Symbol, None] = {}
        for value in values:
            for size in _sizes(value):
                found.update(dict.fromkeys(self.tracer.shape_env.replace(size.node.expr).free_symbols))
        yield from sorted(found, key=str)

    def is_right(self, sizes: Sizes) -> bool:
        """Whether the code and the module give the same for arguments of these sizes."""
        module, args, kwargs = self.call.module, self.call.args, self.call.kwargs
        with for_real(), kept_as_found(module), really_there([module], LIMIT_BYTES) as real:
            ours, theirs = (_MadeUp(sizes, real) for _ in range(2))
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
                and _says_something(wanted)
            )

    def _run(self, made: _MadeUp) -> dict[str, Any]:
        inputs = [made.of(self.call.inputs.get(source, source.meta.get("val"))) for source in self.sources]
        run = Run(
            device=torch.device("cpu"),
            dtype=self.tracer.dtype or torch.get_default_dtype(),
            constants=self.tracer.constants,
            opaque={node.meta["opaque"]: node.target for node in self.graph.nodes if "opaque" in node.meta},
        )
        return self.forward(self.tracer.root, *inputs, run=run)


class _MadeUp:
    """Real values for fake ones, of chosen sizes: each tensor once, and the same numbers whoever asks.

    Args:
        sizes: the sizes.
        real: gives parameters.
    """

    def __init__(self, sizes: Sizes, real: Real) -> None:
        self.sizes = sizes
        self.real = real
        self.made: dict[int, torch.Tensor] = {}

    def of(self, value: Any) -> Any:
        """What stands for `value`, which may be a container."""
        if isinstance(value, torch.SymInt):
            return self.sizes.number(value)
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            raise TraceError("a value that is no size")
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
    """What is in a container of containers, in order."""
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


def _sizes(value: Any) -> Iterator[Any]:
    """The symbolic sizes that `value` is made of."""
    sizes = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
    yield from (size for size in sizes if isinstance(size, torch.SymInt))


def _is_same(one: Any, other: torch.Tensor) -> bool:
    if not isinstance(one, torch.Tensor) or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or (one.is_floating_point() and torch.allclose(one, other, 0, 0, equal_nan=True))


def _says_something(values: Sequence[torch.Tensor]) -> bool:
    """Whether the comparison could have failed: numbers that are none are all alike."""
    return all(bool(torch.isfinite(value).any()) for value in values if value.numel())
