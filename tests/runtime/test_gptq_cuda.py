"""The kernel for a block's columns: through Triton's interpreter, against the plain solve, and compiled for a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is a part of the test extra where it can be installed")

COMMON = """
import torch
from compressed_tensors.quantization import QuantizationArgs
from runtime.algorithms import gptq_columns, gptq_cuda, grid

assert gptq_cuda.has_triton()
GENERATOR = torch.Generator().manual_seed(0)

def args_of(kind, bits, symmetric=True):
    return QuantizationArgs(num_bits=bits, type=kind, symmetric=symmetric, strategy="group", group_size=16)

def solved(weight, target, lower, pivot, factor, zero, groups, args):
    # All [E, ...]; the weights are parts of larger tensors, as in a solve.
    wide = torch.cat((weight, weight, weight), dim=1)
    residual = wide[:, weight.shape[1]:2 * weight.shape[1]]
    quantized = torch.full_like(wide, torch.nan)[:, :weight.shape[1]]
    loss = torch.ones(weight.shape[0], weight.shape[2], dtype=torch.float64)
    gptq_cuda.solve_block_(
        residual, target.clone(), quantized, loss, lower_EBB=lower, pivot_EB=pivot, factor_EGO=factor, zero_EGO=zero,
        group_EB=groups, args=args,
    )
    return residual, quantized, loss - 1
"""

GRIDS = """
def points(bits):
    # All numbers of a small float without a sign, from their bits.
    mantissa_bits, smallest, largest = grid.SMALL_FLOATS[bits]
    steps = [smallest * 2.0**-mantissa_bits * m for m in range(2**mantissa_bits)]
    scale = smallest
    while scale <= largest:
        steps += [scale * (1 + m * 2.0**-mantissa_bits) for m in range(2**mantissa_bits)]
        scale *= 2
    return torch.tensor([step for step in steps if step <= largest], dtype=torch.float64)

def neighbours(values):
    values = values.float()
    return torch.cat([values, torch.nextafter(values, values + 1), torch.nextafter(values, values - 1)])

def around(own):
    # Every point and every midpoint with its neighbours, of both signs, and numbers beyond all points.
    special = torch.tensor([0.0, 1e-45, 1e-40, 1.2e-38, 1e-20, 1e30, 3.4e38, torch.inf])
    beyond = own[-1] * torch.tensor([1.0, 1.03, 1.0625, 1.1, 1.25, 1.5, 2.0, 4.0], dtype=torch.float64)
    sizes = torch.cat((neighbours(torch.cat((own, (own[1:] + own[:-1]) / 2, beyond))), special))
    return torch.cat((sizes, -sizes))

def snapped(values, factor, zero, args):
    # Values and factors, one row each.
    num_rows = len(values)
    given = values.view(1, 1, num_rows)
    _, quantized, _ = solved(
        given, given, torch.ones(1, 1, 1), torch.ones(1, 1), factor.view(1, 1, num_rows),
        None if zero is None else zero.view(1, 1, num_rows), torch.zeros(1, 1, dtype=torch.int32), args,
    )
    return quantized.flatten()

def require_same(values, factor, zero, args):
    values = values + 0.0  # no -0: a sum with the errors of no column makes it 0
    expected = grid.snap_(values.clone(), factor, zero, args)
    found = snapped(values, factor, zero, args)
    same = (found.view(torch.int32) == expected.view(torch.int32)) | (found.isnan() & expected.isnan())
    assert same.all(), (args, values[~same][:9], factor[~same][:9], expected[~same][:9], found[~same][:9])

gptq_cuda._ROWS = 1024  # a program takes as long for any number of rows in the interpreter
cases = 0
for bits in (4, 6, 8):
    args, sizes = args_of("float", bits), around(points(bits))
    assert len(sizes) > 2 * 6 * len(points(bits))
    random = torch.rand(len(sizes), generator=GENERATOR) + 0.05
    for factor in (torch.ones_like(sizes), torch.full_like(sizes, 2.0**-126), torch.full_like(sizes, 3e-5), random):
        require_same(sizes, factor, None, args)
        require_same(sizes * factor, factor, None, args)
        cases += 1
    require_same(torch.tensor([torch.nan, 1.0]), torch.ones(2), None, args)
for bits in range(2, 9):
    half = 2 ** (bits - 1)
    halves = torch.arange(-half - 2, half + 2, 0.5, dtype=torch.float64)
    sizes = torch.cat((neighbours(halves), torch.tensor([1e-45, 1e30, -1e30, torch.inf, -torch.inf])))
    for symmetric in (True, False):
        args = args_of("int", bits, symmetric)
        zero = None if symmetric else torch.randint(-half, half, sizes.shape, generator=GENERATOR).float()
        for factor in (torch.ones_like(sizes), torch.rand(len(sizes), generator=GENERATOR) + 0.05):
            require_same(sizes, factor, zero, args)
            require_same(sizes * factor, factor, zero, args)
            cases += 1
