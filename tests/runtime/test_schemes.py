"""Schemes: what is stored reads back as it was, and transformers sees the same model."""

from __future__ import annotations

import dataclasses
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

from runtime.algorithms.result import QuantizedWeight
from runtime.algorithms.rtn import quantize_rtn
from runtime.errors import QuantizationError, RecipeError, WeightsError
from runtime.formats import compressed
from runtime.formats.checkpoint_config import CheckpointSchemes, quantization_config
from runtime.formats.compressed import (
    compress_module,
    compress_rows,
    decompress_module,
    input_parts,
    join_rows,
    rows_layout,
    static_input_parts,
    stored_dtypes,
    stored_shapes,
)
from runtime.formats.presets import PRESETS, checked, checked_cache, scheme_from_preset
from runtime.formats.rounded_inputs import quantize_activation
from tests.runtime.small import load_transformers
from tests.sweep import sweep

LINEAR = ["Linear"]


def weight_only(num_bits: int, symmetric: bool = True, **strategy: Any) -> QuantizationScheme:
    strategy = strategy or {"strategy": "group", "group_size": 32}
    args = QuantizationArgs(num_bits=num_bits, type="int", symmetric=symmetric, **strategy)
    return checked(QuantizationScheme(targets=LINEAR, weights=args))


def with_inputs(kind: str, strategy: str, *, symmetric_inputs: bool = True) -> QuantizationScheme:
    weights = QuantizationArgs(num_bits=8, type=kind, symmetric=True, strategy=strategy)
    inputs = QuantizationArgs(num_bits=8, type=kind, symmetric=symmetric_inputs, strategy="token", dynamic=True)
    return checked(QuantizationScheme(targets=LINEAR, weights=weights, input_activations=inputs))


OFFERED = {
    **{name: scheme_from_preset(name, LINEAR) for name in PRESETS},
    **{
        f"int{bits}-{'sym' if symmetric else 'asym'}-{strategy}": weight_only(
            bits, symmetric, strategy=strategy, group_size=32 if strategy == "group" else None
        )
        for bits in range(2, 9)
        for symmetric in (True, False)
        for strategy in ("group", "channel")
    },
    "W8A8-tensor": with_inputs("int", "tensor"),
    "W8A8-asymmetric-inputs": with_inputs("int", "channel", symmetric_inputs=False),
    "FP8-tensor": with_inputs("float", "tensor"),
    "FP8-weights-alone": checked(
        QuantizationScheme(
            targets=LINEAR, weights=QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel")
        )
    ),
    "W8A8-static-asymmetric": checked(
        QuantizationScheme(
            targets=LINEAR,
            weights=QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel"),
            input_activations=QuantizationArgs(num_bits=8, type="int", symmetric=False, strategy="tensor"),
        )
    ),
}
SMALL_FLOATS = tuple(name for name in OFFERED if name.startswith(("NVFP4", "MXFP")))


