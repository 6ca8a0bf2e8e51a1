"""Lanes of data, and statistics that do not depend on the number of workers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import nn

from runtime.algorithms import hessian
from runtime.algorithms.hessian import HessianAccumulator
from runtime.algorithms.output_squares import NUM_SAMPLED, TokenSample
from runtime.artifact.manifest import DimEntry, InputEntry
from runtime.data.lanes import NUM_LANES, TOKENS_PER_LANE, Lanes
from runtime.errors import QuantizationError
from runtime.formats.key_values import KeyValues
from runtime.host.memory import is_out_of_memory
from runtime.model.expert_hooks import ROWS
from runtime.quantize.measuring import collect_statistics
from runtime.quantize.seen_inputs import reached_modules
from runtime.quantize.statistics import InputStatistics, Needs
from runtime.streaming.activations import Activations
from runtime.streaming.passes import Passes
from runtime.workers.group import Alone
from tests.runtime.worker_threads import ThreadWorkers, in_threads, outcomes

CPU = torch.device("cpu")
SIZES = (1, 2, 3, 5, 17)


# Division of the data


def manifest(*shape: int | str, least: int = 1) -> Any:
    """What lanes read of a manifest: one input, and the fewest samples that the artifact is valid for."""
    entry = InputEntry(name="x", dtype="int64", shape=shape)
    dims = (DimEntry(name="B", min=least, max=-1),)
    return SimpleNamespace(inputs=(entry,), dims=dims, conditions=())


def numbered(*sizes: int, length: int = TOKENS_PER_LANE // 2) -> list[dict[str, Any]]:
    """Batches of so many samples, whose tokens are the numbers of their samples."""
    starts = itertools.accumulate(sizes, initial=0)
    numbers = [torch.arange(start, start + size) for start, size in zip(starts, sizes, strict=False)]
    return [{"x": number[:, None].expand(-1, length)} for number in numbers]


def numbers(lanes: Lanes) -> list[list[list[int]]]:
    return [[batch["x"][:, 0].tolist() for batch in lane] for lane in lanes.lanes]


def test_batches_are_split_at_the_borders_of_lanes() -> None:
    lanes = Lanes.of(manifest("B", "S"), numbered(4, 4, 2))  # 10 samples of half a lane are 5 lanes
    assert numbers(lanes) == [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]], [[8, 9]]]
    lanes = Lanes.of(manifest("B", "S"), numbered(4, 4, 4, 4, length=3 * TOKENS_PER_LANE // 16))
    assert numbers(lanes) == [[[0, 1, 2, 3], [4]], [[5, 6, 7], [8, 9]], [[10, 11], [12, 13, 14, 15]]]


@pytest.mark.parametrize(("count", "length", "expected"), [(1, 4096, 1), (5, 4096, 5), (100, 4096, 16), (100, 8, 1)])
def test_the_number_of_lanes(count: int, length: int, expected: int) -> None:
    lanes = Lanes.of(manifest("B", "S"), numbered(*[1] * count, length=length))
    assert len(lanes.lanes) == expected <= NUM_LANES
    lengths = [len(lane) for lane in lanes.lanes]
    assert sum(lengths) == count
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("made", [manifest(4, "S"), manifest("B", "S", least=4)])
def test_batches_that_cannot_be_split_stay_whole(made: Any) -> None:
    lanes = Lanes.of(made, numbered(4, 4, 4))  # 12 samples would be 6 lanes
    assert numbers(lanes) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9, 10, 11]]]
    assert lanes.split(made, 2) is None


def test_no_batches_have_no_lanes() -> None:
    lanes = Lanes.of(manifest("B", "S"), [])
    assert (lanes.lanes, lanes.rounds(0, 2), lanes.batches()) == ((), [], [])


def test_smaller_batches_stay_in_their_lanes() -> None:
    made = manifest("B", "S")
    lanes = Lanes.of(made, numbered(4, 4, length=TOKENS_PER_LANE // 4))
    assert lanes.largest(made) == 4
    halves = lanes.split(made, 3)
    assert halves is not None
    assert numbers(halves) == [[[0, 1, 2], [3]], [[4, 5, 6], [7]]]


@pytest.mark.parametrize("size", SIZES)
def test_every_lane_has_one_worker(size: int) -> None:
    made = manifest("B", "S")
    lanes = Lanes.of(made, numbered(*[2] * 20, length=TOKENS_PER_LANE // 3))
    count = len(lanes.lanes)
    assert count == 13
    seen: dict[tuple[int, int], Any] = {}
    for rank in range(size):
        assert [len(lane) for lane in lanes.own(rank, size)] == [n for n in lanes.rounds(rank, size) if n]
        assert len(lanes.rounds(rank, size)) == lanes.num_rounds(size)
        own, places = lanes.batches(rank, size), lanes.places(rank, size)
        seen |= dict(zip(places, own, strict=True))
        turns = [turn for turn, n in enumerate(lanes.rounds(rank, size)) for _ in range(n)]
        assert [lane for lane, _ in places] == [turn * size + rank for turn in turns]
    assert all(seen[lane, place] is batch for lane, own in enumerate(lanes.lanes) for place, batch in enumerate(own))
    assert len(seen) == len(lanes.batches())


# A step with modules that share inputs, experts that few lanes reach, and masks


WIDTH, WIDE, EXPERTS = 300, 640, 4
LENGTH = 24
# By lane, the samples of each batch.
LANES = ([2, 3], [1], [2, 2, 1], [3], [1, 1], [2], [4], [1, 2], [2], [3, 1], [1], [2, 2])


@functools.cache
def row_of(number: int) -> torch.Tensor:
    return torch.randn(LENGTH, WIDTH, generator=torch.Generator().manual_seed(number))


def hidden(x_BS: torch.Tensor) -> torch.Tensor:
    """The hidden states of some samples, the same in any batch."""
    rows = [row_of(int(number)) for number in x_BS[:, 0]]
    return (torch.stack(rows) * (1 + x_BS[:, :1, None] / 10)).bfloat16()


class Toy:
    """The module tree of a step, and its code."""

    def __init__(self, breaks_in: int = -1) -> None:
        names = ["never", "q", "k", "wide", *(f"{part}{e}" for e in range(EXPERTS) for part in ("up", "gate"))]
        self.modules = {name: nn.Linear(WIDE if name == "wide" else WIDTH, 3).bfloat16() for name in names}
        self.breaks_in = breaks_in
        self.is_split = False

    def forward(self, model: Any, x: torch.Tensor) -> dict[str, Any]:
        states_BSI = hidden(x)
        self.modules["q"](states_BSI)
        self.modules["k"](states_BSI.clone() if self.breaks_in in x[:, 0] else states_BSI)
        self.modules["wide"](torch.cat((states_BSI, states_BSI, states_BSI), dim=-1)[..., :WIDE])
        flat_TI = states_BSI.flatten(0, 1)
        for expert in range(EXPERTS):  # 0 sees some tokens of all samples, the last one no token at all
            is_routed = (x.flatten() // 8 == expert) | ((torch.arange(x.numel()) % 5 == 0) & (expert == 0))
            tokens = torch.where(is_routed)[0] if expert < EXPERTS - 1 else torch.empty(0, dtype=torch.int64)
            if not len(tokens):
                continue
            routed_NI = flat_TI[tokens]
            for part in ("up", "gate"):
                module = self.modules[f"{part}{expert}"]
                module.__dict__[ROWS] = tokens
                module(routed_NI)
        return {}

    def step(self) -> Any:
        subgraph = SimpleNamespace(input_names=("x",), forward=self.forward, consumed_names=(), halves=lambda model: ())
        kind = {"goes_on": False, "compares": self.is_split, "is_split": self.is_split, "is_split_after": False}
        return SimpleNamespace(index=0, label="layer", subgraph=subgraph, called=lambda jobs: {}, **kind)


def toy_lanes() -> Lanes:
    sizes = [size for lane in LANES for size in lane]
    batches = iter(numbered(*sizes, length=LENGTH))
    return Lanes(lanes=tuple([next(batches) for _ in lane] for lane in LANES))


def mask(batch: dict[str, Any]) -> torch.Tensor | None:
    """No token of some samples counts, of others a part of them."""
    first = int(batch["x"][0, 0])
    if first % 3 == 0:
        return None
    return torch.arange(LENGTH).expand(batch["x"].shape) < (0 if first % 7 == 5 else 20)


def passes_of(workers: Any, toy: Toy, lanes: Lanes) -> Passes:
    place = (workers.rank, workers.size)
    batches = lanes.batches(*place)
    activations = Activations(batches, CPU)
    if toy.is_split:  # other tokens, of which experts get others
        activations.split()
        for number, batch in enumerate(batches):
            activations.restore(activations.original(number), original_values(activations, batch))
    return Passes(
        model=nn.Module(),
        activations=activations,
        jobs={},
        propagate_error=True,
        watcher=SimpleNamespace(tell=lambda kind, **facts: None, share=lambda: None),  # type: ignore[arg-type]
        tokens=[batch["x"].numel() for batch in batches],
        rounds=lanes.rounds(*place),
        workers=workers,
    )


def original_values(activations: Activations, batch: dict[str, Any]) -> dict[str, Any]:
    return {"x": activations.hold(batch["x"] + 1)}


def measured(
    workers: Any, toy: Toy, needs: Needs, *, lanes: Lanes | None = None, may_stop: bool = False
) -> dict[str, InputStatistics]:
    lanes, toy.is_split = lanes or toy_lanes(), needs.drift
    passes, step = passes_of(workers, toy, lanes), toy.step()
    return collect_statistics(
        toy.modules,
        dict.fromkeys(toy.modules, needs),
        lambda *calls: passes.measure(step, *calls),
        CPU,
        [mask(batch) for batch in lanes.batches(workers.rank, workers.size)],
        may_stop=may_stop,
        workers=workers,
    )


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def shared_facts(found: dict[str, InputStatistics]) -> dict[str, Any]:
    """All that every worker knows of each module."""
    firsts: dict[int, str] = {}
    facts: dict[str, Any] = {}
    for name, entry in found.items():
        own: list[Any] = [entry.num_tokens, entry.num_in_features, firsts.setdefault(id(entry), name), entry.owner]
        if entry.num_tokens:
            own += [entry.is_finite(), entry.is_zero()]
            own += [bits(entry.diagonal_I)] if entry.needs.hessian else []
            if entry.needs.channels:
                spans = [entry.span(averaging) for averaging in (None, 0.01, 0.3)]
                features = [entry.feature_span(average=average) for average in (False, True)]
                own += [bits(torch.stack(pair)) for pair in (*spans, *features)]
                own.append(bits(entry.mean_abs_I))
        facts[name] = own
    return facts


def owned_facts(found: dict[str, InputStatistics]) -> dict[str, Any]:
    """What only the owner of each module's inputs knows."""
    facts: dict[str, Any] = {}
    for name, entry in found.items():
        if not entry.is_here:
            assert entry.gram is None
            assert entry.sample is None
            continue
        hessian = bits(entry.hessian_II) if entry.needs.hessian else b""
        hessian += bits(entry.drift_II) if entry.needs.drift else b""
        weight_OI = torch.linspace(-1, 1, 5 * entry.num_in_features).reshape(5, -1)
        facts[name] = (hessian, entry.output_square(weight_OI) if entry.num_tokens else 0.0)
    return facts