print(cases, "the same")
"""

BLOCKS = """
def problem(columns, rows, groups, args):
    lower = torch.tril(torch.randn(columns, columns, generator=GENERATOR) * 0.1, -1) + torch.eye(columns)
    lower += torch.triu(torch.full_like(lower, torch.nan), 1)  # values above the diagonal may be anything
    factor = torch.rand(groups, rows, generator=GENERATOR) / 2 ** (args.num_bits - 3) + 0.05
    half = 2 ** (args.num_bits - 1)
    zero = None if args.symmetric else torch.randint(-half, half, (groups, rows), generator=GENERATOR).float()
    group = torch.randint(0, groups, (columns,), generator=GENERATOR, dtype=torch.int32)
    weight = torch.randn(columns, rows, generator=GENERATOR)
    pivot = torch.rand(columns, generator=GENERATOR) + 0.5
    return weight, weight + 0.1, lower, pivot, factor, zero, group

for columns, rows, kind, bits, symmetric in (
    (18, 40, "int", 4, False),
    (18, 40, "float", 4, True),
    (5, 3, "float", 8, True),
    (5, 3, "float", 6, True),
    (5, 3, "int", 2, True),
    (5, 3, "int", 8, False),
    (1, 40, "float", 8, True),
):
    args = args_of(kind, bits, symmetric)
    problems = [problem(columns, rows, 3, args) for _ in range(2)]
    stacked = [None if parts[0] is None else torch.stack(parts) for parts in zip(*problems)]
    together = solved(*stacked, args)
    for place, (weight, target, lower, pivot, factor, zero, group) in enumerate(problems):
        own = [None if part is None else part[None] for part in problems[place]]
        for one, many in zip(solved(*own, args), together):
            assert torch.equal(one[0], many[place])
        plain = [weight.clone(), target.clone(), torch.empty(columns, rows)]
        grids = gptq_columns.Grids(scale_GO=factor, factor_GO=factor, zero_GO=zero)
        gptq_columns.solve_block_(
            *plain, lower, grids, args, group.tolist(), gptq_columns.Buffers(columns, weight)
        )
        residual, quantized, loss = (part[place] for part in together)
        # Sums in another order; a number next to a tie may fall to the other side, and later ones follow it.
        same = (quantized == plain[2]).all(dim=0)
        assert same.float().mean() > 0.9, (columns, rows, kind, bits, symmetric)
        # What is subtracted from the weight is the number that a reader computes, without a fused multiply-add.
        assert torch.equal(residual, weight - quantized)
        torch.testing.assert_close(residual[:, same], plain[0][:, same], rtol=1e-4, atol=1e-5)
        expected = (pivot[:, None].double() * plain[1].double().square()).sum(0)
        torch.testing.assert_close(loss[same], expected[same], rtol=1e-4, atol=1e-7)
print("the same")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from runtime.algorithms import gptq_cuda

kernel = gptq_cuda._kernel()
types = dict(loss="*fp64", groups="*i32", smallest="fp32", largest="fp32", shift="fp32")
floats = ("residual", "target", "quantized", "lower", "pivot", "factors", "zeros")
for is_float, has_zero, columns in ((True, False, 128), (False, False, 128), (False, True, 256), (True, False, 1)):
    fixed = dict(IS_FLOAT=is_float, HAS_ZERO=has_zero, NUM_COLUMNS=columns, ROWS=gptq_cuda._ROWS)
    signature = {name: "*fp32" if name in floats else types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature | dict.fromkeys(fixed, "constexpr"), constexprs=fixed)
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    assert len(found.asm["cubin"]) > 1000
    print(found.asm["ptx"])
"""


def output(program: str, **environment: str) -> str:
    root = Path(__file__).parents[2]
    path = os.pathsep.join((str(root), os.environ.get("PYTHONPATH", "")))
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        env={**os.environ, **environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_rounds_every_number_as_the_plain_grids() -> None:
    assert output(COMMON + GRIDS, TRITON_INTERPRET="1") == "40 the same\n"


def test_equals_the_plain_solve_in_the_interpreter() -> None:
    assert output(COMMON + BLOCKS, TRITON_INTERPRET="1") == "the same\n"


def test_compiles_for_a_gpu_to_exact_divisions_and_products(tmp_path: Path) -> None:
    code = output(COMPILED, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert code.count(".target sm_90") == 4
    divisions = re.findall(r"\bdiv\.\S+", code)
    assert divisions and set(divisions) == {"div.rn.f32"}
    assert not re.search(r"\b(fma|mad)\.\S*f32|\.ftz", code)
