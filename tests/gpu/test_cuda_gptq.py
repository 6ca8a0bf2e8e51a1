"""The kernel for a block's columns on a GPU, against the plain solve."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms import gptq, gptq_cuda, gptq_tiles

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_equals_the_plain_solve(num_bits: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2048, 512, generator=generator) @ torch.randn(512, 512, generator=generator)
    weight, hessian = torch.randn(300, 512, generator=generator).cuda(), (inputs.T @ inputs).cuda()
    args = QuantizationArgs(num_bits=num_bits, type="int", symmetric=symmetric, strategy="group", group_size=128)
    assert gptq_cuda.is_supported(weight[:128], args)
    kernel = next(gptq.quantize_siblings([weight], hessian, args, scale_dtype=torch.bfloat16))
    again = next(gptq.quantize_siblings([weight], hessian, args, scale_dtype=torch.bfloat16))
    assert torch.equal(kernel.weight_OI, again.weight_OI)
    monkeypatch.setattr(gptq_cuda, "is_supported", lambda *_: False)
    plain = next(gptq.quantize_siblings([weight], hessian, args, scale_dtype=torch.bfloat16))
    assert (kernel.weight_OI == plain.weight_OI).float().mean() > 0.95
    assert kernel.loss == pytest.approx(plain.loss, rel=0.01)


def test_tiles_are_the_same_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq_tiles, "_HEIGHT_ON_CUDA", 128)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2048, 512, generator=generator) @ torch.randn(512, 512, generator=generator)
    weights = [torch.randn(rows, 512, generator=generator).cuda() for rows in (300, 90)]
    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=128)
    options = gptq.SolveOptions(args=args, scale_dtype=torch.bfloat16)
    found = gptq.factor_siblings(weights, (inputs.T @ inputs).cuda(), options)
    tiles = gptq_tiles.tiles_of([weight.shape for weight in weights], args, "cuda")
    assert len(tiles) == 4
    forth = {one.piece: one for one in gptq.solve_tiles(weights, tiles, found, options)}
    back = {one.piece: one for one in gptq.solve_tiles(weights, tiles[::-1], found, options)}
    for piece, one in forth.items():
        assert torch.equal(one.rows.weight_OI, back[piece].rows.weight_OI) and one.size == back[piece].size
