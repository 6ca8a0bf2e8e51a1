from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import runtime.algorithms.hessian
from runtime.algorithms.hessian import HessianAccumulator
from runtime.host.dispatch_modes import LeanDispatchMode
from runtime.quantize.measuring import collect_statistics
from runtime.quantize.statistics import InputStatistics, Needs
from runtime.streaming.work import EnoughSeenError
from tests.runtime.small import RECIPES, Small, calibrate, directory_bytes, recipe


def linears(*names: str, width: int = 2) -> dict[str, nn.Linear]:
    return {name: nn.Linear(width, 3, bias=False) for name in names}


def whole_numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Sums of products of small integers are exact in float32."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def gram(parts: Iterable[torch.Tensor]) -> list[list[float]]:
    """The sum of x x^T in plain Python."""
    rows = [row for part in parts for row in part.flatten(0, -2).tolist()]
    width = len(rows[0])
    return [[sum(row[i] * row[j] for row in rows) for j in range(width)] for i in range(width)]


def collect(
    modules: dict[str, nn.Linear],
    run_batches: Callable[[], object],
    masks: Sequence[torch.Tensor | None] = (),
    needs: Needs | None = None,
) -> dict[str, InputStatistics]:
    """All that can be measured, of calls that are one batch."""

    def run(begin: Callable[[int], None], end_round: Callable[[], None]) -> None:
        begin(0)
        run_batches()
        end_round()

    wanted = dict.fromkeys(modules, needs or Needs(hessian=True, channels=True))
    return collect_statistics(modules, wanted, run, torch.device("cpu"), masks)


class Chain:
    """Calls modules as told, and counts how often all batches ran."""

    def __init__(self, calls: Callable[[], None]) -> None:
        self.calls = calls
        self.num_runs = 0

    def __call__(self) -> None:
        self.num_runs += 1
        self.calls()


def test_known_numbers() -> None:
    modules = linears("a")
    inputs_BSI = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, -1.0], [5.0, 0.0]]])
    found = collect(modules, lambda: modules["a"](inputs_BSI))
    assert found["a"].hessian_II.tolist() == [[35.0, 14.0], [14.0, 21.0]]
    assert found["a"].num_tokens == 4


@pytest.mark.parametrize("needs", [Needs(hessian=True), Needs(channels=True), Needs(hessian=True, channels=True)])
def test_features_that_are_always_zero_are_counted(needs: Needs) -> None:
    modules = linears("a", width=4)
    batches = [torch.tensor([[0.0, -1.0, 0.0, -0.0]]), torch.tensor([[0.0, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, 0.0]])]
    found = collect(modules, lambda: [modules["a"](batch) for batch in batches], needs=needs)
    assert found["a"].num_dead == 2


def test_modules_that_are_handed_one_tensor_share_one_sum() -> None:
    modules = linears("q", "k", "v", "o")
    batches = [whole_numbers(2, 3, 2, seed=seed) for seed in (1, 2)]
    others = [whole_numbers(2, 3, 2, seed=seed) for seed in (3, 4)]

    def calls() -> None:
        for batch, other in zip(batches, others, strict=True):
            for name in "qkv":
                modules[name](batch)
            modules["o"](other)

    chain = Chain(calls)
    found = collect(modules, chain)
    assert found["q"] is found["k"] is found["v"]
    assert found["o"] is not found["q"]
    assert found["q"].hessian_II.tolist() == gram(batches)
    assert found["o"].hessian_II.tolist() == gram(others)
    assert found["q"].num_tokens == found["o"].num_tokens == 12
    assert chain.num_runs == 1


def test_equal_numbers_in_two_tensors_are_not_shared() -> None:
    modules = linears("a", "b")
    batch = whole_numbers(2, 3, 2)

    def calls() -> None:
        modules["a"](batch)
        modules["b"](batch.clone())

    found = collect(modules, calls)
    assert found["a"] is not found["b"]
    assert found["a"].hessian_II.tolist() == found["b"].hessian_II.tolist() == gram([batch])


def test_a_tensor_that_was_changed_in_place_is_another_one() -> None:
    modules = linears("a", "b")
    batches = [whole_numbers(2, 3, 2, seed=seed) for seed in (1, 2)]

    def calls() -> None:
        for original in batches:
            batch = original.clone()
            modules["a"](batch)
            modules["b"](batch.mul_(2))

    found = collect(modules, calls)
    assert found["a"].hessian_II.tolist() == gram(batches)
    assert found["b"].hessian_II.tolist() == gram([2 * batch for batch in batches])


