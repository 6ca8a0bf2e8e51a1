"""Experts that are solved in stacks: the packed tensors are the same for any number of workers, also after errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from runtime.algorithms import gptq_cuda, gptq_options, gptq_stack_factors
from runtime.errors import QuantizationError
from runtime.formats.compressed import join_rows
from runtime.formats.presets import scheme_from_preset
from runtime.quantize import solve_stacks
from runtime.quantize.measuring import collect_statistics
from runtime.quantize.rounding import Rounding, round_modules
from runtime.quantize.statistics import Needs
from runtime.recipe.modifiers import GptqOptions
from runtime.recipe.recipe import Assignment
from tests.runtime.worker_threads import in_threads

NUM_EXPERTS, STACKED, NUM_LANES = 7, 4, 3
SHAPES = {"gate": (24, 64), "up": (40, 64), "down": (64, 32)}
NAMES = [f"{expert}.{part}" for expert in range(NUM_EXPERTS) for part in SHAPES]
Found = dict[str, tuple[Any, ...]]


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def input_of(name: str) -> str:
    expert, part = name.split(".")
    return f"{expert}.{'inner' if part == 'down' else 'outer'}"


INPUTS = {name: SHAPES[name.split(".")[1]][1] for name in NAMES}
LANES = [
    {
        input_of(name): normal(60, width, seed=100 * lane + 3 * place)
        for place, (name, width) in enumerate(INPUTS.items())
    }
    for lane in range(NUM_LANES)
]


@pytest.fixture(autouse=True)
def queued(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Solve on the CPU as on a GPU without the kernel, in small stacks; return the sizes of all stacks."""
    monkeypatch.setattr(gptq_options, "is_asynchronous", lambda device: True)
    monkeypatch.setattr(gptq_cuda, "has_triton", lambda: False)
    monkeypatch.setattr(gptq_stack_factors, "num_stacked", lambda num_in, num_experts: STACKED)
    sizes, real = [], solve_stacks.solve_together

    def solve(weights: Sequence[Any], *rest: Any) -> Any:
        sizes.append(len(weights))
        return real(weights, *rest)

    monkeypatch.setattr(solve_stacks, "solve_together", solve)
    return sizes


def measured(workers: Any) -> Any:
    modules = {name: nn.Linear(width, 1).bfloat16() for name, width in INPUTS.items()}

    def run(before: Callable[[int], None], after: Callable[[], None]) -> None:
        own = range(workers.rank, NUM_LANES, workers.size)
        for turn in range(-(-NUM_LANES // workers.size)):
            if turn < len(own):
                before(turn)
                for name, module in modules.items():
                    module(LANES[own[turn]][input_of(name)])
            after()

    with torch.no_grad():
        return collect_statistics(
            modules, dict.fromkeys(NAMES, Needs(hessian=True)), run, torch.device("cpu"), workers=workers
        )


def quantized(workers: Any, preset: str, options: GptqOptions, *, are_experts: bool = True, bad: str = "") -> Found:
    scheme = scheme_from_preset(preset, ["Linear"])
    if scheme.weights.strategy == "group":
        scheme.weights.group_size = 16
    jobs = dict.fromkeys(NAMES, Assignment(scheme=scheme, algorithm="gptq", options=options, group=0))
    weights = {name: normal(*SHAPES[name.split(".")[1]], seed=place) for place, name in enumerate(NAMES)}
    if bad:
        weights[bad][3, 5] = torch.inf
    statistics, found = measured(workers), {}
    step = Rounding(
        jobs=jobs,
        weight_of=weights.__getitem__,
        shape_of=lambda name: weights[name].shape,
        dtype_of=lambda name: weights[name].dtype,
        scale_dtype_of=lambda name: torch.bfloat16,
        statistics=statistics,
        siblings={name: name.split(".")[0] for name in NAMES if "down" not in name},
        device=torch.device("cpu"),
        workers=workers,
        experts={name: ("mixture", int(name.split(".")[0])) for name in NAMES} if are_experts else {},
        mixture_sizes={"mixture": len({name.split(".")[0] for name in NAMES})},
    )
    for one in round_modules(NAMES, step):
        packed = [piece.tensors for piece in one.pieces]
        tensors = join_rows(one.name, packed, weights[one.name].shape[1], scheme, {})
        found[one.name] = (one.pieces[0].algorithm, one.size, one.loss, one.warning, tensors)
        weights[one.name] = torch.full_like(weights[one.name], torch.nan)  # the run goes on with the quantized weight
        statistics.pop(one.name)
    return found


def assert_same(one: Found, other: Found, names: Sequence[str] = NAMES) -> None:
    for name in names:
        assert one[name][:4] == other[name][:4], name
        assert all(torch.equal(tensor, other[name][4][part]) for part, tensor in one[name][4].items()), name


@pytest.mark.parametrize("preset", ["W4A16", "NVFP4A16"])
def test_results_are_the_same_for_any_number_of_workers(preset: str, queued: list[int]) -> None:
    options = GptqOptions()
    (alone,) = in_threads(1, lambda workers: quantized(workers, preset, options))
    assert sorted(alone) == sorted(NAMES)
    assert sorted(queued) == [3, 3, STACKED, STACKED], "gate and up of experts, and down"
    (single,) = in_threads(1, lambda workers: quantized(workers, preset, options, are_experts=False))
    assert len(queued) == 4
    for size in (2, 3):
        for found in in_threads(size, lambda workers: quantized(workers, preset, options)):
            assert_same(found, alone)
    for name in NAMES:
        assert alone[name][1] == pytest.approx(single[name][1], rel=1e-4)
        assert alone[name][2] == pytest.approx(single[name][2], rel=0.02)


def test_an_expert_that_fails_is_named_or_rounded_to_nearest() -> None:
    with pytest.raises(QuantizationError, match=r"^5\.up: a weight of shape \[40, 64\] holds numbers that are not"):
        in_threads(1, lambda workers: quantized(workers, "W4A16", GptqOptions(), bad="5.up"))


def test_an_expert_whose_hessian_fails_falls_back_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    options = GptqOptions(fallback="rtn")
    (expected,) = in_threads(1, lambda workers: quantized(workers, "W4A16", options))
    for lane in LANES:
        monkeypatch.setitem(lane, "2.outer", lane["2.outer"] * 1e18)  # products overflow in float32
    (found,) = in_threads(1, lambda workers: quantized(workers, "W4A16", options))
    failed = ["2.gate", "2.up"]
    assert_same(found, expected, [name for name in NAMES if name not in failed])
    for name in failed:
        assert found[name][0] == "rtn" and "does not factor" in found[name][3]
