"""ModelOpt: dequantized numbers equal plain loops, for every format, and wrong tensors are rejected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.errors import WeightsError
from tests.runtime.checkpoint.packing import FP4, MODULE, integers, plain, write

ENTRY = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
KEY = f"{MODULE}.weight"
Tensors = dict[str, torch.Tensor]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def float8(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator()).to(torch.float8_e4m3fn)


def nvfp4(num_out: int = 8, num_in: int = 32) -> tuple[Tensors, torch.Tensor]:
    """Two numbers in a byte, the first in the low bits; a scale for 16 of them, times a scale for all."""
    codes = integers(num_out, num_in, 4)
    packed = [[row[i] | row[i + 1] << 4 for i in range(0, num_in, 2)] for row in codes]
    scale = (torch.rand(num_out, num_in // 16, generator=generator()) * 8).to(torch.float8_e4m3fn)
    second = torch.tensor(0.0123)
    expected = torch.empty(num_out, num_in)
    for o in range(num_out):
        for i in range(num_in):
            expected[o, i] = FP4[codes[o][i]] * (scale[o, i // 16].float() * second)
    tensors = {"weight": torch.tensor(packed, dtype=torch.uint8), "weight_scale": scale, "weight_scale_2": second}
    return {**tensors, "input_scale": torch.tensor(0.5)}, expected


def fp8(scale: torch.Tensor, wide: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """`wide` has the scale of each number."""
    weight = float8(*wide.shape)
    return {"weight": weight, "weight_scale": scale}, weight.float() * wide


def of_blocks(block: int) -> tuple[Tensors, torch.Tensor]:
    scale = torch.rand(2, 3, generator=generator())
    wide = torch.stack([torch.stack([scale[o // block, i // block] for i in range(10)]) for o in range(8)])
    return fp8(scale[:, None, :, None], wide)


def mxfp8() -> tuple[Tensors, torch.Tensor]:
    exponents = torch.randint(120, 134, (8, 2), generator=generator(), dtype=torch.uint8)
    wide = (2.0 ** (exponents.float() - 127)).repeat_interleave(32, 1)
    return fp8(exponents, wide)


def mxfp4() -> tuple[Tensors, torch.Tensor]:
    tensors, _ = nvfp4(8, 64)
    exponents = torch.randint(120, 134, (8, 2), generator=generator(), dtype=torch.uint8)
    wide = (2.0 ** (exponents.float() - 127)).repeat_interleave(32, 1)
    expected = torch.tensor([[FP4[code] for code in row] for row in integers(8, 64, 4)]) * wide
    return {"weight": tensors["weight"], "weight_scale": exponents}, expected


def int8() -> tuple[Tensors, torch.Tensor]:
    weight = torch.randint(-128, 128, (8, 32), generator=generator(), dtype=torch.int8)
    scale = torch.rand(8, generator=generator())
    return {"weight": weight, "weight_scale": scale}, weight.float() * scale[:, None]


def smoothed() -> tuple[Tensors, torch.Tensor]:
    tensors, expected = nvfp4()
    factors = torch.rand(32, generator=generator()).bfloat16()
    return {**tensors, "pre_quant_scale": factors}, expected * factors.float()


ROWS = torch.rand(8, generator=generator())
FORMATS: dict[str, Callable[[], tuple[Tensors, torch.Tensor]]] = {
    "nvfp4": nvfp4,
    "nvfp4, smoothed": smoothed,
    "fp8 of a tensor": lambda: fp8(torch.tensor(0.25), torch.full((8, 32), 0.25)),
    "fp8 of rows": lambda: fp8(ROWS, ROWS[:, None].expand(8, 32)),
    "fp8 of blocks": lambda: of_blocks(4),
    "mxfp8": mxfp8,
    "mxfp4": mxfp4,
    "int8": int8,
}


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("at_a_time", [2**22, 1])
def test_each_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_a_time: int, make: Callable[[], tuple[Tensors, torch.Tensor]]
) -> None:
    monkeypatch.setattr("runtime.checkpoint.source_modelopt._NUMBERS_AT_A_TIME", at_a_time)
    tensors, expected = make()
    others = {"model.layers.0.self_attn.k_proj.k_scale": torch.ones(1)}
    directory = write(tmp_path, ENTRY, {MODULE: tensors}, others)
    checkpoint = plain(directory)
    assert list(checkpoint) == [KEY]
    assert torch.equal(checkpoint.read(KEY), expected)
    assert torch.equal(plain(directory, "bfloat16").read(KEY), expected.bfloat16())


@pytest.mark.parametrize("is_turned", [False, True])
def test_stacked_experts_are_read_one_by_one(tmp_path: Path, is_turned: bool) -> None:
    """The scales of a stack X are X_weight_scale; a stack that is multiplied from the right is packed along rows."""
    tensors, expected = nvfp4()
    stack = torch.stack([expected, expected / 2])
    turn = (lambda t: t.transpose(-1, -2).contiguous()) if is_turned else (lambda t: t)
    key = "model.layers.0.mlp.experts.gate_up_proj"
    parts = {
        key: turn(torch.stack([tensors["weight"]] * 2)),
        f"{key}_weight_scale": turn(torch.stack([tensors["weight_scale"]] * 2)),
        f"{key}_weight_scale_2": tensors["weight_scale_2"] * torch.tensor([1.0, 0.5]),
        f"{key}_input_scale": torch.ones(()),
    }
    checkpoint = plain(write(tmp_path, ENTRY, {}, parts))
    assert list(checkpoint) == [key]
    assert torch.equal(checkpoint.read(key), turn(stack))
    assert torch.equal(checkpoint.read_part(key, 1), turn(stack)[1])
    assert len(list(checkpoint.pieces(key))) == 2


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.5, 0.25])])
def test_stacked_experts_in_fp8(tmp_path: Path, scale: torch.Tensor) -> None:
    key, weight = "model.layers.0.mlp.experts.down_proj", float8(2, 4, 8)
    checkpoint = plain(write(tmp_path, ENTRY, {}, {key: weight, f"{key}_weight_scale": scale}))
    expected = weight.float() * (scale if scale.dim() == 0 else scale[:, None, None])
    assert torch.equal(checkpoint.read(key), expected)
    assert torch.equal(checkpoint.read_part(key, 1), expected[1])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"weight_scale": None}, "missing tensor '.*weight_scale'.*required by '.*weight_scale_2'"),
        ({"weight_scale_2": None}, "missing tensor '.*weight_scale_2'.*required by '.*weight'"),
        (
            {"weight_scale": None, "weight_scale_2": None, "input_scale": None},
            r"up_proj.weight' of .* \(U8\) belongs to no",
        ),
        (
            {"weight": float8(8, 32), "weight_scale": torch.ones(5, 7), "weight_scale_2": None},
            "has shape.*needs a scale",
        ),
        ({"weight": None}, "without its weight"),
        ({"weight_scale": torch.ones(8, 3).to(torch.float8_e4m3fn)}, "weight_scale.*has shape.*needs a scale"),
        ({"weight_scale_2": torch.ones(4)}, "weight_scale_2.*needs one scale"),
        ({"weight_scale_2": torch.ones((), dtype=torch.float64)}, "weight_scale_2.*has the dtype F64, not F32"),
        ({"weight_scale_2": torch.tensor(-1.0)}, "is -1; it must be finite and not negative"),
        ({"weight_scale_2": torch.tensor(float("nan"))}, "weight_scale_2.*is nan"),
        ({"pre_quant_scale": torch.ones(4)}, "pre_quant_scale.*has shape"),
        ({"svdquant_lora_a": torch.ones(4)}, "svdquant_lora_a.*is not of a format"),
        (
            {"weight_scale": torch.ones(16, 2), "weight_scale_2": None},
            "is not of a format that is supported as input",  # INT4
        ),
    ],
)
def test_other_tensors_are_rejected(tmp_path: Path, change: dict[str, torch.Tensor | None], complaint: str) -> None:
    tensors = {key: tensor for key, tensor in {**nvfp4()[0], **change}.items() if tensor is not None}
    with pytest.raises(WeightsError, match=complaint):
        plain(write(tmp_path, ENTRY, {MODULE: tensors})).read(KEY)


@pytest.mark.parametrize(
    "entry",
    [
        {"quant_algo": "MIXED_PRECISION", "config_groups": {"group_0": {"targets": ["Linear"]}}},
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "W4A16_NVFP4"}},
        {**ENTRY, "exclude_modules": ["lm_head"]},
    ],
)
def test_tensors_decide_what_is_quantized(tmp_path: Path, entry: dict[str, Any]) -> None:
    """Entries may have no method, and exclude modules that are quantized."""
    (four, first), (eight, second) = nvfp4(), FORMATS["fp8 of a tensor"]()
    four["weight_scale_2"] = four["weight_scale_2"].reshape(1, 1)
    checkpoint = plain(write(tmp_path, entry, {MODULE: eight, "lm_head": four}))
    assert torch.equal(checkpoint.read(KEY), second)
    assert torch.equal(checkpoint.read("lm_head.weight"), first)


@pytest.mark.parametrize("method", ["fp8", "fbgemm_fp8"])
def test_fp8_of_other_programs_with_the_same_names(tmp_path: Path, method: str) -> None:
    tensors, expected = FORMATS["fp8 of rows" if method == "fbgemm_fp8" else "fp8 of a tensor"]()
    checkpoint = plain(write(tmp_path, {"quant_method": method}, {MODULE: {**tensors, "input_scale": torch.ones(1)}}))
    assert list(checkpoint) == [KEY]
    assert torch.equal(checkpoint.read(KEY), expected)


def test_the_file_beside_config_json_is_enough(tmp_path: Path) -> None:
    tensors, expected = FORMATS["fp8 of a tensor"]()
    write(tmp_path, None, {MODULE: tensors})
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8", "exclude_modules": []}}')
    assert torch.equal(plain(tmp_path).read(KEY), expected)
