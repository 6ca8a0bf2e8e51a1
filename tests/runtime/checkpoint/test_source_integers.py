"""GPTQ, AWQ and AutoRound: dequantized numbers equal plain loops, and wrong tensors are rejected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.errors import WeightsError
from tests.runtime.checkpoint.packing import MODULE, awq_module, gptq_module, int32, plain, words, write

GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
ACT_ORDER = torch.randperm(64, generator=torch.Generator().manual_seed(5)).div(16, rounding_mode="floor").tolist()
Tensors = dict[str, torch.Tensor]


def weight_of(directory: Path, dtype: str = "float32") -> torch.Tensor:
    return plain(directory, dtype).read(f"{MODULE}.weight")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("layout", "offset"), [("gptq", 1), ("gptq_v2", 0)])
def test_gptq_of_each_width(tmp_path: Path, bits: int, layout: str, offset: int) -> None:
    tensors, expected = gptq_module(bits, offset=offset)
    directory = write(tmp_path, {**GPTQ, "bits": bits, "checkpoint_format": layout}, {MODULE: tensors})
    assert torch.equal(weight_of(directory), expected)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(weight_of(directory, str(dtype).removeprefix("torch.")), expected.to(dtype))


def test_gptq_with_groups_in_any_order(tmp_path: Path) -> None:
    tensors, expected = gptq_module(groups_I=ACT_ORDER)
    assert torch.equal(weight_of(write(tmp_path, {**GPTQ, "desc_act": True}, {MODULE: tensors})), expected)


def test_gptq_without_an_order_has_consecutive_groups(tmp_path: Path) -> None:
    tensors, expected = gptq_module(has_order=False)
    assert torch.equal(weight_of(write(tmp_path / "a", GPTQ, {MODULE: tensors})), expected)
    entry = {**GPTQ, "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "data_type": "int"}
    assert torch.equal(weight_of(write(tmp_path / "b", entry, {MODULE: tensors})), expected)
    one_group, expected = gptq_module(groups_I=[0] * 64, has_order=False)
    assert torch.equal(weight_of(write(tmp_path / "c", {**GPTQ, "group_size": -1}, {MODULE: one_group})), expected)


def test_zero_points_of_zero_that_were_subtracted_from_words(tmp_path: Path) -> None:
    """GPTQModel writes the first format by subtracting ones from whole words, which may borrow from the next number."""
    tensors, _ = gptq_module(offset=0)
    zeros = tensors["qzeros"].clone()
    zeros[0, 0] = 0x12345670
    second = weight_of(
        write(tmp_path / "2", {**GPTQ, "checkpoint_format": "gptq_v2"}, {MODULE: {**tensors, "qzeros": zeros}})
    )
    first = weight_of(write(tmp_path / "1", GPTQ, {MODULE: {**tensors, "qzeros": zeros - 0x11111111}}))
    assert torch.equal(first, second)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_zero_points_of_symmetric_modules_are_known(tmp_path: Path, bits: int, layout: str) -> None:
    """Some programs state the first format and store zero points as in the second; both are recognized."""
    tensors, _ = gptq_module(bits)
    middle = 2 ** (bits - 1)
    entry = {**GPTQ, "bits": bits, "sym": True, "checkpoint_format": layout}

    def stored(*zeros: int) -> Path:
        zero_points = int32([words([*zeros, *[zeros[-1]] * (32 - len(zeros))], bits)] * 4)
        return write(tmp_path / f"{zeros}", entry, {MODULE: {**tensors, "qzeros": zero_points}})

    first, second = weight_of(stored(middle - 1)), weight_of(stored(middle))
    assert torch.equal(first, second)
    asymmetric = write(
        tmp_path / "known",
        {**entry, "sym": False, "checkpoint_format": "gptq"},
        {MODULE: {**tensors, "qzeros": int32([words([middle - 1] * 32, bits)] * 4)}},
    )
    assert torch.equal(first, weight_of(asymmetric))
    for zeros in ((middle - 1, middle), (middle - 2,), (middle + 1, middle)):
        with pytest.raises(WeightsError, match=f"sym: true, so all.*stored as {middle - 1} or as {middle}"):
            weight_of(stored(*zeros))


def test_modules_of_gptqmodel_may_differ(tmp_path: Path) -> None:
    """Each has its own bits and groups, and some are not quantized, the head included."""
    four, first = gptq_module(4)
    eight, second = gptq_module(8, [i // 8 for i in range(64)], num_out=64)
    dynamic = {"+:.*lm_head": {"bits": 8, "group_size": 8}, "-:.*down_proj.*": {}}
    kept = torch.randn(4, 4).half()
    entry, modules = {**GPTQ, "dynamic": dynamic}, {MODULE: four, "lm_head": eight}
    checkpoint = plain(write(tmp_path, entry, modules, {"model.layers.0.mlp.down_proj.weight": kept}))
    assert torch.equal(checkpoint.read(f"{MODULE}.weight"), first)
    assert torch.equal(checkpoint.read("lm_head.weight"), second)
    assert torch.equal(checkpoint.read("model.layers.0.mlp.down_proj.weight"), kept)
    assert len(list(checkpoint)) == 3


def test_awq_in_the_order_of_its_kernel(tmp_path: Path) -> None:
    tensors, expected = awq_module()
    assert torch.equal(weight_of(write(tmp_path / "a", AWQ, {MODULE: tensors})), expected)
    entry = {"quant_method": "auto-round", "bits": 4, "group_size": 16, "packing_format": "auto_round:auto_awq"}
    assert torch.equal(weight_of(write(tmp_path / "b", entry, {MODULE: tensors})), expected)


def test_large_weights_are_computed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.checkpoint.source_integers._NUMBERS_AT_A_TIME", 1024)
    for bits in (3, 4):
        tensors, expected = gptq_module(bits, ACT_ORDER + ACT_ORDER)
        directory = write(tmp_path / str(bits), {**GPTQ, "bits": bits}, {MODULE: tensors})
        assert torch.equal(weight_of(directory), expected)
    tensors, expected = awq_module()
    assert torch.equal(weight_of(write(tmp_path / "awq", AWQ, {MODULE: tensors})), expected)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("quantize_config.json", '{"bits": 4, "group_size": 16}'),
        ("quant_config.json", '{"w_bit": 4, "q_group_size": 16, "version": "GEMM", "zero_point": true}'),
    ],
)
def test_the_file_of_an_old_tool_states_the_quantization(tmp_path: Path, name: str, text: str) -> None:
    tensors, expected = gptq_module() if "quantize" in name else awq_module()
    write(tmp_path, None, {MODULE: tensors})
    (tmp_path / name).write_text(text)
    assert torch.equal(weight_of(tmp_path), expected)


def without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def with_first(name: str, value: float) -> Callable[[Tensors], object]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        copy.view(-1)[0] = value
        return copy

    return changed(name, change)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (without("scales"), "missing tensor '.*scales'.*required by"),
        (without("qzeros"), "missing tensor '.*qzeros'"),
        (without("qweight"), "contains '.*' without '.*qweight'"),
        (changed("qweight", lambda t: t[:, :16]), "qweight.*has shape.*needs 32 columns"),
        (changed("qweight", lambda t: t[:4]), "g_idx.*has shape"),
        (changed("qweight", lambda t: t[0]), "qweight.*has shape.*needs a matrix"),
        (changed("qweight", lambda t: t.long()), "qweight.*has the dtype I64, not I32"),
        (changed("qzeros", lambda t: t[:, :2]), "qzeros.*has shape.*32 zero points of 4 bits needs 4 columns"),
        (changed("qzeros", lambda t: t[:2]), "qzeros.*has shape.*needs 4 rows"),
        (changed("scales", lambda t: t.int()), "scales.*has the dtype I32"),
        (changed("g_idx", lambda t: t[:50]), "g_idx.*has shape"),
        (with_first("g_idx", 4), "g_idx contains 4, outside the range 0 to 3"),
        (with_first("g_idx", -1), "g_idx contains -1"),
        (with_first("scales", float("nan")), "scale '.*scales' of .* is nan; it must be finite"),
        (with_first("scales", float("inf")), "is inf; it must be finite"),
    ],
)
def test_gptq_tensors_that_do_not_fit_are_named(
    tmp_path: Path, spoil: Callable[[Tensors], object], complaint: str
) -> None:
    tensors, _ = gptq_module()
    spoil(tensors)
    with pytest.raises(WeightsError, match=complaint):
        weight_of(write(tmp_path, GPTQ, {MODULE: tensors}))


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({**GPTQ, "checkpoint_format": "marlin"}, "GPTQ's layout 'marlin', which is not supported"),
        ({**GPTQ, "checkpoint_format": "gptq_p"}, "GPTQ's layout 'gptq_p'"),
        ({**GPTQ, "is_marlin_format": True}, "GPTQ's layout 'marlin'"),
        ({**GPTQ, "bits": "4"}, "bits = '4', not a whole number"),
        ({**GPTQ, "bits": 8}, "32 zero points of 8 bits needs 8 columns"),
        ({**GPTQ, "quant_method": "auto-round", "packing_format": "auto_round:mlx"}, "packing_format 'auto_round:mlx'"),
        ({**AWQ, "version": "gemv"}, "AWQ's layout 'gemv'"),
        ({**AWQ, "version": "GEMV_FAST"}, "AWQ's layout 'gemv_fast'"),
        ({**AWQ, "bits": 3}, "AWQ with 3 bits"),
        ({**AWQ, "group_size": 0}, "group_size = 0"),
        ({**AWQ, "group_size": 32}, "64 in features in groups of 32 needs 2 rows"),
    ],
)
def test_other_layouts_and_entries_are_rejected_by_name(tmp_path: Path, entry: dict[str, Any], complaint: str) -> None:
    tensors, _ = awq_module() if entry["quant_method"] == "awq" else gptq_module()
    with pytest.raises(WeightsError, match=complaint):
        plain(write(tmp_path, entry, {MODULE: tensors}))


def test_scaled_activations_of_awq_are_rejected(tmp_path: Path) -> None:
    others = {"model.layers.0.mlp.act.scales": torch.ones(4).half()}
    with pytest.raises(WeightsError, match="scaled activations are not supported"):
        plain(write(tmp_path, AWQ, {MODULE: awq_module()[0]}, others))
