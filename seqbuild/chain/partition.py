"""Cut a graph into a chain of subgraphs, each with complete targets."""

from __future__ import annotations

import bisect
import operator
from collections import UserDict
from collections.abc import Collection, KeysView
from typing import TYPE_CHECKING, Any

from torch import fx

from runtime.errors import TargetError, UsageError
from seqbuild.chain import marks as loop_marks
from seqbuild.chain.marks import is_empty_cache
from seqbuild.chain.subgraph import Subgraph

if TYPE_CHECKING:
    from torch import nn


# Keys of a node's metadata: the target inside which the node was recorded, if the target is traced through; whether its
# result comes from a dry run.
WITHIN = "within"
DRY_RUN = "dry_run"


def target_of(node: fx.Node, root: nn.Module, targets: Collection[nn.Module]) -> nn.Module | None:
    """Return the target that a node calls or is part of."""
    name = node.meta.get(WITHIN) or (node.target if node.op == "call_module" else None)
    module = root.get_submodule(str(name)) if name is not None else None
    return module if module in targets else None


def graph_is_well_formed(graph: fx.Graph) -> bool:
    """Return whether for all nodes A and B, A is in B.users exactly if B is in A.all_input_nodes."""
    edges = [(node, user) for node in graph.nodes for user in node.users]
    inputs = [(source, node) for node in graph.nodes for source in node.all_input_nodes]
    return len(edges) == len(inputs) and dict.fromkeys(edges).keys() == dict.fromkeys(inputs).keys()


def find_target_nodes(graph: fx.GraphModule | fx.Graph, targets: Collection[nn.Module]) -> KeysView[fx.Node]:
    """Return the nodes that call a target or belong to one that is traced through, in graph order.

    Args:
        graph: a graph module, or a graph whose owning module contains the called modules.
        targets: the targets.
    """
    fx_graph, root = _graph_and_root(graph)
    return dict.fromkeys(node for node in fx_graph.nodes if target_of(node, root, targets) is not None).keys()


def topological_partition(
    graph: fx.GraphModule | fx.Graph, targets: Collection[nn.Module], targets_per_subgraph: int = 1
) -> list[list[fx.Node]]:
    """Divide the nodes into a chain of partitions, each of which depends on earlier ones only.

    The graph is cut after every `targets_per_subgraph`-th target. All calls of a target that is called several times
    are in one partition, together with everything between them. Nodes that unpack a result stay with the step that
    computed it, and `get_attr` nodes are in the partition of their first user. The nodes after the last target (such as
    a final norm and a head) form a partition without targets.

    Returns:
        Lists of nodes in graph order, including the graph's inputs and its output.

    Raises:
        UsageError: if `targets_per_subgraph` is below one.
        TargetError: if no target is called.
    """
    if targets_per_subgraph < 1:
        raise UsageError(f"targets per subgraph is {targets_per_subgraph}", hint="it must be 1 or more")
    fx_graph, root = _graph_and_root(graph)
    assert graph_is_well_formed(fx_graph), "an edge of the graph is recorded at one end only"
    nodes = list(fx_graph.nodes)
    calls: dict[nn.Module, list[int]] = {}
    for position, node in enumerate(nodes):
        target = target_of(node, root, targets)
        if target is not None:
            calls.setdefault(target, []).append(position)
    if not calls:
        raise TargetError("none of the sequential targets is called by the model's forward")
    cuts = _cuts([(positions[0], positions[-1]) for positions in calls.values()], targets_per_subgraph)
    place: dict[fx.Node, int] = {}
    for position, node in enumerate(nodes):
        if _is_unpacking(node) and node.args[0] in place:
            place[node] = place[node.args[0]]
        else:
            place[node] = bisect.bisect_left(cuts, position)
    for node in nodes:
        if node.op == "get_attr" and node.users:
            place[node] = min(place[user] for user in node.users)
    partitions: list[list[fx.Node]] = [[] for _ in range(len(cuts) + 1)]
    for node in nodes:
        partitions[place[node]].append(node)
    return _without_empty_tail(partitions)


def _cuts(spans: list[tuple[int, int]], targets_per_subgraph: int) -> list[int]:
    """Return the positions after which to cut, outside all spans (first to last call of one target)."""
    cuts: list[int] = []
    held, end = 0, -1
    for index, (_, last) in enumerate(spans):  # in the order of first calls
        held, end = held + 1, max(end, last)
        following = spans[index + 1][0] if index + 1 < len(spans) else None
        is_closed = following is None or following > end
        if is_closed and (held >= targets_per_subgraph or following is None):
            cuts.append(end)
            held = 0
    return cuts