def quantized(weight_OI: torch.Tensor, scheme: QuantizationScheme, dtype: torch.dtype) -> QuantizedWeight:
    """Rounded to nearest, with scales for inputs between -3 and 5 where they are static."""
    result = quantize_rtn(weight_OI, scheme.weights, scale_dtype=dtype)
    if not input_parts(scheme):
        return result
    parts = static_input_parts(torch.tensor(-3.0), torch.tensor(5.0), scheme.input_activations, dtype)
    return dataclasses.replace(result, inputs=parts)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize(
    ("name", "dtype"),
    sweep(
        itertools.product(OFFERED, DTYPES),
        *((name, dtype) for name, dtype in zip(OFFERED, itertools.cycle(DTYPES), strict=False)),
    ),
)
def test_compress_and_decompress_give_the_weight_back(name: str, dtype: torch.dtype) -> None:
    scheme = OFFERED[name]
    # 50 rows and 384 columns: neither the packed words of zero points nor those of 3 bit weights come out even.
    got = quantized(random(50, 384, dtype=dtype), scheme, dtype)
    tensors = compress_module("m", got, scheme)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    weight_OI = decompress_module(tensors, scheme)
    assert weight_OI.dtype == (torch.bfloat16 if name in SMALL_FLOATS else dtype)
    assert torch.equal(weight_OI, got.weight_OI.to(weight_OI.dtype))
    assert stored_shapes((50, 384), scheme) == {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    assert stored_dtypes(scheme, dtype) == {key: tensor.dtype for key, tensor in tensors.items()}


@pytest.mark.parametrize("name", OFFERED)
def test_rows_are_packed_a_part_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = OFFERED[name]
    got = quantized(random(1100, 128), scheme, torch.bfloat16)
    whole = compress_module("m", got, scheme)
    dense = decompress_module(whole, scheme)
    monkeypatch.setattr("runtime.formats.compressed.NUMBERS_AT_A_TIME", 480 * 128)
    parts = compress_module("m", got, scheme)
    assert list(parts) == list(whole)
    assert all(torch.equal(parts[key], whole[key]) and parts[key].dtype == whole[key].dtype for key in whole)
    assert torch.equal(decompress_module(parts, scheme), dense)


def some_rows(result: QuantizedWeight, rows: slice, scheme: QuantizationScheme) -> QuantizedWeight:
    """What a solve of these rows returns."""
    height = scheme.weights.block_structure[0] if scheme.weights.block_structure else 1
    of_scales = slice(None) if result.scale.ndim == 1 else slice(rows.start // height, -(-rows.stop // height))
    return dataclasses.replace(
        result,
        weight_OI=result.weight_OI[rows],
        scale=result.scale[of_scales],
        zero_point=None if result.zero_point is None else result.zero_point[of_scales],
        inputs={},
    )


@pytest.mark.parametrize("num_out", [1, 7, 1100])
@pytest.mark.parametrize("name", OFFERED)
def test_pieces_are_joined_to_the_tensors_of_the_whole(
    name: str, num_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = OFFERED[name]
    got = quantized(random(num_out, 384), scheme, torch.bfloat16)
    whole = compress_module("m", got, scheme)
    monkeypatch.setattr("runtime.formats.compressed.NUMBERS_AT_A_TIME", 480 * 384)
    height = scheme.weights.block_structure[0] if scheme.weights.block_structure else 1
    for cuts in ([], [1], [3, 4, 1013], [512, 1024]):
        places = [0, *sorted({min(cut * height, num_out) for cut in cuts} - {num_out}), num_out]
        parts = []
        for start, stop in itertools.pairwise(places):
            part = compress_rows("m", some_rows(got, slice(start, stop), scheme), scheme)
            layout = rows_layout((stop - start, 384), scheme, torch.bfloat16)
            # A receiver fills memory that it allocated from shapes and dtypes alone.
            assert list(layout) == list(part)
            empty = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in layout.items()}
            for key, tensor in part.items():
                assert tensor.is_contiguous()
                assert (empty[key].shape, empty[key].dtype) == (tensor.shape, tensor.dtype)
                empty[key].flatten().view(torch.uint8).copy_(tensor.flatten().view(torch.uint8))
            parts.append(empty)
        joined = join_rows("m", parts, 384, scheme, got.inputs)
        assert list(joined) == list(whole)
        for key, tensor in joined.items():
            assert tensor.dtype == whole[key].dtype and tensor.is_contiguous()
            assert torch.equal(tensor, whole[key])


def test_join_refuses_scales_of_inputs_that_the_scheme_does_not_have() -> None:
    part = compress_rows(
        "m", quantize_rtn(random(4, 64), OFFERED["FP8"].weights, scale_dtype=torch.float32), OFFERED["FP8"]
    )
    with pytest.raises(QuantizationError, match=r"m: the scheme of its inputs requires \('input_scale',\), not \[\]"):
        join_rows("m", [part], 64, OFFERED["FP8"], {})


def described(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, list[int]]]:
    return {key: (tensor.dtype, list(tensor.shape)) for key, tensor in sorted(tensors.items())}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "W4A16",
            {
                "weight_packed": (torch.int32, [64, 32]),
                "weight_scale": (torch.bfloat16, [64, 2]),
                "weight_shape": (torch.int64, [2]),
            },
        ),
        (
            "W4A16_ASYM",
            {
                "weight_packed": (torch.int32, [64, 32]),
                "weight_scale": (torch.bfloat16, [64, 2]),
                "weight_shape": (torch.int64, [2]),
                "weight_zero_point": (torch.int32, [8, 2]),
            },
        ),
        ("W8A8", {"weight": (torch.int8, [64, 256]), "weight_scale": (torch.bfloat16, [64, 1])}),
        (
            "FP8_DYNAMIC",
            {"weight": (torch.float8_e4m3fn, [64, 256]), "weight_scale": (torch.bfloat16, [64, 1])},
        ),
        (
            "FP8",
            {
                "input_scale": (torch.bfloat16, [1]),
                "weight": (torch.float8_e4m3fn, [64, 256]),
                "weight_scale": (torch.bfloat16, [1]),
            },
        ),
        (
            "FP8_BLOCK",
            {"weight": (torch.float8_e4m3fn, [64, 256]), "weight_scale": (torch.bfloat16, [1, 2])},
        ),
        (
            "NVFP4",
            {
                "input_global_scale": (torch.float32, [1]),
                "weight_global_scale": (torch.float32, [1]),
                "weight_packed": (torch.uint8, [64, 128]),
                "weight_scale": (torch.float8_e4m3fn, [64, 16]),
            },
        ),
        (
            "NVFP4A16",
            {
                "weight_global_scale": (torch.float32, [1]),
                "weight_packed": (torch.uint8, [64, 128]),
                "weight_scale": (torch.float8_e4m3fn, [64, 16]),
            },
        ),
        ("MXFP4", {"weight_packed": (torch.uint8, [64, 128]), "weight_scale": (torch.uint8, [64, 8])}),
        ("MXFP8", {"weight": (torch.float8_e4m3fn, [64, 256]), "weight_scale": (torch.uint8, [64, 8])}),
        (
            "W4A8",
            {
                "weight_packed": (torch.int32, [64, 32]),
                "weight_scale": (torch.bfloat16, [64, 2]),
                "weight_shape": (torch.int64, [2]),
            },
        ),
    ],
)
def test_what_is_stored(name: str, expected: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    tensors = compress_module("m", quantized(random(64, 256), OFFERED[name], torch.bfloat16), OFFERED[name])
    assert described(tensors) == expected


def result_of(weight_OI: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None) -> QuantizedWeight:
    return QuantizedWeight(weight_OI=weight_OI, scale=scale, zero_point=zero_point, loss=0.0, damping=0.0)


def test_four_bit_words_hold_eight_weights_lowest_first() -> None:
    scheme = weight_only(4, strategy="channel")
    integers = torch.tensor([[-8.0, -7, 0, 1, 2, 3, 6, 7]])
    tensors = compress_module("m", result_of(integers, torch.ones(1, 1)), scheme)
    words = [f"{word & 0xFFFFFFFF:08x}" for word in tensors["weight_packed"][0].tolist()]
    assert words == ["feba9810"]


def test_compress_refuses_what_does_not_fit_and_names_the_module() -> None:
    weight = torch.zeros(4, 64)
    with pytest.raises(
        QuantizationError, match=r"layers\.0\.q: the scale has the shape \[4, 1\], but .* requires \[4, 2\]"
    ):
        compress_module("layers.0.q", result_of(weight, torch.ones(4, 1)), weight_only(4))
    with pytest.raises(QuantizationError, match=r"layers\.0\.q: an asymmetric scheme requires a zero point"):
        compress_module("layers.0.q", result_of(weight, torch.ones(4, 2)), weight_only(4, False))
    with pytest.raises(QuantizationError, match=r"layers\.0\.q: the scheme of its inputs requires \('input_scale',\)"):
        compress_module("layers.0.q", result_of(weight, torch.ones(1)), OFFERED["FP8"])
    with pytest.raises(QuantizationError, match=r"layers\.0\.q: NVFP4 requires a global scale"):
        compress_module("layers.0.q", result_of(weight, torch.ones(4, 4)), OFFERED["NVFP4A16"])


def test_decompress_names_what_is_missing() -> None:
    with pytest.raises(
        WeightsError, match=r"missing weight_shape, required by the format pack-quantized .*weight_packed, weight_scale"
    ):
        decompress_module({"weight_packed": torch.zeros(1), "weight_scale": torch.ones(1)}, weight_only(4))


@pytest.mark.parametrize("num_out", [4, 8, 9])
def test_zero_points_of_few_rows_are_unpacked(num_out: int) -> None:
    """Up to eight rows their words are a single row, whose transpose compressed-tensors cannot view as bytes."""
    scheme = OFFERED["W4A16_ASYM"]
    result = quantized(random(num_out, 256), scheme, torch.float32)
    dense = decompress_module(compress_module("m", result, scheme), scheme)
    assert torch.allclose(dense, result.weight_OI, atol=1e-5)


def test_presets_are_found_in_any_case() -> None:
    assert scheme_from_preset("w4a16_asym", ["a", "b"]).targets == ["a", "b"]
    assert not scheme_from_preset("w4a16_asym", LINEAR).weights.symmetric
    assert scheme_from_preset("int8", LINEAR) == scheme_from_preset("W8A8", LINEAR)


def test_every_preset_of_the_format_s_description_is_there() -> None:
    described = "W4A16 W4A16_ASYM W8A8 FP8 FP8_DYNAMIC FP8_BLOCK NVFP4 NVFP4A16 MXFP4 MXFP4A16 MXFP8 W3A16 W8A16 W4A8"
    assert set(described.split()) <= set(PRESETS)


def test_what_is_no_scheme_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match=r"the scheme UNQUANTIZED is not supported .*W4A16, W5A16"):
        scheme_from_preset("unquantized", LINEAR)


