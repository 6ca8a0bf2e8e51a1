"""The activations of the original model beside those of the quantized one: GPTQ with `target: original`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import runtime
import runtime.quantize.solves
from runtime.chain import LoadedSubgraph
from runtime.errors import RecipeError
from runtime.quantize.original_inputs import OriginalInputs
from runtime.streaming.activations import Activations, Budget
from tests.runtime.small import (
    NARROW_W4,
    Small,
    Stop,
    calibrate,
    directory_bytes,
    load_transformers,
    nameless_bytes,
    read_tensors,
    recipe,
    stop_at,
    token_batches,
)

AWARE = recipe(f"{NARROW_W4}, target: original, strength: 0.75", modifier="GPTQModifier")
_GROUPS = "{num_bits: 4, strategy: group, group_size: 16}"
# Of each kind of change: what is only rounded, what is rescaled before, and a rounded cache.
MIXED = runtime.Recipe.from_text(
    f"""\
AWQModifier: {{}}
QuantizationModifier:
  config_groups: {{a: {{targets: ["re:.*layers.0.mlp.*", "re:.*layers.1.*o_proj"], weights: {_GROUPS}}}}}
GPTQModifier:
  config_groups: {{b: {{targets: ["re:.*[qkv]_proj", "re:.*[12].mlp.*"], weights: {_GROUPS}}}}}
  target: original
  kv_cache_scheme: {{num_bits: 8, type: float, strategy: tensor, dynamic: false, symmetric: true}}
