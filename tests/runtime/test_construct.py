"""Module trees without memory for weights."""

from __future__ import annotations

import torch
from torch import nn

from runtime.construct import without_weights


class Experts(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(number, 8, 8))
        self.scale = nn.Parameter(torch.ones(number))
        self.linear = nn.Linear(number, 4)
        self.register_buffer("table", torch.arange(3.0))
        self.plain = torch.zeros(2)


def test_parameters_of_any_size_take_no_memory() -> None:
    with without_weights():
        small, large = Experts(2), Experts(2**40)  # half a petabyte
    for experts, number in ((small, 2), (large, 2**40)):
        assert all(parameter.is_meta for parameter in experts.parameters())
        assert experts.weight.shape == (number, 8, 8)
        assert experts.linear.weight.shape == (4, number)
        assert experts.table.tolist() == [0.0, 1.0, 2.0]
        assert experts.plain.tolist() == [0.0, 0.0]


def test_everything_is_as_before_afterwards() -> None:
    with without_weights():
        pass
    assert not torch.empty(2**25).is_meta
    assert not nn.Linear(2, 2).weight.is_meta
