"""Rotation matrices, and their products with weights."""

from __future__ import annotations

import math

import pytest
import torch

from runtime.algorithms.rotation import Kind, largest_hadamard, rotate_, rotation

KINDS: tuple[Kind, ...] = ("hadamard", "random-hadamard", "random-matrix")
WIDE = torch.float64


def sylvester(size: int) -> torch.Tensor:
    """Entry i, j is the parity of the bits that i and j share."""
    signs = [[(-1.0) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=WIDE) / math.sqrt(size)


def splitmix64(index: int, seed: int) -> int:
    """The generator as published, in Python's integers."""
    value = (index + 1) * 0x9E3779B97F4A7C15 + seed * 0xD1342543DE82EF95
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        value = (value % 2**64 ^ value % 2**64 >> shift) * factor
    return value % 2**64


@pytest.mark.parametrize("size", [2, 16, 64])
def test_matrices_equal_their_definition(size: int) -> None:
    assert torch.allclose(rotation(size, "hadamard").matrix(), sylvester(size), atol=1e-15)
    signs = torch.tensor([(splitmix64(index, 5) >> 1 >> 17 & 1) * 2.0 - 1 for index in range(size)], dtype=WIDE)
    assert torch.allclose(rotation(size, "random-hadamard", 5).matrix(), signs[:, None] * sylvester(size), atol=1e-15)
    fixed = sylvester(size) @ torch.diag(torch.cat([torch.ones(1, dtype=WIDE), signs[1:]])) @ sylvester(size).T
    assert torch.allclose(rotation(size, "hadamard", 5, keeps_mean=True).matrix(), fixed, atol=1e-14)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_products_equal_loops(axis: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 24, 24, generator=generator, dtype=WIDE)
    scale = torch.randn(24, generator=generator, dtype=WIDE)
    turn = rotation(12, "random-matrix", 1)
    expected = weight.clone().movedim(axis, -1)
    for one in range(24):
        for two in range(24):
            for start in (0, 12):
                vector = weight.movedim(axis, -1)[one, two, start : start + 12] * scale[start : start + 12]
                expected[one, two, start : start + 12] = vector @ turn.matrix()
    rotate_(weight, axis, turn, scale=scale)
    assert torch.allclose(weight.movedim(axis, -1), expected, atol=1e-12)


def test_only_chosen_blocks_are_rotated() -> None:
    weight = torch.randn(40, 3, dtype=WIDE)
    rotated = weight.clone()
    rotate_(rotated, 0, rotation(8, "hadamard"), starts=(4, 24))
    expected = weight.clone()
    for start in (4, 24):
        expected[start : start + 8] = sylvester(8).T @ weight[start : start + 8]
    assert torch.allclose(rotated, expected, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keeps_mean", [False, True])
def test_equal_to_the_bit(kind: Kind, keeps_mean: bool) -> None:
    one, two = (rotation(96, kind, 3, keeps_mean=keeps_mean).matrix() for _ in range(2))
    assert torch.equal(one, two)
    rows = torch.randn(3000, 96).bfloat16()
    whole, parts = rows.clone(), rows.clone()
    rotate_(whole, 1, rotation(96, kind, 3, keeps_mean=keeps_mean))
    for part in parts.split(7):
        rotate_(part, 1, rotation(96, kind, 3, keeps_mean=keeps_mean))
    assert torch.equal(whole, parts)
    is_random = kind != "hadamard" or keeps_mean
    assert torch.equal(one, rotation(96, kind, 4, keeps_mean=keeps_mean).matrix()) is not is_random


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize("size", [2, 12, 28, 64, 112])
def test_orthonormal_and_flat(kind: Kind, keeps_mean: bool, size: int) -> None:
    matrix = rotation(size, kind, 7, keeps_mean=keeps_mean).matrix()
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=WIDE), atol=1e-12)
    if keeps_mean:
        ones = torch.ones(size, dtype=WIDE)
        assert torch.allclose(matrix @ ones, ones, atol=1e-11)
    elif kind != "random-matrix":
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5), atol=1e-12)
    if size >= 64:  # an outlier is spread over all channels
        assert float(matrix.abs().max()) < 6 * size**-0.5


def test_a_wrong_size_is_rejected() -> None:
    with pytest.raises(ValueError, match="at least 2 channels, got 1"):
        rotation(1, "hadamard")
    with pytest.raises(ValueError, match="no Hadamard matrix of 142 rows is known"):
        rotation(142, "hadamard")
    assert largest_hadamard(64 * 71) == 64
    assert rotation(142, "random-matrix").size == 142
    with pytest.raises(ValueError, match="100000 rows is too large"):
        rotation(100_000, "random-matrix")
    with pytest.raises(ValueError, match="blocks of 8 do not divide an axis of 12"):
        rotate_(torch.ones(12), 0, rotation(8, "hadamard"))
    with pytest.raises(ValueError, match="a block of 8 exceeds an axis of 12"):
        rotate_(torch.ones(12), 0, rotation(8, "hadamard"), starts=(8,))