def test_a_misspelt_preset_is_told_its_nearest() -> None:
    with pytest.raises(RecipeError, match=r"unknown scheme 'W4A61' .*did you mean W4A16\? supported: W2A16"):
        scheme_from_preset("W4A61", LINEAR)


def test_the_cache_is_8_bit_float_by_tensor() -> None:
    assert checked_cache(QuantizationArgs(num_bits=8, type="float", strategy="tensor")).num_bits == 8
    for odd in ({"type": "int"}, {"num_bits": 4}, {"strategy": "channel"}, {"symmetric": False}):
        with pytest.raises(RecipeError, match=r"a key-value cache .* is not supported"):
            checked_cache(QuantizationArgs(**{"num_bits": 8, "type": "float", "strategy": "tensor", **odd}))


INT8 = {"num_bits": 8, "type": "int"}
TOKEN = {**INT8, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({}, "without weights"),
        ({"weights": INT8, "output_activations": TOKEN}, "output_activations"),
        ({"weights": {**INT8, "strategy": "tensor"}}, "by tensor are not supported"),
        ({"weights": {"num_bits": 1, "strategy": "channel"}}, "1 bit"),
        ({"weights": {"num_bits": 16, "strategy": "channel"}}, "16 bit"),
        ({"weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": False}}, "asymmetric"),
        ({"weights": {"num_bits": 4, "type": "float", "group_size": 32}}, "use one of the presets for float weights"),
        ({"weights": {**INT8, "group_size": 32, "scale_dtype": "uint8"}}, "scale_dtype torch.uint8"),
        ({"weights": {**INT8, "dynamic": True}}, "weights cannot be dynamic"),
        ({"weights": {**INT8, "strategy": "channel", "observer": "best"}}, "observer 'best' is not supported"),
        ({"weights": {**INT8, "strategy": "channel", "observer_kwargs": {"a": 1}}}, "observer_kwargs 'a'"),
        (
            {"weights": {**INT8, "strategy": "channel", "observer": "mse", "observer_kwargs": {"norm": "x"}}},
            "norm must be a positive number, not 'x'",
        ),
        (
            {"weights": {**INT8, "strategy": "channel"}, "input_activations": {**INT8, "strategy": "token"}},
            "static 8 bit input_activations by token",
        ),
        (
            {"weights": {**INT8, "strategy": "channel"}, "input_activations": {**TOKEN, "num_bits": 6}},
            "6 bit int input_act",
        ),
        (
            {"weights": {**INT8, "strategy": "channel"}, "input_activations": {**TOKEN, "strategy": "tensor"}},
            "by tensor",
        ),
        (
            {
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
                "input_activations": {**TOKEN, "num_bits": 8},
            },
            "8 bit float weights with 8 bit int inputs",
        ),
        ({"weights": {**INT8, "strategy": "channel"}, "format": "int-quantized"}, "its format is pack-quantized"),
    ],
)
def test_unsupported_schemes(scheme: dict[str, Any], message: str) -> None:
    with pytest.raises((RecipeError, ValueError), match=rf"{message}|static token quantization"):  # the library's words
        checked(QuantizationScheme(targets=LINEAR, **scheme))


