"""Toy models: each does one thing that a tracer may get wrong. All take `x` of shape [batch, length, 4]."""

from __future__ import annotations

import operator
from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import ModelOutput

WIDTH = 4


class Layer(nn.Module):
    """The sequential target of every toy."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, scale: Any = 1) -> torch.Tensor:
        return torch.tanh(self.linear(x)) * scale


class Toy(nn.Module):
    """Two layers with `glue` between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: torch.Tensor) -> Any:
        x = self.layers[0](x)
        x = self.glue(x)
        return self.layers[1](x)

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Parameters(Toy):
    """Glue that uses a parameter, a buffer, a buffer that is not saved, and another module's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((WIDTH,), 1.5))
        self.register_buffer("offset", torch.arange(float(WIDTH)))
        self.register_buffer("phase", torch.tensor([0.25] * WIDTH), persistent=False)

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.gain + self.offset + self.phase) @ self.layers[1].linear.weight


class PlainTensor(Toy):
    """Glue that uses tensors which are mere attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.tensor([3.0, 1.0, 4.0, 1.0])
        self.other = torch.tensor([1, 0, 2, 3])

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.table.to(x.dtype))[..., self.other] - self.table.to(x.dtype)


class Tied(nn.Module):
    """Uses the weights of a module that it is given, and a part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(WIDTH))
        self.own = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, other: nn.Linear) -> torch.Tensor:
        return self.own(x) @ other.weight + self.bias


class GivesModule(Toy):
    """Glue that calls a leaf with a module, as decoders with tied embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(WIDTH, WIDTH)
        self.head = Tied()

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(x, other=self.embedding)
        return out


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclass
class Plain:
    first: torch.Tensor
    rest: list[torch.Tensor]
    note: str = "a note"


class Output(ModelOutput):
    first: torch.Tensor | None = None
    second: torch.Tensor | None = None


Output = dataclass(Output)  # type: ignore[misc]


class Split(nn.Module):
    """A leaf that returns one of many containers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> Any:
        first, second = x + 1, x * 2
        return {
            "tuple": lambda: (first, None, (second, "text", 3)),
            "list": lambda: [first, [second]],
            "dict": lambda: {"first": first, "second": second},
            "userdict": lambda: UserDict(first=first, second=second),
            "namedtuple": lambda: Pair(first, second),
            "dataclass": lambda: Plain(first, [second]),
            "modeloutput": lambda: Output(first=first, second=second),
        }[self.kind]()


class Containers(Toy):
    """Glue that takes a leaf's container apart."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.split = Split(kind)

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.split(x)
        kind = self.split.kind
        if kind == "tuple":
            first, none, (second, text, three) = parts
            assert none is None
            assert text == "text"
            return first - second * three
        if kind == "list":
            return parts[0] - parts[1][0]
        if kind in ("dict", "userdict"):
            return parts["first"] - parts["second"]
        if kind == "namedtuple":
            assert isinstance(parts, Pair)
            return parts.first - parts.second
        if kind == "dataclass":
            assert parts.note == "a note"
            return parts.first - parts.rest[0]
        return parts.first - parts["second"]


class CalledTwice(nn.Module):
    """One layer, called twice, with glue between the calls, then another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()
        self.last = Layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        x = self.layer(x + 1)
        return self.last(x - 1)


class SharedUnderTwoNames(nn.Module):
    """One layer that is known by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = Layer()
        self.two = Layer()
        self.again = self.one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.two(self.one(x)) + 1)


class HandsThrough(nn.Module):
    """A leaf that hands its input through, and a changed one."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x * 3


class Identity(Toy):
    """Leaves that hand their input through, as dropout does in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.identity = nn.Identity()
        self.through = HandsThrough()

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        same, other = self.through(self.identity(self.dropout(x)))
        return same + self.identity(x) - other


class InPlace(Toy):
    """In-place operations on values, on views of them and through indexing."""

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y += 1
        y[:, 0].mul_(3)
        y[..., 1:3] = x[..., :2]
        z = torch.zeros_like(y)
        z.copy_(y)
        z[z > 1] = 0.1
        return z.add_(y)


