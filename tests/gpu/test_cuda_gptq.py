"""GPTQ on a GPU: the kernel for a block's columns against the plain solve, stacks of problems, and no waiting."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms import gptq, gptq_cuda, gptq_options, gptq_tiles, grid
from runtime.algorithms.gptq_options import SolvedPiece, SolveOptions
from runtime.algorithms.gptq_stacks import solve_together
from tests.runtime.test_gptq import FLOAT8, MXFP4, NVFP4

pytestmark = pytest.mark.gpu

NUM_IN = 512


def int_args(num_bits: int, *, symmetric: bool = True) -> QuantizationArgs:
    return QuantizationArgs(num_bits=num_bits, type="int", symmetric=symmetric, strategy="group", group_size=128)


SCHEMES = {
    **{f"int{bits}": int_args(bits) for bits in (2, 4, 8)},
    **{f"int{bits} asymmetric": int_args(bits, symmetric=False) for bits in (2, 4, 8)},
    "FP8": FLOAT8,
    "NVFP4": NVFP4,
    "MXFP4": MXFP4,
}


def hessian(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2048, NUM_IN, generator=generator) @ torch.randn(NUM_IN, NUM_IN, generator=generator)
    return (inputs.T @ inputs).cuda()


def weight(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, NUM_IN, generator=torch.Generator().manual_seed(100 + seed)).cuda()


@pytest.fixture
def unwaiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """Fail where Python waits for the GPU, except where a solve awaits numbers; return these."""
    reads: list[torch.Tensor] = []

    def awaited(numbers: torch.Tensor) -> object:
        reads.append(numbers)
        torch.cuda.set_sync_debug_mode("default")
        found = numbers.tolist()
        torch.cuda.set_sync_debug_mode("error")
        return found

    monkeypatch.setattr(gptq_options, "awaited", awaited)
    torch.cuda.synchronize()
    yield reads
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", SCHEMES)
def test_equals_the_plain_solve(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own, args = [weight(300)], SCHEMES[name]
    assert gptq_cuda.is_supported(128, torch.float32)
    kernel = next(gptq.quantize_siblings(own, hessian(), args, scale_dtype=torch.bfloat16))
    again = next(gptq.quantize_siblings(own, hessian(), args, scale_dtype=torch.bfloat16))
    assert torch.equal(kernel.weight_OI, again.weight_OI)
    monkeypatch.setattr(gptq_cuda, "is_supported", lambda *_: False)
    plain = next(gptq.quantize_siblings(own, hessian(), args, scale_dtype=torch.bfloat16))
    assert (kernel.weight_OI == plain.weight_OI).float().mean() > 0.95
    assert kernel.loss == pytest.approx(plain.loss, rel=0.01)
    on_cpu = next(gptq.quantize_siblings([own[0].cpu()], hessian().cpu(), args, scale_dtype=torch.bfloat16))
    assert torch.equal(kernel.scale.cpu(), on_cpu.scale)
    assert kernel.loss == pytest.approx(on_cpu.loss, rel=0.01)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("num_rows", [1, 33, 300])
def test_grid_points_are_those_of_a_reader(name: str, num_rows: int) -> None:
    args = SCHEMES[name]
    found = next(gptq.quantize_siblings([weight(num_rows)], hessian(), args, scale_dtype=torch.bfloat16))
    scale = found.scale.float().cuda()
    factor = scale if found.global_scale is None else scale / found.global_scale
    factor = factor.repeat_interleave(NUM_IN // factor.shape[1], dim=1)
    zero = None if found.zero_point is None else found.zero_point.float().repeat_interleave(128, dim=1)
    assert torch.equal(grid.snap_(found.weight_OI.clone(), factor, zero, args), found.weight_OI)


@pytest.mark.parametrize("actorder", ["static", None])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_solve_waits_two_times(name: str, actorder: str | None, unwaiting: list[torch.Tensor]) -> None:
    args, own, total = SCHEMES[name], [weight(300).bfloat16()], hessian()
    scale = torch.full((1,), 100.0, device="cuda") if args.strategy == "tensor_group" else None
    options = SolveOptions(args=args, scale_dtype=torch.bfloat16, actorder=actorder, global_scale=scale)
    tiles = gptq_tiles.tiles_of([own[0].shape], args, "cuda")
    for _ in range(2):  # the first time compiles the kernel, and libraries allocate memory
        unwaiting.clear()
        found = gptq.factor_siblings(own, total, options)
        list(gptq.solve_tiles(own, tiles, found, options))
        assert len(unwaiting) == 2
        torch.cuda.set_sync_debug_mode("error")


@pytest.mark.parametrize("name", ["int4", "int4 asymmetric", "FP8", "NVFP4"])
def test_a_result_does_not_depend_on_the_others_of_a_stack(name: str) -> None:
    args, full = SCHEMES[name], 8
    tiles = gptq_tiles.tiles_of([(300, NUM_IN)], args, "cuda")
    scale = torch.full((1,), 100.0, device="cuda") if args.strategy == "tensor_group" else None
    options = SolveOptions(args=args, scale_dtype=torch.bfloat16, global_scale=scale)

    def solved(*seeds: int) -> list[SolvedPiece]:
        own = [[weight(300, seed)] for seed in seeds]
        found = solve_together(own, [hessian(seed) for seed in seeds], tiles, [options] * len(seeds), full)
        assert all(isinstance(one, list) for one in found)
        return [one[0] for one in found if isinstance(one, list)]

    all_of_them = solved(*range(full))
    for seed in (0, 3, full - 1):
        (alone,) = solved(seed)
        assert torch.equal(alone.rows.weight_OI, all_of_them[seed].rows.weight_OI)
        assert alone.rows.loss == all_of_them[seed].rows.loss and alone.size == all_of_them[seed].size
        own = next(
            gptq.quantize_siblings(
                [weight(300, seed)], hessian(seed), args, scale_dtype=torch.bfloat16, global_scale=scale
            )
        )
        assert own.loss == pytest.approx(alone.rows.loss, rel=0.01)


def test_tiles_are_the_same_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq_tiles, "_HEIGHT_ON_CUDA", 128)
    weights = [weight(rows) for rows in (300, 90)]
    options = SolveOptions(args=int_args(4), scale_dtype=torch.bfloat16)
    found = gptq.factor_siblings(weights, hessian(), options)
    tiles = gptq_tiles.tiles_of([weight.shape for weight in weights], options.args, "cuda")
    assert len(tiles) == 4
    forth = {one.piece: one for one in gptq.solve_tiles(weights, tiles, found, options)}
    back = {one.piece: one for one in gptq.solve_tiles(weights, tiles[::-1], found, options)}
    for piece, one in forth.items():
        assert torch.equal(one.rows.weight_OI, back[piece].rows.weight_OI) and one.size == back[piece].size