""",
    "mixed.yaml",
)
PLAIN = recipe(NARROW_W4, modifier="GPTQModifier")
PLANS = {"aware": AWARE, "mixed": MIXED, "plain": PLAIN}
Done = Callable[[str], tuple[Any, Path]]


@pytest.fixture(scope="module")
def done(narrow_llama: Small, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """Run a recipe without a fault, once; returns the result and the checkpoint."""
    folder, found = tmp_path_factory.mktemp("done"), dict[str, Any]()

    def run(kind: str) -> tuple[Any, Path]:
        if kind not in found:
            found[kind] = calibrate(narrow_llama, PLANS[kind], folder / kind)
        return found[kind], folder / kind

    return run


@pytest.fixture
def drifts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """H and C of each solve, in order."""
    real, found = runtime.quantize.solves.factor_hessian, []

    def factor(hessian_II: torch.Tensor, *args: Any, drift_II: torch.Tensor | None = None, **more: Any) -> Any:
        found.append((hessian_II.clone(), None if drift_II is None else drift_II.clone()))
        return real(hessian_II, *args, drift_II=drift_II, **more)

    monkeypatch.setattr(runtime.quantize.solves, "factor_hessian", factor)
    return found


def inputs_of(model: nn.Module, name: str, batches: list[dict[str, Any]]) -> torch.Tensor:
    """All inputs of a module, as transformers computes them, [T, I]."""
    seen: list[torch.Tensor] = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return torch.cat(seen)


def test_the_drift_is_that_of_two_models(
    narrow_llama: Small, tmp_path: Path, drifts: list[tuple[torch.Tensor, torch.Tensor | None]]
) -> None:
    """Transformers runs the original model, and one whose earlier layers are quantized."""
    calibrate(narrow_llama, AWARE, tmp_path / "out")
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    modules = [f"model.layers.{layer}.{name}" for layer in range(3) for name in names]
    assert len(drifts) == len(modules)
    assert [drift_II is None for _, drift_II in drifts] == [name.startswith("model.layers.0.") for name in modules]
    original, partly = load_transformers(narrow_llama.weights), load_transformers(narrow_llama.weights)
    runtime.dequantize(tmp_path / "out", out=tmp_path / "plain")
    weights = read_tensors(tmp_path / "plain")
    for layer in (1, 2):
        for name, parameter in partly.named_parameters():
            if name.startswith(f"model.layers.{layer - 1}."):
                parameter.data = weights[name]
        for module, (hessian_II, drift_II) in zip(modules, drifts, strict=True):
            if not module.startswith(f"model.layers.{layer}."):
                continue
            original_TI, present_TI = (inputs_of(model, module, token_batches()) for model in (original, partly))
            assert drift_II is not None
            expected_II = (original_TI - present_TI).T @ present_TI
            scale = float(expected_II.abs().max())
            assert scale > 1e-3
            torch.testing.assert_close(drift_II, expected_II, rtol=1e-3, atol=1e-3 * scale)
            torch.testing.assert_close(hessian_II, present_TI.T @ present_TI, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("kind", "every", "number"), [("aware", 1, 14), ("mixed", 0, 16)])
def test_a_run_is_resumed_to_the_same_bytes(
    narrow_llama: Small,
    done: Done,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    every: int,
    number: int,
) -> None:
    """From saved values of both models, and by running finished layers again with the weights of each."""
    expected, files = done(kind)
    stop_at(monkeypatch, number)
    with pytest.raises(Stop):
        calibrate(narrow_llama, PLANS[kind], tmp_path / "out", checkpoint_activations=every)
    stop_at(monkeypatch, 0)
    result = calibrate(narrow_llama, PLANS[kind], tmp_path / "out", checkpoint_activations=every, resume=True)
    assert result.resumed_at > 0
    assert result.modules == expected.modules
    assert directory_bytes(tmp_path / "out") == directory_bytes(files)


def test_values_on_disk_are_the_same_and_each_layer_but_the_first_takes_a_pass_more(
    narrow_llama: Small, done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = stop_at(monkeypatch, 0)
    calibrate(narrow_llama, AWARE, tmp_path / "out", activation_memory=Budget(host_bytes=60_000))
    assert calls[0] == 3 * 5 + 3 * 2  # of three batches: plain GPTQ measures three layers and continues from two
    assert directory_bytes(tmp_path / "out") == directory_bytes(done("aware")[1])


def test_smaller_batches_after_memory_ran_out(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the batches had been smaller, and the original values are computed again with their weights."""
    halves = [
        {name: value[start : start + 2] for name, value in batch.items()}
        for batch in token_batches()
        for start in range(0, len(batch["input_ids"]), 2)
    ]
    calibrate(narrow_llama, MIXED, tmp_path / "expected", batches=halves)
    real, calls = LoadedSubgraph.forward, [0]

    def forward(self: LoadedSubgraph, model: nn.Module, **inputs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return real(self, model, **inputs)

    monkeypatch.setattr(LoadedSubgraph, "forward", forward)
    calibrate(narrow_llama, MIXED, tmp_path / "out")
    out = nameless_bytes(tmp_path / "out", warnings=(), data=None)
    assert out == nameless_bytes(tmp_path / "expected", warnings=(), data=None)


def test_experts_in_groups_are_those_of_one_pass(qwen3_moe: Small, tmp_path: Path) -> None:
    """Each on the tokens that are routed to it, which are not the same in both models."""
    plan = recipe(f"{NARROW_W4}, target: original", modifier="GPTQModifier")
    options: dict[str, Any] = {"moe_calibrate_all_experts": False, "batches": token_batches([(8, 60)] * 2)}
    one = calibrate(qwen3_moe, plan, tmp_path / "one", **options)
    groups = calibrate(qwen3_moe, plan, tmp_path / "groups", statistics_memory=1, **options)
    assert directory_bytes(tmp_path / "one") == directory_bytes(tmp_path / "groups")
    assert {module.name: module.loss for module in one.modules} == {one.name: one.loss for one in groups.modules}


def test_an_output_closer_to_that_of_the_original_model(narrow_llama: Small, tmp_path: Path) -> None:
    """With the data that was used to calibrate, and 3 bits, where errors of layers matter."""
    text = NARROW_W4.replace("num_bits: 4", "num_bits: 3")
    assert text != NARROW_W4
    batches = token_batches([(8, 64)] * 4)

    def distance(plan: runtime.Recipe, out: Path) -> float:
        calibrate(narrow_llama, plan, out, batches=batches)
        runtime.dequantize(out, out=out.with_name(f"{out.name}-plain"))
        models = [load_transformers(path) for path in (narrow_llama.weights, out.with_name(f"{out.name}-plain"))]
        with torch.no_grad():
            pairs = [[model.model(**batch).last_hidden_state for model in models] for batch in batches]
        return sum(float((one - other).square().sum()) for one, other in pairs)

    plain = distance(recipe(text, modifier="GPTQModifier"), tmp_path / "plain")
    aware = distance(recipe(f"{text}, target: original", modifier="GPTQModifier"), tmp_path / "aware")
    assert aware < plain


def test_a_run_without_propagation_is_refused(narrow_llama: Small, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe.yaml:1: target: original .*--no-propagate-error"):
        calibrate(narrow_llama, AWARE, tmp_path / "out", propagate_error=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("target: first", "target must be quantized or original"),
        ("strength: 0.5", "strength has no effect without target: original"),
        ("strength: 1.5", "strength must be a number from 0 to 1"),
        ("strength: -0.1", "strength must be a number from 0 to 1"),
        ("strength: high", "strength must be a number from 0 to 1"),
    ],
)
def test_wrong_fields_are_rejected(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(f"{NARROW_W4}, {text}", modifier="GPTQModifier")


# Inputs of the original model


def rows(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


def test_experts_pair_the_tokens_that_both_models_route_to_them() -> None:
    original, present = torch.arange(12.0).view(4, 3), -torch.arange(9.0).view(3, 3)
    found = OriginalInputs()
    found.begin()
    found.add("up", original, rows(7, 2, 5, 9))
    found.add("gate", original, rows(7, 2, 5, 9))
    found.close()
    taken = found.take("up", present, rows(2, 8, 9))
    assert torch.equal(taken, torch.stack((original[1], present[1], original[3])))
    assert torch.equal(found.take("gate", present[:0], rows()[:0].long()), present[:0])
    # A second call, and a module that only one of the two models calls.
    assert torch.equal(found.take("up", present, rows(2, 8, 9)), present)
    assert torch.equal(found.take("down", present, rows(1, 2, 3)), present)


def test_inputs_that_code_changes_in_place_are_kept_as_they_were() -> None:
    found, states = OriginalInputs(), torch.ones(2, 2, 3)
    found.begin()
    found.add("q", states, None)
    states += 1
    found.add("late", states, None)
    found.close()
    present = torch.zeros(2, 2, 3)
    assert torch.equal(found.take("q", present, None), torch.ones(4, 3))
    assert torch.equal(found.take("late", present, None), torch.full((4, 3), 2.0))
    assert torch.equal(found.take("other", present, None), present.flatten(0, 1))


def test_values_of_both_models_share_what_is_equal() -> None:
    activations = Activations([{}, {}], torch.device("cpu"), lasting={"mask"})
    mask, state = torch.ones(3, 3), torch.ones(2, 5)
    for batch in range(2):
        activations.store(batch, {"mask": mask, "x": state})
    used = activations.used_bytes["host"]
    activations.split(without=["x"])
    assert activations.is_split
    for batch in range(2):
        activations.store(activations.original(batch), {"y": state})
        assert activations.values(activations.original(batch)).keys() == {"mask", "y"}
    assert activations.used_bytes["host"] == used + 2 * state.nbytes
    found = [values["y"] for _, values in activations.stream(["y"], of_original=True)]
    assert all(torch.equal(value, state) for value in found)
    activations.join()
    assert activations.used_bytes["host"] == used
    assert torch.equal(activations.fetch(1, ["mask"])["mask"], mask)
    activations.close()
    assert activations.used_bytes["host"] == 0


class Comparing:
    """A modifier that reads the original model's activations and changes nothing."""

    def __init__(self) -> None:
        self.seen: dict[int, list[Any]] = {}

    def measures(self, names: Any) -> bool:
        return bool(names)

    def rewrites(self, names: Any) -> list[str]:
        return []

    def compares(self, names: Any) -> bool:
        return bool(names)

    def apply(self, work: Any) -> None:
        if work.step.compares:
            work.run_original(functools.partial(self._take, work.step.index))

    def _take(self, step: int, batch: int, inputs: Any, outputs: Any) -> None:
        self.seen.setdefault(step, []).append((batch, dict(inputs), dict(outputs)))


def test_other_modifiers_get_the_original_activations(narrow_llama: Small, done: Done, tmp_path: Path) -> None:
    """And a recipe that does not use them gives the same bytes, as with a strength of 0."""
    own = Comparing()
    none = recipe(f"{NARROW_W4}, target: original, strength: 0", modifier="GPTQModifier")
    calibrate(narrow_llama, none, tmp_path / "out", own_modifiers=[own])
    tensors, plain = read_tensors(tmp_path / "out"), read_tensors(done("plain")[1])
    assert tensors.keys() == plain.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in plain.items())
    model = load_transformers(narrow_llama.weights)
    batches = token_batches()
    assert sorted(own.seen) == [0, 1, 2]
    for step, seen in own.seen.items():
        assert [batch for batch, _, _ in seen] == [0, 1, 2]
        for (_, inputs, outputs), batch in zip(seen, batches, strict=True):
            with torch.no_grad():
                states = model(**batch, output_hidden_states=True).hidden_states
            hidden = [value for value in inputs.values() if isinstance(value, torch.Tensor) and value.dim() == 3]
            given = [value for value in outputs.values() if isinstance(value, torch.Tensor) and value.dim() == 3]
            shape = states[step].shape
            if step:
                assert any(value.shape == shape and torch.allclose(value, states[step], atol=1e-5) for value in hidden)
            if step < 2:
                after = states[step + 1]
                assert any(value.shape == shape and torch.allclose(value, after, atol=1e-5) for value in given)
