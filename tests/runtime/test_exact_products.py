"""Hessians as a GPU sums them up: wide panels, and products of 16-bit numbers that are added in float32 in place.

A dispatch mode computes the products that only a GPU has on the CPU, and counts them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch

from runtime.algorithms import exact_products, hessian
from runtime.algorithms.hessian import HessianAccumulator, accumulator_bytes
from runtime.host.dispatch_modes import LeanDispatchMode

_aten = torch.ops.aten
MM, ADDMM, ADDMM_32 = _aten.mm.dtype, _aten.addmm.dtype_out, _aten.addmm_.default


class ProductsOfGpu(LeanDispatchMode):
    """Executes products with `out_dtype` on the CPU.

    Args:
        missing: the operators that this GPU's torch does not have.
        is_strict: whether the sum must have the dtype of the matrices, as in older versions.
        rounds: whether products are rounded to the dtype of the matrices, as a faulty library would.
    """

    def __init__(self, missing: Sequence[Any] = (), *, is_strict: bool = False, rounds: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.missing, self.is_strict, self.rounds = missing, is_strict, rounds
        self.calls: Counter[Any] = Counter()
        self.aliased: list[bool] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.calls[func] += 1
        if func in self.missing:
            raise NotImplementedError(f"Could not run '{func}'")
        if func is MM:
            return self._product(args[0], args[1])
        if func is ADDMM:
            target, first, second, out_dtype = args
            if self.is_strict and target.dtype != first.dtype:
                raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")
            assert out_dtype == target.dtype == kwargs["out"].dtype == torch.float32
            assert first.dtype == second.dtype
            self.aliased.append(kwargs["out"] is target)
            product = self._product(first, second)
            if kwargs.get("beta", 1):  # otherwise the target may contain anything
                product += target
            return kwargs["out"].copy_(product)
        return func(*args, **kwargs)

    def _product(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        product = first.float() @ second.float()
        return product.to(first.dtype).float() if self.rounds else product


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(hessian, "is_gpu", lambda device_type: True)
    exact_products._way.cache_clear()
    yield
    exact_products._way.cache_clear()


def whole_numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Numbers whose sums of products have one right value in float32."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize(("width", "num_products"), [(96, 1), (2048, 1), (4096, 2), (14336, 7)])
def test_a_batch_takes_one_product_for_each_panel(width: int, num_products: int) -> None:
    panels: list[tuple[int, ...]] = []

    class Shapes(LeanDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            if func is ADDMM:
                panels.append(tuple(args[0].shape))
                return (kwargs or {})["out"]
            return func(*args, **(kwargs or {}))

    exact_products_in_place(torch.bfloat16, "meta")
    accumulator = HessianAccumulator(width, device="meta")
    with Shapes():  # type: ignore[no-untyped-call]
        accumulator.add(torch.empty(8, 2048, width, dtype=torch.bfloat16, device="meta"))
    assert panels == [(min(2048, width - left), width - left) for left in range(0, width, 2048)]
    assert len(panels) == num_products


def exact_products_in_place(dtype: torch.dtype, device: str) -> None:
    """Let the probe succeed on a device without values."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_products, "_is_exact", lambda *_: True)
        assert exact_products._way(dtype, device) is exact_products._in_place


@pytest.mark.parametrize("width", [1, 7, 130, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_lanes_add_up_in_wide_panels(width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "_PANEL_WIDTH_OF_GPU", 128)
    parts = [whole_numbers(3, 11, width, dtype=dtype) * (place + 1) for place in range(3)]
    accumulator = HessianAccumulator(width)
    with ProductsOfGpu() as gpu:
        for part in parts:
            accumulator.add(part[:1])
            accumulator.add(part[1:].transpose(0, 1))  # no view has its tokens
            accumulator.end_lane()
        found = accumulator.hessian_II
    flat = torch.cat([part.reshape(-1, width) for part in parts]).double()
    assert torch.equal(found.double(), flat.T @ flat)
    assert all(gpu.aliased), "the sum is added to in place"
    assert gpu.calls[MM] == 0
    if dtype in exact_products.HALVES:  # besides two products of the probe
        assert gpu.calls[ADDMM] - 2 == 6 * len(list(accumulator.panels()))
        assert gpu.calls[ADDMM_32] == 0


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (ProductsOfGpu, "_in_place"),
        (lambda: ProductsOfGpu(is_strict=True), "_through_a_copy"),
        (lambda: ProductsOfGpu([ADDMM]), "_through_a_copy"),
        (lambda: ProductsOfGpu([ADDMM, MM]), "_converted"),
        (lambda: ProductsOfGpu(rounds=True), "_converted"),
    ],
)
@pytest.mark.parametrize("dtype", exact_products.HALVES)
def test_the_way_is_probed_once(dtype: torch.dtype, make: Callable[[], ProductsOfGpu], expected: str) -> None:
    inputs = whole_numbers(70, 200, dtype=dtype) + 1 / 16
    accumulator = HessianAccumulator(200)
    with make() as gpu:
        accumulator.add(inputs)
        probed = dict(gpu.calls)
        accumulator.add(inputs)
        assert exact_products._way(dtype, "cpu").__name__ == expected
    for one in (MM, ADDMM):
        if one in gpu.missing or (gpu.is_strict and one is ADDMM) or gpu.rounds:
            assert gpu.calls[one] == probed.get(one, 0), "a form that failed is not tried again"
    assert torch.equal(accumulator.hessian_II.double(), 2 * inputs.double().T @ inputs.double())


def test_a_lack_of_memory_is_not_taken_for_a_missing_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(exact_products, "_in_place", full)
    with pytest.raises(torch.OutOfMemoryError):
        exact_products._way(torch.bfloat16, "cpu")
    monkeypatch.undo()
    with ProductsOfGpu():
        assert exact_products._way(torch.bfloat16, "cpu") is exact_products._in_place


def test_products_of_float32_are_not_split_into_small_batches() -> None:
    accumulator = HessianAccumulator(64)
    with ProductsOfGpu() as gpu:
        accumulator.add(whole_numbers(4096, 64, dtype=torch.float32))
    assert gpu.calls[ADDMM_32] == 1


def test_large_fp16_numbers_do_not_overflow() -> None:
    accumulator = HessianAccumulator(3)
    with ProductsOfGpu():
        accumulator.add(torch.full((9, 3), 32768.0, dtype=torch.float16))
    assert accumulator.hessian_II.unique().tolist() == [9 * 32768.0**2]


def test_the_size_of_wide_panels_is_planned() -> None:
    accumulator = HessianAccumulator(5000, device="meta")
    accumulator.fold_(0, accumulator.lane_panel(0))
    assert accumulator_bytes(5000, "cuda") == accumulator._upper_II.nbytes + accumulator._diagonal.nbytes
