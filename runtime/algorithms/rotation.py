"""Orthogonal matrices that spread outliers over all channels, and their product with a weight.

QuaRot (arXiv 2404.00456) and SpinQuant (arXiv 2405.16406): a vector x of the residual stream becomes x Q. What
computes x is multiplied by Q, and what reads it by the inverse, so that the model computes the same:

    writer  y = h Wᵀ + b    W' = Qᵀ W, b' = b Q        for each column of W a row vector times Q
    reader  y = x Wᵀ        W' = W Q                   (x Q)(W Q)ᵀ = x Wᵀ

Both are `rotate_`: each vector along an axis is multiplied by Q from the right. Kinds of Q for n channels, orthonormal:

    hadamard          H / √n, H of Sylvester's construction times a known matrix of order n / 2^k
    random-hadamard   diag(s) H / √n with random signs s
    random-matrix     Q of the QR decomposition of a matrix of normal numbers, with a positive diagonal of R

Layer norm subtracts the mean, so a rotation of its input must not change it: Q 1 = 1. The columns of H / √n begin with
a constant one, and (H / √n) diag(d) (H / √n)ᵀ fixes it for signs d with d_0 = 1; a random matrix of n - 1 rows is moved
by the reflection that maps the first unit vector to the constant one.

Numbers are float64. Signs and normal numbers are a function of seed and index in integers (SplitMix64), and
Sylvester's part is n log n sums in a fixed order, so these are equal on every machine. Products with known matrices,
and the decomposition, are those of the installed BLAS and LAPACK: other machines may differ in the last bits of
float64, which rounding to a stored dtype hides except at a tie.

Left out: learned rotations, and rotations inside of the model (R3, R4), which readers compute themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from runtime.algorithms.hadamard import known_matrices, with_positive_column

Kind = Literal["hadamard", "random-hadamard", "random-matrix"]
_CHUNK = 2**17  # numbers at a time: all passes over them stay in the processor's cache
_LARGEST_DENSE = 16384


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rotation:
    """An orthonormal matrix Q of n rows, in a form that is quick to multiply with.

    Attributes:
        size: n.
        signs: [n], which multiply first; None for none.
        known: a known Hadamard matrix whose order divides n, [m, m]; None without a Hadamard product.
        middle: [n], signs between two Hadamard products; None for one product.
        dense: Q itself, [n, n], instead.
    """

    size: int
    signs: torch.Tensor | None = None
    known: torch.Tensor | None = None
    middle: torch.Tensor | None = None
    dense: torch.Tensor | None = None

    def of_rows(self, rows_Nn: torch.Tensor) -> torch.Tensor:
        """Return the product of row vectors in float64 with Q, [N, n]; the argument may be overwritten."""
        if self.dense is not None:
            return rows_Nn @ self.dense
        assert self.known is not None, "a rotation has one of the two forms"
        if self.signs is not None:
            rows_Nn = rows_Nn * self.signs
        if self.middle is None:
            return _hadamard(rows_Nn, self.known)
        return _hadamard(_hadamard(rows_Nn, self.known) * self.middle, self.known.T)

    def matrix(self) -> torch.Tensor:
        """Return Q, [n, n]."""
        return self.of_rows(torch.eye(self.size, dtype=torch.float64))


def rotation(size: int, kind: Kind, seed: int = 0, *, keeps_mean: bool = False) -> Rotation:
    """Return the rotation of a kind.

    Args:
        size: the number of channels, n.
        kind: see above.
        seed: of random numbers.
        keeps_mean: whether Q 1 = 1.

    Raises:
        ValueError: there is no such matrix of this size.
    """
    if size < 2:
        raise ValueError(f"a rotation needs at least 2 channels, got {size}")
    if kind == "random-matrix":
        if size > _LARGEST_DENSE:
            raise ValueError(f"a random matrix of {size} rows is too large; {_LARGEST_DENSE} is the limit")
        return Rotation(size=size, dense=_random_matrix(size, seed, keeps_mean=keeps_mean))
    known = _known_hadamard(size)
    if known is None:
        raise ValueError(f"no Hadamard matrix of {size} rows is known")
    if keeps_mean:
        middle = _signs(size, seed)
        middle[0] = 1.0
        return Rotation(size=size, known=known, middle=middle)
    return Rotation(size=size, known=known, signs=_signs(size, seed) if kind == "random-hadamard" else None)


def largest_hadamard(size: int) -> int:
    """Return the largest divisor of a size that has a Hadamard matrix."""
    return next(size // count for count in range(1, size + 1) if not size % count and _has_hadamard(size // count))


def rotate_(
    tensor: torch.Tensor,
    axis: int,
    rotation: Rotation,
    *,
    starts: Sequence[int] | None = None,
    scale: torch.Tensor | None = None,
) -> None:
    """Multiply the vectors along an axis by Q from the right, in place; computed in float64 and rounded once.

    Args:
        tensor: of floating point numbers.
        axis: the axis of the vectors.
        rotation: Q.
        starts: the first index of each block of n that is rotated; None for all of the axis, block by block.
        scale: multiplies the vectors before, [size of the axis]; requires that all of the axis is rotated.

    Raises:
        ValueError: the blocks do not fit the axis.
    """
    size, length = rotation.size, tensor.shape[axis]
    if starts is None:
        if length % size:
            raise ValueError(f"blocks of {size} do not divide an axis of {length}")
        starts = range(0, length, size)
    if any(not 0 <= start <= length - size for start in starts):
        raise ValueError(f"a block of {size} exceeds an axis of {length}")
    vectors = tensor.movedim(axis, -1)
    for start in starts:
        block = vectors.narrow(-1, start, size)
        factor = scale[start : start + size] if scale is not None else None
        for rows in _matrices(block):
            _rotate_rows_(rows, rotation, factor)


def _matrices(vectors: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield views [N, n] of all vectors, for each matrix of a stack."""
    if vectors.dim() > 2:
        for part in vectors:
            yield from _matrices(part)
    else:
        yield vectors if vectors.dim() == 2 else vectors[None]