def part_in_the_second_batch(modules: dict[str, nn.Linear], parts: dict[str, list[torch.Tensor]]) -> None:
    modules["a"](parts["a"][0])
    modules["b"](parts["a"][0])
    modules["a"](parts["a"][1])
    modules["b"](parts["b"][1])


def call_the_follower_once_more(modules: dict[str, nn.Linear], parts: dict[str, list[torch.Tensor]]) -> None:
    modules["a"](parts["a"][0])
    modules["b"](parts["a"][0])
    modules["a"](parts["a"][1])
    modules["b"](parts["a"][1])
    modules["b"](parts["a"][1])


def leave_the_follower_out(modules: dict[str, nn.Linear], parts: dict[str, list[torch.Tensor]]) -> None:
    modules["a"](parts["a"][0])
    modules["b"](parts["a"][0])
    modules["a"](parts["a"][1])


def call_the_leader_twice(modules: dict[str, nn.Linear], parts: dict[str, list[torch.Tensor]]) -> None:
    modules["a"](parts["a"][0])
    modules["b"](parts["a"][0])
    modules["a"](parts["a"][1])
    modules["a"](parts["b"][1])
    modules["b"](parts["b"][1])


def change_the_order(modules: dict[str, nn.Linear], parts: dict[str, list[torch.Tensor]]) -> None:
    modules["a"](parts["a"][0])
    modules["b"](parts["a"][0])
    modules["b"](parts["a"][1])
    modules["a"](parts["a"][1])


@pytest.mark.parametrize(
    ("calls", "seen_by_a", "seen_by_b"),
    [
        (part_in_the_second_batch, ["a0", "a1"], ["a0", "b1"]),
        (call_the_follower_once_more, ["a0", "a1"], ["a0", "a1", "a1"]),
        (leave_the_follower_out, ["a0", "a1"], ["a0"]),
        (call_the_leader_twice, ["a0", "a1", "b1"], ["a0", "b1"]),
        (change_the_order, ["a0", "a1"], ["a0", "a1"]),
    ],
)
def test_sharing_that_breaks_falls_back_to_a_sum_each(
    calls: Callable[..., None], seen_by_a: list[str], seen_by_b: list[str]
) -> None:
    modules = linears("a", "b")
    parts = {name: [whole_numbers(2, 3, 2, seed=ord(name) + index) for index in (0, 1)] for name in "ab"}
    chain = Chain(lambda: calls(modules, parts))
    found = collect(modules, chain)
    for name, seen in (("a", seen_by_a), ("b", seen_by_b)):
        expected = [parts[key[0]][int(key[1])] for key in seen]
        assert found[name].hessian_II.tolist() == gram(expected)
        assert found[name].num_tokens == 6 * len(seen)
    assert chain.num_runs == 2


def test_a_late_module_does_not_follow_one_that_saw_more_before() -> None:
    """As an expert that is called for the first time in the second batch."""
    modules = linears("a", "b")
    batches = [whole_numbers(2, 3, 2, seed=seed) for seed in (1, 2)]

    def calls() -> None:
        modules["a"](batches[0])
        modules["a"](batches[1])
        modules["b"](batches[1])

    found = collect(modules, calls)
    assert found["a"].hessian_II.tolist() == gram(batches)
    assert found["b"].hessian_II.tolist() == gram(batches[1:])


def test_a_module_that_is_never_called_is_left_out() -> None:
    modules = linears("a", "b")
    assert list(collect(modules, lambda: modules["a"](whole_numbers(4, 2)))) == ["a"]


def test_no_tokens_at_all_count_as_none() -> None:
    modules = linears("a")
    found = collect(modules, lambda: modules["a"](torch.empty(0, 2)))
    assert found["a"].num_tokens == 0
    assert found["a"].hessian_II.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_an_input_given_by_name_is_seen() -> None:
    modules = linears("a")
    batch = whole_numbers(3, 2)
    found = collect(modules, lambda: modules["a"](input=batch))
    assert found["a"].hessian_II.tolist() == gram([batch])


def test_hooks_are_gone_afterwards_also_after_an_error() -> None:
    modules = linears("a")

    def fail() -> None:
        modules["a"](whole_numbers(3, 2))
        raise RuntimeError("the model failed")

    with pytest.raises(RuntimeError, match="the model failed"):
        collect(modules, fail)
    collect(modules, lambda: modules["a"](whole_numbers(3, 2)))
    assert not modules["a"]._forward_pre_hooks