def test_the_config_is_that_of_the_format_specification() -> None:
    config = quantization_config([OFFERED["W4A16"]], ["lm_head"])
    keys = [key for key in config if key != "moe_sparsity_config"]  # new in compressed-tensors 0.20
    assert sorted(keys) == [
        "config_groups",
        "format",
        "global_compression_ratio",
        "ignore",
        "kv_cache_scheme",
        "quant_method",
        "quantization_status",
        "sparsity_config",
        "transform_config",
        "version",
    ]
    assert config["quant_method"] == "compressed-tensors"
    assert config["quantization_status"] == "compressed"
    assert config["format"] == "pack-quantized"
    assert config["ignore"] == ["lm_head"]
    group = config["config_groups"]["group_0"]
    assert sorted(group) == ["format", "input_activations", "output_activations", "targets", "weights"]
    assert group["format"] == "pack-quantized"
    assert group["targets"] == ["Linear"]
    weights = {key: group["weights"][key] for key in ("num_bits", "type", "symmetric", "strategy", "group_size")}
    assert weights == {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    assert json.loads(json.dumps(config)) == config


def test_several_formats_are_mixed_precision() -> None:
    config = quantization_config([OFFERED["W4A16"], OFFERED["W8A16"]], [])
    assert config["format"] == "pack-quantized"
    config = quantization_config([OFFERED["W4A16"], OFFERED["W8A8"]], [])
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in config["config_groups"].values()] == ["pack-quantized", "int-quantized"]


