"""The kernel for a block's columns: through Triton's interpreter, against the plain solve."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is a part of the test extra where it can be installed")

PROGRAM = """
import torch
from compressed_tensors.quantization import QuantizationArgs
from runtime.algorithms import gptq_columns, gptq_cuda

assert gptq_cuda.has_triton()
generator = torch.Generator().manual_seed(0)
for columns, rows, choices in ((24, 70, (4,)), (5, 3, (2, 8)), (128, 33, (3,))):
    for symmetric in (True, False):
        for bits in choices:
            args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=16)
            lower = torch.tril(torch.randn(columns, columns, generator=generator) * 0.1, -1) + torch.eye(columns)
            scale = torch.rand(3, rows, generator=generator) + 0.1
            half = 2 ** (bits - 1)
            zero = None if symmetric else torch.randint(-half, half, (3, rows), generator=generator).float()
            groups = [column % 3 for column in range(columns)]
            weight = torch.randn(columns, rows, generator=generator)
            one = [weight.clone(), weight + 0.1, torch.empty(columns, rows)]
            two = [tensor.clone() for tensor in one]
            grids = gptq_columns.Grids(scale_GO=scale, factor_GO=scale, zero_GO=zero)
            buffers = gptq_columns.Buffers(columns, weight)
            gptq_columns.solve_block_(*one, lower, grids, args, groups, buffers)
            gptq_cuda.solve_block_(*two, lower, scale, zero, groups, bits)
            # Sums in another order; a number next to a tie may fall to the other side, and later ones follow it.
            same = one[2] == two[2]
            assert same.all(dim=0).float().mean() > 0.9, (columns, rows, symmetric, bits)
            rows_alike = same.all(dim=0)
            for first, second in zip(one, two):
                torch.testing.assert_close(first[:, rows_alike], second[:, rows_alike], rtol=1e-4, atol=1e-5)
print("the same")
"""


def test_equals_the_plain_solve_in_the_interpreter() -> None:
    root = Path(__file__).parents[2]
    path = os.pathsep.join((str(root), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", PROGRAM], cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "the same\n"
