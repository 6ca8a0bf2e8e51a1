from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from safetensors.torch import load_file, save_file

import runtime
from runtime.algorithms import grid
from runtime.algorithms.gptq import quantize_siblings
from runtime.algorithms.rtn import quantize_rtn
from runtime.formats.compressed import static_input_parts
from runtime.formats.key_values import KeyValues
from runtime.formats.presets import scheme_from_preset
from runtime.formats.stored_scales import require_finite, require_sound_scales
from runtime.quantize.statistics import Needs
from runtime.workers.group import Alone
from tests.runtime.small import NARROW_W4, Small, calibrate, read_tensors, recipe

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}
FP8_INPUTS = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="tensor", dynamic=False)
CACHE = "kv_cache_scheme: {num_bits: 8, type: float, strategy: tensor, symmetric: true, dynamic: false}"


def weights_of(name: str) -> QuantizationArgs:
    args: QuantizationArgs = scheme_from_preset(name, ["Linear"]).weights
    return args


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [1e-7, 3e-7, 1e-6, 1e-5, 1e-3])
def test_tiny_weights_in_float16_keep_their_numbers(symmetric: bool, num_bits: int, size: float) -> None:
    """The scale that float16 would round to nothing is its smallest number, not one thousand times too large."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(16, 32, generator=generator) * size).half()
    args = QuantizationArgs(**{**INT4, "num_bits": num_bits}, symmetric=symmetric)
    got = quantize_rtn(weight, args, scale_dtype=torch.float16)
    assert got.scale.dtype == torch.float16
    assert bool((got.scale > 0).all())
    # In float64 with a scale of its own: no more than the rounding of the scale itself may be lost besides.
    exact = quantize_rtn(weight.double(), args, scale_dtype=torch.float64)
    error = float((got.weight_OI - weight.double()).norm())
    step = 2.0**-24  # float16's smallest
    assert error <= 1.6 * float((exact.weight_OI - weight.double()).norm()) + 0.5 * step * weight.numel() ** 0.5


@pytest.mark.parametrize("name", ["NVFP4A16", "MXFP4A16", "MXFP8A16", "FP8_DYNAMIC"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_small_floats_of_tiny_weights(name: str, dtype: torch.dtype) -> None:
    """One part in a million of usual weights has the same relative error as these, but for what float16 has lost."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(16, 64, generator=generator) * 0.02
    weight = (plain * 1e-3).to(dtype)
    got = quantize_rtn(weight, weights_of(name), scale_dtype=dtype)
    usual = quantize_rtn(plain, weights_of(name), scale_dtype=torch.float32)
    error = float((got.weight_OI - weight.float()).norm() / weight.float().norm())
    assert error < 1.2 * float((usual.weight_OI - plain).norm() / plain.norm()) + 0.01


def test_nvfp4_in_float16_uses_its_scales() -> None:
    """448 * 6 over a number below 0.04 has no room in float16: the global scale is not 1 because of that."""
    weight = (torch.randn(8, 32, generator=torch.Generator().manual_seed(0)) * 0.005).half()
    largest = float(weight.abs().max())
    assert float(grid.global_scale_of(weight)) == pytest.approx(448 * 6 / largest, rel=1e-3)
    assert float(grid.global_scale_of(torch.zeros(4, 4))) == 1.0


