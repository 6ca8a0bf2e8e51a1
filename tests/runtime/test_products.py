"""Products and factorizations of float32 matrices, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from runtime.algorithms import products
from runtime.algorithms.products import factorize_, multiplied
from tests.sweep import sweep

SIZES = ((1, 1, 1), (3, 5, 7), (128, 300, 64), (65, 1, 513), (0, 4, 3), (4, 3, 0))
ORDERS = (1, 2, 127, 128, 129, 255, 257, 640, 1000)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["oneDNN", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(products, "_has_onednn", lambda: False)
    elif not products._has_onednn():
        pytest.skip("this torch has none for this processor")
    return str(request.param)


@pytest.mark.usefixtures("way")
class TestMultiplied:
    @pytest.mark.parametrize(
        ("sizes", "dtype"),
        sweep(
            itertools.product(SIZES, (torch.float32, torch.float64, torch.bfloat16)),
            *((sizes, torch.float32) for sizes in SIZES),
            *(((128, 300, 64), torch.float64), ((65, 1, 513), torch.bfloat16)),
        ),
    )
    def test_is_the_product(self, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
        rows, columns, inner = sizes
        first, second = numbers(rows, inner).to(dtype), numbers(columns, inner, seed=1).to(dtype)
        found = multiplied(first, second)
        assert (found.dtype, found.shape) == (dtype, (rows, columns))
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.5}[dtype]
        torch.testing.assert_close(found.double(), first.double() @ second.double().t(), atol=tolerance, rtol=0.01)

    def test_takes_any_order_of_memory_and_changes_nothing(self) -> None:
        whole = numbers(90, 80)
        before = whole.clone()
        views = (whole[:20, :30], whole[::2, 3:33][:20], whole.t()[:30, :20].t(), numbers(20, 30), numbers(30, 20).t())
        for first in views:
            for second in views:
                found = multiplied(first, second)
                torch.testing.assert_close(found.double(), first.double() @ second.double().t(), atol=1e-4, rtol=0)
        assert torch.equal(whole, before)

    def test_keeps_what_float32_keeps(self) -> None:
        """No narrower numbers are multiplied: 1 + 2^-20 is one in bf16 and in TF32."""
        fine = torch.full((64, 64), 1 + 2.0**-20)
        assert torch.equal(multiplied(fine, torch.eye(64)), fine)


@pytest.mark.usefixtures("way")
class TestFactorize:
    @pytest.mark.parametrize(
        ("size", "dtype"),
        sweep(
            itertools.product(ORDERS, (torch.float32, torch.float64)),
            *((size, torch.float32) for size in ORDERS),
            *((1, torch.float64), (129, torch.float64), (640, torch.float64)),
        ),
    )
    def test_gives_the_matrix_back(self, size: int, dtype: torch.dtype) -> None:
        inputs = numbers(size + 50, size).to(dtype) * torch.linspace(0.1, 3, size, dtype=dtype)
        matrix = inputs.t() @ inputs
        found = matrix.clone()
        assert factorize_(found)
        lower = found.tril().double()
        tolerance = 1e-6 if dtype == torch.float32 else 1e-14
        assert float((lower.t() @ lower - matrix.double()).norm() / matrix.double().norm()) < tolerance

    @pytest.mark.parametrize(
        ("size", "small"),
        sweep(
            itertools.product((200, 1025, 1200, 1500), (128, 700)), (200, 128), (1025, 700), (1200, 128), (1500, 700)
        ),
    )
    def test_reads_the_lower_triangle_alone(self, size: int, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of small blocks as well, wherever pieces of rows end: what is above the diagonal is out of date by then."""
        monkeypatch.setattr(products, "_SMALL", small)
        inputs = numbers(size + 50, size)
        matrix = inputs.t() @ inputs
        found = matrix + torch.full_like(matrix, torch.nan).triu(1)
        assert factorize_(found)
        lower = found.tril().double()
        assert float((lower.t() @ lower - matrix.double()).norm() / matrix.double().norm()) < 1e-6

    @pytest.mark.parametrize("size", [3, 300])
    @pytest.mark.parametrize("place", [0, -1])
    def test_says_when_there_is_none(self, size: int, place: int) -> None:
        for number in (-1.0, 0.0, float("nan")):
            matrix = torch.eye(size)
            matrix[place, place] = number
            assert not factorize_(matrix)
