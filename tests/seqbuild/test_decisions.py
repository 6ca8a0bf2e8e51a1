"""What the tracer makes of decisions by values that no opaque step can take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from runtime.errors import DataError, TraceError
from seqbuild import Subgraph, trace_subgraphs
from tests.seqbuild import toys
from tests.tiny_models import assert_same, randomize, run_chain, run_model


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, toys.WIDTH, generator=torch.Generator().manual_seed(seed))


def trace(model: nn.Module, **inputs: Any) -> list[Subgraph]:
    return trace_subgraphs(randomize(model).eval(), inputs, ["Layer"])


def check(model: nn.Module, subgraphs: list[Subgraph], **inputs: torch.Tensor) -> None:
    copies = [{name: value.clone() for name, value in inputs.items()} for _ in range(2)]
    assert_same(run_chain(subgraphs, model, copies[0]), run_model(model, copies[1]))


class SplitsThenChecks(toys.Toy):
    """Turns the number of its images into a number, and asks for something later that follows from all of them."""

    def forward(self, x: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        parts = torch.cat(self.split(x.flatten(0, 1), lengths), dim=0)
        self.check(parts, ids)
        return self.layers[1](self.layers[0](x + parts.sum()))

    def split(self, x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.split(x, lengths[:, 0].tolist())

    def check(self, parts: torch.Tensor, ids: torch.Tensor) -> None:
        if parts.shape[0] != (ids == 1).sum():
            raise ValueError("as many tokens as there are features")


def test_the_line_that_fixed_a_size_is_to_blame_for_what_follows() -> None:
    ids = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 2]])
    model = SplitsThenChecks()
    subgraphs = trace(model, x=values(2, 4), ids=ids, lengths=torch.tensor([[5], [3]]))
    assert f"{__name__}:SplitsThenChecks.split" in [path for part in subgraphs for path in part.code.opaque]
    lengths = torch.tensor([[3], [2], [6], [1]])
    check(model, subgraphs, x=values(3, 4, seed=1), ids=ids[[0, 1, 1]], lengths=lengths)


class Layout(toys.Toy):
    """Goes one of two ways, as the ids have it; a target is called in both."""

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        if (ids == 1).sum() > 2:
            return self.layers[1](x)
        return self.layers[1](x * 2)


def test_a_way_that_all_samples_go_is_taken_and_required() -> None:
    model = Layout()
    subgraphs = trace(model, x=values(2, 4), ids=torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]]))
    check(model, subgraphs, x=values(1, 5), ids=torch.tensor([[1, 1, 3, 0, 1]]))
    with pytest.raises(DataError, match="violates an assumption made when the model was traced"):
        check(model, subgraphs, x=values(1, 3), ids=torch.tensor([[1, 0, 2]]))


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([[1, 0, 2]]),
        torch.ones(2, 4, dtype=torch.int64),
        torch.zeros(2, 4, dtype=torch.int64, device="meta"),
    ],
    ids=["samples differ", "always the same", "no values"],
)
def test_a_way_that_samples_do_not_show_is_an_error(ids: torch.Tensor) -> None:
    with pytest.raises(TraceError, match=r"test_decisions.py, line \d+\): it branches on data"):
        trace(Layout(), x=values(*ids.shape), ids=ids)


class Weighs(toys.Toy):
    """Decides by ids and by a parameter, whose numbers nobody knows while compiling."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.ones(9))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        return self.layers[1](x) if self.scores[ids].sum() > -1000 else self.layers[1](-x)


class Written(toys.Toy):
    """Decides by ids into which contents have been written meanwhile."""

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        ids.copy_(x.sum(dim=-1) > 0)
        return self.layers[1](x) if ids.sum() > 3 else self.layers[1](-x)


@pytest.mark.parametrize("make", [Weighs, Written])
def test_contents_show_nothing(make: type[nn.Module]) -> None:
    with pytest.raises(TraceError, match="branches on data"):
        trace(make(), x=values(2, 3), ids=torch.tensor([[1, 0, 2], [4, 5, 6]]))


