"""What is recorded inside of layers, when they are traced through: code that calculates with sizes."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import nn

from seqbuild.trace.model import Trace, TraceOptions, trace_model
from tests.seqbuild.toys import WIDTH
from tests.tiny_models import assert_same, randomize, run_chain, run_model

SHAPES = ((2, 5), (1, 7), (4, 3), (3, 8), (2, 16), (1, 2))


class Layer(nn.Module):
    """A layer with an inner part, so that the part can be foreign."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.part(self.linear(x))
        return out


class Model(nn.Module):
    """Two layers of one kind."""

    def __init__(self, part: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(part()), Layer(part())])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def traced(model: nn.Module, **options: Any) -> Trace:
    sample = {"x": torch.zeros(2, 5, WIDTH)}
    options = {"leaves": "linear", "is_batch_only": False, **options}
    return trace_model(model, sample, ["Layer"], TraceOptions(may_ignore=lambda function: True, **options))


def is_portable(trace: Trace) -> bool:
    calls = [str(node.target) for node in trace.graph.find_nodes(op="call_module")]
    return all(name.endswith("linear") for name in calls) and not trace.auto_ignore


def check(part: type[nn.Module], *, portable: bool = True) -> str:
    """Trace, compare with the model in many sizes, and return the first layer's code."""
    model = randomize(Model(part)).eval()
    trace = traced(model)
    assert is_portable(trace) is portable
    for batch, length in SHAPES:
        x = torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(length))
        assert_same(run_chain(trace.subgraphs, model, {"x": x.clone()}), run_model(model, {"x": x.clone()}))
    return trace.subgraphs[0].code.source


