"""What the tracer does by itself about code that it cannot record."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from runtime.errors import DataError, TraceError
from seqbuild import Subgraph, trace_subgraphs
from tests.seqbuild import toys
from tests.tiny_models import assert_same, randomize, run_chain, run_model

X = torch.zeros(2, 5, toys.WIDTH)


def values(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, length, toys.WIDTH, generator=torch.Generator().manual_seed(seed))


def trace(model: nn.Module, **inputs: Any) -> list[Subgraph]:
    return trace_subgraphs(model, inputs or {"x": X}, ["Layer"])


def check(model: nn.Module) -> list[Subgraph]:
    """Trace, and compare in three sizes."""
    randomize(model).eval()
    subgraphs = trace(model)
    for seed, (batch, length) in enumerate(((2, 5), (1, 7), (4, 3))):
        x = values(batch, length, seed)
        assert_same(run_chain(subgraphs, model, {"x": x.clone()}), run_model(model, {"x": x.clone()}))
    return subgraphs


def opaque(subgraphs: list[Subgraph]) -> list[str]:
    return [path for subgraph in subgraphs for path in subgraph.code.opaque]


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (toys.Branches, "spread"),
        (toys.BranchesInMethod, "Branching.choose"),
        (toys.NumberFromData, "largest"),
        (toys.RowLoop, "RowLoop.glue"),
    ],
)
def test_the_innermost_function_becomes_one_step(make: type[nn.Module], path: str) -> None:
    assert opaque(check(make())) == [f"tests.seqbuild.toys:{path}"]


def test_a_function_that_calls_a_target_does_not() -> None:
    class Outer(toys.Toy):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[1](self.decide(x))

        def decide(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layers[0](x)
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match="branches on data"):
        trace(Outer())


def pieces(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As many tensors as there are rows with a positive first number, and one."""
    count = int((x[:, 0, 0] > 0).sum().item())
    return tuple(x * (index + 1) for index in range(count + 1))


class Pieces(toys.Toy):
    def glue(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.cat(pieces(x), dim=0).sum()


def test_a_sequence_of_unknown_length_is_joined() -> None:
    subgraphs = check(Pieces())
    assert "torch.ops.aten.cat.default(pieces, 0)" in "".join(subgraph.code.source for subgraph in subgraphs)


class Filling(nn.Module):
    """A layer that keeps something for later ones in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = toys.Layer()

    def forward(self, x: torch.Tensor, shared: dict[str, torch.Tensor]) -> torch.Tensor:
        if "first" not in shared:
            shared["first"] = x * 2
        return self.layer(x) + shared["first"]


class Shares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Filling(), Filling(), Filling()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared: dict[str, torch.Tensor] = {}
        for layer in self.layers:
            x = layer(x, shared)
        return x


def test_a_dictionary_that_layers_fill_goes_from_one_to_the_next() -> None:
    model = randomize(Shares()).eval()
    subgraphs = trace_subgraphs(model, {"x": X}, ["Filling"])
    assert len(subgraphs) == 3
    x = values(3, 4)
    assert_same(run_chain(subgraphs, model, {"x": x}), run_model(model, {"x": x}))


class Asserts(toys.Toy):
    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        assert lengths.max().item() <= x.shape[1]
        return self.layers[1](self.layers[0](x))


def test_what_the_model_refuses_the_chain_refuses() -> None:
    model = randomize(Asserts()).eval()
    subgraphs = trace(model, x=X, lengths=torch.tensor([3, 4]))
    inputs = {"x": values(3, 6), "lengths": torch.tensor([6, 1, 2])}
    assert_same(run_chain(subgraphs, model, inputs), run_model(model, inputs))
    with pytest.raises(DataError, match="violates an assumption made when the model was traced"):
        run_chain(subgraphs, model, inputs | {"lengths": torch.tensor([7, 1, 2])})


class Vmapped(toys.Toy):
    def glue(self, x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(lambda row: row * row.sum(), in_dims=0)(x)


def test_vmap_is_recorded() -> None:
    assert opaque(check(Vmapped())) == []


class Switching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = toys.Layer()
        self.factor = 1.0

    def switch(self, factor: float) -> None:
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.factor


class Switches(nn.Module):
    """The model sets an attribute of its layer, which a chain on a fresh model must do as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Switching()
        self.second = Switching()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.second.switch(3.0)
        return self.second(self.first(x))


def test_what_the_model_does_to_its_layers_the_chain_does() -> None:
    subgraphs = trace_subgraphs(Switches(), {"x": X}, ["Switching"])
    assert opaque(subgraphs) == [f"{__name__}:Switching.switch"]
    one, other = (randomize(Switches()).eval() for _ in range(2))
    assert_same(run_chain(subgraphs, one, {"x": values(2, 3)}), run_model(other, {"x": values(2, 3)}))


class Lengths(toys.Toy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, 1)
        first, second = torch.split_with_sizes(torch.cat([rows, x[:, 0]]), [len(rows), len(x)])
        return self.layers[1](self.layers[0](first.unflatten(0, x.shape[:2])) + second[:, None])


def test_the_length_of_a_tensor_is_a_symbol() -> None:
    check(Lengths())
    assert "len" not in globals()


class Remembering(nn.Module):
    """Attention's part in a cache: a layer adds what it is given, and reads all that is there."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.linear = nn.Linear(toys.WIDTH, toys.WIDTH)

    def forward(self, x: torch.Tensor, cache: Any) -> torch.Tensor:
        if cache is None:
            return torch.tanh(self.linear(x))
        keys, _ = cache.update(x[:, None], x[:, None], self.layer_idx)
        return torch.tanh(self.linear(x)) + keys.sum(dim=(1, 2), keepdim=True)[:, 0]


class TwoStacks(nn.Module):
    """The second stack reads what the first has left in a cache."""

    def __init__(self, *, shares: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Remembering(0), Remembering(1), Remembering(0)])
        self.shares = shares

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cache = DynamicCache()
        x = self.layers[1](self.layers[0](x, cache), cache)
        return self.layers[2](x, cache if self.shares else DynamicCache())


def test_a_cache_that_carries_something_is_refused() -> None:
    trace_subgraphs(TwoStacks(shares=False), {"x": X}, ["Remembering"])
    with pytest.raises(TraceError, match="stored in a cache"):
        trace_subgraphs(TwoStacks(shares=True), {"x": X}, ["Remembering"])


@pytest.mark.parametrize("make", [toys.NumberFromData, toys.DataDependentLeaf, Pieces, toys.BranchesInMethod])
def test_two_samples_of_one_shape_give_the_same_code(make: type[nn.Module]) -> None:
    sources = [[subgraph.code.source for subgraph in trace(make(), x=values(3, 5, seed))] for seed in (1, 2, 3)]
    assert sources[0] == sources[1] == sources[2]
