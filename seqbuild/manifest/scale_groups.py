"""Derive a chain's scale groups: Linear modules with a common input, and the parameters that can scale it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import fx, nn

from runtime.artifact.manifest import ScaledParameter, ScaleGroup, SubgraphEntry
from runtime.artifact.scale_groups import runs_of
from seqbuild.manifest.channels import Arrival, follow, operator_name, size_of
from seqbuild.manifest.mixtures import Mixtures
from seqbuild.manifest.sources import ChannelSource, parameter_of, sources, weights_of
from seqbuild.trace.experts.dense import is_dense_experts
from seqbuild.trace.experts.learn import is_experts

if TYPE_CHECKING:
    from seqbuild.chain.subgraph import Subgraph


def scale_groups(
    model: nn.Module, subgraphs: Sequence[Subgraph], entries: Sequence[SubgraphEntry]
) -> tuple[ScaleGroup, ...]:
    """Return the scale groups of every subgraph, in order of execution.

    Args:
        model: the traced model.
        subgraphs: traced down to Linear modules.
        entries: their manifest entries. Subgraphs with the same code differ in names only and are analyzed once.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    # A parameter with several uses, under any name, cannot be scaled for only one of them.
    uses: Counter[int] = Counter()
    names: dict[str, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[name] = id(parameter)
        uses[id(parameter)] = 0
    for subgraph in subgraphs:
        for node in subgraph.graph.nodes:
            for name in _read(node, modules):
                if name in names:
                    uses[names[name]] += 1
    for entry in entries:  # opaque steps also use parameters of the modules that they receive
        for name in entry.uses:
            if name in names:
                uses[names[name]] += 1
    shared = {name for name, key in names.items() if uses[key] > 1}
    found: list[ScaleGroup] = []
    known: dict[str, tuple[str, list[ScaleGroup]]] = {}
    mixtures = Mixtures()
    for index, (subgraph, entry) in enumerate(zip(subgraphs, entries, strict=True)):
        groups = _renamed(known.get(entry.file), entry.scope, index)
        if groups is None or shared.intersection(entry.parameters):
            groups = _groups_of(subgraph.graph, index, modules, shared, mixtures)
        if entry.scope and not shared.intersection(entry.parameters):
            known.setdefault(entry.file, (entry.scope, groups))
        found += groups
    return tuple(_each_once(found))


def mixture_groups(groups: Sequence[ScaleGroup]) -> tuple[ScaleGroup, ...]:
    """Return the groups without a Linear module: their tensors are read by a mixture's experts and its router."""
    return tuple(group for group in groups if not group.modules)


def _each_once(groups: Sequence[ScaleGroup]) -> Iterator[ScaleGroup]:
    """Keep a module that is called several times only in the group of its first call, which then has no producer."""
    seen: set[str] = set()
    for group in groups:
        new = tuple(name for name in group.modules if name not in seen)
        seen.update(new)
        if len(new) == len(group.modules):  # includes groups without modules, whose parameters are used once
            yield group
        elif new:
            yield ScaleGroup(subgraph=group.subgraph, modules=new)


def _renamed(known: tuple[str, list[ScaleGroup]] | None, scope: str, index: int) -> list[ScaleGroup] | None:
    """Rename the groups of another subgraph with the same code for this one."""
    if known is None:
        return None
    before, groups = known

    def named(name: str) -> str:
        return scope + name.removeprefix(before) if name else ""

    return [
        dataclasses.replace(
            group,
            subgraph=index,
            modules=tuple(named(name) for name in group.modules),
            others=tuple(dataclasses.replace(other, name=named(other.name)) for other in group.others),
            producer=named(group.producer),
            bias=named(group.bias),
        )
        for group in groups
    ]


def _read(node: fx.Node, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the parameters that a node uses."""
    if node.op == "get_attr":
        return [str(node.target)] * max(len(node.users), 1)
    if node.op != "call_module" or str(node.target) not in modules:
        return []
    return [f"{node.target}.{name}" for name, _ in modules[str(node.target)].named_parameters()]


def _groups_of(
    graph: fx.Graph, index: int, modules: Mapping[str, nn.Module], shared: set[str], mixtures: Mixtures
) -> list[ScaleGroup]:
    weights = weights_of(graph, modules, mixtures)
    siblings: dict[fx.Node, list[str]] = {}
    tensor_of: dict[str, fx.Node] = {}
    for node, (weight, *_) in weights.items():
        name = weight.name.removesuffix(".weight")
        if node.op == "call_module" and isinstance(modules.get(name), nn.Linear):
            tensor = _same_tensor(node.args[0])
            siblings.setdefault(tensor, []).append(name)
            tensor_of[name] = tensor
    produced: dict[fx.Node | str, ScaleGroup] = {}
    for source in sources(graph, modules):
        group = _group(source, graph, index, weights, siblings, tensor_of, shared, modules)
        if group is not None:  # keep the last of several producers, which is the nearest
            produced[tensor_of[group.modules[0]] if group.modules else group.others[0].name] = group
    return [
        *(
            produced.get(tensor) or ScaleGroup(subgraph=index, modules=tuple(dict.fromkeys(names)))
            for tensor, names in siblings.items()
        ),
        *(group for group in produced.values() if not group.modules),
    ]


def _group(
    source: ChannelSource,
    graph: fx.Graph,
    index: int,
    weights: Mapping[fx.Node, tuple[object, ...]],
    siblings: Mapping[fx.Node, Sequence[str]],
    tensor_of: Mapping[str, fx.Node],
    shared: set[str],
    modules: Mapping[str, nn.Module],
) -> ScaleGroup | None:
    """Return the group that a source can produce."""
    if source.weight in shared or source.bias in shared:
        return None
    flow = follow(graph, source.node, source.channels, weights)  # type: ignore[arg-type]
    if not flow.arrivals or any(arrival.channels != flow.arrivals[0].channels for arrival in flow.arrivals):
        return None
    channels = flow.arrivals[0].channels
    if flow.escaped.intersection(channels) or any(arrival.parameter in shared for arrival in flow.arrivals):
        return None
    first = next((name for arrival in flow.arrivals for name in _linear_name(arrival, tensor_of)), None)
    if first is None and not any(_is_mixture(arrival, modules) for arrival in flow.arrivals):
        return None
    members = tuple(dict.fromkeys(siblings[tensor_of[first]])) if first is not None else ()
    met = {arrival.parameter for arrival in flow.arrivals}
    if not met.issuperset(f"{name}.weight" for name in members):
        return None
    others = [arrival for arrival in flow.arrivals if arrival.parameter.removesuffix(".weight") not in members]
    return ScaleGroup(
        subgraph=index,
        modules=members,
        others=tuple(ScaledParameter(name=arrival.parameter, axis=arrival.axis) for arrival in others),
        producer=source.weight,
        bias=source.bias,
        offset=source.offset,
        channels=runs_of(channels),
    )


def _linear_name(arrival: Arrival, tensor_of: Mapping[str, fx.Node]) -> list[str]:
    name = arrival.parameter.removesuffix(".weight")
    return [name] if arrival.node.op == "call_module" and name in tensor_of else []


def _is_mixture(arrival: Arrival, modules: Mapping[str, nn.Module]) -> bool:
    module = modules.get(str(arrival.node.target)) if arrival.node.op == "call_module" else None
    return module is not None and (is_experts(module) or is_dense_experts(module))


def _same_tensor(value: object) -> fx.Node:
    """Return the first node whose value has the same rows of features, possibly in another shape."""
    assert isinstance(value, fx.Node)
    while operator_name(value) in ("view", "reshape", "alias", "contiguous", "detach", "flatten", "_unsafe_view"):
        before = value.args[0]
        if not isinstance(before, fx.Node) or parameter_of(before):
            break
        sizes = size_of(before), size_of(value)
        if not sizes[0] or not sizes[1] or sizes[0][-1] != sizes[1][-1]:
            break
        value = before
    return value
