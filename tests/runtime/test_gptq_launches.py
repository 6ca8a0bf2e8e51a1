"""What a GPTQ solve on a GPU launches, and that Python does not wait for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms import gptq_cuda, gptq_options, gptq_stacks
from runtime.algorithms.gptq import SolveOptions, factor_siblings, solve_tiles
from runtime.algorithms.gptq_stacks import solve_together
from runtime.algorithms.gptq_tiles import tiles_of
from tests.runtime.launches import Launches
from tests.runtime.test_gptq import FLOAT8, MXFP4, NVFP4

SIZE, WIDTH = 4096, 128
W4A16 = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=WIDTH)
SCHEMES = {
    "W4A16": W4A16,
    "W4A16_ASYM": W4A16.model_copy(update={"symmetric": False}),
    "W4A16 mse": W4A16.model_copy(update={"observer": "mse"}),
    "W4A16 imatrix_mse": W4A16.model_copy(update={"observer": "imatrix_mse"}),
    "W4A16 percentile": W4A16.model_copy(update={"observer": "percentile"}),
    "FP8": FLOAT8,
    "FP8_BLOCK": QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[128, 128]),
    "NVFP4": NVFP4,
    "MXFP4": MXFP4,
}


class Device:
    """A device whose numbers are only read where a solve awaits them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_reads = self.num_kernels = 0
        monkeypatch.setattr(gptq_options, "is_asynchronous", lambda device: True)
        monkeypatch.setattr(gptq_options, "awaited", self.awaited)
        monkeypatch.setattr(gptq_cuda, "has_triton", lambda: True)
        monkeypatch.setattr(gptq_cuda, "solve_block_", self.solve_block_)

    def awaited(self, numbers: torch.Tensor) -> Any:
        """All problems are finite, have inputs and factor; losses are 1."""
        self.num_reads += 1
        return torch.ones(numbers.shape).tolist()

    def solve_block_(self, *args: torch.Tensor, **kwargs: Any) -> None:
        """One launch."""
        self.num_kernels += 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def options_of(args: QuantizationArgs, **options: Any) -> SolveOptions:
    scale = meta(1) if args.strategy == "tensor_group" else None
    return SolveOptions(args=args, scale_dtype=torch.bfloat16, global_scale=scale, **options)


READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda numbers: numbers.sum().item(),
    "float": lambda numbers: float(numbers.sum()),
    "bool": lambda numbers: bool(torch.isfinite(numbers).all()),
    "mask": lambda numbers: numbers[numbers > 0],
    "nonzero": lambda numbers: numbers.nonzero(),
    "equal": lambda numbers: torch.equal(numbers, numbers),
}
READS_OF_DEVICES: dict[str, Callable[[torch.Tensor], Any]] = {
    "list": lambda numbers: numbers.tolist(),
    "cpu": lambda numbers: numbers.cpu(),
    "tensor": lambda numbers: torch.tensor([0, 1], device=numbers.device),
    "scalar": lambda numbers: torch.tensor(0.5, device=numbers.device),
    "to": lambda numbers: torch.ones(3).to(numbers.device),
}


@pytest.mark.parametrize(
    ("name", "place"), [*((name, "meta") for name in READS | READS_OF_DEVICES), *((name, "cpu") for name in READS)]
)
def test_a_read_is_noticed(name: str, place: str) -> None:
    numbers = torch.ones(3, device=place)
    with Launches(), pytest.raises((AssertionError, NotImplementedError, RuntimeError)):
        (READS | READS_OF_DEVICES)[name](numbers)


@pytest.mark.parametrize("actorder", ["static", None])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_solve_reads_two_times_and_launches_few_kernels_for_each_block(
    name: str, actorder: str | None, device: Device
) -> None:
    options = options_of(SCHEMES[name], actorder=actorder)
    size = SIZE if actorder else 2 * options.block_width  # each group is fitted during the solve
    weights, num_blocks = [meta(size, size, dtype=torch.bfloat16)], size // options.block_width
    with Launches() as factoring:
        found = factor_siblings(weights, meta(size, size), options)
    assert device.num_reads == 1, "whether the Hessian is finite and positive definite"
    assert factoring.total <= 60
    with Launches() as solving:
        (piece,) = solve_tiles(weights, tiles_of([(size, size)], options.args, "cuda"), found, options)
    assert device.num_reads == 2, "losses and sizes"
    assert piece.rows.weight_OI.shape == (size, size) and piece.rows.loss == 1
    assert device.num_kernels == num_blocks
    # A product with earlier blocks, and for four blocks one more product and a copy of the targets.
    assert solving.counts["baddbmm_"] <= num_blocks + size // gptq_stacks.PANEL
    if actorder and "mse" not in name:
        assert solving.counts["clone"] <= num_blocks // 4 + 8
        assert solving.total + device.num_kernels <= 8 * num_blocks


def test_a_stack_launches_what_one_problem_does(device: Device) -> None:
    totals = []
    for num_problems in (1, 8):
        options = options_of(W4A16)
        weights = [[meta(256, 1024, dtype=torch.bfloat16)] for _ in range(num_problems)]
        hessians = [meta(1024, 1024) for _ in range(num_problems)]
        device.num_kernels = device.num_reads = 0
        with Launches() as launches:
            tiles = tiles_of([(256, 1024)], W4A16, "cuda")
            found = solve_together(weights, hessians, tiles, [options] * num_problems, num_problems)
        assert len(found) == num_problems and not hessians
        assert device.num_kernels == 1024 // WIDTH and device.num_reads == 2
        totals.append(launches.total)
    assert totals[1] <= totals[0] + 8 * 7, "a conversion of the weight and of its scales for each"


def test_products_are_not_rounded_to_tf32(device: Device) -> None:
    class Products(Launches):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "bmm" in str(func):
                assert not torch.backends.cuda.matmul.allow_tf32
            return super().__torch_dispatch__(func, types, args, kwargs)

    options = options_of(W4A16)
    weights = [meta(256, SIZE, dtype=torch.bfloat16)]
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with Products() as products:
            found = factor_siblings(weights, meta(SIZE, SIZE), options)
            list(solve_tiles(weights, tiles_of([(256, SIZE)], W4A16, "cuda"), found, options))
        assert products.counts["baddbmm_"] > 30
        assert torch.backends.cuda.matmul.allow_tf32, "what the process has chosen"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
