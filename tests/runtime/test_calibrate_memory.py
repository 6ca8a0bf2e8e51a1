from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from torch import nn

import runtime
from runtime.calibration import ModuleReport
from runtime.chain import LoadedSubgraph
from tests.runtime.small import (
    RECIPES,
    Small,
    calibrate,
    directory_bytes,
    recipe,
    token_batches,
)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often each safetensors file is opened for reading."""
    counts: dict[str, int] = {}
    real = safetensors.safe_open

    def counting(path: Any, *args: Any, **kwargs: Any) -> Any:
        counts[Path(path).name] = counts.get(Path(path).name, 0) + 1
        return real(path, *args, **kwargs)

    monkeypatch.setattr(safetensors, "safe_open", counting)
    yield counts


def watch_loaded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of the parameters that hold memory, at each step of the chain."""
    steps: list[list[str]] = []
    real = LoadedSubgraph.forward

    def forward(self: LoadedSubgraph, model: nn.Module, **inputs: Any) -> dict[str, Any]:
        tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        stored = model.state_dict(keep_vars=True)
        loaded = [name for name, tensor in tensors.items() if name in stored and not tensor.is_meta]
        assert loaded == [name for name in stored if name in self.entry.parameters]
        steps.append(loaded)
        return real(self, model, **inputs)

    monkeypatch.setattr(LoadedSubgraph, "forward", forward)
    return steps


def test_calibration_holds_one_subgraph_and_opens_each_shard_once(
    sharded_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: dict[str, int]
) -> None:
    steps = watch_loaded(monkeypatch)
    plan = recipe(RECIPES["W4A16"], modifier="GPTQModifier")
    calibrate(sharded_llama, plan, tmp_path / "out")
    # Three batches, each measured and then propagated, in two layers; nobody needs the last layer's outputs.
    assert [step[-1].split(".")[2] for step in steps] == ["0"] * 6 + ["1"] * 6 + ["2"] * 3
    assert opened == {path.name: 1 for path in sorted(sharded_llama.weights.glob("*.safetensors"))}


def test_evaluation_holds_one_subgraph_and_opens_each_shard_once(
    sharded_llama: Small, monkeypatch: pytest.MonkeyPatch, opened: dict[str, int]
) -> None:
    steps = watch_loaded(monkeypatch)
    runtime.evaluate(sharded_llama.load(), weights=sharded_llama.weights, batches=token_batches())
    assert len(steps) == 4 * 3
    assert opened == {path.name: 1 for path in sorted(sharded_llama.weights.glob("*.safetensors"))}


def test_round_to_nearest_runs_nothing(llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: LoadedSubgraph, model: nn.Module, **inputs: Any) -> dict[str, Any]:
        raise AssertionError("round-to-nearest measures nothing")

    monkeypatch.setattr(LoadedSubgraph, "forward", forward)
    without = calibrate(llama, recipe(RECIPES["W4A16"]), tmp_path / "without", batches=[])
    calibrate(llama, recipe(RECIPES["W4A16"]), tmp_path / "with")
    assert directory_bytes(tmp_path / "with") == directory_bytes(tmp_path / "without")
    assert without.modules[0] == ModuleReport(
        name="model.layers.0.self_attn.q_proj",
        algorithm="rtn",
        loss=without.modules[0].loss,
        damping=0.0,
        num_tokens=0,
        scheme="4 bit int weights in groups of 128",
    )


def test_nothing_is_propagated_past_the_last_module_that_is_measured(
    llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = watch_loaded(monkeypatch)
    plan = recipe("targets: ['re:model.layers.0.mlp'], scheme: W4A16", modifier="GPTQModifier")
    result = calibrate(llama, plan, tmp_path / "out")
    assert len(steps) == 3
    assert len(result.modules) == 3
