"""Experts of a class that nothing marks: known by what their forward does, and refused where it differs by expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from runtime.leaves import build_leaf
from runtime.program import compile_program
from seqbuild.trace.expert_loops import Loop, watched_loop
from seqbuild.trace.experts import experts_leaf, is_experts

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
            places, tokens = torch.where(mask[number])
            output = self.one(number, states[tokens]) * weights[tokens, places, None]
            total.index_add_(0, tokens, output)
        return self.after(total)

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
        (Looping, Loop(num_experts=NUM_EXPERTS), (7,)),
        (Idle, Loop(num_experts=NUM_EXPERTS, num_identity=2), (7,)),
        (Flat, Loop(num_experts=NUM_EXPERTS, num_dims=3), (3, 5)),
    ],
)
def test_what_is_known_does_the_same(kind: type[Looping], loop: Loop, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    experts = kind()
    assert is_experts(experts)
    assert watched_loop(experts, WIDTH) == loop
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


@pytest.mark.parametrize(
    "kind",
    [OneOfThem, AnothersMatrix, LastMatrixForLast, More, Turned, InPlace, IdleDoubled, IdleFirst, Remembering],
    ids=lambda kind: kind.__name__,
)
def test_what_is_not_the_same_for_all_is_no_leaf(kind: type[Looping]) -> None:
    experts = kind()
    assert is_experts(experts)
    assert experts_leaf(experts) is None


def test_others_are_no_experts() -> None:
    class Other(nn.Module):
        def forward(self, states: Any, index: Any, weights: Any) -> Any:
            return states

    assert not is_experts(Other())
    assert not is_experts(nn.Linear(2, 2))
