"""The GPTQ solve: beside llm-compressor's in one process, and the CUDA kernel beside its bounds.

    python tests/bench/bench_gptq.py [--sizes 2048 4096]          in an environment with llm-compressor, or without

Both get the same weight, Hessian and min-max scales (4 bits, groups of 128, static order). What is compared is the time
of the solve and tr((W-Q) H (W-Q)^T). On CUDA the time of a block's columns is printed next to what moving its bytes
and calculating its operations takes at the rates that --bandwidth and --flops state.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms.gptq import quantize_siblings
from runtime.algorithms.observers import fitted_grid

ARGS = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=128, actorder="static")


def problem(size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Hessian of inputs whose features depend on each other."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(size, size, generator=generator) / size**0.5
    scale = 0.2 + 3 * torch.rand(size, generator=generator)
    inputs = torch.randn(2 * size, size, generator=generator) @ (mix * scale) + 0.1 * torch.randn(
        2 * size, size, generator=generator
    )
    weight = torch.randn(size, size, generator=generator) * 0.02
    return weight.to(device), (inputs.T @ inputs).to(device)


def loss(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    error = (weight - quantized.to(weight.dtype)).double()
    return float(((error @ hessian.double()) * error).sum())


def seconds(call: Callable[[], None]) -> float:
    """On a CPU the process's time, which does not depend on what else the machine does."""
    if not torch.cuda.is_available():
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(size: int, device: str) -> None:
    weight, hessian = problem(size, device)
    found: list[torch.Tensor] = []

    def ours() -> None:
        found.append(next(quantize_siblings([weight], hessian, ARGS, scale_dtype=torch.float32)).weight_OI)

    taken = seconds(ours)
    print(f"{size}x{size} ours {taken:8.2f} s  loss {loss(weight, found[-1], hessian):.6g}", flush=True)
    try:
        from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    except ImportError:
        return
    grid = fitted_grid(weight, ARGS, scale_dtype=torch.float32)

    def theirs() -> None:
        quantized, *_ = quantize_weight(
            weights=weight[None].clone(),
            hessians=hessian[None].clone(),
            scale=grid.scale_RC[None],
            zero_point=torch.zeros_like(grid.scale_RC)[None],
            global_scale=None,
            quant_args=ARGS,
        )
        found.append(quantized[0])

    peer = seconds(theirs)
    print(
        f"{size}x{size} peer {peer:8.2f} s  loss {loss(weight, found[-1], hessian):.6g}  "
        f"{peer / taken:.1f} times as long",
        flush=True,
    )


def kernel(size: int, bandwidth: float, flops: float) -> None:
    """Milliseconds of a block of 128 columns, and its bounds."""
    from runtime.algorithms import gptq_cuda

    width = 128
    weight = torch.randn(1, width, size, device="cuda")
    target, quantized = weight.clone(), torch.empty_like(weight)
    loss = torch.zeros(1, size, dtype=torch.float64, device="cuda")
    given = {
        "lower_EBB": torch.eye(width, device="cuda") + torch.randn(1, width, width, device="cuda").mul(0.01).tril(-1),
        "pivot_EB": torch.ones(1, width, device="cuda"),
        "factor_EGO": torch.full((1, 1, size), 0.3, device="cuda"),
        "zero_EGO": None,
        "group_EB": torch.zeros(1, width, dtype=torch.int32, device="cuda"),
        "args": ARGS,
    }
    gptq_cuda.solve_block_(weight.clone(), target, quantized, loss, **given)
    taken = min(seconds(lambda: gptq_cuda.solve_block_(weight, target, quantized, loss, **given)) for _ in range(20))
    moved = 4 * 4 * width * size  # the residual is read and written, the target is read, quantized is written
    worked = 2 * width * width * size
    print(
        f"{width} columns of {size} rows: {1e3 * taken:.3f} ms; moving {moved / 1e6:.1f} MB takes "
        f"{1e3 * moved / bandwidth:.3f} ms, calculating {worked / 1e6:.0f} MFLOP {1e3 * worked / flops:.3f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--bandwidth", type=float, default=3.35e12, help="bytes a second; an H100's by default")
    parser.add_argument("--flops", type=float, default=6.7e13, help="float32 operations a second")
    chosen = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for size in chosen.sizes:
        compare(size, device)
        if device == "cuda":
            kernel(size, chosen.bandwidth, chosen.flops)


if __name__ == "__main__":
    main()
