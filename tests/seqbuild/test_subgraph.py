"""Running one step of the chain."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import fx

from runtime.errors import DataError
from seqbuild import Subgraph, trace_subgraphs
from tests.seqbuild import toys
from tests.tiny_models import make_inputs, tiny_model

X = torch.zeros(2, 5, toys.WIDTH)


def traced(model: torch.nn.Module) -> list[Subgraph]:
    return trace_subgraphs(model, {"x": X}, ["Layer"])


def test_forward_returns_named_outputs() -> None:
    model = toys.Toy()
    first, second = traced(model)
    x = torch.randn(3, 2, toys.WIDTH)
    output = first.forward(model, x=x)
    assert list(output) == ["layers_0"]
    assert torch.equal(output["layers_0"], model.layers[0](x))
    assert list(second.forward(model, layers_0=x)) == ["output"]


@pytest.mark.parametrize("inputs", [{}, {"x": X, "y": X}, {"y": X}])
def test_other_inputs_are_refused(inputs: dict[str, torch.Tensor]) -> None:
    model = toys.Toy()
    with pytest.raises(DataError, match=r"it takes x"):
        traced(model)[0].forward(model, **inputs)


def test_forward_uses_the_weights_of_now() -> None:
    model = toys.Toy()
    first, _ = traced(model)
    before = first.forward(model, x=X + 1)["layers_0"]
    torch.nn.init.zeros_(model.layers[0].linear.weight)
    torch.nn.init.zeros_(model.layers[0].linear.bias)
    assert before.abs().sum() > 0
    assert first.forward(model, x=X + 1)["layers_0"].abs().sum() == 0


def test_gradients_flow_through_a_subgraph() -> None:
    model = toys.Parameters()
    subgraphs = traced(model)
    hidden = subgraphs[0].forward(model, x=X + 1)
    subgraphs[1].forward(model, **hidden)["output"].sum().backward()
    assert model.gain.grad is not None
    assert bool((model.gain.grad != 0).all())


def test_submodules_in_call_order_each_once() -> None:
    model = tiny_model("llama")
    subgraphs = trace_subgraphs(model, make_inputs(model, 2, 6), ["LlamaDecoderLayer"])
    inner = model.model
    assert subgraphs[0].submodules(model, recurse=False) == [inner.embed_tokens, inner.rotary_emb, inner.layers[0]]
    assert subgraphs[1].submodules(model) == list(inner.layers[1].modules())
    assert subgraphs[3].submodules(model) == [inner.norm, model.lm_head]
    twice = toys.CalledTwice()
    assert traced(twice)[0].submodules(twice, recurse=False) == [twice.layer]


def test_names_may_be_given_by_position() -> None:
    graph = fx.Graph()
    subgraph = Subgraph(graph, ["x"], ["x"])
    assert (subgraph.graph, subgraph.input_names, subgraph.consumed_names) == (graph, ["x"], ["x"])
    assert Subgraph(graph, ["x"]).consumed_names == []


def test_values_are_freed_as_soon_as_the_code_is_done_with_them() -> None:
    alive: list[bool] = []

    class Plus(toys.Toy):
        def glue(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    model = Plus()
    (subgraph,) = trace_subgraphs(model, {"x": X}, ["Layer"], targets_per_subgraph=2)
    references: list[weakref.ref[torch.Tensor]] = []
    model.layers[0].register_forward_hook(lambda module, args, output: references.append(weakref.ref(output)))
    model.layers[1].register_forward_pre_hook(lambda module, args: alive.append(references[0]() is not None))
    with torch.no_grad():
        subgraph.forward(model, x=X)
    assert alive == [False]
