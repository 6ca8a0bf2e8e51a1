"""Code that decides by one size in particular: no sample has it, and whoever has it may not get another's result."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from runtime.artifact.size_expressions import holds
from seqbuild.manifest import describe
from seqbuild.trace.model import Trace, TraceOptions, trace_model
from tests.seqbuild.toys import WIDTH, Toy
from tests.sweep import sweep
from tests.tiny_models import assert_same, randomize, run_chain, run_model

Decides = Callable[[int, int], bool]
RARE: dict[str, tuple[Decides, tuple[int, int]]] = {
    "one length": (lambda batch, length: length == 6, (2, 6)),
    "another length": (lambda batch, length: length != 6, (2, 6)),
    "two lengths": (lambda batch, length: length in (8, 6), (1, 8)),
    "a remainder": (lambda batch, length: length % 100 == 50, (1, 150)),
    "a remainder's half": (lambda batch, length: (length % 12) // 6 == 1, (3, 20)),
    "rounded up": (lambda batch, length: -(-length // 25) == 2, (1, 50)),
    "a product": (lambda batch, length: batch * length == 12, (3, 4)),
    "a sum": (lambda batch, length: batch + length == 4, (1, 3)),
    "a square": (lambda batch, length: batch == length, (3, 3)),
    "a line": (lambda batch, length: length == 3 * batch + 1, (3, 10)),
    "one token": (lambda batch, length: length == 1, (2, 1)),
    "more than one token": (lambda batch, length: length > 1, (2, 1)),
    "one row": (lambda batch, length: batch == 1, (1, 5)),
    "a single number": (lambda batch, length: batch * length == 1, (1, 1)),
}
SHAPES = ((2, 5), (1, 5), (2, 12), (3, 5), (4, 5), (2, 13))


class Part(nn.Module):
    """Doubles what comes in some sizes."""

    def __init__(self, decides: Decides) -> None:
        super().__init__()
        self.decides = decides

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if self.decides(x.shape[0], x.shape[1]) else x


class InGlue(Toy):
    def __init__(self, decides: Decides) -> None:
        super().__init__()
        self.decides = decides

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if self.decides(x.shape[0], x.shape[1]) else x


class Layer(nn.Module):
    def __init__(self, decides: Decides) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.part = Part(decides)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.part(self.linear(x))
        return out


class InLayers(nn.Module):
    def __init__(self, decides: Decides) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(decides), Layer(decides)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Stated:
    """What an artifact says of the shapes that it takes."""

    def __init__(self, trace: Trace) -> None:
        symbols = describe.Symbols(trace, None)
        (self.shape,) = (entry.shape for entry in describe.describe_inputs(trace, symbols))
        self.dims = {entry.name: entry for entry in symbols.dims()}
        self.conditions = symbols.conditions()

    def takes(self, *sizes: int) -> bool:
        named = {name: size for name, size in zip(self.shape, sizes, strict=False) if isinstance(name, str)}
        is_in_range = all(
            self.dims[name].min <= size <= (math.inf if self.dims[name].max < 0 else self.dims[name].max)
            for name, size in named.items()
        )
        return is_in_range and all(holds(condition, named) for condition in self.conditions)


@pytest.mark.parametrize(
    ("kind", "leaves"),
    sweep(
        [(InGlue, "target"), (InGlue, "linear"), (InLayers, "target"), (InLayers, "linear")],
        (InGlue, "target"),
        (InLayers, "linear"),
    ),
)
@pytest.mark.parametrize("case", RARE)
def test_what_is_taken_is_the_models(case: str, kind: Any, leaves: str) -> None:
    decides, rare = RARE[case]
    model = randomize(kind(decides)).eval()
    options: dict[str, Any] = {"may_ignore": lambda function: True, "leaves": leaves, "is_batch_only": False}
    trace = trace_model(model, {"x": torch.zeros(2, 5, WIDTH)}, ["Layer"], TraceOptions(**options))
    stated = Stated(trace)
    num_taken = 0
    for batch, length in (*SHAPES, rare):
        if not stated.takes(batch, length):
            continue
        num_taken += 1
        x = torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(length))
        assert_same(run_chain(trace.subgraphs, model, {"x": x.clone()}), run_model(model, {"x": x.clone()}))
    assert num_taken >= len(SHAPES) - 1  # who asks for one row is not given one row
    assert stated.takes(2, 5)
