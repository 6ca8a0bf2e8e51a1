"""Module trees without memory for weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from runtime.model.weightless import from_config, without_weights


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


class _Mixed:
    """A model of which a part has no SDPA: transformers refuses that for all, and chooses well by itself."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def _from_config(cls, config: Any, *, dtype: torch.dtype, attn_implementation: str | None) -> _Mixed:
        config._attn_implementation = attn_implementation or config.usual
        if attn_implementation == "sdpa":
            raise ValueError("VisionModel does not support an attention implementation through SDPA yet")
        return cls(config)


def test_parts_keep_the_attention_that_they_have() -> None:
    config = SimpleNamespace(usual="sdpa")
    for attention in ("sdpa", "eager", None):
        model = from_config(_Mixed, config, dtype=torch.float32, attention=attention)
        assert model.config._attn_implementation == (attention or "sdpa")
    with pytest.raises(ValueError, match="does not support"):
        from_config(_Mixed, SimpleNamespace(usual="eager"), dtype=torch.float32, attention="sdpa")