def _rotate_rows_(rows_Nn: torch.Tensor, rotation: Rotation, scale: torch.Tensor | None) -> None:
    count = max(1, _CHUNK // rotation.size)
    for first in range(0, len(rows_Nn), count):
        chunk = rows_Nn[first : first + count]
        wide = chunk.to(torch.float64, memory_format=torch.contiguous_format)
        chunk.copy_(rotation.of_rows(wide if scale is None else wide * scale))


def _hadamard(rows_Nn: torch.Tensor, known_mm: torch.Tensor) -> torch.Tensor:
    """Multiply by (Sylvester's matrix ⊗ a known one) / √n."""
    num_rows, size = rows_Nn.shape
    order = len(known_mm)
    values = rows_Nn.reshape(num_rows, -1, order).clone()
    step = 1
    while step < size // order:
        pairs = values.view(num_rows, -1, 2, step * order)
        one, two = pairs[:, :, 0], pairs[:, :, 1]
        total = one + two
        torch.sub(one, two, out=two)
        one.copy_(total)
        step *= 2
    if order > 1:
        values = values.view(num_rows, -1, order) @ known_mm
    return values.view(num_rows, size).mul_(1 / math.sqrt(size))


def _known_order(size: int) -> int:
    """Return the number of rows of the known matrix for a size; 0 for a size without one."""
    odd = size // (size & -size)
    if odd == 1:
        return 1
    orders = known_matrices()
    factors = (odd * 2**power for power in range(2, size.bit_length()))
    return next((order for order in factors if order in orders and not size % order), 0)


def _has_hadamard(size: int) -> bool:
    return size in (1, 2) or bool(_known_order(size))


def _known_hadamard(size: int) -> torch.Tensor | None:
    order = _known_order(size)
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    return with_positive_column(known_matrices()[order]) if order else None


def _random_matrix(size: int, seed: int, *, keeps_mean: bool) -> torch.Tensor:
    if not keeps_mean:
        return _orthonormal(size, seed)
    matrix = torch.eye(size, dtype=torch.float64)
    matrix[1:, 1:] = _orthonormal(size - 1, seed)
    # The reflection along v maps the first unit vector to the constant vector of length 1.
    v = torch.full((size,), -1 / math.sqrt(size), dtype=torch.float64)
    v[0] += 1
    v /= v.norm()
    matrix -= 2 * torch.outer(v, v @ matrix)
    return matrix - 2 * torch.outer(matrix @ v, v)


def _orthonormal(size: int, seed: int) -> torch.Tensor:
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    bits = _hashed(2 * size * size, seed)
    uniform = ((bits >> 11).double() + 0.5) / 2**52
    # Box and Muller: two uniform numbers make a normal one.
    one, two = uniform[: size * size], uniform[size * size :]
    normal = (-2 * one.log()).sqrt() * (2 * math.pi * two).cos()
    q, r = torch.linalg.qr(normal.reshape(size, size))
    made: torch.Tensor = q * r.diagonal().sign()
    return made


def _signs(count: int, seed: int) -> torch.Tensor:
    return (_hashed(count, seed) >> 17 & 1).double() * 2 - 1


def _hashed(count: int, seed: int) -> torch.Tensor:
    """Return SplitMix64 of seed and index; a logical shift is an arithmetic one without the bits that it adds."""
    value = torch.arange(1, count + 1, dtype=torch.int64) * _signed(0x9E3779B97F4A7C15)
    value += _signed(seed * 0xD1342543DE82EF95 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        value = (value ^ _shifted(value, shift)) * _signed(factor)
    return _shifted(value, 1)


def _shifted(value: torch.Tensor, count: int) -> torch.Tensor:
    return torch.bitwise_and(value >> count, 2 ** (64 - count) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