def test_half_precision_is_summed_up_exactly_in_float32() -> None:
    modules = {"a": nn.Linear(2, 2, bias=False).bfloat16()}
    batch = torch.tensor([[1.0, 1.0]] * 600, dtype=torch.bfloat16)  # bfloat16 would stop counting at 256
    found = collect(modules, lambda: modules["a"](batch))
    assert found["a"].hessian_II.tolist() == [[600.0, 600.0], [600.0, 600.0]]
    assert found["a"].hessian_II.dtype == torch.float32


def test_sizes_of_channels_by_hand() -> None:
    modules = linears("a")
    found = collect(modules, lambda: modules["a"](torch.tensor([[1.0, -2.0], [-3.0, 4.0]])))["a"]
    assert found.mean_abs_I.tolist() == [2.0, 3.0]
    assert [bound.tolist() for bound in found.feature_span()] == [[-3.0, -2.0], [1.0, 4.0]]


def test_the_moving_average_takes_a_hundredth_of_each_batch() -> None:
    modules = linears("a")

    def calls() -> None:
        modules["a"](torch.tensor([[0.0, 1.0]]))
        modules["a"](torch.tensor([[100.0, 1.0]]))

    found = collect(modules, calls)["a"]
    low, high = found.feature_span(average=True)
    assert low.tolist() == high.tolist() == [1.0, 1.0]
    assert [bound.item() for bound in found.span(0.01)] == pytest.approx([0.01, 1.99])  # of the tensor, not of features
    assert [bound.item() for bound in found.span(0.5)] == [0.5, 50.5]
    assert [bound.item() for bound in found.span(None)] == [0.0, 100.0]


@pytest.mark.parametrize("shape", [(2, 3, 2), (6, 2)])
def test_masked_tokens_do_not_count(shape: tuple[int, ...]) -> None:
    modules = linears("a")
    batch = whole_numbers(6, 2)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    found = collect(modules, lambda: modules["a"](batch.reshape(shape)), [mask])["a"]
    assert found.hessian_II.tolist() == gram([batch[[0, 2, 4, 5]]])
    assert found.num_tokens == 4
    assert found.mean_abs_I.tolist() == batch[[0, 2, 4, 5]].abs().mean(dim=0).tolist()


def test_what_masked_tokens_hold_does_not_matter() -> None:
    modules = linears("a")
    batch = whole_numbers(2, 3, 2)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    other = batch.clone()
    other[0, 2] = torch.nan
    one, two = (collect(modules, lambda given=given: modules["a"](given), [mask])["a"] for given in (batch, other))
    assert torch.equal(one.hessian_II, two.hessian_II)
    assert torch.equal(one.mean_abs_I, two.mean_abs_I)


def test_an_input_of_other_tokens_than_the_batch_counts_whole() -> None:
    modules = linears("a")
    batch = whole_numbers(4, 2)  # as an expert sees it
    found = collect(modules, lambda: modules["a"](batch), [torch.zeros(2, 3, dtype=torch.bool)])
    assert found["a"].num_tokens == 4


def test_statistics_of_rescaled_inputs_need_no_second_pass() -> None:
    modules = linears("a")
    batch, factors = whole_numbers(5, 2), torch.tensor([2.0, 0.5])
    before = collect(modules, lambda: modules["a"](batch))["a"]
    before.scale(factors)
    after = collect(modules, lambda: modules["a"](batch / factors))["a"]
    assert torch.equal(before.hessian_II, after.hessian_II)
    assert torch.equal(before.mean_abs_I, after.mean_abs_I)
    assert all(torch.equal(*pair) for pair in zip(before.feature_span(), after.feature_span(), strict=True))
    assert before.span(0.01) == before.span(None) == after.span(None)


# A batch that need not run to its end


class Batches:
    """Runs two modules for each batch as a run does, and counts how often the second one computes."""

    def __init__(self, parts: Sequence[torch.Tensor], orders: Sequence[str]) -> None:
        self.modules = linears("a", "b")
        self.parts, self.orders = parts, orders
        self.num_ends = 0

    def __call__(self, begin: Callable[[int], None], end_round: Callable[[], None]) -> None:
        for batch, (part, order) in enumerate(zip(self.parts, self.orders, strict=True)):
            begin(batch)
            try:
                for name in order:
                    self.modules[name](part)
                self.num_ends += 1
            except EnoughSeenError:
                pass
        end_round()

    def measure(self, *, may_stop: bool = True) -> dict[str, InputStatistics]:
        needs = dict.fromkeys(self.modules, Needs(hessian=True))
        return collect_statistics(self.modules, needs, self, torch.device("cpu"), may_stop=may_stop)