class Smallest(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best = x.topk(min(4, x.shape[1]), dim=1).values
        return x + best.sum(dim=1, keepdim=True) * max(1, x.shape[1] - 4, 3)


def test_the_smaller_and_the_larger_of_sizes_are_calculated() -> None:
    code = check(Smallest)
    assert code.count("torch.sym_min(") == 1
    assert code.count("torch.sym_max(") == 2


class Least(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        widths = [min([3, 2]), max(4, 2, key=lambda size: -size), min(2.5, 3)]
        return x * sum(widths)


def test_other_uses_of_min_and_max_are_pythons() -> None:
    check(Least)


@pytest.mark.parametrize("part", [Smallest, Least])
def test_nothing_is_left_in_the_modules_of_the_code(part: type[nn.Module]) -> None:
    traced(randomize(Model(part)).eval())
    namespace = vars(sys.modules[__name__])
    assert not [name for name in ("min", "max", "range") if name in namespace]


class Padded(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        padding = (4 - length % 4) % 4
        sums = nn.functional.pad(x, (0, 0, 0, padding)).reshape(x.shape[0], -1, 4, WIDTH).cumsum(dim=2)
        out = sums.reshape(x.shape[0], -1, WIDTH)
        if padding > 0:
            out = out[:, :length]
        return out


def test_a_decision_that_makes_no_difference_is_proven_to_make_none() -> None:
    check(Padded)


class Doubled(nn.Module):
    """What it decides does make a difference, if only for some sizes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > 3:
            x = x * 2
        return x


class Rounded(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] % 8 != 0:
            x = x + 1
        return x


class Wider(nn.Module):
    """The values are the same, and the shape is not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > 7:
            x = torch.cat([x, x], dim=1)
        return x[:, : x.shape[1]] if x.shape[1] > 7 else x


@pytest.mark.parametrize("part", [Doubled, Rounded, Wider])
def test_a_decision_that_makes_a_difference_is_left_to_the_models_code(part: type[nn.Module]) -> None:
    check(part, portable=False)


class OneLength(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != 5:
            raise ValueError("the length must be five")
        return x * 2


class SquareOnly(nn.Module):
    """Patches along both axes, as in a vision tower, and a position for each: other lengths have other counts."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2, 2, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = x[:, 1:].reshape(x.shape[0], -1, 2, WIDTH)
        side = int((patches.shape[1] * 2) ** 0.5)
        return (patches + self.table).reshape(x.shape[0], side, side, WIDTH).sum(dim=2) + x[:, :1]


@pytest.mark.parametrize("part", [OneLength, SquareOnly])
def test_a_size_that_the_model_insists_on_is_no_assumption(part: type[nn.Module]) -> None:
    model = randomize(OfOneLayer(part)).eval()
    trace = traced(model, is_batch_only=True)
    assert is_portable(trace)
    for batch in (1, 2, 4):
        x = torch.randn(batch, 5, WIDTH, generator=torch.Generator().manual_seed(batch))
        assert_same(run_chain(trace.subgraphs, model, {"x": x.clone()}), run_model(model, {"x": x.clone()}))


class OfOneLayer(nn.Module):
    def __init__(self, part: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(part())])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)  # type: ignore[no-any-return]


class AtOneLength(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[1] == 5 else x


class NotAtSomeLengths(nn.Module):
    """Some other lengths are refused, but not all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] == 5:
            return x * 2
        if x.shape[1] > 6:
            raise ValueError("too long")
        return x


@pytest.mark.parametrize("part", [AtOneLength, NotAtSomeLengths])
def test_a_size_that_makes_a_difference_is_not_insisted_on(part: type[nn.Module]) -> None:
    model = randomize(OfOneLayer(part)).eval()
    trace = traced(model, is_batch_only=True)
    assert not is_portable(trace)
    for length in (5, 6, 2):
        x = torch.randn(3, length, WIDTH, generator=torch.Generator().manual_seed(length))
        assert_same(run_chain(trace.subgraphs, model, {"x": x.clone()}), run_model(model, {"x": x.clone()}))


class Asked(nn.Module):
    """The same decision twice: harmless inside, where it is proven, and not so outside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Padded()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        if (4 - x.shape[1] % 4) % 4 > 0:
            x = -x
        return x


def test_what_is_proven_for_one_module_is_not_taken_for_granted_by_another() -> None:
    check(Asked, portable=False)


class ByAnotherWay(nn.Module):
    """A value that was not compared leaves the part that calculates it."""

    class Inner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept = x * 2 if x.shape[1] > 3 else x
            return x + 1

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        kept: torch.Tensor = self.inner.kept
        return x + kept


def test_only_what_was_compared_counts() -> None:
    check(ByAnotherWay, portable=False)


class Quantile(nn.Module):
    """Torch checks the numbers of a distribution: a decision by values that the code itself states."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cutoff = torch.distributions.normal.Normal(0, 1).icdf(torch.tensor(0.9, dtype=torch.float32))
        return torch.relu(x - cutoff.type(x.dtype))


class Stated(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if bool(torch.tensor([1, 3], dtype=torch.int64).sum() == 5) else x * 3


@pytest.mark.parametrize("part", [Quantile, Stated])
def test_decisions_by_numbers_of_the_code_are_known(part: type[nn.Module]) -> None:
    assert "require" not in check(part)


class InBlocks(nn.Module):
    """Sizes are divided as floats, and rounded."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * math.ceil(x.shape[1] / 4) + math.floor(x.shape[1] / 3)


class Cut(nn.Module):
    """A size is divided as a float and made whole by `int`, which is asked for as well."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = int((x.shape[1] + 3) / 2)
        assert isinstance(3, int) and not isinstance(x, int)
        return x + x[:, :length].sum(dim=1, keepdim=True) * int(2.5)


@pytest.mark.parametrize("part", [InBlocks, Cut])
def test_sizes_are_rounded(part: type[nn.Module]) -> None:
    check(part)


class Rewritten(nn.Module):
    """The number is written over by one that is not the code's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        total.add_(x.sum().abs() + 1)
        return x * 2 if bool(total > 0) else x * 3


class Rounded16(nn.Module):
    """A number in the dtype of the weights is another one in another run."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if bool(torch.full((), 1.001, dtype=x.dtype) == 1) else x * 3


class Random(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if bool(torch.rand(()) < 2) else x * 3


@pytest.mark.parametrize("part", [Rewritten, Random])
def test_decisions_by_other_numbers_are_not(part: type[nn.Module]) -> None:
    check(part, portable=False)


def test_a_number_in_the_dtype_of_the_weights_is_not_known() -> None:
    model = randomize(Model(Rounded16)).eval()
    sample = {"x": torch.zeros(2, 5, WIDTH, dtype=torch.bfloat16)}
    options: dict[str, Any] = {"leaves": "linear", "dtype": torch.bfloat16, "may_ignore": lambda function: True}
    assert not is_portable(trace_model(model, sample, ["Layer"], TraceOptions(**options)))


class TwoInputs(nn.Module):
    """A mask of the same length: other lengths of one of the two alone would be refused by any model."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            x = self.linear(x) * mask.unsqueeze(2)
            return x * 2 if x.shape[1] == 5 else x

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([TwoInputs.Part()])

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x, mask)  # type: ignore[no-any-return]


def test_sizes_that_belong_together_change_together() -> None:
    model = randomize(TwoInputs()).eval()
    sample = {"x": torch.zeros(2, 5, WIDTH), "mask": torch.zeros(2, 5)}
    options: Any = {"leaves": "linear", "is_batch_only": True}
    trace = trace_model(model, sample, ["Part"], TraceOptions(may_ignore=lambda function: True, **options))
    assert not is_portable(trace)
    for length in (5, 3, 8):
        generator = torch.Generator().manual_seed(length)
        inputs = {"x": torch.randn(2, length, WIDTH, generator=generator), "mask": torch.ones(2, length)}
        assert_same(run_chain(trace.subgraphs, model, dict(inputs)), run_model(model, dict(inputs)))
