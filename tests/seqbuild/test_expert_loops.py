"""Experts of a class that nothing marks: known by what their forward does, and refused where it differs by expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import MixtralConfig

from runtime.language.program import compile_program
from runtime.model.leaves import build_leaf
from seqbuild.trace.experts.learn import experts_leaf, is_experts
from seqbuild.trace.experts.loop import ExpertLoop, analyze_loop
from seqbuild.trace.experts.signature import signature

NUM_EXPERTS, WIDTH, NARROW = 3, 8, 4


class Looping(nn.Module):
    """A loop over experts, with places where it can be bent."""

    num_classes, num_rows = NUM_EXPERTS, NUM_EXPERTS

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = WIDTH
        self.up = nn.Parameter(torch.randn(self.num_rows, NARROW, WIDTH))
        self.down = nn.Parameter(torch.randn(self.num_rows, WIDTH, NARROW))

    def forward(self, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(states)
        mask = F.one_hot(index, num_classes=self.num_classes).permute(2, 1, 0)
        for number in mask.sum(dim=(-1, -2)).nonzero().flatten().tolist():
            places, tokens = self.chosen(*torch.where(mask[number]))
            self.before(total, states, tokens)
            output = self.weighted(number, states, weights, places, tokens)
            total.index_add_(0, tokens, output)
        return self.after(total)

    def chosen(self, places: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return places, tokens

    def before(self, total: torch.Tensor, states: torch.Tensor, tokens: torch.Tensor) -> None:
        pass

    def weighted(self, number: int, states: Any, weights: Any, places: Any, tokens: Any) -> torch.Tensor:
        return self.one(number, states[tokens]) * weights[tokens, places, None]

    def one(self, number: int, states: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.relu(F.linear(states, self.up[number])), self.down[number])

    def after(self, total: torch.Tensor) -> torch.Tensor:
        return total


class Idle(Looping):
    """Two more experts, that hand on their tokens."""

    num_classes = NUM_EXPERTS + 2

    def one(self, number: int, states: torch.Tensor) -> torch.Tensor:
        return super().one(number, states) if number < NUM_EXPERTS else states


class Flat(Looping):
    """All rows of all experts in one axis, and tokens in two."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(NUM_EXPERTS * NARROW, WIDTH))
        self.down = nn.Parameter(torch.randn(NUM_EXPERTS * NARROW, WIDTH))

    def one(self, number: int, states: torch.Tensor) -> torch.Tensor:
        up, down = (matrix.view(-1, NARROW, WIDTH)[number] for matrix in (self.up, self.down))
        return torch.relu(states @ up.T) @ down

    def forward(self, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = states.reshape(-1, WIDTH)
        total = torch.zeros_like(rows)
        mask = F.one_hot(index, num_classes=self.num_classes).permute(2, 1, 0)
        for number in mask.sum(dim=(-1, -2)).nonzero().flatten().tolist():
            places, tokens = torch.where(mask[number])
            total.index_add_(0, tokens, self.one(number, rows[tokens]) * weights[tokens, places, None])
        return total.view(states.shape[0], -1, WIDTH)


def host_module(experts: nn.Module) -> nn.Module:
    """What a host builds for these experts, with their weights."""
    found = experts_leaf(experts)
    assert found is not None
    kind, code = found
    program = compile_program(code.source, "leaf.py")
    shapes = {name: tuple(parameter.shape) for name, parameter in experts.named_parameters()}
    module = build_leaf(kind, "experts", shapes, program)
    module.load_state_dict(experts.state_dict(), assign=True)
    return module


@pytest.mark.parametrize(
    ("kind", "loop", "shape"),
    [
        (Looping, ExpertLoop(num_experts=NUM_EXPERTS), (7,)),
        (Idle, ExpertLoop(num_experts=NUM_EXPERTS, num_identity=2), (7,)),
        (Flat, ExpertLoop(num_experts=NUM_EXPERTS, num_dims=3), (3, 5)),
    ],
)
def test_what_is_known_does_the_same(kind: type[Looping], loop: ExpertLoop, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    experts = kind()
    assert is_experts(experts)
    assert analyze_loop(experts, WIDTH) == loop
    states, num_tokens = torch.randn(*shape, WIDTH), torch.Size(shape).numel()
    index = torch.stack([torch.randperm(experts.num_classes)[:2] for _ in range(num_tokens)])
    weights = torch.rand(num_tokens, 2)
    with torch.no_grad():
        assert torch.equal(host_module(experts)(states, index, weights), experts(states, index, weights))


class OneOfThem(Looping):
    def one(self, number: int, states: torch.Tensor) -> torch.Tensor:
        return super().one(number, states) * (2 if number == NUM_EXPERTS - 1 else 1)


class AnothersMatrix(Looping):
    def one(self, number: int, states: torch.Tensor) -> torch.Tensor:
        return super().one((number + 1) % NUM_EXPERTS, states)


class LastMatrixForLast(Looping):
    def one(self, number: int, states: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.relu(F.linear(states, self.up[number])), self.down[min(number, 1)])


class More(Looping):
    def after(self, total: torch.Tensor) -> torch.Tensor:
        return total * 2


class Turned(Looping):
    def after(self, total: torch.Tensor) -> torch.Tensor:
        return total.flip(0)


class InPlace(Looping):
    def after(self, total: torch.Tensor) -> torch.Tensor:
        total.mul_(2)
        return total


class IdleDoubled(Idle):
    def one(self, number: int, states: torch.Tensor) -> torch.Tensor:
        return super().one(number, states) * (1 if number < NUM_EXPERTS else 2)


class IdleFirst(Idle):
    num_classes, num_rows = NUM_EXPERTS + 1, NUM_EXPERTS + 1

    def one(self, number: int, states: torch.Tensor) -> torch.Tensor:
        return Looping.one(self, number, states) if number else states


class Remembering(Looping):
    def one(self, number: int, states: torch.Tensor) -> torch.Tensor:
        self.last = super().one(number, states) + (self.last[:1] if number else 0)
        return self.last


class Capacity(Looping):
    def chosen(self, places: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return places[:8], tokens[:8]


class Decaying(Looping):
    def before(self, total: torch.Tensor, states: torch.Tensor, tokens: torch.Tensor) -> None:
        total.mul_(0.5)


class Twice(Looping):
    def before(self, total: torch.Tensor, states: torch.Tensor, tokens: torch.Tensor) -> None:
        total.index_add_(0, tokens, states[tokens])


class AllWeights(Looping):
    def weighted(self, number: int, states: Any, weights: Any, places: Any, tokens: Any) -> torch.Tensor:
        return self.one(number, states[tokens]) * weights[tokens].sum(-1, keepdim=True)


class FirstWeight(Looping):
    def weighted(self, number: int, states: Any, weights: Any, places: Any, tokens: Any) -> torch.Tensor:
        return self.one(number, states[tokens]) * weights[:, :1][tokens]


class NumberOfPlaces(Looping):
    def weighted(self, number: int, states: Any, weights: Any, places: Any, tokens: Any) -> torch.Tensor:
        return super().weighted(number, states, weights, places, tokens) / weights.shape[1]


class ByPlace(Looping):
    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.rand(NUM_EXPERTS, WIDTH))

    def weighted(self, number: int, states: Any, weights: Any, places: Any, tokens: Any) -> torch.Tensor:
        return super().weighted(number, states, weights, places, tokens) * self.gains[places]


class MeanOfAll(Looping):
    def weighted(self, number: int, states: Any, weights: Any, places: Any, tokens: Any) -> torch.Tensor:
        return super().weighted(number, states, weights, places, tokens) * states.mean()


class Writing(Looping):
    def weighted(self, number: int, states: Any, weights: Any, places: Any, tokens: Any) -> torch.Tensor:
        output = super().weighted(number, states, weights, places, tokens)
        states[tokens] = states[tokens] * 0.5
        return output


class Unweighted(Looping):
    def weighted(self, number: int, states: Any, weights: Any, places: Any, tokens: Any) -> torch.Tensor:
        return self.one(number, states[tokens])


class ManyOtherwise(Looping):
    def one(self, number: int, states: torch.Tensor) -> torch.Tensor:
        return super().one(number, states.clamp(-1, 1) if states.shape[0] > 6 else states)


class Reordered(Looping):
    def one(self, number: int, states: torch.Tensor) -> torch.Tensor:
        return super().one(number, states[:, torch.arange(WIDTH - 1, -1, -1)])


class WithBuffer(Looping):
    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.Buffer(torch.tensor([1.0, 2.0, 3.0]))

    def one(self, number: int, states: torch.Tensor) -> torch.Tensor:
        return super().one(number, states) * self.gains[number]


class Overwriting(Looping):
    """Changes its weights, by a function whose name does not tell."""

    def one(self, number: int, states: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.relu(F.linear(states, F.relu(self.up[number], True))), self.down[number])


class FirstOnes(Looping):
    """Whatever is used, the states are those of the first expert's tokens."""

    def one(self, number: int, states: torch.Tensor) -> torch.Tensor:
        kept = self.__dict__.setdefault("kept", [states])
        return super().one(number, kept[0])

    def after(self, total: torch.Tensor) -> torch.Tensor:
        del self.__dict__["kept"]
        return total


class NumberUsed(Looping):
    def forward(self, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(states)
        mask = F.one_hot(index, num_classes=self.num_classes).permute(2, 1, 0)
        used = mask.sum(dim=(-1, -2)).nonzero().flatten().tolist()
        for number in used:
            places, tokens = torch.where(mask[number])
            output = self.one(number, states[tokens]) * weights[tokens, places, None]
            total.index_add_(0, tokens, output / len(used))
        return total


class InAnotherDtype(Looping):
    """What is watched has one dtype: that there is more than it shows, shows when it is executed."""

    def one(self, number: int, states: torch.Tensor) -> torch.Tensor:
        return super().one(number, states) * (2 if states.dtype is torch.float32 else 1)


BENT = [
    *(OneOfThem, AnothersMatrix, LastMatrixForLast, More, Turned, InPlace, IdleDoubled, IdleFirst, Remembering),
    *(Capacity, Decaying, Twice, AllWeights, FirstWeight, NumberOfPlaces, ByPlace, MeanOfAll, Writing, Unweighted),
    *(ManyOtherwise, Reordered, WithBuffer, Overwriting, FirstOnes, NumberUsed, InAnotherDtype),
]


@pytest.mark.parametrize("kind", BENT, ids=lambda kind: kind.__name__)
def test_what_is_not_the_same_for_all_is_no_leaf(kind: type[Looping]) -> None:
    experts = kind()
    assert is_experts(experts)
    before = {name: value.clone() for name, value in experts.state_dict().items()}
    assert experts_leaf(experts) is None
    assert all(torch.equal(value, before[name]) for name, value in experts.state_dict().items())


def test_what_looks_the_same_is_executed() -> None:
    assert analyze_loop(InAnotherDtype(), WIDTH) == ExpertLoop(num_experts=NUM_EXPERTS)
    assert experts_leaf(InAnotherDtype()) is None


def test_experts_of_a_real_size_are_executed_without_their_weights() -> None:
    class Large(Looping):
        def __init__(self) -> None:
            super().__init__()
            self.hidden_size = 1024
            self.up = nn.Parameter(torch.empty(40, 512, 1024, device="meta"))
            self.down = nn.Parameter(torch.empty(40, 1024, 512, device="meta"))

        num_classes = 40

    class Bent(Large):
        def one(self, number: int, states: torch.Tensor) -> torch.Tensor:
            return super().one(number, states) * (2 if states.dtype is torch.float32 else 1)

    assert experts_leaf(Large()) is not None
    assert experts_leaf(Bent()) is None


def test_random_numbers_and_modes_are_left_alone() -> None:
    experts, state = Private(5.0), torch.get_rng_state()
    with FakeTensorMode():
        assert experts_leaf(experts) is not None
    assert torch.equal(torch.get_rng_state(), state)


# What is learned of one module is used for another


class Private(Looping):
    def __init__(self, gain: Any) -> None:
        super().__init__()
        self._gain = gain

    def one(self, number: int, states: torch.Tensor) -> torch.Tensor:
        return super().one(number, states) * self._gain


def test_modules_that_differ_in_private_are_learned_apart() -> None:
    states, index, weights = torch.randn(5, WIDTH), torch.tensor([[0, 1]] * 5), torch.rand(5, 2)
    with torch.no_grad():
        for gain in (1.0, 3.0, 1):
            experts = Private(gain)
            assert torch.equal(host_module(experts)(states, index, weights), experts(states, index, weights))
    assert signature(Private(2.0)) == signature(Private(2.0)) != signature(Private(2))
    assert experts_leaf(Private(2.0)) is experts_leaf(Private(2.0))


def test_configs_are_compared_by_value() -> None:
    first, same, other = (Private(MixtralConfig(num_local_experts=number)) for number in (4, 4, 5))
    before = signature(first)
    assert before is not None
    assert before == signature(same) != signature(other)
    first._gain.num_local_experts = 6
    assert signature(first) != before


def test_what_cannot_be_compared_is_learned_each_time() -> None:
    hooked = Looping()
    hooked.add_module("inner", nn.Identity())
    assert signature(hooked) is not None
    hooked.get_submodule("inner").register_forward_hook(lambda *_: None)
    assert [signature(experts) for experts in (hooked, WithBuffer(), Private(object()))] == [None] * 3


def test_others_are_no_experts() -> None:
    class Other(nn.Module):
        def forward(self, states: Any, index: Any, weights: Any) -> Any:
            return states

    assert not is_experts(Other())
    assert not is_experts(nn.Linear(2, 2))
