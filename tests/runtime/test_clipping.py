"""Clipping: the search in float64, in parts of any size, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms import clipping
from runtime.algorithms.clipping import quantize_clipped
from runtime.algorithms.rtn import quantize_rtn
from runtime.errors import QuantizationError
from tests.runtime.test_awq import GROUP, SCHEME, WIDTH, problem

FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn}
SCHEMES = {
    "group": QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=64),
    "narrow": SCHEME,
    "channel": QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel"),
    "tensor_group": QuantizationArgs(**FP4, symmetric=True, zp_dtype=None),
}


def clipped_by_hand(weight: torch.Tensor, gram: torch.Tensor) -> float:
    """The least block-diagonal loss, group by group and factor by factor."""
    total = 0.0
    for row in weight:
        for left in range(0, WIDTH, GROUP):
            part, block = row[left : left + GROUP], gram[left : left + GROUP, left : left + GROUP]
            losses = []
            for step in range(11):
                scale = ((1 - step / 20) * part.abs().max() / 3.5).float().double()
                error = (part / scale).clamp(-4, 3).round() * scale - part
                losses.append(float(error @ block @ error))
            total += min(losses)
    return total


def test_clipping_equals_a_search_in_float64() -> None:
    inputs, (weight, _) = problem()
    blocks = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    gram = inputs.T @ inputs
    for left in range(0, WIDTH, GROUP):
        part = slice(left, left + GROUP)
        blocks[part, part] = gram[part, part]
    got = quantize_clipped(weight, blocks, SCHEME, scale_dtype=torch.float32)
    assert got.loss == pytest.approx(clipped_by_hand(weight, gram), rel=1e-5)
    rounded = quantize_rtn(weight, SCHEME, scale_dtype=torch.float32)
    error = rounded.weight_OI.double() - weight
    assert got.loss < 0.9 * float(((error @ blocks) * error).sum())


def test_clipping_refuses() -> None:
    with pytest.raises(QuantizationError, match="does not match a weight"):
        quantize_clipped(torch.ones(2, WIDTH), torch.eye(3), SCHEME, scale_dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", SCHEMES)
def test_parts_change_no_bit(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(150, 192, generator=generator).to(dtype)
    inputs = torch.randn(300, 192, generator=generator) * torch.rand(192, generator=generator)
    found = []
    for rows, columns in ((1024, 1024), (70, 64)):
        monkeypatch.setattr(clipping, "_ROWS", rows)
        monkeypatch.setattr(clipping, "_COLUMNS", columns)
        found.append(quantize_clipped(weight, inputs.T @ inputs, SCHEMES[name], scale_dtype=torch.bfloat16))
    whole, parts = found
    assert torch.equal(parts.weight_OI, whole.weight_OI)
    assert torch.equal(parts.scale, whole.scale)
    assert (parts.zero_point is None) == (whole.zero_point is None)
    assert parts.zero_point is None or torch.equal(parts.zero_point, whole.zero_point)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)


def test_the_loss_is_that_of_the_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(70, 192, generator=generator), torch.randn(300, 192, generator=generator)
    gram = inputs.T @ inputs
    got = quantize_clipped(weight, gram, SCHEMES["group"], scale_dtype=torch.bfloat16)
    error = (got.weight_OI - weight).double()
    blocks = torch.block_diag(*(gram[left : left + 64, left : left + 64].double() for left in (0, 64, 128)))
    assert got.loss == pytest.approx(float(((error @ blocks) * error).sum()), rel=1e-5)
