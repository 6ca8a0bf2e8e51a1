"""What is planned for several workers: operations, messages, and how far the work divides."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import runtime
from runtime.algorithms.hessian import HessianAccumulator
from runtime.checkpoint.reader import Checkpoint
from runtime.errors import UsageError
from runtime.planning.distribution import Distribution, share
from runtime.planning.rates import Rates
from runtime.planning.request import memory_here, plan_artifact
from runtime.planning.shapes import ShapeRun
from runtime.planning.step_work import panel_bytes
from runtime.planning.work import PassWork, SharedInput, StepWork
from runtime.weights.parameters import Weights
from tests.runtime.place import ROOT, Place, Run, assert_refused
from tests.runtime.small import NARROW_W4, RECIPES, Small, token_batches

PROGRAM = ROOT / "tests" / "runtime" / "sent_bytes.py"

RATES = Rates.of("cpu", torch.float32)
# torch counts fused attention on other devices only.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
        query, key, value
    )
}


def distribution(small: Small, **options: Any) -> Distribution:
    given = {"num_samples": 16, "seq_len": 64, "batch_size": 4, "workers": 2}
    found = plan_artifact(small.load(), **{**given, **options}).plan.distribution
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_operations_are_those_that_torch_counts(name: str, request: pytest.FixtureRequest) -> None:
    small: Small = request.getfixturevalue(name)
    artifact = small.load()
    model, empty = artifact.empty_model(), artifact.empty_model()
    Weights(artifact, Checkpoint(small.weights), torch.float32, model).load(
        model, artifact.manifest.parameters, torch.device("cpu")
    )
    ids = torch.randint(2, 250, (4, 32))
    values: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shapes: dict[str, Any] = {key: value.to("meta") for key, value in values.items()}
    with ShapeRun(artifact, empty, torch.float32, "cpu") as run, torch.no_grad():
        for subgraph in artifact.subgraphs:
            footprint = run(subgraph, {key: shapes[key] for key in subgraph.input_names})
            assert footprint is not None
            given = {key: values[key] for key in subgraph.input_names}
            with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counted:
                values |= subgraph.forward(model, **given)
            shapes |= footprint.outputs
            assert footprint.routed.operations == counted.get_total_flops()


def test_messages_are_the_panels_of_lanes_that_owners_do_not_have() -> None:
    accumulator = HessianAccumulator(300)
    panels = sum(accumulator.lane_panel(left).nbytes for left in accumulator.panels())
    assert panel_bytes(300) == panels
    one = SharedInput(
        name="a", width=300, num_tokens=10.0, has_hessian=True, lane_bytes=panels, small_bytes=7, final_bytes=1200
    )
    step = StepWork(measured=PassWork(products=1.0), propagated=PassWork(products=1.0), inputs=(one,))
    # Five lanes on two workers: worker 0 owns the sum, and has lanes 0, 2 and 4.
    assert share(step, 5, 2, RATES).sent_bytes == (3 * 7 + 1200, 2 * (panels + 7))
    assert share(step, 5, 1, RATES).sent_bytes == (0,)


_STATIC = "{num_bits: 8, type: int, strategy: tensor, symmetric: true, dynamic: false}"
_W8 = "{num_bits: 8, type: int, strategy: channel, symmetric: true}"
CALLS = {
    "gptq": ("llama", f"GPTQModifier: {{{RECIPES['W4A16']}}}"),
    "smoothquant": (
        "llama",
        f"SmoothQuantModifier: {{}}\nGPTQModifier: {{config_groups: {{a: {{targets: [Linear], weights: {_W8}, "
        f"input_activations: {_STATIC}}}}}, ignore: [lm_head]}}",
    ),
    "mixture": ("qwen3_moe", f"GPTQModifier: {{{NARROW_W4}}}"),
}
NUM_SAMPLES, SEQ_LEN = 40, 128  # 5120 tokens are 5 lanes


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory, llama: Small, qwen3_moe: Small) -> Callable[[int], dict[str, Any]]:
    """Return, for a number of workers, by call the bytes that each worker has sent; a start executes all calls."""
    folder = tmp_path_factory.mktemp("sent")
    torch.save(token_batches([(2, SEQ_LEN)] * (NUM_SAMPLES // 2)), folder / "batches.pt")
    models = {"llama": llama, "qwen3_moe": qwen3_moe}

    @functools.cache
    def run(size: int) -> dict[str, Any]:
        calls = [
            {
                "artifact": str(models[model].artifact),
                "weights": str(models[model].weights),
                "recipe": text,
                "batches": str(folder / "batches.pt"),
                "out": str(folder / f"{name}-{size}"),
            }
            for name, (model, text) in CALLS.items()
        ]
        path = folder / f"calls-{size}.json"
        path.write_text(json.dumps(calls))
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        command = [sys.executable, "-m", *torchrun, str(PROGRAM), str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return dict(zip(CALLS, json.loads(path.read_text()), strict=True))

    return run


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.wide)])
@pytest.mark.parametrize("name", CALLS)
def test_workers_send_what_is_planned(
    sent: Callable[[int], dict[str, Any]], name: str, size: int, request: pytest.FixtureRequest
) -> None:
    model, text = CALLS[name]
    recipe = runtime.Recipe.from_text(text, "recipe.yaml")
    small: Small = request.getfixturevalue(model)
    found = distribution(small, recipe=recipe, workers=size, num_samples=NUM_SAMPLES, seq_len=SEQ_LEN, batch_size=2)
    planned = [sum(counts) for counts in zip(*(one.sent_bytes for one in found.shares), strict=True)]
    assert [counts["tensors"] for counts in sent(size)[name]] == pytest.approx(planned, rel=0.05)
    assert sum(planned) == found.sent_bytes


def test_lanes_limit_how_far_a_run_divides(llama: Small) -> None:
    found = distribution(llama, num_samples=64, seq_len=256)
    assert found.num_lanes == 16
    speedups = [replace(found, num_workers=size).speedup for size in (1, 2, 4, 16, 32)]
    assert speedups[0] == 1
    assert speedups[:4] == sorted(speedups[:4])
    assert all(speedup < size for speedup, size in zip(speedups[1:], (2, 4, 16, 16), strict=True))
    slow = replace(found, num_workers=4, rates=replace(found.rates, link=1e6))
    assert slow.speedup < replace(found, num_workers=4).speedup


def test_each_worker_has_the_values_of_its_lanes(llama: Small) -> None:
    options = {"num_samples": 64, "seq_len": 256, "batch_size": 4}
    alone, four = (plan_artifact(llama.load(), **options, workers=size).plan for size in (1, 4))
    assert alone.distribution is None
    assert alone.activation_bytes / 4 <= four.activation_bytes < alone.activation_bytes * 0.3  # a mask is shared
    assert all(step.sent == step.most_sent == 0 for step in alone.steps)
    assert [step.sent > step.most_sent > 0 for step in four.steps] == [True, True, True, False]


def test_the_command_prints_the_plan_of_several_workers(place: Place, run: Run) -> None:
    command = ["plan", str(place.artifact), "--samples", "64", "--seq-len", "256", "--device", "cpu"]
    code, said, _ = run([*command, "--workers", "32", "--bandwidth", "25GB/s"])
    assert code == 0
    lines = [line for line in said.splitlines() if line.startswith(("workers", "sent", "serial", "speedup", "    "))]
    assert lines[0].split("  ")[-1] == "figures above are of each; the samples are in 16 lanes"
    assert "more than 16 workers only share solves and writing" in lines[1]
    assert "25.0 GB/s between workers" in lines[-1]
    facts = json.loads(run([*command, "--workers", "2", "--json"])[1])
    assert facts["distribution"]["sent_bytes"] == sum(step["sent"] for step in facts["subgraphs"]) > 0
    assert 1 < facts["distribution"]["speedup"] <= 2
    assert 0 < facts["distribution"]["serial_share"] < 1
    assert json.loads(run([*command, "--json"])[1])["distribution"] is None
    for text in ("25GB", "0GB/s", "fast", "/s"):
        assert_refused(run([*command, "--workers", "2", "--bandwidth", text]), "--bandwidth", "25GB/s")


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": 1.5}, {"bandwidth": 0}, {"bandwidth": "25GB/s"}])
def test_arguments_of_the_wrong_kind_are_rejected(llama: Small, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        plan_artifact(llama.load(), num_samples=8, seq_len=40, batch_size=4, **options)


def test_workers_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.planning.request.available_bytes", lambda: 8 * 10**9)
    monkeypatch.setattr("runtime.planning.request.resident_bytes", lambda: 10**9)
    assert memory_here(torch.device("cpu")).host == 9 * 10**9
    for name, number in {"WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4, "RANK": 5, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(number))
    monkeypatch.setenv("MASTER_ADDR", "node1")
    assert memory_here(torch.device("cpu")).host == 3 * 10**9
