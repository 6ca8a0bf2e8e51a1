"""What calibration measures: the Hessians of the inputs that Linear modules see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from runtime.algorithms.hessian import HessianAccumulator


class _SharingBrokenError(Exception):
    """Modules that were taken to see the same inputs do not."""


def collect_hessians(
    modules: Mapping[str, nn.Module], run_batches: Callable[[], None], device: torch.device
) -> dict[str, HessianAccumulator]:
    """Sum up the Hessian of every distinct input while all batches run.

    Modules that are handed the very same tensor, such as the query, key and value projections, share one sum. Should
    they turn out to part ways in a later batch, everything is measured again with a sum for each.

    Args:
        modules: Linear modules by dotted name; their inputs are [..., I].
        run_batches: executes the subgraph for every batch.
        device: where sums are kept.

    Returns:
        The accumulators of the modules that were called, by name; one object may stand under several names.
    """
    try:
        return _collect(modules, run_batches, _Observer(device, share=True))
    except _SharingBrokenError:
        return _collect(modules, run_batches, _Observer(device, share=False))


def _collect(
    modules: Mapping[str, nn.Module], run_batches: Callable[[], None], observer: _Observer
) -> dict[str, HessianAccumulator]:
    handles = [
        module.register_forward_pre_hook(observer.hook(name), with_kwargs=True) for name, module in modules.items()
    ]
    try:
        run_batches()
    finally:
        for handle in handles:
            handle.remove()
    observer.require_agreement()
    return observer.accumulators


class _Observer:
    def __init__(self, device: torch.device, *, share: bool) -> None:
        self.device = device
        self.share = share
        self.accumulators: dict[str, HessianAccumulator] = {}
        self._leaders: dict[str, str] = {}
        self._tokens: dict[str, int] = {}
        self._latest: dict[str, tuple[torch.Tensor, int]] = {}  # what each leader was handed last, and its version

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._observe(name, args[0] if args else next(iter(kwargs.values())))

        return observe

    def _observe(self, name: str, inputs: torch.Tensor) -> None:
        if name not in self._leaders:
            self._leaders[name] = self._find_leader(inputs) or name
        leader = self._leaders[name]
        self._tokens[name] = self._tokens.get(name, 0) + inputs.numel() // inputs.shape[-1]
        if leader == name:
            if name not in self.accumulators:
                self.accumulators[name] = HessianAccumulator(inputs.shape[-1], device=self.device)
            self.accumulators[name].add(inputs)
            self._latest[name] = (inputs, inputs._version)
        elif self._is_latest(leader, inputs):
            self.accumulators[name] = self.accumulators[leader]
        else:
            raise _SharingBrokenError

    def _find_leader(self, inputs: torch.Tensor) -> str | None:
        """A module that was handed this tensor, and nothing before it."""
        num_tokens = inputs.numel() // inputs.shape[-1]
        names = (name for name in self._latest if self._is_latest(name, inputs) and self._tokens[name] == num_tokens)
        return next(names, None) if self.share else None

    def _is_latest(self, leader: str, inputs: torch.Tensor) -> bool:
        tensor, version = self._latest[leader]
        return tensor is inputs and version == inputs._version

    def require_agreement(self) -> None:
        """Followers must have seen all that their leaders have."""
        for name, leader in self._leaders.items():
            if self._tokens[name] != self._tokens[leader]:
                raise _SharingBrokenError