def _without_empty_tail(partitions: list[list[fx.Node]]) -> list[list[fx.Node]]:
    """Merge a last partition that contains only inputs and the output into the one before it."""
    if len(partitions) > 1 and all(node.op in ("output", "placeholder") for node in partitions[-1]):
        tail = partitions.pop()
        partitions[-1].extend(tail)
    return partitions


def partition_graph(model: nn.Module, partitions: list[list[fx.Node]]) -> list[Subgraph]:
    """Build a Subgraph from each partition.

    A subgraph takes values of earlier ones by name and returns the values that later ones need; the last returns the
    fields of the model's output. Parameters never cross a boundary: each partition has its own `get_attr` nodes.

    Args:
        model: the traced model.
        partitions: the result of `topological_partition`.

    Returns:
        Subgraphs in execution order; `trace_consumed_names` fills in their `consumed_names`.
    """
    owner = {node: index for index, nodes in enumerate(partitions) for node in nodes}
    return [_subgraph(model, index, nodes, owner) for index, nodes in enumerate(partitions)]


def _subgraph(model: nn.Module, index: int, nodes: list[fx.Node], owner: dict[fx.Node, int]) -> Subgraph:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    body = [node for node in nodes if node.op not in ("placeholder", "output", "get_attr")]
    output = next((node for node in nodes if node.op == "output"), None)
    ends = [] if output is None else [output]
    unused = [node for node in nodes if node.op == "placeholder" and not node.users]  # an input, so that it is consumed
    sources = dict.fromkeys([*unused, *(source for node in (*body, *ends) for source in node.all_input_nodes)])
    outside = [
        source
        for source in sources
        if source.op == "placeholder" or (source.op != "get_attr" and owner[source] != index)
    ]
    for source in sorted(outside, key=lambda node: node.op != "placeholder"):  # model inputs first, then by use
        copies[source] = graph.placeholder(str(source.target) if source.op == "placeholder" else source.name)
        copies[source].meta = {key: value for key, value in source.meta.items() if key != WITHIN}
    for node, around in loop_marks.paths((*body, *ends)):
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in copies:
                place = copies[around[0]] if around and node is not around[0] else graph._root  # outside loops
                with graph.inserting_before(place):
                    copies[source] = graph.node_copy(source)
        if node.op != "output":
            copies[node] = graph.node_copy(node, lambda source: copies[source])
    results: dict[str, Any] = {
        node.name: copies[node] for node in body if any(owner[user] != index for user in node.users)
    }
    if output is not None:
        results.update(fx.node.map_arg(named_output(output.args[0]), lambda source: copies[source]))
    graph.output(results)
    graph.owning_module = model  # type: ignore[assignment]
    return Subgraph(graph=graph, input_names=[str(node.target) for node in graph.find_nodes(op="placeholder")])


def trace_consumed_names(subgraphs: list[Subgraph]) -> None:
    """Set each subgraph's `consumed_names`: the inputs that no later subgraph has."""
    needed_later: dict[str, None] = {}
    for subgraph in reversed(subgraphs):
        subgraph.consumed_names = [name for name in subgraph.input_names if name not in needed_later]
        needed_later.update(dict.fromkeys(subgraph.input_names))


def named_output(output: Any) -> dict[str, Any]:
    """Convert a model's output to a dict: the fields of a ModelOutput, or `output`, `output_0`, ... for bare values.

    Fields without a value are left out.
    """
    if isinstance(output, (tuple, list)):
        output = {f"output_{index}": value for index, value in enumerate(output)}
    if not isinstance(output, (dict, UserDict)):
        return {"output": output}
    return {str(name): value for name, value in output.items() if value is not None and not is_empty_cache(value)}


def _is_unpacking(node: fx.Node) -> bool:
    """Return whether a node takes a fixed part of the result of one other node."""
    is_access = node.op == "call_function" and node.target in (operator.getitem, getattr)
    return is_access and len(node.all_input_nodes) == 1


def _graph_and_root(graph: fx.GraphModule | fx.Graph) -> tuple[fx.Graph, nn.Module]:
    if isinstance(graph, fx.GraphModule):
        return graph.graph, graph
    root: nn.Module | None = graph.owning_module
    assert root is not None, "a graph needs an owning module, which contains the called modules"
    return graph, root