def all_facts(size: int, needs: Needs, breaks_in: int = -1) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `size` workers measure, before and after inputs were scaled: by all of them, and by owners."""

    def run(workers: ThreadWorkers) -> tuple[dict[str, Any], dict[str, Any]]:
        found = measured(workers, Toy(breaks_in), needs)
        known, owned = shared_facts(found), owned_facts(found)
        for entry in dict.fromkeys(found.values()):
            entry.scale(torch.linspace(0.5, 3, entry.num_in_features))
        known |= {f"{name}, scaled": facts for name, facts in shared_facts(found).items()}
        owned |= {f"{name}, scaled": facts for name, facts in owned_facts(found).items()}
        return known, owned

    found = in_threads(size, run)
    known = [one for one, _ in found]
    assert all(one == known[0] and list(one) == list(known[0]) for one in known)
    owners = {facts.pop(3) for facts in known[0].values()}
    assert len(owners) >= min(size, 3)
    owned: dict[str, Any] = {}
    for _, own in found:
        assert not owned.keys() & own.keys()
        owned |= own
    assert owned.keys() == known[0].keys()
    return known[0], owned


KINDS = {
    "all": Needs(hessian=True, channels=True),
    "H": Needs(hessian=True),
    "channels": Needs(channels=True),
}


DRIFT = Needs(hessian=True, drift=True)


def test_the_drift_does_not_depend_on_the_number_of_workers() -> None:
    expected = all_facts(1, DRIFT)
    for size in (2, 3):
        assert all_facts(size, DRIFT) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("breaks_in", [-1, 14])
def test_statistics_do_not_depend_on_the_number_of_workers(kind: str, breaks_in: int) -> None:
    expected = all_facts(1, KINDS[kind], breaks_in)
    known = expected[0]
    reached = ["q", "k", "wide", "up0", "gate0", "up1", "gate1", "up2", "gate2"]
    assert [name for name in known if "scaled" not in name] == reached
    assert (known["k"][2] == "q") == (known["gate1"][2] == "up1") == (breaks_in < 0)
    for size in SIZES[1:]:
        assert all_facts(size, KINDS[kind], breaks_in) == expected


def test_wide_panels_of_a_gpu_do_not_depend_on_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "is_gpu", lambda device_type: True)
    monkeypatch.setattr(hessian, "_PANEL_WIDTH_OF_GPU", 256)
    expected = all_facts(1, KINDS["all"])
    for size in (2, 5):
        assert all_facts(size, KINDS["all"]) == expected


def test_a_hessian_is_the_sum_of_those_of_lanes_in_their_order() -> None:
    toy, lanes = Toy(), toy_lanes()
    found = measured(Alone(), toy, KINDS["all"])
    for name, width in (("q", WIDTH), ("wide", WIDE)):
        total = torch.zeros(width, width)
        for lane in lanes.lanes:
            one = HessianAccumulator(width)
            for batch in lane:
                inputs_BSI = hidden(batch["x"]).repeat(1, 1, 3)[..., :width]
                counts = mask(batch)
                one.add(inputs_BSI if counts is None else inputs_BSI[counts])
            total += one.hessian_II
        assert torch.equal(found[name].hessian_II, total)
        assert torch.equal(found[name].diagonal_I, total.diagonal())


def test_the_drift_is_that_of_tokens_which_both_models_have() -> None:
    found = measured(Alone(), Toy(), DRIFT)
    for name, expert in (("q", None), ("up1", 1)):
        total = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        for batch in toy_lanes().batches():
            present, original = batch["x"].flatten(), batch["x"].flatten() + 1
            is_counted = torch.ones(len(present), dtype=torch.bool) if mask(batch) is None else mask(batch).flatten()
            is_known = is_counted if expert is None else is_counted & (present // 8 == 1) & (original // 8 == 1)
            present_TI = hidden(batch["x"]).flatten(0, 1)[is_known].double()
            original_TI = hidden(batch["x"] + 1).flatten(0, 1)[is_known].double()
            total += (original_TI - present_TI).T @ present_TI
        assert total.abs().max() > 1
        torch.testing.assert_close(found[name].drift_II.double(), total, rtol=1e-4, atol=1e-2)


def test_one_lane_is_a_plain_sum_and_a_plain_average() -> None:
    """As without lanes: batches in order, one after the other."""
    lanes = Lanes(lanes=(toy_lanes().batches(),))
    found = measured(Alone(), Toy(), KINDS["all"], lanes=lanes)["q"]
    plain, low_I = HessianAccumulator(WIDTH), torch.zeros(0)
    for batch in lanes.batches():
        counts = mask(batch)
        inputs_TI = hidden(batch["x"]).flatten(0, 1) if counts is None else hidden(batch["x"])[counts]
        if len(inputs_TI):
            plain.add(inputs_TI)
            least_I = inputs_TI.amin(dim=0).float()
            low_I = torch.lerp(low_I, least_I, 0.01) if len(low_I) else least_I
    assert torch.equal(found.hessian_II, plain.hessian_II)
    assert torch.equal(found.feature_span(average=True)[0], low_I)


def test_the_average_over_lanes_is_that_over_batches() -> None:
    one = measured(Alone(), Toy(), KINDS["channels"], lanes=Lanes(lanes=(toy_lanes().batches(),)))
    for name, entry in measured(Alone(), Toy(), KINDS["channels"]).items():
        for got, wanted in zip(entry.feature_span(average=True), one[name].feature_span(average=True), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        assert all(map(torch.equal, entry.span(0.2), one[name].span(0.2)))
        torch.testing.assert_close(entry.mean_abs_I, one[name].mean_abs_I, rtol=1e-6, atol=0)


@pytest.mark.parametrize("width", [1, 100, 128, 130, 256, 300, 384, 640])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_lanes_share_one_matrix_with_their_total(width: int, count: int) -> None:
    """Whole numbers have one right sum, whether a lane is added here or comes from elsewhere."""
    generator = torch.Generator().manual_seed(width)
    parts = [torch.randint(-4, 5, (60, width), generator=generator).float() for _ in range(count)]
    together, here, there = torch.cat(parts), HessianAccumulator(width), HessianAccumulator(width)
    for part in parts:
        here.add(part[:20])
        here.add(part[20:])
        here.end_lane()
        lane = HessianAccumulator(width)
        lane.add(part)
        is_first = not there.has_total
        for left in there.panels():
            there.fold_(left, lane.lane_panel(left).contiguous(), is_first=is_first)
        there.has_total = True
    expected = together.t() @ together
    assert torch.equal(here.hessian_II, expected)
    assert torch.equal(there.hessian_II, expected)
    here.add(parts[0])
    assert torch.equal(here.hessian_II, expected + parts[0].t() @ parts[0])


def test_a_sample_is_the_same_wherever_its_lanes_are_taken() -> None:
    lanes = [torch.arange(start, start + size)[:, None] for start, size in ((0, 900), (1000, 3), (2000, 1500))]
    whole, joined = TokenSample(), TokenSample()
    for number, lane in enumerate(lanes):
        for part in torch.split(lane, 400):
            whole.add(part)
        whole.end_lane(number)
    for number in (2, 0, 1):
        one = TokenSample()
        one.add(lanes[number])
        joined.join(number, one.lane_TI, one.stride, len(lanes[number]))
    assert torch.equal(whole.inputs_TI, joined.inputs_TI)
    assert whole.share == joined.share
    assert NUM_SAMPLED // 2 < len(whole.inputs_TI) <= NUM_SAMPLED
    assert torch.equal(whole.inputs_TI, torch.cat([lane[:: whole.stride] for lane in lanes]).float())


# Errors on one worker


def fails_at(number: int, error: BaseException) -> Callable[[Toy], None]:
    """Make a module raise in the batch with this sample."""

    def arrange(toy: Toy) -> None:
        def hook(module: nn.Module, args: Any) -> None:
            if float(hidden(torch.full((1, LENGTH), number))[0, 0, 0]) in args[0][..., 0]:
                raise error

        toy.modules["k"].register_forward_pre_hook(hook)

    return arrange


@pytest.mark.parametrize("size", [2, 3, 17])
@pytest.mark.parametrize("number", [5, 31])
def test_all_workers_leave_when_one_fails(size: int, number: int) -> None:
    def run(workers: ThreadWorkers) -> None:
        toy = Toy()
        fails_at(number, QuantizationError("wrong numbers"))(toy)
        measured(workers, toy, KINDS["all"])

    found = outcomes(size, run)
    assert sorted(type(one).__name__ for one in found) == ["QuantizationError"] + ["WorkerError"] * (size - 1)
    assert all("wrong numbers" in str(one) for one in found)


@pytest.mark.parametrize("size", [2, 3])
def test_all_workers_run_out_of_memory_when_one_does(size: int) -> None:
    def run(workers: ThreadWorkers) -> None:
        toy = Toy()
        fails_at(5, MemoryError("no memory"))(toy)
        measured(workers, toy, KINDS["all"])

    assert all(isinstance(one, BaseException) and is_out_of_memory(one) for one in outcomes(size, run))


def test_an_owner_without_memory_for_a_matrix_stops_all(monkeypatch: pytest.MonkeyPatch) -> None:
    real = InputStatistics.reserve

    def reserve(self: InputStatistics) -> None:
        if self.num_in_features == WIDE and not self.lane_tokens:  # on its owner, which has not measured it
            raise MemoryError("no memory")
        real(self)

    monkeypatch.setattr(InputStatistics, "reserve", reserve)
    found = outcomes(17, lambda workers: measured(workers, Toy(), KINDS["all"], lanes=one_lane()))
    assert all(isinstance(one, BaseException) and is_out_of_memory(one) for one in found)


def one_lane() -> Lanes:
    return Lanes(lanes=toy_lanes().lanes[:1])


def test_batches_end_early_on_every_worker() -> None:
    """The first batch of each worker shows which module is the last."""

    def run(workers: ThreadWorkers) -> tuple[list[str], dict[str, InputStatistics]]:
        toy = Toy()
        toy.modules = {name: toy.modules[name] for name in ("q", "k")}
        ends: list[str] = []

        def forward(model: Any, x: torch.Tensor) -> dict[str, Any]:
            states_BSI = hidden(x)
            toy.modules["q"](states_BSI)
            toy.modules["k"](states_BSI)
            ends.append("end")
            return {}

        toy.forward = forward  # type: ignore[method-assign]
        return ends, measured(workers, toy, Needs(hessian=True), may_stop=True)

    expected = in_threads(1, run)[0][1]["q"].hessian_II
    for ends, found in in_threads(3, run):
        assert len(ends) == 1
        assert not found["q"].is_here or torch.equal(found["q"].hessian_II, expected)


# Keys and values, and modules that were reached


AVERAGES: tuple[dict[str, Any], ...] = (
    {},
    {"observer": "static_minmax"},
    {"observer": "minmax", "observer_kwargs": {"averaging_constant": 0.3}},
)


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
@pytest.mark.parametrize("options", AVERAGES)
def test_spans_of_the_cache_do_not_depend_on_the_number_of_workers(strategy: str, options: dict[str, Any]) -> None:
    args = QuantizationArgs(num_bits=8, type="float", strategy=strategy, **options)

    def run(workers: Any) -> list[bytes]:
        key_values = KeyValues(args=args, is_measuring=True)
        lanes = toy_lanes()
        key_values.forget(["attention"])
        own = iter(lanes.own(workers.rank, workers.size))
        for _ in range(lanes.num_rounds(workers.size)):
            for batch in next(own, ()):
                states = hidden(batch["x"]).unflatten(-1, (3, 100)).transpose(1, 2)
                key_values.handle("attention", "k", states)
                if int(batch["x"][0, 0]) % 2:
                    key_values.handle("attention", "v", states.float() * 2)
            key_values.end_round(workers, CPU)
        assert key_values.spans["attention", "k"][0].numel() == (3 if strategy == "attn_head" else 1)
        return [bits(torch.stack(key_values.spans["attention", part])) for part in "kv"]

    expected = run(Alone())
    for size in SIZES[1:]:
        assert in_threads(size, run) == [expected] * size


@pytest.mark.parametrize("size", SIZES)
def test_a_module_is_reached_if_any_worker_reaches_it(size: int) -> None:
    def run(workers: ThreadWorkers) -> set[str]:
        toy = Toy()
        tree = nn.ModuleDict(toy.modules)
        with reached_modules(tree, list(toy.modules), workers) as reached:
            measured(workers, toy, Needs(hessian=True))
        return set(reached)

    assert in_threads(size, run) == [{"q", "k", "wide", "up0", "gate0", "up1", "gate1", "up2", "gate2"}] * size


def test_a_pass_goes_on_without_batches() -> None:
    def run(workers: ThreadWorkers) -> int:
        toy = Toy()
        passes = passes_of(workers, toy, one_lane())
        passes.go_on(toy.step())
        return passes.num_tokens

    assert in_threads(3, run) == [5 * LENGTH, 0, 0]


def test_one_worker_has_the_first_batch() -> None:
    def run(workers: ThreadWorkers) -> list[int]:
        passes, step = passes_of(workers, Toy(), toy_lanes()), Toy().step()
        step.subgraph.forward = lambda model, x: {"y": x}
        return [int(value[0, 0]) for value in passes.first(step).values()]

    assert in_threads(3, run) == [[0], [], []]
