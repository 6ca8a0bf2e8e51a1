"""Measured rates: the file that holds them, and the seconds that they predict."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from runtime.cli.plan import _machine
from runtime.errors import DataError
from runtime.planning.machine import Machine, read_machine
from runtime.planning.measure import measure
from runtime.planning.rates import CPU_CORE, CPU_FLOAT32, PassRates, rate_of
from runtime.planning.request import plan_artifact
from runtime.planning.seconds import PHASES
from runtime.planning.stopwatch import Stopwatch, fitted
from tests.runtime.small import NARROW_W4, Small

HALVES = PassRates(products=4e11, attention=4e10, moving=4e10)
MACHINE = Machine(
    device="cpu",
    name="a processor",
    threads=2,
    torch_version="2.13",
    passes={"bfloat16": HALVES, "float32": CPU_FLOAT32},
    base=replace(CPU_CORE, call_s=1e-6),
)


def test_a_file_has_the_rates_of_each_dtype(tmp_path: Path) -> None:
    MACHINE.write(tmp_path / "machine.json")
    found = read_machine(tmp_path / "machine.json", "cpu")
    assert found == MACHINE
    assert found.rates(torch.bfloat16).passes == HALVES
    assert found.rates(torch.float64, link=7.0).passes == found.base.passes
    assert found.rates(torch.float64, link=7.0).link == 7.0
    assert found.rates(torch.float32).origin == "measured on a processor, 2 threads"


def changed(**values: Any) -> str:
    return json.dumps(json.loads(json.dumps(VALUES)) | values)


VALUES: dict[str, Any] = {}


@pytest.fixture(scope="module", autouse=True)
def _values(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("machine") / "machine.json"
    MACHINE.write(path)
    VALUES.update(json.loads(path.read_text()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lambda: "", "is no machine file"),
        (lambda: "[" * 100_000, "is no machine file"),
        (lambda: "{}", "is no machine file"),
        (lambda: " " * (2**20 + 1), "more than 1,048,576 bytes"),
        (lambda: changed(seqbuild_machine=2), "of version 2, and this program reads 1"),
        (lambda: changed(rates={}), "is no machine file"),
        (lambda: changed(more=1), "is no machine file"),
        (lambda: changed(device="tpu"), "device is 'tpu'"),
        (lambda: changed(device="cuda"), "has the rates of a cuda device, and the plan is for cpu"),
        (lambda: changed(name="x" * 201), "more than 200 characters"),
        (lambda: changed(name="EPYC\nfits"), r"name is 'EPYC\nfits'"),
        (lambda: changed(threads=0), "threads is 0"),
        (lambda: changed(rates=VALUES["rates"] | {"sums": 0}), "sums is 0"),
        (lambda: changed(rates=VALUES["rates"] | {"sums": -1.0}), "sums is -1"),
        (lambda: changed(rates=VALUES["rates"] | {"sums": "fast"}), "is no machine file"),
        (lambda: changed(rates=VALUES["rates"] | {"nearest": []}), "nearest, unpacking or rounding_inputs is empty"),
        (lambda: changed(rates=VALUES["rates"] | {"nearest": [["int4-group", 1e99]]}), "of a kind of grid is 1e+99"),
        (lambda: changed().replace("4e11", "1e999").replace("400000000000.0", "1e999"), "is no machine file"),
    ],
)
def test_a_wrong_file_is_one_error(tmp_path: Path, text: Any, message: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(text())
    with pytest.raises(DataError) as error:
        read_machine(path, "cpu")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pipe_is_no_machine_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="cannot read the machine file"):
        read_machine(tmp_path / "pipe", "cpu")


def test_parts_of_seconds_are_told_apart_by_sizes() -> None:
    parts = [(1000.0, 10.0), (100.0, 100.0), (3000.0, 3.0)]
    seconds = [2e-3 * one + 5e-3 * two for one, two in parts]
    assert fitted(parts, seconds, (1e-3, 1e-3)) == pytest.approx([2e-3, 5e-3], rel=0.2)
    alike = fitted([(1.0, 1.0)], [10.0], (1.0, 4.0))
    assert alike == pytest.approx([2.0, 8.0])


def test_similar_kinds_share_a_rate() -> None:
    kinds = (("int4-group", 1.0), ("int8-channel", 2.0), ("float8-channel", 3.0), ("int4-group-mse", 4.0))
    assert [rate_of(kinds, kind) for kind in ("int4-group", "int3-group", "float4-group", "float8-group-mse")] == [
        *(1.0, 1.0, 3.0, 4.0)
    ]


def test_seconds_are_work_over_rates(llama: Small) -> None:
    text = f"GPTQModifier: {{{NARROW_W4}}}"
    given: dict[str, Any] = {"num_samples": 16, "seq_len": 64, "batch_size": 4}
    given["recipe"] = runtime.Recipe.from_text(text, "recipe.yaml")
    plan = plan_artifact(llama.load(), **given, machine=MACHINE).plan
    found = plan.seconds
    assert tuple(found.phases) == PHASES
    assert found.total == pytest.approx(found.start + found.publish + sum(map(sum, (s.values() for s in found.steps))))
    assert all(step.seconds == seconds for step, seconds in zip(plan.steps, found.steps, strict=True))
    slow = replace(MACHINE.base, passes=replace(CPU_FLOAT32, products=1.0), factorization=1e3)
    slower = plan_artifact(
        llama.load(),
        **given,
        machine=Machine(device="cpu", name="", threads=1, torch_version="", passes={}, base=slow),
    ).plan.seconds
    assert slower.phases["measure"] > 1e6
    assert slower.phases["solve"] > 100 * found.phases["solve"]
    assert slower.phases["load"] == found.phases["load"]
    twice = plan_artifact(llama.load(), **{**given, "num_samples": 32}, machine=MACHINE).plan.seconds
    assert twice.phases["propagate"] == pytest.approx(2 * found.phases["propagate"], rel=0.01)


@pytest.fixture
def small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Stopwatch.__init__

    def init(self: Stopwatch, device: torch.device) -> None:
        made(self, device)
        self.narrow, self.wide = 128, 256

    monkeypatch.setattr(Stopwatch, "__init__", init)
    monkeypatch.setattr("runtime.planning.measure.start_seconds", lambda device: 1.5)


@pytest.mark.usefixtures("small_matrices")
def test_a_measured_machine_plans(tmp_path: Path, llama: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code measures a GPU, where only the device differs."""
    monkeypatch.chdir(tmp_path)
    machine = measure(torch.device("cpu"))
    assert list(tmp_path.iterdir()) == [], "files of the measurement are removed"
    machine.write(tmp_path / "machine.json")
    assert read_machine(tmp_path / "machine.json", "cpu") == machine
    plan = plan_artifact(llama.load(), num_samples=4, seq_len=32, batch_size=4, machine=machine).plan
    assert 1.5 < plan.seconds.total < 60


def test_options_of_rates() -> None:
    with pytest.raises(runtime.SeqbuildError, match="--measure and --machine are both sources of rates"):
        _machine(True, Path("m"), None, "cpu")
    with pytest.raises(runtime.SeqbuildError, match="--save-machine needs rates to write"):
        _machine(False, None, Path("m"), "cpu")