class Literals(Toy):
    """Numbers that become tensors, and constructors."""

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        root = torch.tensor(10.0**0.5, dtype=x.dtype, device=x.device)
        steps = torch.tensor([1.0, 2.0, 3.0, 4.0])
        ramp = torch.arange(x.shape[1], device=x.device).unsqueeze(-1)
        thirds = torch.tensor([1 / 3, 2 / 3, 1.1, 0.7], dtype=x.dtype, device=x.device)
        x = x * root + steps.to(x.dtype) + ramp - thirds
        x = x.masked_fill(x > 30, torch.finfo(x.dtype).min).clamp(min=-100)
        return x + torch.ones(1, WIDTH, dtype=x.dtype) * torch.full((), 0.1, dtype=x.dtype)


class Sizes(Toy):
    """Arithmetic on sizes, in shapes and in values."""

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        flat = x.reshape(batch * length, width)
        half = (length + 1) // 2
        x = flat.view(batch, length, width) / length + half % 3 - batch
        x = x * (length**2) + x.numel() / (batch * width)
        return torch.cat([x[:, half:], x[:, :half]], dim=1)


class Nested(nn.Module):
    """An ancestor below the root, which returns a tuple, and glue at both levels."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Toy()
        self.head = nn.Linear(WIDTH, 2)
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.inner(x * self.gain)
        if bias is not None:
            x = x + bias
        return self.head(x) * self.gain, x


def spread(x: torch.Tensor) -> torch.Tensor:
    """What a tracer cannot follow: it decides by a value."""
    if x.sum() > 0:
        return x * 2
    return x - 1


def largest(x: torch.Tensor) -> int:
    """Returns a number that comes from data."""
    return operator.index(x.abs().sum(dim=-1).argmax().item()) + 1


def positive_rows(x: torch.Tensor) -> torch.Tensor:
    """As many rows as the values have it."""
    rows = [row for row in x.flatten(0, 1) if bool((row[0] >= 0).item()) and bool(row.sum() < 1e9)]
    return torch.stack(rows[: int((x.sum() * 0).item()) + x.shape[0] ** 2 + 1])


def as_list(x: torch.Tensor) -> torch.Tensor:
    numbers = x[0, 0].tolist()
    return x + sum(numbers)


class Branches(Toy):
    def glue(self, x: torch.Tensor) -> torch.Tensor:
        return spread(x)


class BranchInForward(Toy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        if x.sum() > 0:
            x = x * 2
        return self.layers[1](x)


class Branching(nn.Module):
    """The same in a method, of a module that is not an ancestor."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def choose(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain if bool((x[0, 0, 0] > 0).item()) else -x


class BranchesInMethod(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.branching = Branching()

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        return self.branching.choose(x)


class NumberFromData(Toy):
    """A number from data is used in glue."""

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        return x * largest(x) + 1


class WholeFromData(Toy):
    """A number from data that `int` makes whole can be recorded."""

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        return x * int(x.abs().sum(dim=-1).argmax().item()) + 1


class ListFromData(Toy):
    """Numbers from data, of which there are as many as the model is wide: they can be recorded."""

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        return as_list(x) * x[0, 0, 0].item()


class RowLoop(Toy):
    """A loop over the batch: it would be recorded with as many rows as the sample has."""

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([row * 2 for row in x])


class PowerOfLength(Toy):
    """A decision by a length which is no condition that an artifact can state."""

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if torch.sym_float(x.shape[1]) ** 1.5 > 4 else x


class SizesWithinSizes(Toy):
    """A length that is calculated in steps of which each uses the one before twice."""

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        for number in range(2, 14):
            length = length // number * 2 + length % number + 2
        return x * 2 if length % 3 else x


class RescalesItself(Toy):
    """Weights that the first forward divides, as transformers' RWKV does."""

    is_rescaled = False

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_rescaled:
            self.layers[1].linear.weight.div_(2)
            self.is_rescaled = True
        return x


class DataDependentLeaf(Toy):
    """A leaf, not an opaque step, that cannot run without values."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf = Loop()

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        return self.leaf(x)[0] + x.shape[1]


class TokensOfABatch(DataDependentLeaf):
    """A leaf that needs values and returns batch and length as one axis."""

    def glue(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.leaf(x)[0]
        return self.flat(tokens).view(x.shape) + self.flat(x).shape[0]

    def __init__(self) -> None:
        super().__init__()
        self.flat = Flat()


class Flat(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(0, 1) * (1 if x[0, 0, 0].item() > 0 else 2)


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = torch.zeros_like(x)
        for row in (x[..., 0] > 0).any(dim=-1).nonzero().flatten().tolist():
            total[row] = self.linear(x[row])
        return total, x.sum(dim=1)
