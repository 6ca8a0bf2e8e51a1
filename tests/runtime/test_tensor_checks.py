"""Tensors of a kind or with numbers that no model has there are refused by name, before anything runs or when read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import runtime
import runtime.weights.tensor_checks
from runtime.chain import LoadedSubgraph
from runtime.checkpoint.reader import Checkpoint
from runtime.weights.origins import Origin
from runtime.weights.tensor_checks import TensorChecks
from tests.runtime.place import Run
from tests.runtime.small import NARROW_W4, Small, calibrate, read_tensors, recipe, token_batches

PLAN = f"GPTQModifier: {{{NARROW_W4.replace('[lm_head]', '[lm_head, model.layers.1.mlp.down_proj]')}}}"
IGNORED = "model.layers.1.mlp.down_proj.weight"
OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def changed(small: Small, directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(small.weights, directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def broken(small: Small, directory: Path, key: str, value: float) -> Path:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key].view(-1)[-1] = value

    return changed(small, directory, change)


def recast(small: Small, directory: Path, key: str, dtype: torch.dtype) -> Path:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = tensors[key].to(dtype)

    return changed(small, directory, change)


@pytest.fixture
def no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: LoadedSubgraph, model: nn.Module, **inputs: Any) -> dict[str, Any]:
        raise AssertionError("ran before everything was checked")

    monkeypatch.setattr(LoadedSubgraph, "forward", forward)


def refusal(small: Small, weights: Path, out: Path, plan: str = PLAN) -> str:
    """What calibrating and evaluating say, which is the same."""
    with pytest.raises(runtime.WeightsError) as calibrating:
        calibrate(small, runtime.Recipe.from_text(plan, "recipe.yaml"), out, weights=weights)
    with pytest.raises(runtime.WeightsError) as evaluating:
        runtime.evaluate(small.load(), weights=weights, batches=token_batches())
    assert not out.exists()
    assert not list(out.parent.glob(".*"))
    assert str(calibrating.value) == str(evaluating.value)
    return str(calibrating.value)


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize(
    "key", [*OUTSIDE, "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"]
)
@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64]
)
def test_other_kinds_of_numbers(narrow_llama: Small, tmp_path: Path, key: str, dtype: torch.dtype) -> None:
    said = refusal(narrow_llama, recast(narrow_llama, tmp_path / "model", key, dtype), tmp_path / "out")
    quantized = {torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8"}
    if dtype in quantized:
        assert f"{tmp_path / 'model'} contains quantized weights ({key!r} in {quantized[dtype]}" in said
    else:
        assert f"tensor {key!r} of {tmp_path / 'model'} has the dtype" in said


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_will_do(narrow_llama: Small, tmp_path: Path, dtype: torch.dtype) -> None:
    weights = recast(narrow_llama, tmp_path / "model", "model.norm.weight", dtype)
    calibrate(narrow_llama, recipe(NARROW_W4), tmp_path / "out", weights=weights)
    assert read_tensors(tmp_path / "out")["model.norm.weight"].dtype == dtype


def test_on_the_command_line(narrow_llama: Small, tmp_path: Path, run: Run) -> None:
    weights = recast(narrow_llama, tmp_path / "model", "model.norm.weight", torch.int32)
    (tmp_path / "recipe.yaml").write_text(f"QuantizationModifier: {{{NARROW_W4}}}")
    given = ["--weights", str(weights), "--recipe", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out")]
    code, said, error = run(["calibrate", str(narrow_llama.artifact), *given, "--device", "cpu"])
    assert code == 2
    assert "'model.norm.weight'" in error
    assert error.count("\n") == 1
    code, said, _ = run(["doctor", str(narrow_llama.artifact), *given, "--device", "cpu"])
    assert code == 1
    assert "'model.norm.weight'" in said


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", [*OUTSIDE, "model.layers.2.input_layernorm.weight", IGNORED])
def test_numbers_that_are_not_finite_before_anything_runs(
    narrow_llama: Small, tmp_path: Path, key: str, value: float
) -> None:
    said = refusal(narrow_llama, broken(narrow_llama, tmp_path / "model", key, value), tmp_path / "out")
    assert f"tensor {key!r} of {tmp_path / 'model'} contains {'NaN' if value != value else 'infinity'}" in said


@pytest.mark.parametrize("plan", [PLAN, PLAN.replace("GPTQ", "Quantization")])
def test_large_ones_inside_of_layers_when_they_are_read(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: str
) -> None:
    """Whether batches go through them, or they are copied."""
    monkeypatch.setattr(runtime.weights.tensor_checks, "SMALL_BYTES", 16)
    weights = broken(narrow_llama, tmp_path / "model", IGNORED, float("nan"))
    assert f"tensor {IGNORED!r}" in refusal(narrow_llama, weights, tmp_path / "out", plan)


def test_a_look_at_them_reads_nothing_twice(narrow_llama: Small, tmp_path: Path) -> None:
    checkpoint = Checkpoint(narrow_llama.weights)
    from runtime.weights.parameters import Weights

    artifact = narrow_llama.load()
    source = Weights(artifact, checkpoint, torch.float32, artifact.empty_model())
    source.checks.require_outside()
    assert checkpoint.bytes_read == 0


@pytest.mark.parametrize("part", ["weight_scale", "weight_packed", "weight_shape"])
def test_parts_of_quantized_weights_have_their_kinds(narrow_llama: Small, tmp_path: Path, part: str) -> None:
    calibrate(narrow_llama, recipe(NARROW_W4), tmp_path / "w4")
    quantized = Small(weights=tmp_path / "w4", artifact=narrow_llama.artifact)
    key = f"model.layers.1.mlp.down_proj.{part}"
    dtype = torch.int32 if part == "weight_scale" else torch.uint8
    weights = recast(quantized, tmp_path / "model", key, dtype)
    with pytest.raises(runtime.WeightsError, match=f"{key}.* has the dtype"):
        runtime.evaluate(narrow_llama.load(), weights=weights, batches=token_batches())


def test_scales_of_quantized_weights_are_finite(narrow_llama: Small, tmp_path: Path) -> None:
    calibrate(narrow_llama, recipe(NARROW_W4), tmp_path / "w4")
    quantized = Small(weights=tmp_path / "w4", artifact=narrow_llama.artifact)
    weights = broken(quantized, tmp_path / "model", "model.layers.1.mlp.down_proj.weight_scale", float("nan"))
    with pytest.raises(runtime.WeightsError, match=r"down_proj\.weight_scale.* contains NaN"):
        runtime.evaluate(narrow_llama.load(), weights=weights, batches=token_batches())


@pytest.mark.parametrize(("bad", "said"), [(float("nan"), "nan"), (0.0, "0"), (-1.0, "-1")])
@pytest.mark.parametrize("part", ["mlp.down_proj.input_scale", "self_attn.v_scale"])
def test_static_scales_are_above_zero(narrow_llama: Small, tmp_path: Path, part: str, bad: float, said: str) -> None:
    cache = "kv_cache_scheme: {num_bits: 8, type: float, strategy: tensor, symmetric: true, dynamic: false}"
    calibrate(narrow_llama, recipe(f"targets: Linear, scheme: FP8, ignore: [lm_head], {cache}"), tmp_path / "fp8")
    quantized = Small(weights=tmp_path / "fp8", artifact=narrow_llama.artifact)
    weights = broken(quantized, tmp_path / "model", f"model.layers.1.{part}", bad)
    with pytest.raises(runtime.WeightsError, match=rf"layers\.1\.{part}' of .* (is {said}; it must be|contains NaN)"):
        runtime.evaluate(narrow_llama.load(), weights=weights, batches=token_batches())


def checks(directory: Path, tensors: dict[str, torch.Tensor], dtypes: dict[str, str]) -> TensorChecks:
    """Those of a model with a parameter `weight` and buffers `mask` and `places`."""
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2))
    model.register_buffer("mask", torch.zeros(2))
    model.register_buffer("places", torch.zeros(2, dtype=torch.int64))
    parameters: Any = {name: SimpleNamespace(dtype=dtype) for name, dtype in dtypes.items()}
    origins = {name: Origin(keys=(name,), conversion=-1) for name in dtypes}
    return TensorChecks(Checkpoint(directory), origins, parameters, model, ())


def test_masks_may_hold_infinities_and_weights_may_not(tmp_path: Path) -> None:
    dtypes = {"weight": "model", "mask": "float32"}
    infinite = torch.tensor([0.0, -float("inf")])
    checks(tmp_path / "a", {"weight": torch.ones(2), "mask": infinite}, dtypes).require_outside()
    with pytest.raises(runtime.WeightsError, match=r"'weight' .* contains infinity"):
        checks(tmp_path / "b", {"weight": infinite.clone(), "mask": infinite}, dtypes).require_outside()
    with pytest.raises(runtime.WeightsError, match=r"'mask' .* contains NaN"):
        checks(tmp_path / "c", {"weight": torch.ones(2), "mask": infinite * 0}, dtypes).require_outside()


def test_floats_where_integers_belong(tmp_path: Path) -> None:
    for dtype in (torch.int32, torch.int64, torch.uint8):
        checks(tmp_path, {"places": torch.zeros(2, dtype=dtype)}, {"places": "int64"})
    with pytest.raises(runtime.WeightsError, match=r"'places' .* has the dtype F32; parameter places needs integers"):
        checks(tmp_path, {"places": torch.zeros(2)}, {"places": "int64"})


@pytest.mark.parametrize(("dtype", "code"), [(torch.float8_e4m3fn, 0xFF), (torch.float8_e5m2, 0x7D)])
def test_float8_that_is_no_number(tmp_path: Path, dtype: torch.dtype, code: int) -> None:
    from runtime.weights.tensor_checks import _odd_number

    sound = torch.arange(0, 0x7C, dtype=torch.uint8)
    assert not _odd_number(sound.view(dtype), may_be_infinite=False)
    assert _odd_number(torch.cat((sound, torch.tensor([code], dtype=torch.uint8))).view(dtype), may_be_infinite=False)


def test_what_no_parameter_is_made_from_may_hold_anything(tmp_path: Path) -> None:
    found = checks(tmp_path, {"weight": torch.ones(2), "other": torch.tensor([float("nan")])}, {"weight": "model"})
    found.require_outside()
    assert b"".join(bytes(piece) for piece in found.pieces("other"))
