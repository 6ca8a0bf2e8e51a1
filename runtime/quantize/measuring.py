"""Measure the inputs of Linear modules while batches run.

Padding, and tokens that a loss mask excludes, are not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn

from runtime.data.masks import TokenMask
from runtime.model.expert_hooks import ROWS
from runtime.quantize.lane_exchange import LaneCalls, LaneExchange, SharingBrokenError
from runtime.quantize.original_inputs import OriginalInputs
from runtime.quantize.statistics import InputStatistics, Needs
from runtime.streaming.work import EnoughSeenError
from runtime.workers.division import Division
from runtime.workers.group import Alone, Workers


class RunBatches(Protocol):
    """Executes the subgraph for the batches of this worker."""

    def __call__(
        self, before: Callable[[int], None], after: Callable[[], None], original: Callable[[int], None] = ..., /
    ) -> None:
        """Run all lanes; call `before` with the index of each batch, and `after` after each round of lanes.

        With `original`, each batch runs twice: first its original values, before which that is called.
        """


def collect_statistics(
    modules: Mapping[str, nn.Module],
    needs: Mapping[str, Needs],
    run_batches: RunBatches,
    device: torch.device,
    masks: Sequence[TokenMask] = (),
    *,
    may_stop: bool = False,
    workers: Workers | None = None,
    division: Division | None = None,
) -> dict[str, InputStatistics]:
    """Measure the inputs of modules while all batches run.

    Modules that receive the same tensor object, such as the query, key and value projections, share one sum. If they
    receive different tensors in a later batch, everything is measured again with one sum per module. Every worker calls
    this with the same modules, and runs the batches of its own lanes.

    Args:
        modules: Linear modules by dotted name; their inputs are [..., I].
        needs: what to measure for each.
        run_batches: executes the subgraph for every batch.
        device: the device of the sums.
        masks: for each batch of this worker, which tokens are measured (`runtime.data.masks`). A mask applies to inputs
            with as many tokens, and to inputs of experts, which state the tokens that they receive (without a decoder).
            All tokens of other inputs are measured.
        may_stop: whether `run_batches` accepts `EnoughSeenError` as the end of a batch. This requires that the batch's
            results are not needed and that every batch calls the modules in the same order.
        workers: that share the run; None for one.
        division: assigns each sum to the worker that will have it.

    Returns:
        The statistics of the modules that any worker has called, by name and in the order of calls; several names may
        share one object.
    """
    group = workers or Alone()
    for share in (True, False):
        exchange = LaneExchange(group, division or Division(group.size), device, list(modules))
        observer = _Observer(needs, masks, exchange, share=share, may_stop=may_stop)
        found = _collect(modules, run_batches, observer)
        if found is not None:
            return found
        del exchange, observer  # frees the sums of the first attempt
    raise AssertionError("modules that share nothing cannot break it")


def _collect(
    modules: Mapping[str, nn.Module], run_batches: RunBatches, observer: _Observer
) -> dict[str, InputStatistics] | None:
    handles = [
        module.register_forward_pre_hook(observer.hook(name), with_kwargs=True) for name, module in modules.items()
    ]
    try:
        if observer.has_drift:
            run_batches(observer.begin, observer.end_round, observer.begin_original)
        else:
            run_batches(observer.begin, observer.end_round)
        return observer.exchange.finish()
    except SharingBrokenError:
        return None
    finally:
        for handle in handles:
            handle.remove()


class _Counted:
    """The tokens of a batch that are measured. The host finds their indices: to select by a mask, it waits for a GPU.

    Args:
        mask: on the host.
        device: of the inputs.

    Attributes:
        shape: of the mask.
        num_tokens: its size.
        indices: the tokens that are measured, on the device.
    """

    def __init__(self, mask: torch.Tensor, device: torch.device) -> None:
        self.shape, self.num_tokens = mask.shape, mask.numel()
        self.indices = mask.flatten().nonzero().flatten().to(device, non_blocking=True)
        self._mask, self._device = mask, device

    @property
    def is_whole(self) -> bool:
        """Whether all are measured."""
        return len(self.indices) == self.num_tokens

    @cached_property
    def mask(self) -> torch.Tensor:
        """Whether each token is measured."""
        return self._mask.flatten().to(self._device, torch.bool, non_blocking=True)


class _Observer:
    def __init__(
        self,
        needs: Mapping[str, Needs],
        masks: Sequence[TokenMask],
        exchange: LaneExchange,
        *,
        share: bool,
        may_stop: bool,
    ) -> None:
        self.share = share
        self.masks = masks
        self.exchange = exchange
        # Which modules share an input is known only when they are called, so the first measures what any of them needs.
        together = Needs()
        for need in needs.values():
            together |= need
        self._needs = dict.fromkeys(needs, together) if share else dict(needs)
        self._counted: tuple[_Counted, ...] = ()  # in the current batch
        self._lane = LaneCalls()
        self._latest: dict[str, tuple[torch.Tensor, int]] = {}  # the last input of each leader, and its version
        self._calls: list[str] = []  # of the current batch
        self._first_calls: list[str] | None = None  # of the first batch
        self._may_stop = may_stop
        self.has_drift = together.drift
        self._originals = OriginalInputs()

    def begin_original(self, batch: int) -> None:
        """Start the run of a batch's original values, which comes before that of the batch."""
        self._originals.begin()

    def begin(self, batch: int) -> None:
        """Start a batch."""
        self._originals.close()
        if self._calls and self._first_calls is None:
            self._first_calls = self._calls
        self._calls = []
        mask = self.masks[batch] if batch < len(self.masks) else None
        parts = mask if isinstance(mask, tuple) else () if mask is None else (mask,)
        counted = tuple(_Counted(part, self.exchange.device) for part in parts)
        self._counted = () if all(part.is_whole for part in counted) else counted

    def end_round(self) -> None:
        """End the lane that has run here, if any, and add the lanes of all workers.

        Raises:
            SharingBrokenError: on all workers, if modules of one of them that should read the same inputs do not.
        """
        lane, self._lane, self._latest = self._lane, LaneCalls(), {}
        self._originals = OriginalInputs()
        self.exchange.end_round(lane, self._needs)

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs, rows = args[0] if args else next(iter(kwargs.values())), module.__dict__.get(ROWS)
            if self._originals.is_open:
                self._originals.add(name, inputs, rows)
                return
            if not self._lane.is_broken:  # the exchange after the lane tells the other workers
                self._observe(name, inputs, rows)
            self._calls.append(name)
            if self._may_stop and (self._calls == self._first_calls or self._lane.is_broken):
                raise EnoughSeenError

        return observe

    def _observe(self, name: str, inputs: torch.Tensor, rows: torch.Tensor | None) -> None:
        lane = self._lane
        if name not in lane.leaders:
            lane.leaders[name] = self._find_leader(inputs) or name
        leader = lane.leaders[name]
        num_tokens = inputs.numel() // inputs.shape[-1]
        lane.tokens[name] = lane.tokens.get(name, 0) + num_tokens
        if leader == name:
            found = self.exchange.entry(name, inputs.shape[-1], self._needs[name])
            originals = self._originals.take(name, inputs, rows) if found.needs.drift else None
            found.add(inputs, self._counts(inputs, num_tokens, rows), originals)
            self._latest[name] = (inputs, inputs._version)
        elif not self._is_latest(leader, inputs):
            lane.is_broken = True

    def _counts(self, inputs: torch.Tensor, num_tokens: int, rows: torch.Tensor | None) -> torch.Tensor | None:
        """Select the inputs that are measured, as a mask or as indices; None for all."""
        if rows is not None:
            chosen = self._counted[0].mask[rows] if len(self._counted) == 1 else None
            return chosen if chosen is not None and chosen.numel() == num_tokens else None
        fit = [one for one in self._counted if one.num_tokens == num_tokens]
        if len(fit) > 1 and inputs.dim() == 3:
            fit = [one for one in fit if one.shape == inputs.shape[:2]] or fit
        return fit[0].indices if fit else None

    def _find_leader(self, inputs: torch.Tensor) -> str | None:
        """Find a module that has received this tensor in this lane and no other."""
        num_tokens = inputs.numel() // inputs.shape[-1]
        tokens = self._lane.tokens
        names = (name for name in self._latest if self._is_latest(name, inputs) and tokens[name] == num_tokens)
        return next(names, None) if self.share else None

    def _is_latest(self, leader: str, inputs: torch.Tensor) -> bool:
        tensor, version = self._latest[leader]
        return tensor is inputs and version == inputs._version
