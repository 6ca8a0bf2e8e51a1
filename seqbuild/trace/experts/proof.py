"""Prove by execution that a leaf computes the same as the experts module from which it was learned.

The leaf is built as on a host and called next to the module, both with the same random weights: for several numbers of
tokens and of experts per token, with some experts unused, and in two dtypes. Results must be equal bit for bit, and
nothing may be modified.

Weights of a real model's size are overlapping windows into a few random numbers: they take no memory, but no two
experts and no two rows are equal.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from runtime.language.program import compile_program
from runtime.model.leaves import build_leaf
from seqbuild.trace.experts.loop import ExpertLoop, replaced_parameters
from seqbuild.trace.real.weightless import attributes_restored

if TYPE_CHECKING:
    from runtime.artifact.manifest import LeafKind
    from seqbuild.chain.emit import EmittedCode

_MOST_OWN = 2**20  # size limit of a parameter with independent random numbers
_MOST_IN_ROWS = 2**26  # span limit of windows whose rows do not overlap
_MOST_QUICK = 2**19  # size limit of an expert that is tested with many tokens and several dtypes
_MANY = 300  # number of tokens of the largest test case
_FEW = (0, 1, -2, -1)  # the experts used in a large mixture
_DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32))
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Case:
    """A choice of experts.

    Attributes:
        index: the experts of each token, [T, K].
        may_fail: whether the module may reject it: some need several experts per token, or have no number for "none".
    """

    index: torch.Tensor
    may_fail: bool


def is_proven(module: nn.Module, loop: ExpertLoop, width: int, kind: LeafKind, code: EmittedCode) -> bool:
    """Return whether a leaf computes the same as a module.

    Args:
        module: a module whose forward takes hidden states, indices and weights.
        loop: the properties of its loop.
        width: the width of the hidden states.
        kind: the leaf's kind.
        code: the leaf's program.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"), attributes_restored(module):
        try:
            return _Trial(module, loop, width, kind, code).is_equal()
        except Exception as error:
            _logger.debug("%s is not proven: %s", type(module).__name__, error)
            return False


