"""Multiply vectors by a Hadamard matrix without building it.

A Hadamard matrix H has entries +1 and -1 and orthogonal rows, so H / sqrt(n) is a rotation that spreads every number of
a vector evenly over all others (QuIP#, arXiv 2402.04396, section 3; SpinQuant, arXiv 2405.16406, section 3.2):

    H_1 = [1],   H_2m = [[H_m, H_m], [H_m, -H_m]]                    (Sylvester)
    T = diag(d) H,   d in {+1, -1}^n                                 (random Hadamard)

For other sizes H_n = N_k (x) H_(n/k), where N_k is a known Hadamard matrix and k at most 256: compressed-tensors has a
table of them, which also lists powers of two in another order than Sylvester's. N_k is normalized so that its first
column is 1, and so the first column of T is d. A Kronecker product is applied factor by factor: x of n numbers, seen as
X [k, a], becomes

    x (N_k (x) H_a)  =  N_k^T X H_a         (H_a is symmetric)

which takes n (a + k) multiplications instead of n^2. A transform of blocks multiplies each block of `size` consecutive
numbers by the same matrix.

Left out: matrices that are trained, and permutations.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from runtime.errors import QuantizationError

LARGEST_SIZE = 2**17
_LARGEST_FACTOR = 256
_NUMBERS_AT_A_TIME = 2**19  # bounds the copies in the dtype of the computation


def is_power_of_two(size: int) -> bool:
    """Whether a Hadamard matrix of this size is Sylvester's."""
    return size > 0 and size & (size - 1) == 0


@functools.cache
def known_factor(size: int) -> int:
    """Return k of N_k (x) H_(n/k).

    Raises:
        QuantizationError: if no Hadamard matrix of the size is known.
    """
    factor = size // (size & -size) if 0 < size <= LARGEST_SIZE else LARGEST_SIZE
    while factor * 2 <= _LARGEST_FACTOR and size % (factor * 2) == 0:
        factor *= 2
    if factor > _LARGEST_FACTOR or factor not in known_matrices():
        raise QuantizationError(f"no Hadamard matrix of size {size} is known")
    return factor


@functools.cache
def known_matrices() -> Mapping[int, torch.Tensor]:
    """Read compressed-tensors' table of Hadamard matrices, by their number of rows, as they are stored."""
    from compressed_tensors.transform.utils.hadamard import REPO_PATH
    from safetensors.torch import load_file

    return {int(name): matrix for name, matrix in load_file(REPO_PATH).items()}


def with_positive_column(matrix: torch.Tensor) -> torch.Tensor:
    """Return a Hadamard matrix in float64, with rows negated so that the first column is 1."""
    wide = matrix.to(torch.float64)
    return wide * wide[:, :1]


@functools.cache
def _listed(size: int) -> torch.Tensor:
    """Return the matrix of the table as compressed-tensors multiplies by it: transposed, [n, n]."""
    return with_positive_column(known_matrices()[size].T)


def random_signs(size: int, seed: int) -> torch.Tensor:
    """Return +1 and -1 in float64, [n], that depend on the size and the seed alone."""
    stream = hashlib.shake_256(f"signs {size} {seed}".encode()).digest(-(-size // 8))
    bits = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
    ones = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return ones.flatten()[:size].double() * 2 - 1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Hadamard:
    """The rotation T / sqrt(n) of consecutive blocks of n numbers.

    Attributes:
        size: n.
        signs: d, [n] in float64; None for ones.
        is_listed: whether a matrix whose size is a power of two is that of the table instead of Sylvester's.
        dtype: of the computation.
    """

    size: int
    signs: torch.Tensor | None = None
    is_listed: bool = False
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        """Reject sizes without a known matrix, and signs that do not fit."""
        known_factor(self.size)
        if self.signs is not None and self.signs.shape != (self.size,):
            raise QuantizationError(f"a Hadamard matrix of size {self.size} has {list(self.signs.shape)} signs")

    def apply(self, values: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
        """Return x T / sqrt(n), or x T^T / sqrt(n) if `inverse`.

        Args:
            values: [..., m], m a multiple of n; not changed.
            inverse: whether to multiply by the inverse.

        Returns:
            A new tensor of the same shape and dtype; each number is rounded once.

        Raises:
            QuantizationError: if n does not divide m.
        """
        if values.shape[-1] % self.size:
            raise QuantizationError(f"a transform of size {self.size} does not divide {values.shape[-1]} features")
        rows = values.reshape(-1, self.size)
        made = torch.empty_like(rows, memory_format=torch.contiguous_format)
        signs, (left, right) = self._signs_on(values.device), self._factors_on(values.device)
        count = max(1, _NUMBERS_AT_A_TIME // self.size)
        for first in range(0, len(rows), count):
            part = rows[first : first + count].to(self.dtype)
            if signs is not None and not inverse:
                part = part * signs
            part = _product(part, left.T if inverse else left, right)
            made[first : first + count] = part * signs if signs is not None and inverse else part
        return made.view(values.shape)

    @property
    def _is_sylvester(self) -> bool:
        return is_power_of_two(self.size) and not self.is_listed

    def _signs_on(self, device: torch.device) -> torch.Tensor | None:
        return None if self.signs is None else self.signs.to(device, self.dtype)

    def _factors_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return N_k / sqrt(n), and H_a."""
        return _factors(self.size, self._is_sylvester, self.dtype, str(device))

    def rows(self, first: int, count: int) -> torch.Tensor:
        """Return some rows of T, [count, n] in float64: its entries are +1 and -1."""
        left, right = _bases(self.size, self._is_sylvester)
        numbers = torch.arange(first, first + count)
        one, two = left[numbers // len(right)], right[numbers % len(right)]
        rows = (one[:, :, None] * two[:, None, :]).flatten(1)
        return rows if self.signs is None else rows * self.signs[numbers, None]


def _product(rows: torch.Tensor, left_kk: torch.Tensor, right_aa: torch.Tensor) -> torch.Tensor:
    """Multiply rows [R, k a] by the Kronecker product of two matrices, as two products of large matrices."""
    num_left, num_right = len(left_kk), len(right_aa)
    if num_right == 1:
        return rows @ left_kk
    by_left = (rows.reshape(-1, num_right) @ right_aa).view(-1, num_left, num_right).transpose(1, 2)
    by_right = (by_left.reshape(-1, num_left) @ left_kk).view(-1, num_right, num_left).transpose(1, 2)
    return by_right.reshape(-1, num_left * num_right)


@functools.lru_cache(maxsize=8)
def _sylvester(size: int) -> torch.Tensor:
    made = torch.ones(1, 1, dtype=torch.float64)
    while len(made) < size:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made


def _bases(size: int, is_sylvester: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return N_k and H_a; any k will do for Sylvester's matrix, and equal factors cost least."""
    factor = 1 << (size.bit_length() // 2) if is_sylvester and size > 1 else known_factor(size)
    left = _sylvester(factor) if is_sylvester else _listed(factor)
    return left, _sylvester(size // factor)


@functools.lru_cache(maxsize=64)
def _factors(size: int, is_sylvester: bool, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = _bases(size, is_sylvester)
    return (left / math.sqrt(size)).to(device, dtype), right.to(device, dtype)
