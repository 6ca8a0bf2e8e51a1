"""Follow vectors through a chain of graphs, to find which of them one orthogonal matrix can rotate.

The analysis needs to know operators only, not architectures. A rotation passes through data movement that keeps a
vector whole, sums of vectors, products with one number for each vector, norms apart from their gains, and weighted sums
over tokens. A Linear module that reads a rotated vector multiplies by the inverse first. Any other operation treats
channels one by one, and they have escaped.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from seqbuild.manifest.channels import METADATA, MOVES, WEIGHTED_SUMS, operator_name, size_of
from seqbuild.manifest.mixtures import Mixtures
from seqbuild.manifest.sources import parameter_of, parameter_plus
from seqbuild.manifest.spaces import Gain, Space, SpaceReader, SpaceWriter, Vectors
from seqbuild.manifest.vector_rules import (
    NORM,
    NUMBERS,
    REDUCTIONS,
    SPREADS,
    is_constant_on_last_axis,
    joined,
    moved,
    reduced,
    weighted_sum,
    without_mean,
)

if TYPE_CHECKING:
    from seqbuild.chain.subgraph import Subgraph

_SAME = frozenset(("to", "_to_copy", "type_as", "float", "half", "bfloat16", "double", "dropout", "neg", "neg_"))
_PRODUCTS = frozenset(("mul", "mul_", "multiply"))
_QUOTIENTS = frozenset(("div", "div_", "true_divide", "divide"))
_SUMS = frozenset(("add", "add_", "sub", "sub_", "subtract"))
_LOOKUPS = frozenset(("index", "index_select"))


# What a use of a parameter is on some axis, and in which space.
Role = tuple[Space, SpaceReader | SpaceWriter | Gain]


@dataclass(kw_only=True)
class SpaceFlow:
    """Spaces of a chain of graphs.

    Args:
        modules: of the model, by name.
        parameters: of the model, by every name.

    Attributes:
        spaces: all spaces, joined ones as well.
        uses: for each use of a parameter, what it is on each of its axes: it writes or reads a space, or is the gain of
            a norm. An axis of another use is missing.
    """

    modules: Mapping[str, nn.Module]
    parameters: Mapping[str, torch.Tensor]
    spaces: list[Space] = field(default_factory=list)
    uses: dict[str, list[dict[int, Role]]] = field(default_factory=dict)
    _boundary: dict[str, Any] = field(default_factory=dict)
    _values: dict[fx.Node, Any] = field(default_factory=dict)
    _mixtures: Mixtures = field(default_factory=Mixtures)

    def follow(self, subgraphs: Sequence[Subgraph]) -> None:
        """Follow all vectors from the first subgraph to the last."""
        for index, subgraph in enumerate(subgraphs):
            self._values = {}
            for node in subgraph.graph.nodes:
                self._step(node, is_last=index == len(subgraphs) - 1)
            for name in subgraph.consumed_names:
                self._boundary.pop(name, None)

    def _step(self, node: fx.Node, *, is_last: bool) -> None:
        if node.op == "placeholder":
            if str(node.target) in self._boundary:
                self._values[node] = self._boundary[str(node.target)]
        elif node.op == "output":
            self._leave(node, is_last=is_last)
        elif node.op == "call_module":
            self._call(node)
        elif node.op == "call_function" and operator_name(node) not in METADATA:
            result = self._computed(node)
            if result is NUMBERS:
                return
            if result is not None:
                self._values[node] = result
            else:
                self._escape(node, f"{operator_name(node) or node.target} in {_place(node)}")

    def _leave(self, node: fx.Node, *, is_last: bool) -> None:
        values = node.args[0]
        if is_last or not isinstance(values, Mapping):
            self._escape(node, "the model returns it")
            return
        for name, value in values.items():
            if isinstance(value, fx.Node) and value in self._values:
                self._boundary[str(name)] = self._values[value]
            elif not isinstance(value, fx.Node):
                fx.map_arg(value, lambda entry: self._escape_value(entry, "it is passed on in a container"))

    def _escape(self, node: fx.Node, reason: str) -> None:
        for entry in node.all_input_nodes:
            self._escape_value(entry, reason)
            if entry.op == "get_attr":
                self._uses_otherwise(str(entry.target))

    def _escape_value(self, node: fx.Node, reason: str) -> None:
        value = self._values.get(node)
        for part in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(part, Vectors):
                what = f"the gain {part.gain.weight} is applied before {reason}" if part.gain is not None else reason
                part.space.escape(part.seen, what)

    def _uses_otherwise(self, name: str) -> None:
        self.uses.setdefault(name, []).append({})

    def _use(self, name: str, roles: dict[int, Role]) -> None:
        self.uses.setdefault(name, []).append(roles)

    # Modules.

    def _call(self, node: fx.Node) -> None:
        name, module = str(node.target), self.modules.get(str(node.target))
        if isinstance(module, nn.Linear):
            self._linear(node, f"{name}.weight", f"{name}.bias" if module.bias is not None else "", axis=1)
        elif type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
            self._linear(node, f"{name}.weight", f"{name}.bias", axis=0)
        elif isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:
            self._values[node] = self._written(node, {f"{name}.weight": 1})
        elif module is not None:
            self._mixture(node, name, module)

    def _linear(self, node: fx.Node, weight: str, bias: str, *, axis: int) -> None:
        read = self._read(node, node.args[0] if node.args else None, weight, axis)
        written = self._written(node, {weight: 1 - axis, **({bias: 0} if bias else {})}, read)
        if written is not None:
            self._values[node] = written

    def _read(self, node: fx.Node, value: Any, name: str, axis: int) -> dict[int, Any]:
        """Record that a parameter multiplies a value; return its role."""
        vectors = self._values.get(value)
        if not isinstance(vectors, Vectors):
            return {}
        row = vectors.row
        if vectors.is_square or row is None:
            self._escape_value(value, f"{name} reads it in another form")
            return {}
        reading = SpaceReader(name=name, axis=axis, channels=tuple(row.tolist()), gain=vectors.gain)
        vectors.space.root.readings.append(reading)
        vectors.space.root.is_used = True
        return {axis: (vectors.space, reading)}

    def _written(self, node: fx.Node, axes: Mapping[str, int], others: dict[int, Any] | None = None) -> Vectors | None:
        """Return a value of a new space that parameters write; `others` are further roles of the first of them."""
        size = size_of(node)
        if not size or size[-1] < 2:
            for name in axes:
                self._use(name, dict(others or {}) if name == next(iter(axes)) else {})
            return None
        written = [SpaceWriter(name=name, axis=axis) for name, axis in axes.items()]
        space = Space.of(size[-1], *written)
        self.spaces.append(space)
        for entry in written:
            more = others or {} if entry is written[0] else {}
            self._use(entry.name, {entry.axis: (space, entry), **more})
        return Vectors(space=space, channels=torch.arange(size[-1], dtype=torch.int32).expand(size))

    def _mixture(self, node: fx.Node, name: str, module: nn.Module) -> None:
        first, *others = node.all_input_nodes
        readings, writings = self._mixtures.readings(module), self._mixtures.writings(module)
        for other in others:
            self._escape_value(other, f"{name} reads it")
        roles: dict[str, dict[int, Any]] = {own: {} for own, _ in module.named_parameters()}
        if not readings:
            self._escape_value(first, f"{name} reads it in an unknown way")
        for reading in readings:
            roles[reading.name] |= self._read(node, first, f"{name}.{reading.name}", reading.axis)
        size = size_of(node)
        if writings and size:
            places = [(entry.name, entry.axis) for entry in writings]
            written = [SpaceWriter(name=f"{name}.{own}", axis=axis) for own, axis in places]
            space = Space.of(size[-1], *written)
            self.spaces.append(space)
            for (own, axis), entry in zip(places, written, strict=True):
                roles[own][axis] = (space, entry)
            self._values[node] = Vectors(space=space, channels=torch.arange(size[-1], dtype=torch.int32).expand(size))
        for own, found in roles.items():
            self._use(f"{name}.{own}", found)

    # Operators. Each of these returns None if its inputs escape.

    def _computed(self, node: fx.Node) -> Any:
        name = operator_name(node)
        if node.target is operator.getitem:
            container, index = node.args
            value = self._values.get(container)  # type: ignore[arg-type]
            return value[index] if isinstance(value, (tuple, list)) and isinstance(index, int) else None
        if name == "linear":
            return self._functional_linear(node)
        if name == "embedding":
            table = parameter_of(node.args[0])
            return self._written(node, {table: 1}) if table in self.parameters else None
        if name in _PRODUCTS:
            return self._product(node)
        if name in _SUMS:
            return self._sum(node)
        if name in REDUCTIONS or name in SPREADS or name == NORM:
            vectors = self._state(node.args[0])
            return reduced(node, name, vectors) if vectors is not None else None
        if name in ("rms_norm", "layer_norm"):
            return self._normalized(node, name)
        if name in WEIGHTED_SUMS:
            return self._weighted_sum(node, name)
        if name in MOVES:
            states = {entry: state for entry in node.all_input_nodes if (state := self._state(entry)) is not None}
            return moved(node, states) if states else None
        return self._elementwise(node, name)

    def _elementwise(self, node: fx.Node, name: str) -> Any:
        first, size = self._state(node.args[0]) if node.args else None, size_of(node)
        if first is None or size is None:
            return None
        others = [entry for entry in node.all_input_nodes if entry is not node.args[0]]
        if any(entry in self._values for entry in others if name not in ("to", "type_as", "masked_scatter", "where")):
            return None
        if name in _SAME:
            return replace(first, channels=first.channels.expand(size))
        if name in _QUOTIENTS:
            return self._scaled(first, node.args[1], size)
        if name in ("pow", "square") and first.is_plain and (name == "square" or node.args[1] == 2):
            return replace(first, is_square=True)
        if name in ("masked_fill", "masked_fill_") and not first.is_square and node.args[2] == 0 and first.gain is None:
            return self._scaled(first, node.args[1], size)
        if name in _LOOKUPS and first.row is not None and size and size[-1] == first.channels.shape[-1]:
            return first.spread(size) if _keeps_last_axis(node, name, first.channels.dim()) else None
        if name == "masked_scatter" and is_constant_on_last_axis(node.args[1]):
            return joined(first, self._state(node.args[2]), size)
        return None

    def _state(self, value: Any) -> Vectors | None:
        """The state of an argument; a parameter that is used as a value writes a space of its own."""
        if not isinstance(value, fx.Node):
            return None
        if value.op == "get_attr" and value not in self._values and str(value.target) in self.parameters:
            parameter = self.parameters[str(value.target)]
            if parameter.dim() and parameter.shape[-1] > 1 and parameter.is_floating_point():
                written = SpaceWriter(name=str(value.target), axis=parameter.dim() - 1)
                space = Space.of(parameter.shape[-1], written)
                self.spaces.append(space)
                self._use(written.name, {written.axis: (space, written)})
                channels = torch.arange(space.size, dtype=torch.int32).expand(tuple(parameter.shape))
                self._values[value] = Vectors(space=space, channels=channels)
        state = self._values.get(value)
        return state if isinstance(state, Vectors) else None

    def _functional_linear(self, node: fx.Node) -> Vectors | None:
        weight = parameter_of(node.args[1])
        bias = parameter_of(node.args[2]) if len(node.args) > 2 and node.args[2] is not None else ""
        if weight not in self.parameters or (len(node.args) > 2 and node.args[2] is not None and not bias):
            return None
        read = self._read(node, node.args[0], weight, 1)
        return self._written(node, {weight: 0, **({bias: 0} if bias else {})}, read)

    def _product(self, node: fx.Node) -> Vectors | None:
        size = size_of(node)
        if size is None:
            return None
        for place in (0, 1):
            name, offset = parameter_plus(node.args[place])
            if name in self.parameters and self.parameters[name].dim() == 1:
                vectors = self._value_of(node.args[1 - place])
                if vectors is not None:
                    return self._with_gain(vectors, Gain(weight=name, offset=offset), size)
        one, two = (self._state(argument) for argument in node.args[:2])
        if one is not None and two is not None:
            is_square = node.args[0] is node.args[1] and one.is_plain
            return replace(one, is_square=True) if is_square else None
        vectors, other = (one, node.args[1]) if one is not None else (two, node.args[0])
        return self._scaled(vectors, other, size) if vectors is not None else None

    def _value_of(self, value: Any) -> Vectors | None:
        """The state of an argument that is no parameter."""
        return self._state(value) if isinstance(value, fx.Node) and not parameter_of(value) else None

    def _with_gain(self, vectors: Vectors, gain: Gain, size: Sequence[int]) -> Vectors | None:
        if self.parameters[gain.weight].numel() == 1:
            self._uses_otherwise(gain.weight)
            return replace(vectors, channels=vectors.channels.expand(tuple(size)))
        if not vectors.is_plain or not vectors.is_whole or tuple(size) != tuple(vectors.channels.shape):
            return None
        self._use(gain.weight, {0: (vectors.space, gain)})
        if gain.bias:
            self._use(gain.bias, {0: (vectors.space, replace(gain, weight=gain.bias, bias=gain.weight))})
        vectors.space.root.gains.append(gain)
        return replace(vectors, gain=gain)

    def _scaled(self, vectors: Vectors, factor: Any, size: Sequence[int]) -> Vectors | None:
        """Handle a product with one number for each vector."""
        if isinstance(factor, fx.Node):
            if factor in self._values:
                return None
            own = size_of(factor)
            if factor.op == "get_attr":
                own = tuple(self._tensor(str(factor.target)).shape)
                self._uses_otherwise(str(factor.target))
            if own is None or (own and own[-1] != 1 and not is_constant_on_last_axis(factor)):
                return None
            if not own or all(length == 1 for length in own):
                return replace(vectors, channels=vectors.channels.expand(tuple(size)))
            vectors.space.restrict(vectors.rows)
        return replace(vectors, channels=vectors.channels.expand(tuple(size)))

    def _tensor(self, name: str) -> torch.Tensor:
        owner, _, own = name.rpartition(".")
        found: Any = getattr(self.modules[owner], own)
        return found if isinstance(found, torch.Tensor) else torch.empty(())

    def _sum(self, node: fx.Node) -> Vectors | None:
        size, (first, second) = size_of(node), node.args[:2]
        one, two = self._state(first), self._state(second)
        if size is None or (node.kwargs.get("alpha", 1) != 1 and two is not None and one is None):
            return None
        if one is not None and two is not None:
            return joined(one, two, size)
        vectors, other = (one, second) if one is not None else (two, first)
        if vectors is None or not vectors.is_plain:
            if vectors is not None and vectors.gain is not None:
                vectors.space.root.is_sum = True  # but for the gain
            return None
        own = size_of(other) if isinstance(other, fx.Node) else ()
        if own is None or (own and own[-1] != 1) or (isinstance(other, fx.Node) and other.op == "get_attr"):
            return None
        return without_mean(vectors, size)

    def _normalized(self, node: fx.Node, name: str) -> Vectors | None:
        vectors, size = self._state(node.args[0]), size_of(node)
        weight, bias = (node.args[place] if len(node.args) > place else None for place in (2, 3))
        bias = bias if name == "layer_norm" else None
        (own, offset), shift = parameter_plus(weight), parameter_of(bias)
        shape = node.args[1]
        if vectors is None or size is None or not vectors.is_plain:
            return None
        if (weight is not None and own not in self.parameters) or (bias is not None and shift not in self.parameters):
            return None
        if not isinstance(shape, (list, tuple)) or len(shape) != 1 or (bias is not None and weight is None):
            return None
        vectors.space.restrict(vectors.rows)
        if name == "layer_norm":
            vectors.space.root.keeps_mean = True
        gain = Gain(weight=own, offset=offset, bias=shift)
        return self._with_gain(vectors, gain, size) if weight is not None else vectors

    def _weighted_sum(self, node: fx.Node, name: str) -> Vectors | None:
        summed = node.args[WEIGHTED_SUMS[name]]
        vectors = self._state(summed)
        result = weighted_sum(node, name, vectors) if vectors is not None else None
        if result is not None:
            for entry in node.all_input_nodes:
                if entry is not summed:
                    self._escape_value(entry, f"{name} in {_place(node)}")
        return result


def _keeps_last_axis(node: fx.Node, name: str, num_dims: int) -> bool:
    """Whether a lookup only chooses among vectors."""
    where = node.args[1]
    if name == "index_select":
        return isinstance(where, int) and where % num_dims != num_dims - 1
    return isinstance(where, (list, tuple)) and len(where) < num_dims


def _place(node: fx.Node) -> str:
    """The name of the nearest module that was called before a node."""
    before = node.prev
    while before.op not in ("root", "call_module", "get_attr"):
        before = before.prev
    return f"the code after {before.target}" if before.op != "root" else "the first lines"
