"""Loops over a symbolic size: which are recorded as loops, and that all others are left to the model's code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from seqbuild.trace.model import TraceOptions, trace_model
from tests.seqbuild.test_inside_layers import Layer, check
from tests.seqbuild.toys import WIDTH
from tests.tiny_models import assert_same, randomize, run_chain, run_model


class Scan(nn.Module):
    """A state that goes from turn to turn, and a list of what is made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros_like(x[:, 0])
        outputs = []
        for index in range(x.shape[1]):
            state = state * self.decay + x[:, index]
            outputs.append(torch.tanh(state))
        return torch.stack(outputs, dim=1) + state[:, None] * self.decay


class Written(nn.Module):
    """Results are written into a tensor, at indices of several forms."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, total = torch.zeros_like(x), x[..., 0, :] * 0
        other = torch.zeros_like(x)
        for step in range(x.shape[1]):
            total = total + x[..., step, :2].repeat(1, 2)
            out[:, step] = total
            out[:, step, 1:] += x[:, step, None, 1:][:, 0]
            other[:, step, 0] = 0.1
        return out + other


class Blocks(nn.Module):
    """Padding, blocks, and two loops, one of them inside of the other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        padding = (2 - length % 2) % 2
        blocks = nn.functional.pad(x, (0, 0, 0, padding)).reshape(x.shape[0], -1, 2, WIDTH)
        state = torch.zeros_like(x[:, 0])
        kept = []
        for index in range((length + padding) // 2):
            for inner in range(x.shape[0]):
                state = state + blocks[:, index].sum(dim=1) * x[inner, 0]
            kept.append(state[:, None].expand(-1, 2, -1))
        out = torch.cat(kept, dim=1)
        return out[:, :length]


class Promoted(nn.Module):
    """The state is of another dtype before the first turn."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros_like(x[:, 0])
        for index in range(x.shape[1]):
            state = state + x[:, index].double()
        return x + state[:, None].to(x.dtype)


@pytest.mark.parametrize("part", [Scan, Written, Blocks, Promoted])
def test_a_loop_is_recorded_as_a_loop(part: type[nn.Module]) -> None:
    code = check(part)
    assert code.count("    for ") == (2 if part is Blocks else 1)


def test_code_of_a_loop_is_as_one_would_write_it() -> None:
    code = check(Scan)
    assert "    outputs = []\n" in code
    assert "    for index in range(sym_size_int" in code
    assert "        outputs.append(tanh)\n" in code
    assert code.index('self.get_parameter("layers.0.part.decay")') < code.index("for index")


class First(nn.Module):
    """One turn is not like the others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros_like(x[:, 0])
        for index in range(x.shape[1]):
            state = x[:, index] * 2 if index == 0 else state + x[:, index]
        return x + state[:, None]


class Late(nn.Module):
    """Likewise, for a turn that the sample does not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros_like(x[:, 0])
        for index in range(x.shape[1]):
            if index > 6:
                state = state * 2
            state = state + x[:, index]
        return x + state[:, None]


class Counting(nn.Module):
    """A number that changes from turn to turn."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state, factor = torch.zeros_like(x[:, 0]), 1
        for index in range(x.shape[1]):
            state = state + x[:, index] * factor
            factor = factor + 1
        return x + state[:, None]


class Swapping(nn.Module):
    """What one variable was goes into another one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = torch.zeros_like(x[:, 0]), torch.ones_like(x[:, 0])
        for index in range(x.shape[1]):
            one, other = other, one + x[:, index]
        return x + (one - other * 2)[:, None]


class Aliased(nn.Module):
    """What a variable was in the beginning has another name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = x[:, 0] + 1
        state = start
        for index in range(x.shape[1]):
            state = state * 0.5 + start * x[:, index]
        return x + state[:, None]


class Hidden(nn.Module):
    """Likewise, where no look at the function shows it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = self.start = x[:, 0] + 1
        for index in range(x.shape[1]):
            state = state * 0.5 + self.start * x[:, index]
        return x + state[:, None]


class Inside(nn.Module):
    """A state that no name of the function shows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state = torch.zeros_like(x[:, 0])
        total = torch.zeros_like(x[:, 0])
        for index in range(x.shape[1]):
            total = total + self.step(x[:, index])
        return x + total[:, None]

    def step(self, x: torch.Tensor) -> torch.Tensor:
        self.state = self.state * 0.5 + x
        return self.state


class Last(nn.Module):
    """A value of the last turn is used behind the loop."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x[:, 0])
        for index in range(x.shape[1]):
            last = x[:, index] * 2
            total = total + last
        return x + (total - last)[:, None]


class Index(nn.Module):
    """The number of the last turn is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x[:, 0])
        for index in range(x.shape[1]):
            total = total + x[:, index]
        return x + (total * (index + 1))[:, None]


class Broken(nn.Module):
    """The loop ends early, after as many turns as there are in no sample."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x[:, 0])
        for index in range(x.shape[1]):
            total = total + x[:, index]
            if index > 2:
                break
        return x + total[:, None]


class Comprehension(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[:, index] * 2 for index in range(x.shape[1])], dim=1)


class Listed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in list(range(x.shape[1])):
            x = x + x[:, index, None] * 0.5
        return x


class Counted(nn.Module):
    """Somebody asks how long the list is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = []
        for index in range(x.shape[1]):
            outputs.append(x[:, index])
        return torch.stack(outputs, dim=1) * len(outputs)


class Growing(nn.Module):
    """The state gets larger with every turn."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = x[:, :1]
        for index in range(x.shape[1]):
            state = torch.cat([state, x[:, index, None]], dim=1)
        return x + state.sum(dim=1, keepdim=True)


@pytest.mark.parametrize(
    "part",
    [
        First,
        Late,
        Counting,
        Swapping,
        Aliased,
        Hidden,
        Inside,
        Last,
        Index,
        Growing,
        Broken,
        Comprehension,
        Listed,
        Counted,
    ],
)
def test_what_is_no_such_loop_is_left_to_the_models_code(part: type[nn.Module]) -> None:
    assert "    for " not in check(part, portable=False)


class Text(nn.Module):
    """Tokens, in blocks of so many that the usual sample is a single one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, WIDTH)
        self.layers = nn.ModuleList([Layer(Chunked()), Layer(Chunked())])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


class Chunked(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        padding = (16 - length % 16) % 16
        blocks = nn.functional.pad(x, (0, 0, 0, padding)).reshape(batch, -1, 16, WIDTH)
        state, out = torch.zeros_like(x[:, :1]), torch.zeros_like(blocks)
        for index in range((length + padding) // 16):
            out[:, index] = blocks[:, index].cumsum(dim=1) + state
            state = out[:, index, -1:] * 0.5
        return out.reshape(batch, -1, WIDTH)[:, :length]


def test_a_sample_that_is_too_short_for_a_loop_is_made_longer() -> None:
    model = randomize(Text()).eval()
    sample = {"input_ids": torch.zeros(3, 7, dtype=torch.int64)}
    options: dict[str, Any] = {"leaves": "linear", "is_batch_only": False, "may_ignore": lambda function: True}
    trace = trace_model(model, sample, ["Layer"], TraceOptions(**options))
    assert not trace.auto_ignore
    assert "for index in range(" in trace.subgraphs[0].code.source
    for length in (2, 7, 16, 17, 40):
        inputs = {"input_ids": torch.arange(2 * length).reshape(2, length) % 8}
        assert_same(run_chain(trace.subgraphs, model, inputs), run_model(model, inputs))
