"""Weights that several workers quantize: the packed tensors are the same for any number of them, also after errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn

from runtime.algorithms import gptq_tiles, grid
from runtime.algorithms.gptq import quantize_siblings
from runtime.algorithms.gptq_factors import Factored
from runtime.algorithms.hessian import HessianAccumulator
from runtime.algorithms.refine import refine
from runtime.algorithms.rtn import quantize_rtn
from runtime.errors import QuantizationError, WorkerError
from runtime.formats.compressed import compress_module, join_rows
from runtime.formats.presets import scheme_from_preset
from runtime.host.memory import is_out_of_memory
from runtime.quantize import packed_pieces, solve_division, solves
from runtime.quantize.measuring import collect_statistics
from runtime.quantize.rounding import Rounded, Rounding, round_modules
from runtime.quantize.solve_division import Solve, divided, windows
from runtime.quantize.statistics import Needs
from runtime.recipe.modifiers import GptqOptions
from runtime.recipe.recipe import Assignment
from runtime.workers.agreement import is_shared
from tests.runtime.worker_threads import ThreadWorkers, in_threads, outcomes

SIZES = (1, 2, 3)
DTYPE = torch.bfloat16
SHAPES = {"q": (150, 256), "k": (60, 256), "v": (70, 256), "plain": (50, 256), "down": (130, 384), "idle": (30, 384)}
READ = {"q": 0, "k": 0, "v": 0, "plain": 0, "down": 1}  # the input that a module reads; no token reaches `idle`
GLOBAL = ("gate", "up")  # siblings that share NVFP4's global scale
Found = dict[str, tuple[Any, ...]]


@pytest.fixture(autouse=True)
def low_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 64 rows, of which the small weights here have several."""
    monkeypatch.setattr(gptq_tiles, "_HEIGHT", 64)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DTYPE)


LANES = [[normal(90, 256, seed=lane), normal(90, 384, seed=10 + lane)] for lane in range(5)]
WEIGHTS = {name: normal(*shape, seed=index) for index, (name, shape) in enumerate(SHAPES.items())}


def job(preset: str, options: GptqOptions | None = None) -> Assignment:
    algorithm = "rtn" if options is None else "gptq"
    return Assignment(scheme=scheme_from_preset(preset, ["Linear"]), algorithm=algorithm, options=options, group=0)


@dataclass
class Step:
    """A step, as each worker quantizes it."""

    options: GptqOptions = field(default_factory=GptqOptions)
    preset: str = "W4A16"
    names: Sequence[str] = tuple(SHAPES)
    goes_on: bool = True

    def jobs(self) -> dict[str, Assignment]:
        solved, nearest = job(self.preset, self.options), job(self.preset)
        return {name: solved if name in ("q", "k", "v", "down") else nearest for name in self.names}

    def weights(self) -> dict[str, torch.Tensor]:
        own = {name: normal(64, 256, seed=20 + place) * (1 + place) for place, name in enumerate(GLOBAL)}
        return {name: weight for name, weight in (WEIGHTS | own).items() if name in self.names}

    def __call__(self, workers: Any) -> Found:
        """Quantize all modules; return for each its algorithm, numbers and packed tensors."""
        weights, jobs, found = self.weights(), self.jobs(), {}
        for rounded in self.rounded(workers, weights, jobs):
            name, pieces = rounded.name, rounded.pieces
            packed = [piece.tensors for piece in pieces]
            tensors = join_rows(name, packed, weights[name].shape[1], jobs[name].scheme, {}) if rounded.is_here else {}
            numbers = (pieces[0].algorithm, rounded.size, rounded.loss, pieces[0].damping, rounded.warning)
            found[name] = (*numbers, {part: tensor.clone() for part, tensor in tensors.items()})
            if self.goes_on:  # the run replaces the original weight, which must not be read any more
                weights[name] = torch.full_like(weights[name], torch.nan)
        return found

    def rounded(self, workers: Any, weights: dict[str, torch.Tensor], jobs: dict[str, Assignment]) -> Iterator[Rounded]:
        statistics = measured(workers, [name for name in READ if name in self.names])
        rounding = Rounding(
            jobs=jobs,
            weight_of=weights.__getitem__,
            shape_of=lambda name: weights[name].shape,
            dtype_of=lambda name: weights[name].dtype,
            scale_dtype_of=lambda name: DTYPE,
            statistics=statistics,
            siblings=dict.fromkeys(GLOBAL, "fused"),
            device=torch.device("cpu"),
            workers=workers,
            writer_of=lambda name: list(weights).index(name) % workers.size,
            goes_on=self.goes_on,
        )
        for one in round_modules(self.names, rounding):
            yield one
            statistics.pop(one.name, None)