PARTS = [whole_numbers(2, 3, 2, seed=seed) for seed in range(3)]


def test_batches_end_with_the_last_module_that_is_measured() -> None:
    batches = Batches(PARTS, ["ab"] * 3)
    found = batches.measure()
    assert batches.num_ends == 1  # the first shows which module is the last
    assert found["b"].hessian_II.tolist() == gram(PARTS)
    assert found["b"].num_tokens == 18


def test_batches_run_to_their_end_where_results_are_needed() -> None:
    batches = Batches(PARTS, ["ab"] * 3)
    batches.measure(may_stop=False)
    assert batches.num_ends == 3


def test_a_run_ends_batches_early_and_computes_the_same(
    llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[torch.Size] = []
    real = nn.Linear.forward

    def counted(self: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
        calls.append(self.weight.shape)
        return real(self, inputs)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    plan = recipe(RECIPES["W4A16"], modifier="GPTQModifier")
    calibrate(llama, plan, tmp_path / "early")
    # Three batches, three layers. While measuring, down_proj computes in the first batch of each layer alone; then all
    # go on through the first two layers.
    assert calls.count(torch.Size([128, 256])) == 3 * 1 + 2 * 3
    assert calls.count(torch.Size([256, 128])) == 2 * (3 * 3 + 2 * 3)
    monkeypatch.setattr("runtime.quantize.expert_groups._may_stop", lambda work, names: False)
    calls.clear()
    calibrate(llama, plan, tmp_path / "whole")
    assert calls.count(torch.Size([128, 256])) == 3 * 3 + 2 * 3
    assert directory_bytes(tmp_path / "early") == directory_bytes(tmp_path / "whole")


def test_numbers_of_tokens_are_rounded_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What multiplies keeps a program for each size that it meets, and experts see another number in every batch."""
    sizes: dict[tuple[int, ...], None] = {}
    real = runtime.algorithms.hessian.add_product_

    def record(target: torch.Tensor, first: torch.Tensor, second: torch.Tensor, *, is_new: bool) -> None:
        sizes[tuple(second.shape)] = None
        real(target, first, second, is_new=is_new)

    monkeypatch.setattr(runtime.algorithms.hessian, "add_product_", record)
    found = HessianAccumulator(5)
    batches = [whole_numbers(count, 5, seed=count) for count in range(1, 301)]
    for batch in batches:
        found.add(batch)
    inputs = torch.cat(batches)
    assert torch.equal(found.hessian_II, inputs.t() @ inputs)
    assert found.num_tokens == len(inputs)
    assert len(sizes) == 3


class WithoutWaiting(LeanDispatchMode):
    """Fails on operators for which the host waits for a GPU: their result, or its size, depends on numbers there."""

    _aten = torch.ops.aten
    _WAITING = (_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten._unique2, _aten.is_nonzero)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        assert func.overloadpacket not in self._WAITING, func
        if func.overloadpacket is self._aten.index:
            assert not any(one is not None and one.dtype == torch.bool for one in args[1]), "a mask has to be counted"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("needs", [Needs(hessian=True), Needs(channels=True), Needs(hessian=True, channels=True)])
def test_no_module_waits_for_a_gpu_while_a_batch_runs(needs: Needs) -> None:
    modules = linears("q", "k", "o", width=600)
    batches = [whole_numbers(2, 5, 600, seed=seed) for seed in range(4)]
    masks = [torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]).bool(), None] * 2

    def run(begin: Callable[[int], None], end_round: Callable[[], None]) -> None:
        for lane in range(2):
            for place in (2 * lane, 2 * lane + 1):
                begin(place)
                with WithoutWaiting():  # type: ignore[no-untyped-call]
                    modules["q"](batches[place])
                    modules["k"](batches[place])
                    modules["o"](batches[place] + 1)
            end_round()

    found = collect_statistics(modules, dict.fromkeys(modules, needs), run, torch.device("cpu"), masks)
    counted = [b[m] if m is not None else b.flatten(0, 1) for b, m in zip(batches, masks, strict=True)]
    assert found["q"].num_tokens == found["k"].num_tokens == sum(map(len, counted)) == 34
    if needs.hessian:
        assert torch.equal(found["q"].hessian_II, torch.cat(counted).T @ torch.cat(counted))
