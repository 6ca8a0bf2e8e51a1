"""The product with a Hadamard matrix, against matrices that are built from the definition and by compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.transform.utils.hadamard import random_hadamard_matrix

from runtime.algorithms.hadamard import Hadamard, known_factor, random_signs
from runtime.errors import QuantizationError
from runtime.formats.transforms import TransformConfigError, stored_matrix

SIZES = (1, 2, 12, 48, 64, 128, 384, 1408)


def sylvester(size: int) -> torch.Tensor:
    """The matrix by its definition: entry (i, j) is -1 to the number of common bits of i and j."""
    rows = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(rows, dtype=torch.float64)


def values(size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(3, 5, 2 * size, dtype=torch.float64, generator=torch.Generator().manual_seed(size)).to(dtype)


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_equals_the_definition(size: int) -> None:
    blocks = values(size).unflatten(-1, (2, size))
    expected = torch.einsum("abci,ij->abcj", blocks, sylvester(size)) / size**0.5
    torch.testing.assert_close(Hadamard(size=size, dtype=torch.float64).apply(values(size)), expected.flatten(-2))


@pytest.mark.parametrize("size", SIZES)
def test_matrices_of_compressed_tensors_are_recognized(size: int) -> None:
    given = random_hadamard_matrix(size, torch.float64, torch.device("cpu"), torch.Generator().manual_seed(7))
    found = stored_matrix(lambda first, count: given[first : first + count], size, is_random=True, dtype=torch.float64)
    assert torch.equal(found.rows(0, size), given)
    blocks = values(size).unflatten(-1, (2, size))
    torch.testing.assert_close(found.apply(values(size)), (blocks @ given / size**0.5).flatten(-2))


@pytest.mark.parametrize("size", SIZES)
def test_is_a_rotation(size: int) -> None:
    matrix = Hadamard(size=size, signs=random_signs(size, 3), dtype=torch.float64)
    rows = matrix.rows(0, size)
    assert torch.equal(rows @ rows.T, size * torch.eye(size, dtype=torch.float64))
    turned = matrix.apply(values(size))
    torch.testing.assert_close(turned.square().sum(-1), values(size).square().sum(-1), rtol=1e-13, atol=0)
    torch.testing.assert_close(matrix.apply(turned, inverse=True), values(size), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_deterministic_and_keeps_the_dtype(dtype: torch.dtype) -> None:
    matrix = Hadamard(size=48, signs=random_signs(48, 3))
    once = matrix.apply(values(48, dtype))
    assert once.dtype == dtype
    assert torch.equal(once, matrix.apply(values(48, dtype)))
    assert torch.equal(once[:1], matrix.apply(values(48, dtype)[:1]))
    exact = Hadamard(size=48, signs=random_signs(48, 3), dtype=torch.float64).apply(values(48, dtype).double())
    torch.testing.assert_close(once.double(), exact, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_signs_depend_on_size_and_seed() -> None:
    signs = "".join("+" if sign > 0 else "-" for sign in random_signs(16, 0).tolist())
    assert signs == "+-+-+-+--++-++--"  # on every machine
    assert not torch.equal(random_signs(64, 0), random_signs(64, 1))
    assert set(random_signs(1000, 0).tolist()) == {1.0, -1.0}
    assert abs(float(random_signs(10_000, 0).mean())) < 0.05


def test_rejects_what_it_cannot_multiply() -> None:
    for size in (0, 7, 1415, 2**18):
        with pytest.raises(QuantizationError, match="no Hadamard matrix of size"):
            known_factor(size)
    with pytest.raises(QuantizationError, match="does not divide 48 features"):
        Hadamard(size=32).apply(torch.zeros(2, 48))
    with pytest.raises(QuantizationError, match=r"has \[4\] signs"):
        Hadamard(size=8, signs=torch.ones(4))
    with pytest.raises(TransformConfigError, match="not a known Hadamard matrix of Sylvester"):
        stored_matrix(lambda first, count: -sylvester(8)[first:], 8, is_random=False, dtype=torch.float32)
