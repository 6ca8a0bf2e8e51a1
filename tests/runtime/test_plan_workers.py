"""What is planned for several workers: operations, messages, and how far the work divides."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import runtime
from runtime.algorithms.hessian import HessianAccumulator
from runtime.checkpoint.reader import Checkpoint
from runtime.model.experts import all_tokens_seen
from runtime.planning.distribution import Distribution, SharedInput, StepWork, share
from runtime.planning.rates import Rates
from runtime.planning.request import plan_artifact
from runtime.planning.shapes import ShapeRun
from runtime.weights.parameters import Weights
from tests.runtime.place import Place, Run, assert_refused
from tests.runtime.small import Small

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
            assert footprint.routed == counted.get_total_flops()


def test_messages_are_the_panels_of_lanes_that_owners_do_not_have() -> None:
    accumulator = HessianAccumulator(300)
    panels = sum(accumulator.lane_panel(left).nbytes for left in accumulator.panels())
    one = SharedInput(name="a", width=300, num_tokens=10.0, sum_bytes=panels, small_bytes=0)
    step = StepWork(measured=1.0, propagated=1.0, inputs=(one,))
    # 5 lanes on 2 workers: worker 0 owns the sum and has lanes 0, 2 and 4; then it sends the diagonal.
    assert share(step, 5, 2, RATES).sent_bytes == (4 * 300, 2 * panels)
    assert share(step, 5, 1, RATES).sent_bytes == (0,)
