"""A forward that goes through a set does so in order; `test_same_bytes` compiles such a model in several processes."""

from __future__ import annotations

from torch import nn

from seqbuild.trace.python.builtins import sets_in_order


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kinds = {"b", "a", "d", "c"}

    def forward(self) -> tuple[list[str], list[str], bool]:
        return list(self.kinds), list(set("zyxwv")), isinstance({1}, set)


def test_sets_are_gone_through_in_order_for_as_long_as_asked() -> None:
    layers = Layers()
    before = layers.kinds
    with sets_in_order([layers]):
        assert layers() == (list("abcd"), list("vwxyz"), True)
    assert "set" not in globals()
    assert layers.kinds == before
