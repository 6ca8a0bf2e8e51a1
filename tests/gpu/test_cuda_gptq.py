"""The kernel for a block's columns on a GPU, against the plain solve."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms import gptq, gptq_cuda

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