class Marked(toys.Toy):
    """Writes where a token stands, if it stands anywhere, in one of several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.table = nn.Parameter(torch.ones(2, toys.WIDTH))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        num_found = 0
        for index, token in enumerate((7, 8)):
            mask, others = ids == token, ids != token
            if self.kind == "in place" and mask.any():
                x[mask] = self.table[index]
            if self.kind == "copied" and mask.sum() > 0:
                x = x.masked_fill(mask.unsqueeze(-1), index + 0.5)
            if self.kind == "all" and not (~mask).all():
                x = x.masked_fill(mask[..., None], index + 0.5)
            if self.kind == "kept" and not others.all():
                x[~others] = self.table[index]
            if self.kind == "none" and not bool(mask.sum() == 0):
                x = x.masked_scatter(mask[..., None], self.table.repeat(50, 1))
            if self.kind == "overwritten":
                has_any = mask.any()
                mask.copy_(others)
                if has_any:
                    x[mask] = self.table[index]
            if self.kind == "counted" and mask.any():
                x[mask] = self.table[index]
                num_found += 1
            if self.kind == "elsewhere" and mask.any():
                x[ids == 1] = self.table[index]
        if self.kind == "counted" and num_found == 0:
            x = x * 2
        return self.layers[1](x)


class Selected(toys.Toy):
    def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        if chosen.any():
            x = x.masked_fill(chosen[..., None], 0.0)
        return self.layers[1](x)


def test_a_mask_may_be_an_input() -> None:
    model = Selected()
    subgraphs = trace(model, x=values(2, 4), chosen=torch.zeros(2, 4, dtype=torch.bool))
    for chosen in ([[True, False]], [[False, False]]):
        check(model, subgraphs, x=values(1, 2), chosen=torch.tensor(chosen))


class Numbered(toys.Toy):
    """Files what a step has made under a number of the step's own, and looks it up by that."""

    def forward(self, x: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        found = dict([self.features(x.flatten(0, 1), lengths)])
        for number, layer in enumerate(self.layers):
            x = layer(x)
            x = x + found[number] if number in found else x
        return x

    def features(self, x: torch.Tensor, lengths: torch.Tensor) -> tuple[int, torch.Tensor]:
        parts = torch.split(x, lengths.flatten().tolist())
        return int(lengths.min() > 50), torch.stack([part.sum(dim=0) for part in parts]).sum(dim=0)


def test_a_number_that_all_samples_have_is_taken_and_required() -> None:
    model = Numbered()
    ids = torch.ones(2, 9, dtype=torch.int64)
    subgraphs = trace(model, x=values(2, 4), ids=ids, lengths=torch.tensor([[5], [3]]))
    check(model, subgraphs, x=values(2, 5, seed=1), ids=ids, lengths=torch.tensor([[2], [7], [1]]))
    with pytest.raises(DataError, match="violates an assumption made when the model was traced"):
        check(model, subgraphs, x=values(1, 60), ids=ids, lengths=torch.tensor([[60]]))


UNMARKED = torch.tensor([[1, 2, 0, 1], [0, 1, 5, 0]])


@pytest.mark.parametrize("kind", ["in place", "copied", "all", "kept", "none"])
def test_writing_where_nothing_is_marked_is_right_for_all_data(kind: str) -> None:
    model = Marked(kind)
    subgraphs = trace(model, x=values(2, 4), ids=UNMARKED)
    assert all("run.require" not in subgraph.code.source for subgraph in subgraphs)
    for ids in ([[1, 2, 3]], [[7, 1, 7]], [[1, 8, 2]], [[7, 8, 8]]):
        check(model, subgraphs, x=values(1, 3), ids=torch.tensor(ids))


@pytest.mark.parametrize("kind", ["counted", "elsewhere", "overwritten"])
def test_what_does_more_than_write_is_required(kind: str) -> None:
    model = Marked(kind)
    subgraphs = trace(model, x=values(2, 4), ids=UNMARKED)
    check(model, subgraphs, x=values(1, 3), ids=torch.tensor([[1, 2, 3]]))
    with pytest.raises(DataError, match="violates an assumption made when the model was traced"):
        check(model, subgraphs, x=values(1, 3), ids=torch.tensor([[7, 1, 7]]))
