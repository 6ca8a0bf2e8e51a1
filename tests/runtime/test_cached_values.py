"""Where the values of a program are handed out, and what is said of entries that name none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from runtime.artifact.cached_values import hooked, wrong_parts
from runtime.artifact.manifest import CachedValue
from runtime.language.program import Run, compile_program

PROGRAM = """\
def forward(self, x, *, run):
    key = torch.ops.aten.empty_like.default(x)
    slice_1 = torch.ops.aten.slice.Tensor(key, 0, 0, 2)
    copy_ = torch.ops.aten.copy_.default(slice_1, x)
    del slice_1, copy_
    value = torch.ops.aten.mul.Tensor(x, 2)
    for turn in range(2):
        inner = torch.ops.aten.add.Tensor(x, turn)
    del x, inner
    sum_1 = torch.ops.aten.add.Tensor(key, value)
    del key, value
    return {
        "sum_1": sum_1,
    }
"""


def entry(name: str, after: str = "", part: str = "k", module: str = "a", subgraph: int = 0) -> CachedValue:
    return CachedValue(
        subgraph=subgraph, module=module, kind="Attention", part=part, name=name, after=after or name, heads=1
    )


def test_a_value_is_handed_out_when_it_is_whole_and_what_comes_back_goes_on() -> None:
    entries = [entry("key", "copy_"), entry("value", part="v")]
    hooks = hooked(PROGRAM, entries)
    assert hooks == {"copy_": [(0, "key")], "value": [(1, "value")]}
    seen: list[tuple[int, list[float]]] = []

    def cached(place: int, value: Any) -> Any:
        seen.append((place, value.tolist()))
        return torch.full_like(value, 10 ** (place + 1))

    run = Run(device=torch.device("cpu"), dtype=torch.float32, cached=cached)
    result = compile_program(PROGRAM, "program", hooks)(None, torch.tensor([1.0, 2.0]), run=run)
    assert seen == [(0, [1.0, 2.0]), (1, [2.0, 4.0])]
    assert result["sum_1"].tolist() == [110.0, 110.0]
    plain = compile_program(PROGRAM, "program")(None, torch.tensor([1.0, 2.0]), run=run)
    assert plain["sum_1"].tolist() == [3.0, 6.0]


@pytest.mark.parametrize(
    "odd",
    [
        entry("nowhere"),
        entry("key", "nowhere"),
        entry("x"),
        entry("run", "key"),
        entry("inner"),  # in a loop
        entry("key", "inner"),
        entry("turn"),
        entry("value", "key"),  # not made yet
        entry("slice_1", "value"),  # deleted before
    ],
)
def test_what_is_not_there_cannot_be_handed_out(odd: CachedValue) -> None:
    assert hooked(PROGRAM, [odd]) is None


@pytest.mark.parametrize(
    ("parts", "is_sound"), [("kv", True), ("kvq", True), ("k", False), ("kq", False), ("kkv", False), ("kvqq", False)]
)
def test_a_module_keeps_keys_and_values_once(parts: str, is_sound: bool) -> None:
    assert any(wrong_parts([entry("key", part=part) for part in parts])) is not is_sound


def test_a_module_keeps_its_values_in_one_subgraph() -> None:
    assert any(wrong_parts([entry("key"), entry("value", part="v", subgraph=1)]))
