"""The inputs that modules get from the original model, beside those that they get from the quantized one.

For each batch, the original values run through the subgraph first (`runtime.streaming.passes`), and the inputs of all
measured modules are kept. Then the batch itself runs, and the same calls of the same modules get the same tokens.
Experts get the tokens that are routed to them, which may be others: a token that only one of the two models routes to
an expert has no counterpart there, and counts as if its original input were the present one.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class _Input:
    """A copy of an input, [N, I], because code may change the tensor in place; `rows` are the tokens of an expert."""

    tokens_NI: torch.Tensor
    rows_N: torch.Tensor | None

    def like(self, flat_NI: torch.Tensor, rows_N: torch.Tensor | None) -> torch.Tensor:
        """The original inputs of these tokens, and the given inputs of tokens without a counterpart."""
        if rows_N is None or self.rows_N is None:
            is_same = rows_N is None and self.rows_N is None and flat_NI.shape == self.tokens_NI.shape
            return self.tokens_NI if is_same else flat_NI
        if not len(self.rows_N):
            return flat_NI
        # No shape depends on a value, so that a GPU need not be awaited.
        sorted_N, order_N = torch.sort(self.rows_N)
        places_N = torch.searchsorted(sorted_N, rows_N).clamp_(max=len(sorted_N) - 1)
        is_known_N = sorted_N[places_N] == rows_N
        return torch.where(is_known_N[:, None], self.tokens_NI[order_N[places_N]], flat_NI)


@dataclass(kw_only=True)
class OriginalInputs:
    """The original inputs of one batch.

    Attributes:
        is_open: whether the original values of a batch are running, so that hooks add inputs.
    """

    is_open: bool = False
    _calls: dict[str, list[_Input]] = field(default_factory=dict)
    _copies: dict[int, tuple[weakref.ref[torch.Tensor], int, torch.Tensor]] = field(default_factory=dict)

    def begin(self) -> None:
        """Start a batch."""
        self._calls.clear()
        self._copies.clear()
        self.is_open = True

    def close(self) -> None:
        """End the run of the original values; the batch itself follows."""
        self._copies.clear()
        self.is_open = False

    def add(self, name: str, inputs: torch.Tensor, rows_N: torch.Tensor | None) -> None:
        """Keep an input of a module. Modules that read the same tensor share one copy."""
        reference, version, tokens_NI = self._copies.get(id(inputs), (None, -1, None))
        if reference is None or reference() is not inputs or version != inputs._version or tokens_NI is None:
            tokens_NI = inputs.detach().clone().reshape(-1, inputs.shape[-1])
            self._copies[id(inputs)] = (weakref.ref(inputs), inputs._version, tokens_NI)
        self._calls.setdefault(name, []).append(_Input(tokens_NI=tokens_NI, rows_N=rows_N))

    def take(self, name: str, inputs: torch.Tensor, rows_N: torch.Tensor | None) -> torch.Tensor:
        """The original inputs [N, I] of the same tokens, for the next call of a module."""
        flat_NI = inputs.detach().reshape(-1, inputs.shape[-1])
        calls = self._calls.get(name)
        return calls.pop(0).like(flat_NI, rows_N) if calls else flat_NI