def measured(workers: Any, names: Sequence[str]) -> Any:
    """The statistics of the inputs, of lanes that are divided among the workers."""
    modules = {name: nn.Linear(SHAPES[name][1], 1).to(DTYPE) for name in names}

    def run(before: Callable[[int], None], after: Callable[[], None]) -> None:
        own = range(workers.rank, len(LANES), workers.size)
        for turn in range(-(-len(LANES) // workers.size)):
            if turn < len(own):
                before(turn)
                for name in names:
                    modules[name](LANES[own[turn]][READ[name]])
            after()

    with torch.no_grad():
        needs = dict.fromkeys(names, Needs(hessian=True))
        return collect_statistics(modules, needs, run, torch.device("cpu"), workers=workers)


def assert_same(one: Found, other: Found) -> None:
    assert sorted(one) == sorted(other)
    for name in one:
        assert one[name][:-1] == other[name][:-1]
        assert list(one[name][-1]) == list(other[name][-1])
        for part, tensor in one[name][-1].items():
            assert tensor.dtype == other[name][-1][part].dtype
            assert torch.equal(tensor, other[name][-1][part]), (name, part)


def same_for_any_number(step: Step) -> Found:
    """Require that all workers of all runs have the same results, and return them."""
    (alone,) = in_threads(1, step)
    assert sorted(alone) == sorted(step.names)
    for size in SIZES[1:]:
        for found in in_threads(size, step):
            assert_same(found, alone)
    return alone


def hessian_of(name: str) -> torch.Tensor:
    total = HessianAccumulator(SHAPES[name][1])
    for lane in LANES:
        total.add(lane[READ[name]])
        total.end_lane()
    return total.hessian_II


def test_tensors_are_those_of_whole_weights() -> None:
    found = same_for_any_number(Step())
    jobs = Step().jobs()
    for names in (("q", "k", "v"), ("down",)):
        args = jobs[names[0]].scheme.weights
        whole = quantize_siblings([WEIGHTS[name] for name in names], hessian_of(names[0]), args, scale_dtype=DTYPE)
        for name, result in zip(names, whole, strict=True):
            expected = compress_module(name, result, jobs[name].scheme)
            assert found[name][0] == "gptq"
            assert all(torch.equal(tensor, found[name][-1][part]) for part, tensor in expected.items())
            assert found[name][2] == pytest.approx(result.loss)
    for name in ("plain", "idle"):
        result = quantize_rtn(WEIGHTS[name], jobs[name].scheme.weights, scale_dtype=DTYPE)
        expected = compress_module(name, result, jobs[name].scheme)
        assert all(torch.equal(tensor, found[name][-1][part]) for part, tensor in expected.items())


@pytest.mark.parametrize("options", [GptqOptions(), GptqOptions(fallback="rtn")])
@pytest.mark.parametrize("limit", [1, 64 * 256 + 1, 200 * 256])
def test_windows_may_be_smaller_than_a_batch(options: GptqOptions, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (expected,) = in_threads(1, Step(options))
    monkeypatch.setattr(solve_division, "NUMBERS_AT_A_TIME", limit)
    assert_same(same_for_any_number(Step(options)), expected)


def test_refined_weights() -> None:
    found = same_for_any_number(Step(GptqOptions(refine=2), preset="W3A16"))
    args = scheme_from_preset("W3A16", ["Linear"]).weights
    (before,) = quantize_siblings([WEIGHTS["down"]], hessian_of("down"), args, scale_dtype=DTYPE)
    after = refine(WEIGHTS["down"], before, hessian_of("down"), args, sweeps=2, dampening_frac=before.damping)
    assert found["down"][2] == pytest.approx(after.loss)
    assert after.loss < before.loss


def test_modules_that_no_later_batch_needs_stay_with_their_writer() -> None:
    step = Step(names=("idle", "gate", "up"), goes_on=False)
    (alone,) = in_threads(1, step)
    found = in_threads(2, step)
    for place, name in enumerate(step.names):
        assert [bool(one[name][-1]) for one in found] == [place % 2 == rank for rank in range(2)]
        assert_same({name: found[place % 2][name]}, {name: alone[name]})
        assert found[0][name][:-1] == found[1][name][:-1] == alone[name][:-1]


@pytest.mark.parametrize("goes_on", [True, False])
def test_siblings_in_different_windows_share_a_global_scale(goes_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(preset="NVFP4A16", names=("idle", *GLOBAL), goes_on=goes_on)
    expected = grid.global_scale_of(*(step.weights()[name] for name in GLOBAL))
    monkeypatch.setattr(solve_division, "NUMBERS_AT_A_TIME", 1)
    for size in SIZES:
        for name in GLOBAL:
            packed = [found[name][-1] for found in in_threads(size, step) if found[name][-1]]
            assert len(packed) == (size if goes_on else 1)
            assert all(torch.equal(tensors["weight_global_scale"], expected) for tensors in packed)


# Errors


def fail_at(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let the solve of the tile with the first rows of `k` fail, which also has rows of `q`."""
    real = solves.solve_tiles

    def solve(weights: Any, tiles: Any, *rest: Any) -> Any:
        for tile in tiles:
            if any(len(weights[piece.weight]) == SHAPES["k"][0] and not piece.start for piece in tile):
                raise error
        return real(weights, tiles, *rest)

    monkeypatch.setattr(solves, "solve_tiles", solve)


def solver_of_the_tile(size: int) -> tuple[int, int]:
    """The worker that solves the first rows of `k`, and the one that has their Hessian."""
    step = Step()

    def run(workers: Any) -> tuple[int, int]:
        weights, owner = step.weights(), measured(workers, ["q"])["q"].owner
        for one in step.rounded(workers, weights, step.jobs()):
            if one.name == "k":
                return one.pieces[0].solver, owner
        raise AssertionError

    return in_threads(size, run)[0]


@pytest.mark.parametrize("limit", [1, 2**30])
def test_modules_of_a_tile_that_fails_are_rounded_to_nearest(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    solver, owner = solver_of_the_tile(3)
    assert solver != owner
    monkeypatch.setattr(solve_division, "NUMBERS_AT_A_TIME", limit)
    fail_at(monkeypatch, QuantizationError("a scale is not finite"))
    step = Step(GptqOptions(fallback="rtn"))
    found = same_for_any_number(step)
    assert {name: one[0] for name, one in found.items() if one[0] == "gptq"} == dict.fromkeys(("v", "down"), "gptq")
    for name in ("q", "k"):
        assert found[name][4] == f"warning: {name} rounded to nearest: a scale is not finite"
        result = quantize_rtn(WEIGHTS[name], step.jobs()[name].scheme.weights, scale_dtype=DTYPE)
        expected = compress_module(name, result, step.jobs()[name].scheme)
        assert all(torch.equal(tensor, found[name][-1][part]) for part, tensor in expected.items())


@pytest.mark.parametrize("size", SIZES)
def test_an_error_ends_all_workers(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, QuantizationError("a scale is not finite"))
    found = outcomes(size, Step())
    failed = [rank for rank, one in enumerate(found) if isinstance(one, QuantizationError)]
    assert len(failed) == 1
    for rank, one in enumerate(found):
        assert "a scale is not finite" in str(one)
        assert rank in failed or (isinstance(one, WorkerError) and f"worker {failed[0]} on" in str(one))


def lack(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("place", ["a tile", "factors to send", "factors to receive", "results"])
def test_all_workers_recover_if_memory_runs_out_on_one(place: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if place == "a tile":
        fail_at(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."))
    elif place == "factors to send":
        monkeypatch.setattr(solves, "_memory_for", lack)
    elif place == "factors to receive":
        monkeypatch.setattr(Factored, "empty", lack)
    else:
        monkeypatch.setattr(packed_pieces._FlatPiece, "of", lack)

    def run(workers: ThreadWorkers) -> bool:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            Step()(workers)
        workers.exchange("the workers go on together")
        return is_out_of_memory(caught.value) and is_shared(caught.value, workers)

    assert all(in_threads(size, run))


# The division


def test_work_is_divided_evenly() -> None:
    solves_ = [Solve(num_in_features=width, owner=index % 4, rows=[256] * 16) for index, width in enumerate([512] * 4)]
    found = divided(solves_, 4)
    counts = [sum(workers.count(rank) for workers in found.workers) for rank in range(4)]
    assert counts == [16] * 4
    assert divided([replace(solves_[1], is_divided=False)], 4).workers == [[1] * 16]
    alone = [replace(one, owner=0) for one in solves_]
    assert list(divided(alone, 1).order) == [0, 1, 2, 3]


def test_factors_are_used_in_the_order_in_which_they_are_complete() -> None:
    wide, narrow = (Solve(num_in_features=width, owner=rank, rows=[64]) for rank, width in enumerate((1024, 256)))
    assert list(divided([wide, narrow], 2).order) == [1, 0]


def test_windows_hold_all_weights_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve_division, "NUMBERS_AT_A_TIME", 10)
    sizes = [4, 6, 1, 30, 2, 9, 1]
    found = [sizes[one] for one in windows(sizes, are_joined=True)]
    assert found == [[4, 6], [1], [30], [2], [9, 1]]
    assert [sizes[one] for one in windows(sizes, are_joined=False)] == [[size] for size in sizes]
    assert list(windows([], are_joined=True)) == []