@pytest.mark.parametrize("size", [1e-44, 1e-39, 1e-30, 1e-20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_readers_can_invert_the_scales_of_inputs_that_are_almost_zero(dtype: torch.dtype, size: float) -> None:
    """Engines divide by static scales, and by the product of two global ones, in float32."""
    bounds = torch.tensor(0.0), torch.tensor(size)
    (scale,) = static_input_parts(*bounds, FP8_INPUTS, dtype).values()
    assert float(scale) >= torch.finfo(torch.float32).tiny
    nvfp4 = scheme_from_preset("NVFP4", ["Linear"]).input_activations
    (inputs,) = static_input_parts(*bounds, nvfp4, dtype).values()
    product = inputs * grid.global_scale_of(torch.full((2, 2), size, dtype=dtype))
    assert 0 < float(1 / product) < float("inf")
    assert float(1 / product) >= torch.finfo(torch.float32).tiny


def test_a_group_far_below_the_others_has_the_smallest_float8() -> None:
    weight = torch.full((1, 32), 1.0)
    weight[0, 16:] = 2e-6
    got = quantize_rtn(weight, weights_of("NVFP4A16"), scale_dtype=torch.float32)
    assert float(got.scale[0, 1]) == 2.0**-9
    assert float(got.weight_OI[0, 16]) == pytest.approx(2e-6, rel=0.2)


@pytest.mark.parametrize("name", ["W4A16", "W8A16", "W4A16_ASYM", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_zeros_have_a_scale_and_stay_zero(name: str, dtype: torch.dtype) -> None:
    weight = torch.zeros(128, 128, dtype=dtype)
    for result in (
        quantize_rtn(weight, weights_of(name), scale_dtype=dtype),
        *quantize_siblings([weight], torch.eye(128), weights_of(name), scale_dtype=dtype),
    ):
        scale = result.scale.float()
        assert bool((torch.isfinite(scale) & (scale > 0)).all())
        assert not result.weight_OI.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-4, 3.0, 6e4])
def test_static_scales_of_inputs_and_caches(dtype: torch.dtype, size: float) -> None:
    low, high = torch.tensor(-size / 2), torch.tensor(size)
    (scale,) = static_input_parts(low, high, FP8_INPUTS, dtype).values()
    spans = {("a", "k"): (low, high), ("a", "v"): (torch.tensor(0.0), high)}
    cache = KeyValues(args=FP8_INPUTS, modules={}, entries={}, spans=spans)
    scales = [scale, *(cache.scale_of("a", part, dtype) for part in ("k", "v"))]
    wanted = size / 448 if size else torch.finfo(dtype).eps  # what llm-compressor writes for a dead projection
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    for found in scales:
        assert found.dtype == dtype
        assert found.shape == (1,)
        assert float(found) == pytest.approx(wanted, rel=2 * torch.finfo(dtype).eps, abs=smallest)
        assert float(found) > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_no_such_scale_is_written(bad: float, dtype: torch.dtype) -> None:
    if dtype == torch.float8_e4m3fn and bad == float("inf"):
        pytest.skip("it has none")
    scale = torch.tensor([[1.0, bad]]).to(dtype)
    with pytest.raises(runtime.QuantizationError, match=rf"^a\.b: weight_scale is {bad:g} in "):
        require_sound_scales("a.b", {"weight_packed": torch.zeros(1), "weight_scale": scale})
    require_sound_scales("a.b", {"weight": scale})


def test_nor_a_power_of_two_that_is_none() -> None:
    require_sound_scales("a", {"weight_scale": torch.tensor([1, 127, 254], dtype=torch.uint8)})
    with pytest.raises(runtime.QuantizationError, match="a: weight_scale is nan in uint8"):
        require_sound_scales("a", {"weight_scale": torch.tensor([1, 255], dtype=torch.uint8)})


def test_nor_a_norm_that_lost_its_numbers() -> None:
    require_finite("a", torch.ones(2))
    with pytest.raises(runtime.QuantizationError, match="a is not finite in float16 after rescaling"):
        require_finite("a", torch.tensor([1e9]).half())


@pytest.fixture(scope="module")
def half_llama(small: Callable[..., Small]) -> Small:
    from tests.runtime.small import NARROW

    return small("LlamaForCausalLM", "LlamaConfig", NARROW, dtype=torch.float16)


def changed(small: Small, directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of the model with other weights."""
    import shutil

    shutil.copytree(small.weights, directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


DOWN = "model.layers.1.mlp.down_proj"
MEASURING = {
    "FP8": "QuantizationModifier: {targets: Linear, scheme: FP8, ignore: [lm_head]}",
    "SmoothQuant": f"SmoothQuantModifier: {{}}\nQuantizationModifier: {{{NARROW_W4}}}",
    "AWQ": f"AWQModifier: {{}}\nQuantizationModifier: {{{NARROW_W4}}}",
    "GPTQ": f"GPTQModifier: {{{NARROW_W4}}}",
}


@pytest.mark.parametrize("name", MEASURING)
def test_an_overflow_is_named_and_nothing_is_written(half_llama: Small, tmp_path: Path, name: str) -> None:
    def overflow(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("up_proj", "gate_proj"):
            tensors[f"model.layers.1.mlp.{part}.weight"] *= 2000

    weights = changed(half_llama, tmp_path / "model", overflow)
    plan = runtime.Recipe.from_text(MEASURING[name], "recipe.yaml")
    # SmoothQuant measures what norms make: the first of these after the overflow.
    first = "model.layers.2.self_attn.q_proj" if name == "SmoothQuant" else DOWN
    with pytest.raises(runtime.QuantizationError, match=f"inputs of {first} are not finite in float16.*dtype bfloat16"):
        calibrate(half_llama, plan, tmp_path / "out", weights=weights)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    if name in ("AWQ", "GPTQ"):
        calibrate(half_llama, plan, tmp_path / "out", weights=weights, dtype=torch.float32)
    if name == "FP8":
        with pytest.raises(runtime.QuantizationError, match=f"inputs of {DOWN}: a scale .* overflows float16"):
            calibrate(half_llama, plan, tmp_path / "out", weights=weights, dtype=torch.float32)


@pytest.mark.parametrize("observer", ["", ", observer: static_minmax"])
def test_keys_that_are_not_finite_are_named(observer: str) -> None:
    args = QuantizationArgs(num_bits=8, type="float", strategy="tensor", observer=observer.rpartition(" ")[2] or None)
    for bad in (float("nan"), float("inf")):
        cache = KeyValues(args=args, modules={}, is_measuring=True)
        for number in (1.0, bad, 1.0):
            cache.handle("a", "v", torch.tensor([1.0, number, -1.0]))
        cache.end_round(Alone(), torch.device("cpu"))
        with pytest.raises(runtime.QuantizationError, match=r"the values of a reach .*, so their v_scale is undefined"):
            cache.scale_of("a", "v", torch.float32)


def test_a_dead_projection_has_the_scale_that_its_readers_use(half_llama: Small, tmp_path: Path) -> None:
    def kill(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.v_proj.weight"].zero_()

    weights = changed(half_llama, tmp_path / "model", kill)
    plan = recipe(f"targets: Linear, scheme: FP8, ignore: [lm_head], {CACHE}")
    result = calibrate(half_llama, plan, tmp_path / "out", weights=weights)
    tensors = read_tensors(tmp_path / "out")
    eps = 2.0**-10
    assert float(tensors["model.layers.1.self_attn.v_scale"]) == eps
    assert float(tensors["model.layers.1.self_attn.o_proj.input_scale"]) == eps
    assert any(remark.startswith("warning: all inputs of") and "o_proj" in remark for remark in result.remarks)


def test_what_overflows_when_it_is_read_is_refused(half_llama: Small, tmp_path: Path) -> None:
    """65472 / 7.5, rounded, times 8 has no room in float16."""

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = -65472

    weights = changed(half_llama, tmp_path / "model", enlarge)
    with pytest.raises(runtime.QuantizationError, match=r"layers\.0\.mlp\.up_proj: rounded weights reach .* float16"):
        calibrate(half_llama, recipe(NARROW_W4), tmp_path / "out", weights=weights)
    assert not (tmp_path / "out").exists()


def test_masked_tokens_may_overflow() -> None:
    from runtime.quantize.statistics import InputStatistics

    found = InputStatistics(4, Needs(hessian=True, channels=True), torch.device("cpu"))
    inputs: Any = torch.ones(3, 4)
    inputs[1] = float("inf")
    found.add(inputs, torch.tensor([True, False, True]))
    found.fold(found.lane_tokens, found.take_lane())
    assert found.is_finite()
    found.add(inputs, None)
    found.fold(found.lane_tokens, found.take_lane())
    assert not found.is_finite()
