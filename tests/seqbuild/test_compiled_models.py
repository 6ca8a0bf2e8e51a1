"""Models that `torch.compile` has been applied to are traced as what they were, and stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from seqbuild import trace_subgraphs
from tests.seqbuild import toys
from tests.tiny_models import run_chain

X = torch.randn(2, 5, toys.WIDTH, generator=torch.Generator().manual_seed(0))
BACKEND = "eager"  # which runs the graphs that torch has made


class Model(toys.Toy):
    """With glue in a module of its own, and one that lies deeper."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = toys.Toy()

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.middle(x) + doubled(x)
        return y


@torch.compile(backend=BACKEND)
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def whole(model: Model) -> nn.Module:
    compiled: nn.Module = torch.compile(model, backend=BACKEND)  # type: ignore[assignment]
    return compiled


def in_place(model: Model) -> nn.Module:
    model.compile(backend=BACKEND)
    return model


def inner(model: Model) -> nn.Module:
    model.middle = torch.compile(model.middle, backend=BACKEND)
    return model


def layers(model: Model) -> nn.Module:
    for index in range(2):
        model.layers[index] = torch.compile(model.layers[index], backend=BACKEND)
    return model


def layers_in_place(model: Model) -> nn.Module:
    for layer in (*model.layers, model.middle):
        layer.compile(backend=BACKEND)
    return model


def forwards(model: Model) -> nn.Module:
    model.layers[0].forward = torch.compile(model.layers[0].forward, backend=BACKEND)
    model.middle.forward = torch.compile(model.middle.forward, backend=BACKEND)
    return model


def disabled(model: Model) -> nn.Module:
    model.layers[0].forward = torch.compiler.disable(model.layers[0].forward)
    return whole(model)


def everything(model: Model) -> nn.Module:
    return whole(in_place(layers(inner(model))))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


WAYS = [whole, in_place, inner, layers, layers_in_place, forwards, disabled, everything]


@pytest.mark.parametrize("way", WAYS)
def test_what_was_compiled_is_traced(way: Callable[[Model], nn.Module]) -> None:
    torch.manual_seed(0)
    plain = Model().eval()
    expected = plain(X)
    expected_chain = trace_subgraphs(plain, {"x": X}, ["Layer"])
    compiled = way(plain)
    before = [(module, dict(vars(module)), dict(module._modules)) for module in compiled.modules()]
    chain = trace_subgraphs(compiled, {"x": X}, ["Layer"])
    assert [step.code.source for step in chain] == [step.code.source for step in expected_chain]
    assert [(module, dict(vars(module)), dict(module._modules)) for module in compiled.modules()] == before
    for model in (compiled, plain):
        assert torch.equal(run_chain(chain, model, {"x": X})["output"], expected)
    assert [type(module).__name__ for step in chain for module in step.submodules(compiled, recurse=False)] == [
        type(plain.get_submodule(name)).__name__.replace("OptimizedModule", "Layer")
        for step in expected_chain
        for name in step.code.submodules
    ]
    assert torch.equal(compiled(X), expected)