class _Trial:
    """A module and its leaf, with the same weights."""

    def __init__(self, module: nn.Module, loop: ExpertLoop, width: int, kind: LeafKind, code: EmittedCode) -> None:
        shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        self.module = module
        self.leaf = build_leaf(kind, "experts", shapes, compile_program(code.source, "experts.py"))
        self.shapes = shapes
        self.width = width
        self.num_dims = loop.num_dims
        self.num_experts = int(kind.options["num_experts"][0])
        self.num_identity = loop.num_identity
        self.size = sum(torch.Size(shape).numel() for shape in shapes.values()) // self.num_experts
        self.is_large = self.size > _MOST_QUICK
        self.generator = torch.Generator().manual_seed(0)

    def is_equal(self) -> bool:
        """Return whether both return the same in all test cases."""
        for place, (states_dtype, weights_dtype) in enumerate(_DTYPES[:1] if self.is_large else _DTYPES):
            values = self._values(states_dtype)
            cases = self._few_cases() if self.is_large or place else self._cases()
            if not all(self._is_same(case, values, states_dtype, weights_dtype) for case in cases):
                return False
        return True

    def _few_cases(self) -> Iterator[_Case]:
        """Yield few cases: each reads all large matrices and may compile kernels for its number of tokens."""
        used, num_all = self._used(), self.num_experts + self.num_identity
        few = dict.fromkeys((*used[:2], self.num_experts - 1, num_all - 1))
        yield _Case(index=self._drawn(list(few), 7, min(2, len(few))), may_fail=False)
        yield _Case(index=torch.tensor([[used[0], num_all], [num_all, used[0]]]), may_fail=True)

    def _cases(self) -> Iterator[_Case]:
        used, num_all = self._used(), self.num_experts + self.num_identity
        for num_places in (1, 2, 4):
            if num_places <= len(used):
                for num_tokens in (1, 2, 7, *([_MANY] if num_places == 2 else [])):
                    index = self._drawn(used, num_tokens, num_places)
                    yield _Case(index=index, may_fail=num_places == 1 < len(used))
        for expert in (used[0], used[-1]):
            yield _Case(index=torch.full((6, 1), expert), may_fail=len(used) > 1)
        pairs = list(itertools.pairwise(used))
        yield from (_Case(index=torch.tensor([pair] * 4), may_fail=False) for pair in (*pairs[:1], *pairs[-1:]))
        yield _Case(index=self._drawn([*used, num_all], 8, 2), may_fail=True)
        yield _Case(index=torch.full((2, 2), num_all), may_fail=True)
        if num_all > len(used) and self.size * num_all <= _MOST_OWN:
            yield _Case(index=torch.arange(num_all - num_all % 2).view(-1, 2), may_fail=False)

    def _used(self) -> list[int]:
        """Return the experts to use: all in a small mixture, else the first and last ones of each kind."""
        own = dict.fromkeys(range(self.num_experts))
        if self.num_experts > 2 * len(_FEW):
            own = dict.fromkeys(number % self.num_experts for number in _FEW)
        others = {0, self.num_identity - 1} if self.num_identity else set()
        return [*own, *(self.num_experts + number for number in sorted(others))]

    def _drawn(self, used: Sequence[int], num_tokens: int, num_places: int) -> torch.Tensor:
        """Draw different experts for each token."""
        order = torch.rand(num_tokens, len(used), generator=self.generator).argsort(-1)
        return torch.tensor(used)[order[:, :num_places]]

    def _is_same(
        self,
        case: _Case,
        values: Mapping[str, torch.Tensor],
        states_dtype: torch.dtype,
        weights_dtype: torch.dtype,
    ) -> bool:
        num_tokens = len(case.index)
        lead = (num_tokens,) if self.num_dims == 2 else (2 - num_tokens % 2, -1)
        states = torch.randn(num_tokens, self.width, generator=self.generator).to(states_dtype)
        weights = torch.rand(case.index.shape, generator=self.generator).to(weights_dtype)
        inputs = states.view(*lead, self.width), case.index, weights
        unchanged = (*inputs, *values.values())
        versions = [tensor._version for tensor in unchanged]
        forward = inspect.unwrap(type(self.module).forward)
        with replaced_parameters(self.module, values), replaced_parameters(self.leaf, values):
            try:
                expected = forward(self.module, *inputs)
            except Exception:
                if not case.may_fail and states_dtype == weights_dtype:
                    raise
                return True  # the module does not support this case
            found = self.leaf(*inputs)
        is_same = found.dtype == expected.dtype and bool(torch.equal(found, expected))
        return is_same and [tensor._version for tensor in unchanged] == versions

    def _values(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Create small random values for all parameters."""
        windows = {
            name: _strides(shape) for name, shape in self.shapes.items() if torch.Size(shape).numel() > _MOST_OWN
        }
        reach = max((_reach(self.shapes[name], strides) for name, strides in windows.items()), default=0)
        few = torch.rand(_MOST_OWN + 7, generator=self.generator).sub_(0.5).to(dtype) if windows else torch.empty(0)
        numbers = few.repeat(2 + reach // (_MOST_OWN + 7)) if windows else few
        values: dict[str, torch.Tensor] = {}
        for place, (name, shape) in enumerate(self.shapes.items()):
            if name in windows:
                value = numbers.as_strided(shape, windows[name], 61 * place)
            else:
                value = torch.rand(shape, generator=self.generator).sub_(0.5).to(dtype)
            values[name] = nn.Parameter(value, requires_grad=False)
        return values


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a window: experts overlap, and so do rows if the span would be too large otherwise."""
    rows = (1009, *torch.empty(shape[1:], device="meta").stride())
    is_flat = len(shape) < 3 or _reach(shape, rows) > _MOST_IN_ROWS
    return (*(1009,) * (len(shape) - 2), 3, 1)[-len(shape) :] if is_flat else rows


def _reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