def test_schemes_are_found_again_in_the_config() -> None:
    groups = [
        scheme_from_preset("W4A16", ["Linear"]),
        scheme_from_preset("W8A8", [r"re:.*down_proj$"]),
        scheme_from_preset("FP8_DYNAMIC", ["layers.0.down_proj"]),
    ]
    config = quantization_config(groups, ["lm_head", "re:.*router", "Gate"])
    schemes = CheckpointSchemes.from_config(json.loads(json.dumps(config)))
    assert list(schemes.groups) == groups
    assert schemes.find("layers.0.q_proj", "Linear") == groups[0]
    assert schemes.find("layers.0.q_proj", torch.nn.Linear) == groups[0]
    assert schemes.find("layers.1.down_proj", "Linear") == groups[1]
    assert schemes.find("layers.0.down_proj", "Linear") == groups[2]
    assert schemes.find("lm_head", "Linear") is None
    assert schemes.find("layers.0.router.proj", "Linear") is None
    assert schemes.find("layers.0.gate", "Gate") is None
    assert schemes.find("embed", "Embedding") is None


def test_a_group_without_format_has_the_config_s() -> None:
    config = quantization_config([OFFERED["W4A16"]], [])
    config["config_groups"]["group_0"]["format"] = None
    assert CheckpointSchemes.from_config(config).groups == (OFFERED["W4A16"],)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quantized by 'gptq'"),
        ({"quantization_status": "frozen"}, "frozen, not compressed"),
        ({"kv_cache_scheme": {"num_bits": 4, "type": "float", "strategy": "tensor"}}, "key-value cache"),
        ({"config_groups": {"group_0": {"targets": "Linear"}}}, "cannot be read"),
        ({"config_groups": {"UNQUANTIZED": ["Linear"]}}, "without weights"),
        ({"config_groups": {"a": {"targets": ["Linear"], "input_activations": {"num_bits": 8}}}}, "without weights"),
    ],
)
def test_configs_that_cannot_be_read(change: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        CheckpointSchemes.from_config(quantization_config([OFFERED["W4A16"]], []) | change)


def test_activations_by_hand() -> None:
    args = OFFERED["W8A8"].input_activations
    inputs = torch.tensor([[[127.5, 1.4, -2.6], [0.0, 0.0, 0.0]]])
    assert quantize_activation(inputs, args).tolist() == [[[127.0, 1.0, -3.0], [0.0, 0.0, 0.0]]]
    assert quantize_activation(torch.empty(1, 0, 3), args).shape == (1, 0, 3)


def test_activations_of_two_dimensions_share_one_scale() -> None:
    inputs = random(5, 16)
    got = quantize_activation(inputs, OFFERED["W8A8"].input_activations)
    assert torch.equal(
        got, quantize_activation(inputs.reshape(1, 1, -1), OFFERED["W8A8"].input_activations).reshape(5, 16)
    )


def save_checkpoint(model: Any, scheme: QuantizationScheme, folder: Path) -> dict[str, torch.Tensor]:
    """Write the model with its decoder's Linears quantized; return their dense weights."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    dense = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            tensors = compress_module(name, quantized(module.weight, scheme, torch.bfloat16), scheme)
            del state[f"{name}.weight"]
            state |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
            dense[name] = decompress_module(tensors, scheme)
    config = model.config.to_dict() | {"quantization_config": quantization_config([scheme], ["lm_head"])}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return dense


@pytest.mark.parametrize(
    "name",
    [*PRESETS, "int3-sym-group", "W8A8-asymmetric-inputs", "W8A8-static-asymmetric", "FP8-weights-alone"],
)
def test_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    scheme = OFFERED[name]
    dense = save_checkpoint(model, scheme, tmp_path)
    parts = quantized(torch.ones(1, 128), scheme, torch.bfloat16).inputs
    for module_name, weight_OI in dense.items():
        module = model.get_submodule(module_name)
        module.weight.data = weight_OI
        if scheme.input_activations is not None:
            module.register_forward_pre_hook(
                lambda _, inputs: (quantize_activation(inputs[0], scheme.input_activations, parts),)
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = load_transformers(tmp_path, torch.bfloat16)
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)
    for module_name, weight_OI in dense.items():
        assert torch.equal(loaded.get_submodule(module_name).weight, weight_OI)


def test_a_gpu_unpacks_more_rows_at_a_time() -> None:
    shape = (14336, 4096)
    parts = {kind: compressed._parts_of_rows(shape, is_cut=True, device_type=kind) for kind in ("cpu", "cuda")}
    assert {kind: len(found) for kind, found in parts.items()} == {"cpu": 30, "cuda": 4}
    for found in parts.values():
        assert [row for rows in found for row in range(*rows.indices(shape[0]))] == list(range(shape[0]))
