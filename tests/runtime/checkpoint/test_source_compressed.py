"""compressed-tensors: what is read as plain equals what compressed-tensors decompresses, for every preset."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from compressed_tensors.quantization import QuantizationScheme

from runtime.algorithms.rtn import quantize_rtn
from runtime.errors import WeightsError
from runtime.formats.checkpoint_config import quantization_config
from runtime.formats.compressed import compress_module, input_parts
from runtime.formats.presets import checked, scheme_from_preset
from tests.runtime.checkpoint.packing import MODULE, plain, write

OTHER = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]
PRESETS = (
    *("W4A16", "W4A16_ASYM", "W8A16", "W3A16", "W2A16", "W5A16", "W8A8", "W4A8", "W4AFP8"),
    *("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP8"),
)


def quantized(name: str, shape: tuple[int, int] = (64, 256)) -> tuple[QuantizationScheme, Tensors]:
    """A scheme, and what it stores for a weight."""
    scheme = checked(scheme_from_preset(name, ["Linear"]))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    args = scheme.weights.model_copy(update={"observer": None, "observer_kwargs": {}})
    result = quantize_rtn(weight, args, scale_dtype=torch.bfloat16)
    inputs = {part: torch.ones(1) for part in input_parts(scheme)}

    return scheme, compress_module(MODULE, dataclasses.replace(result, inputs=inputs), scheme)


def decompressed(tensors: Tensors, scheme: QuantizationScheme) -> torch.Tensor:
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    own = {key: tensor for key, tensor in tensors.items() if not key.startswith("input_")}
    weight: torch.Tensor = compressor.decompress(own, scheme)["weight"]
    return weight


def entry(*schemes: QuantizationScheme, **changes: Any) -> dict[str, Any]:
    return {**quantization_config(list(schemes), ["lm_head"]), **changes}


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset(tmp_path: Path, name: str) -> None:
    scheme, tensors = quantized(name)
    cache = {f"model.layers.0.self_attn.{part}_scale": torch.ones(1) for part in "kv"}
    checkpoint = plain(write(tmp_path, entry(scheme), {MODULE: tensors}, cache), "bfloat16")
    expected = decompressed(tensors, scheme).bfloat16()
    assert list(checkpoint) == [f"{MODULE}.weight"]
    assert torch.equal(checkpoint.read(f"{MODULE}.weight"), expected)
    assert checkpoint.stored(f"{MODULE}.weight").shape == expected.shape


@pytest.mark.parametrize("targets", [("re:.*mlp.*", "re:.*self_attn.*"), ("Linear", "Embedding"), ("Linear", OTHER)])
def test_groups_are_told_apart_by_names_and_by_tensors(tmp_path: Path, targets: tuple[str, str]) -> None:
    modules, expected, schemes = {}, {}, []
    for module, name, target in zip((MODULE, OTHER), ("W8A8", "NVFP4A16"), targets, strict=True):
        scheme, modules[module] = quantized(name)
        schemes.append(scheme.model_copy(update={"targets": [target]}))
        expected[module] = decompressed(modules[module], scheme).bfloat16()
    checkpoint = plain(write(tmp_path, entry(*schemes), modules), "bfloat16")
    for module, weight in expected.items():
        assert torch.equal(checkpoint.read(f"{module}.weight"), weight)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("W4A16", {"weight_shape": torch.empty(0, dtype=torch.int64)}),
        ("W4A16_ASYM", {"weight_shape": None}),
        ("FP8", {"weight_scale": ()}),
        ("FP8_DYNAMIC", {"weight_scale": (64,)}),
        ("NVFP4A16", {"weight_global_scale": ()}),
    ],
)
def test_shapes_that_state_less(tmp_path: Path, name: str, change: dict[str, Any]) -> None:
    """weight_shape may be empty or missing if scales state it, and scales may have fewer axes."""
    scheme, tensors = quantized(name)
    expected = decompressed(tensors, scheme).float()
    changed = {part: tensors[part].reshape(to) if isinstance(to, tuple) else to for part, to in change.items()}
    parts = {part: tensor for part, tensor in {**tensors, **changed}.items() if tensor is not None}
    old = {key: value for key, value in entry(scheme).items() if key != "quant_method"}
    for config in ({"quantization_config": old}, {"compression_config": entry(scheme)}):
        assert torch.equal(plain(write(tmp_path, None, {MODULE: parts}, **config)).read(f"{MODULE}.weight"), expected)


def test_a_global_scale_of_zero(tmp_path: Path) -> None:
    scheme, tensors = quantized("NVFP4A16")
    directory = write(tmp_path, entry(scheme), {MODULE: {**tensors, "weight_global_scale": torch.zeros(1)}})
    with pytest.raises(WeightsError, match=r"weight_global_scale' of .* is 0; it must be finite and positive"):
        plain(directory).read(f"{MODULE}.weight")


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_the_order_of_groups_in_old_checkpoints(tmp_path: Path, is_symmetric: bool) -> None:
    scheme, tensors = quantized("W4A16" if is_symmetric else "W4A16_ASYM")
    generator = torch.Generator().manual_seed(1)
    order = (torch.randperm(256, generator=generator) // 128).int()
    numbers = torch.randint(-8, 8, (64, 256), generator=generator, dtype=torch.int8)
    zeros = torch.randint(-8, 8, (64, 2), generator=generator, dtype=torch.int8)
    tensors |= {"weight_packed": pack_to_int32(numbers, 4), "weight_g_idx": order}
    if not is_symmetric:
        tensors["weight_zero_point"] = pack_to_int32(zeros, 4, packed_dim=0).contiguous()
    scale = tensors["weight_scale"]
    expected = torch.empty(64, 256, dtype=torch.bfloat16)
    for i in range(256):
        group = int(order[i])
        whole = numbers[:, i].int() - (0 if is_symmetric else zeros[:, group].int())
        expected[:, i] = (whole.float() * scale[:, group].float()).bfloat16()
    directory = write(tmp_path, entry(scheme), {MODULE: tensors})
    assert torch.equal(plain(directory, "bfloat16").read(f"{MODULE}.weight"), expected)
    write(tmp_path, entry(scheme), {MODULE: {**tensors, "weight_g_idx": order + 1}})
    with pytest.raises(WeightsError, match="weight_g_idx contains a group outside the range 0 to 1"):
        plain(directory).read(f"{MODULE}.weight")


def test_evaluation_sees_what_is_stored(tmp_path: Path) -> None:
    from runtime.checkpoint.dequantize import open_checkpoint

    scheme, tensors = quantized("FP8")
    checkpoint = open_checkpoint(write(tmp_path, entry(scheme), {MODULE: tensors}))
    assert {key.removeprefix(f"{MODULE}.") for key in checkpoint} == set(tensors)
    assert checkpoint.is_quantized


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights .*'sparse-24-bitmask'"),
        (
            {"transform_config": {"config_groups": {"R3": {"apply": [{"targets": ["Linear"], "location": "input"}]}}}},
            "the transform_config of .*: the type 'None' of the group R3 is not hadamard or random-hadamard",
        ),
        ({"quantization_status": "frozen"}, "quantization_status frozen, not compressed"),
    ],
)
def test_entries_that_are_not_supported(tmp_path: Path, changes: Mapping[str, Any], complaint: str) -> None:
    scheme, tensors = quantized("W4A16")
    with pytest.raises(WeightsError, match=complaint):
        plain(write(tmp_path, entry(scheme, **changes), {MODULE: tensors}))


def test_rotations_that_the_weights_include_are_read(tmp_path: Path) -> None:
    scheme, tensors = quantized("W4A16")
    merged = {"config_groups": {"R1": {"apply": [{"targets": ["Linear"], "location": "weight_output"}]}}}
    assert list(plain(write(tmp_path, entry(scheme, transform_config=merged), {MODULE: tensors})))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"weight_scale": torch.ones(64, 3)}, "do not fit any scheme"),
        ({"weight_packed": torch.zeros(64, 32)}, "do not fit any scheme"),
        ({"weight_shape": torch.tensor([64, 2**40])}, "two sizes instead of"),
        ({"weight_shape": torch.tensor([64, -1])}, "two sizes instead of"),
        ({"weight_shape": torch.tensor([64, 255])}, "do not fit any scheme"),
        ({"weight_shape": torch.tensor([64, 248])}, "do not fit any scheme"),
        ({"weight_shape": torch.ones(2)}, "has the dtype F32"),
        (
            {"weight_shape": None, "weight_packed": torch.zeros(0, 32).int(), "weight_scale": torch.ones(0, 2)},
            "has a weight_scale and no matrix",
        ),
        ({"weight_scale": None}, "missing tensor '.*weight_scale'"),
        ({"weight_packed": None}, "has a weight_scale and no matrix|do not fit"),
        ({"weight_scale": torch.full((64, 2), float("nan"))}, "is nan; it must be finite"),
        ({"weight_global_scale": torch.ones(1)}, "do not fit any scheme"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, change: dict[str, torch.Tensor | None], complaint: str) -> None:
    scheme, tensors = quantized("W4A16")
    parts = {key: tensor for key, tensor in {**tensors, **change}.items() if tensor is not None}
    directory = write(tmp_path, entry(scheme), {MODULE: parts})
    with pytest.raises(WeightsError, match=complaint):
        plain(directory).read(f"{MODULE}.weight")
