"""Find norms and Linear modules that can scale the channels of a tensor, and those that take channels in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from seqbuild.manifest.channels import Weight, operator_name, size_of
from seqbuild.manifest.mixtures import Mixtures

if TYPE_CHECKING:
    from collections.abc import Mapping

_CASTS = ("to", "_to_copy", "type_as", "float", "alias", "detach", "contiguous")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelSource:
    """Parameters whose common scaling, channel by channel, scales the value of a node.

    Attributes:
        node: the node whose value is scaled.
        weight: the dotted name of a norm's weight [C], or of a Linear's [C, I].
        bias: the bias that is scaled with it, or "".
        offset: added to the weight by the model before it multiplies: 1 for norms that store the difference from one.
        channels: integers in the shape of the node's value.
    """

    node: fx.Node
    weight: str
    bias: str
    offset: int
    channels: torch.Tensor


def weights_of(
    graph: fx.Graph, modules: Mapping[str, nn.Module], mixtures: Mixtures
) -> dict[fx.Node, tuple[Weight, ...]]:
    """Return the calls that take channels in along the last axis of their first input, with their weights."""
    found: dict[fx.Node, tuple[Weight, ...]] = {}
    for node in graph.nodes:
        if node.op == "call_module" and str(node.target) in modules:
            weights = tuple(_module_weights(str(node.target), modules[str(node.target)], mixtures))
            if weights and node.all_input_nodes and _first_input(node) is node.all_input_nodes[0]:
                found[node] = weights
        elif operator_name(node) == "linear":
            name = parameter_of(node.args[1])
            if name and isinstance(node.args[0], fx.Node):
                found[node] = (Weight(name=name, axis=1),)
    return found


def _first_input(node: fx.Node) -> object:
    return node.args[0] if node.args else next(iter(node.kwargs.values()), None)


def _module_weights(name: str, module: nn.Module, mixtures: Mixtures) -> Iterator[Weight]:
    if isinstance(module, nn.Linear):
        yield Weight(name=f"{name}.weight", axis=1)
    elif type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        yield Weight(name=f"{name}.weight", axis=0)
    else:
        for reading in mixtures.readings(module):
            yield Weight(name=f"{name}.{reading.name}", axis=reading.axis)


def sources(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> Iterator[ChannelSource]:
    """Yield all sources of a graph, in order of execution."""
    for node in graph.nodes:
        size = size_of(node)
        if not size:
            continue
        found = _linear(node, modules) if node.op == "call_module" else _norm(node)
        if found is None:
            continue
        weight, bias, offset, end = found
        channels = torch.arange(size[-1], dtype=torch.int32).expand(size)
        yield ChannelSource(node=end, weight=weight, bias=bias, offset=offset, channels=channels)


_Found = tuple[str, str, int, fx.Node]


def _linear(node: fx.Node, modules: Mapping[str, nn.Module]) -> _Found | None:
    module = modules.get(str(node.target))
    if not isinstance(module, nn.Linear):
        return None
    bias = f"{node.target}.bias" if module.bias is not None else ""
    return f"{node.target}.weight", bias, 0, node


def _norm(node: fx.Node) -> _Found | None:
    name = operator_name(node)
    if name in ("layer_norm", "rms_norm", "native_layer_norm"):
        weight = parameter_of(node.args[2]) if len(node.args) > 2 else ""
        bias = parameter_of(node.args[3]) if name == "layer_norm" and len(node.args) > 3 else ""
        return (weight, bias, 0, node) if weight and name != "native_layer_norm" else None
    if name != "mul":
        return None
    for place in (0, 1):
        weight, offset = parameter_plus(node.args[place])
        if weight and _width(node.args[place]) == _width(node) and not parameter_of(node.args[1 - place]):
            bias, end = _bias_after(node)
            return weight, bias, offset, end
    return None


def parameter_of(value: Any) -> str:
    """Return the parameter that a value is, apart from a dtype conversion; "" for any other value."""
    while isinstance(value, fx.Node) and operator_name(value) in _CASTS:
        value = value.args[0]
    return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else ""


def parameter_plus(value: Any) -> tuple[str, int]:
    """Return a parameter and the integer that is added to it."""
    plain = parameter_of(value)
    if plain:
        return plain, 0
    while isinstance(value, fx.Node) and operator_name(value) in _CASTS:
        value = value.args[0]
    if not isinstance(value, fx.Node) or operator_name(value) != "add" or len(value.args) < 2:
        return "", 0
    for place in (0, 1):
        number, name = value.args[1 - place], parameter_of(value.args[place])
        if name and isinstance(number, (int, float)) and number == int(number):
            return name, int(number)
    return "", 0


def _width(value: Any) -> int | None:
    """Return the size of the last axis; for a parameter that is looked up here, the size of its only axis."""
    size = size_of(value) if isinstance(value, fx.Node) else None
    if size is not None:
        return size[-1] if size else None
    while isinstance(value, fx.Node) and value.op != "get_attr" and value.args:
        value = value.args[0]
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    root: Any = value.graph.owning_module
    found: Any = root
    for part in str(value.target).split("."):
        found = getattr(found, part, None)
    return int(found.shape[0]) if isinstance(found, torch.Tensor) and found.dim() == 1 else None


def _bias_after(node: fx.Node) -> tuple[str, fx.Node]:
    """Return the parameter that is added to the product immediately afterwards, and the node that is then scaled."""
    end, users = node, list(node.users)
    while len(users) == 1 and operator_name(users[0]) in _CASTS:
        end, users = users[0], list(users[0].users)
    if len(users) == 1 and operator_name(users[0]) == "add" and len(users[0].args) == 2:
        others: Sequence[Any] = [argument for argument in users[0].args if argument is not end]
        name = parameter_of(others[0]) if others else ""
        if name and _width(others[0]) == _width(node):
            return name, users[0]
    return "", node
