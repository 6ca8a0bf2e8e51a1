"""Cutting graphs: expected partitions, names and orders are written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import fx, nn

from runtime.errors import TargetError, UsageError
from seqbuild import (
    Subgraph,
    find_target_nodes,
    graph_is_well_formed,
    partition_graph,
    topological_partition,
    trace_consumed_names,
)
from tests.tiny_models import assert_same, run_chain

ROOT = Path(__file__).parents[2]


class Chain(nn.Module):
    """before, a, between, b, c, after."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("before", "a", "between", "b", "c", "after"):
            self.add_module(name, nn.Linear(3, 3))
        self.gain = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))


class Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class Straight(Chain):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        gain = self.gain
        x = self.before(x)
        x = self.a(x)
        x = self.between(x) + mask
        x = self.b(x)
        x = self.c(x) * gain
        return self.after(x)


class Repeated(Chain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        x = self.b(x)
        x = self.between(x)
        x = self.a(x)
        return self.c(x)


def traced(model: nn.Module) -> fx.GraphModule:
    return fx.GraphModule(model, Tracer().trace(model))


def names(partitions: list[list[fx.Node]]) -> list[list[str]]:
    return [[node.name for node in nodes] for nodes in partitions]


def a_b_c(graph: fx.GraphModule) -> list[nn.Module]:
    return [graph.a, graph.b, graph.c]  # type: ignore[list-item]


def test_find_target_nodes_takes_sets_lists_graphs_and_graph_modules() -> None:
    graph = traced(Straight())
    for targets in (a_b_c(graph), set(a_b_c(graph)), tuple(reversed(a_b_c(graph)))):
        for given in (graph, graph.graph):
            found = find_target_nodes(given, targets)
            assert [node.name for node in found] == ["a", "b", "c"]
            assert all(isinstance(node, fx.Node) for node in found)
    assert list(find_target_nodes(graph, {nn.Linear(1, 1)})) == []
    nodes = {node.name: node for node in graph.graph.nodes}
    assert find_target_nodes(graph, {graph.b}) == {nodes["b"]}


def test_one_target_a_partition() -> None:
    graph = traced(Straight())
    assert names(topological_partition(graph, set(a_b_c(graph)))) == [
        ["x", "mask", "before", "a"],
        ["between", "add", "b"],
        ["c"],
        ["gain", "mul", "after", "output"],
    ]


@pytest.mark.parametrize(
    ("targets_per_subgraph", "expected"),
    [
        (2, [["x", "mask", "before", "a", "between", "add", "b"], ["c"], ["gain", "mul", "after", "output"]]),
        (3, [["x", "mask", "before", "a", "between", "add", "b", "c"], ["gain", "mul", "after", "output"]]),
        (9, [["x", "mask", "before", "a", "between", "add", "b", "c"], ["gain", "mul", "after", "output"]]),
    ],
)
def test_several_targets_a_partition(targets_per_subgraph: int, expected: list[list[str]]) -> None:
    graph = traced(Straight())
    assert names(topological_partition(graph, a_b_c(graph), targets_per_subgraph)) == expected


def test_a_target_called_twice_keeps_what_lies_between() -> None:
    graph = traced(Repeated())
    assert names(topological_partition(graph, {graph.a, graph.c})) == [
        ["x", "a", "b", "between", "a_1"],
        ["c", "output"],
    ]
    assert names(topological_partition(graph, set(a_b_c(graph)))) == [
        ["x", "a", "b", "between", "a_1"],
        ["c", "output"],
    ]
    assert names(topological_partition(graph, {graph.b})) == [["x", "a", "b"], ["between", "a_1", "c", "output"]]


def test_attributes_go_as_late_as_their_first_user() -> None:
    class Early(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gain = self.gain
            x = self.a(x)
            x = self.b(x) * gain
            return self.c(x) * gain

    graph = traced(Early())
    partitions = topological_partition(graph, set(a_b_c(graph)))
    assert names(partitions) == [["x", "a"], ["b"], ["gain", "mul", "c"], ["mul_1", "output"]]
    subgraphs = partition_graph(graph, partitions)
    # never handed on: each subgraph that uses it reads it from the model
    assert [subgraph.input_names for subgraph in subgraphs] == [["x"], ["a"], ["b"], ["c"]]
    assert [subgraph.code.attributes for subgraph in subgraphs] == [(), (), ("gain",), ("gain",)]


def test_what_unpacks_a_result_stays_with_its_maker() -> None:
    class Unpacking(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            both = self.a(x)
            y = self.b(x)
            return self.c(both[1]) + y[both[0]]

    graph = traced(Unpacking())
    # y[both[0]] needs two results and is no unpacking: it must not go before the second of them
    assert names(topological_partition(graph, {graph.a, graph.b})) == [
        ["x", "a", "getitem", "getitem_1"],
        ["b"],
        ["c", "getitem_2", "add", "output"],
    ]


def test_an_index_that_is_made_later_stays_later() -> None:
    class Indexing(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return y[self.b(x)]

    graph = traced(Indexing())
    assert names(topological_partition(graph, {graph.a, graph.b})) == [["x", "a"], ["b"], ["getitem", "output"]]


def test_no_target_is_called() -> None:
    graph = traced(Straight())
    with pytest.raises(TargetError, match="none of the sequential targets is called"):
        topological_partition(graph, {nn.Linear(1, 1)})
    with pytest.raises(TargetError, match="none of the sequential targets is called"):
        topological_partition(graph, [])


@pytest.mark.parametrize("number", [0, -1])
def test_targets_per_subgraph_must_be_positive(number: int) -> None:
    graph = traced(Straight())
    with pytest.raises(UsageError, match=f"targets per subgraph is {number}"):
        topological_partition(graph, a_b_c(graph), number)


def test_partitions_become_subgraphs() -> None:
    graph = traced(Straight())
    subgraphs = partition_graph(graph, topological_partition(graph, set(a_b_c(graph))))
    assert all(type(subgraph) is Subgraph for subgraph in subgraphs)
    assert [subgraph.input_names for subgraph in subgraphs] == [["x"], ["mask", "a"], ["b"], ["c"]]
    assert [subgraph.consumed_names for subgraph in subgraphs] == [[], [], [], []]
    trace_consumed_names(subgraphs)
    assert [subgraph.consumed_names for subgraph in subgraphs] == [["x"], ["mask", "a"], ["b"], ["c"]]
    assert subgraphs[1].code.source == (
        "def forward(self, mask, a, *, run):\n"
        '    between = self.get_submodule("between")(a)\n'
        "    del a\n"
        "    add = between + mask\n"
        "    del between, mask\n"
        '    b = self.get_submodule("b")(add)\n'
        "    del add\n"
        "    return {\n"
        '        "b": b,\n'
        "    }\n"
    )
    for subgraph in subgraphs:
        subgraph.graph.lint()
        assert graph_is_well_formed(subgraph.graph)
    x, mask = torch.randn(2, 3), torch.randn(2, 3)
    assert_same(run_chain(subgraphs, graph, {"x": x, "mask": mask}), {"output": graph(x, mask).detach()})


def test_the_original_graph_is_left_alone() -> None:
    graph = traced(Straight())
    before = graph.code
    partition_graph(graph, topological_partition(graph, set(a_b_c(graph))))
    graph.recompile()
    assert graph.code == before


def test_values_are_consumed_by_their_last_user() -> None:
    def step(*input_names: str) -> Subgraph:
        return Subgraph(graph=fx.Graph(), input_names=list(input_names))

    subgraphs = [step("x", "mask"), step("mask", "h0"), step("h1", "x"), step()]
    trace_consumed_names(subgraphs)
    assert [subgraph.consumed_names for subgraph in subgraphs] == [[], ["mask", "h0"], ["h1", "x"], []]
    trace_consumed_names(subgraphs)  # a second time changes nothing
    assert [subgraph.consumed_names for subgraph in subgraphs] == [[], ["mask", "h0"], ["h1", "x"], []]
    trace_consumed_names([])


class TestWellFormed:
    @staticmethod
    def make() -> tuple[fx.Graph, fx.Node, fx.Node]:
        graph = fx.Graph()
        x = graph.placeholder("x")
        y = graph.call_function(torch.neg, (x,))
        graph.output(y)
        return graph, x, y

    def test_good(self) -> None:
        assert graph_is_well_formed(self.make()[0])
        assert graph_is_well_formed(fx.Graph())
        assert graph_is_well_formed(traced(Straight()).graph)

    def test_a_user_too_few(self) -> None:
        graph, x, y = self.make()
        del x.users[y]
        assert not graph_is_well_formed(graph)

    def test_a_user_too_many(self) -> None:
        graph, x, y = self.make()
        y.users[x] = None
        assert not graph_is_well_formed(graph)

    def test_the_wrong_user(self) -> None:
        graph, x, _ = self.make()
        (output,) = graph.find_nodes(op="output")
        x.users.clear()
        x.users[output] = None
        assert not graph_is_well_formed(graph)
