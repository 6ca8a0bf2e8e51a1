"""Measure the inputs of Linear modules: Gram matrices, and magnitudes and ranges of channels.

Padding, and tokens that a loss mask excludes, are not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from runtime.algorithms.hessian import HessianAccumulator
from runtime.algorithms.output_squares import WIDEST_GRAM, TokenSample, gram_square, sample_square, summed
from runtime.data.masks import TokenMask
from runtime.formats.presets import AVERAGING_CONSTANT
from runtime.model.experts import ROWS
from runtime.streaming.work import EnoughSeenError

RunBatches = Callable[[Callable[[int], None]], None]
_TOKENS_PER_SUM = 256


class _SharingBrokenError(Exception):
    """Raised when modules that were assumed to read the same inputs do not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """The measurements that a module needs.

    Attributes:
        hessian: the Gram matrix of its inputs.
        channels: the mean magnitude, the minimum and the maximum of each input feature.
    """

    hessian: bool = False
    channels: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(hessian=self.hessian or other.hessian, channels=self.channels or other.channels)

    def __bool__(self) -> bool:
        return self.hessian or self.channels


class InputStatistics:
    """Statistics of the inputs of modules that read the same tensor.

    Args:
        num_in_features: I.
        needs: what to measure.
        device: the device of the sums, and of the inputs.

    Attributes:
        num_tokens: number of measured inputs.
        smallest_I: the minimum of each feature; `largest_I` is the maximum.
        average_smallest_I: the moving average of the batches' minima; `average_largest_I` of their maxima.
        spans: minimum and maximum of each batch, each [2].
    """

    def __init__(self, num_in_features: int, needs: Needs, device: torch.device) -> None:
        self.num_tokens = 0
        self.num_in_features = num_in_features
        self.needs = needs
        self._hessian = HessianAccumulator(num_in_features, device=device) if needs.hessian else None
        self._sum_abs_I = torch.zeros(num_in_features, dtype=torch.float64, device=device)
        self.smallest_I = torch.full((num_in_features,), torch.inf, device=device)
        self.largest_I = -self.smallest_I
        self.average_smallest_I = self.average_largest_I = torch.zeros(0, device=device)
        self.spans: list[torch.Tensor] = []
        self._scale_I: torch.Tensor | None = None
        # If no algorithm needs H, the error report uses a Gram matrix of narrow inputs, or some tokens of wide ones.
        is_reported = needs.channels and not needs.hessian
        is_narrow = num_in_features <= WIDEST_GRAM
        self._gram = HessianAccumulator(num_in_features, device=device) if is_reported and is_narrow else self._hessian
        self._sample = TokenSample() if is_reported and not is_narrow else None

    def add(self, inputs: torch.Tensor, counts: torch.Tensor | None) -> None:
        """Add a batch of inputs [..., I].

        Args:
            inputs: all leading dimensions are tokens.
            counts: bool for each token, whether it is measured; None for all.
        """
        assert self._scale_I is None, "inputs that are added after scaling would not be divided"
        flat_TI = inputs.detach().reshape(-1, inputs.shape[-1])
        if counts is not None:
            flat_TI = flat_TI[counts.reshape(-1)]
        self.num_tokens += len(flat_TI)
        if not len(flat_TI):
            return
        if self._gram is not None:
            self._gram.add(flat_TI)
        if self._sample is not None:
            self._sample.add(flat_TI)
        if self.needs.channels:
            self._add_channels(flat_TI)

    def _add_channels(self, flat_TI: torch.Tensor) -> None:
        smallest_I, largest_I = flat_TI.amin(dim=0).to(torch.float32), flat_TI.amax(dim=0).to(torch.float32)
        self.smallest_I = torch.minimum(self.smallest_I, smallest_I)
        self.largest_I = torch.maximum(self.largest_I, largest_I)
        self.spans.append(torch.stack((smallest_I.amin(), largest_I.amax())))
        if len(self.average_smallest_I):
            smallest_I = torch.lerp(self.average_smallest_I, smallest_I, AVERAGING_CONSTANT)
            largest_I = torch.lerp(self.average_largest_I, largest_I, AVERAGING_CONSTANT)
        self.average_smallest_I, self.average_largest_I = smallest_I, largest_I
        for part_TI in torch.split(flat_TI, _TOKENS_PER_SUM):  # a sum in float64 copies its operand
            self._sum_abs_I += part_TI.abs().sum(dim=0, dtype=torch.float64)

    @property
    def hessian_II(self) -> torch.Tensor:
        """H of the scaled inputs, float32; the sum itself, not a copy."""
        assert self._hessian is not None, "H was not measured"
        return self._hessian.hessian_II

    def is_finite(self) -> bool:
        """Whether all measured inputs and the sums of their squares are finite in float32."""
        sums = [] if self._hessian is None else [self._hessian.hessian_II.diagonal()]
        if self.needs.channels:
            sums += [self.smallest_I, self.largest_I]
        return all(bool(torch.isfinite(one).all()) for one in sums)

    def is_zero(self) -> bool:
        """Whether all measured inputs were zero."""
        if self.needs.channels:
            return not bool(self.smallest_I.any()) and not bool(self.largest_I.any())
        return self._hessian is not None and not bool(self._hessian.hessian_II.diagonal().any())

    def take_hessian(self) -> torch.Tensor:
        """Move H out; the caller may overwrite it."""
        hessian_II, self._hessian, self._gram = self.hessian_II, None, None
        return hessian_II

    def output_square(self, weight_OI: torch.Tensor, quantized_OI: torch.Tensor | None = None) -> float:
        """Compute ||W X||^2 over the scaled inputs, or ||W X - Q X||^2 (`runtime.algorithms.output_squares`).

        Args:
            weight_OI: W [O, I], on the device of the inputs.
            quantized_OI: Q, or None.
        """
        if self._gram is not None:
            gram_II = self._gram.hessian_II
            return summed(weight_OI, quantized_OI, lambda rows_RI: gram_square(rows_RI, gram_II))
        assert self._sample is not None, "nothing was measured, or H was moved out"
        inputs_TI = self._sample.inputs_TI
        if self._scale_I is not None:
            inputs_TI /= self._scale_I
        square = summed(weight_OI, quantized_OI, lambda rows_RI: sample_square(rows_RI, inputs_TI))
        return square * self._sample.share

    @property
    def mean_abs_I(self) -> torch.Tensor:
        """The mean magnitude of each feature; float32."""
        mean_I = (self._sum_abs_I / max(self.num_tokens, 1)).to(torch.float32)
        return mean_I if self._scale_I is None else mean_I / self._scale_I

    def feature_span(self, *, average: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Minimum and maximum of each feature, over all batches or as moving averages."""
        low_I, high_I = self.smallest_I, self.largest_I
        if average:
            low_I, high_I = self.average_smallest_I, self.average_largest_I
        return (low_I, high_I) if self._scale_I is None else (low_I / self._scale_I, high_I / self._scale_I)

    def span(self, averaging: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Minimum and maximum of all features, over all batches or as moving averages.

        Args:
            averaging: weight of the newest batch in the average; None for no average. If the inputs were scaled, each
                feature is averaged with a weight of 0.01 instead.
        """
        if averaging is None or self._scale_I is not None:
            low_I, high_I = self.feature_span(average=averaging is not None)
            return low_I.amin(), high_I.amax()
        average = self.spans[0]
        for newest in self.spans[1:]:
            average = torch.lerp(average, newest, averaging)
        return average[0], average[1]

    def scale(self, scale_I: torch.Tensor) -> None:
        """Convert the statistics to those of inputs divided by positive factors [I], without a second pass."""
        factors_I = scale_I.to(self._sum_abs_I.device, torch.float32)
        self._scale_I = factors_I if self._scale_I is None else self._scale_I * factors_I
        if self._gram is not None:
            self._gram.rescale_(factors_I)


def collect_statistics(
    modules: Mapping[str, nn.Module],
    needs: Mapping[str, Needs],
    run_batches: RunBatches,
    device: torch.device,
    masks: Sequence[TokenMask] = (),
    *,
    may_stop: bool = False,
) -> dict[str, InputStatistics]:
    """Measure the inputs of modules while all batches run.

    Modules that receive the same tensor object, such as the query, key and value projections, share one sum. If they
    receive different tensors in a later batch, everything is measured again with one sum per module.

    Args:
        modules: Linear modules by dotted name; their inputs are [..., I].
        needs: what to measure for each.
        run_batches: executes the subgraph for every batch; calls its argument with the batch's index before each.
        device: the device of the sums.
        masks: for each batch, which tokens are measured (`runtime.data.masks`). A mask applies to inputs with as many
            tokens, and to inputs of experts, which state the tokens that they receive (without a decoder). All tokens
            of other inputs are measured.
        may_stop: whether `run_batches` accepts `EnoughSeenError` as the end of a batch. This requires that the batch's
            results are not needed and that every batch calls the modules in the same order.

    Returns:
        The statistics of the called modules by name; several names may share one object.
    """
    try:
        return _collect(modules, run_batches, _Observer(device, needs, masks, share=True, may_stop=may_stop))
    except _SharingBrokenError:
        return _collect(modules, run_batches, _Observer(device, needs, masks, share=False, may_stop=may_stop))


def _collect(
    modules: Mapping[str, nn.Module], run_batches: RunBatches, observer: _Observer
) -> dict[str, InputStatistics]:
    handles = [
        module.register_forward_pre_hook(observer.hook(name), with_kwargs=True) for name, module in modules.items()
    ]
    try:
        run_batches(observer.begin)
    finally:
        for handle in handles:
            handle.remove()
    observer.require_agreement()
    return observer.found


class _Observer:
    def __init__(
        self,
        device: torch.device,
        needs: Mapping[str, Needs],
        masks: Sequence[TokenMask],
        *,
        share: bool,
        may_stop: bool,
    ) -> None:
        self.device = device
        self.share = share
        self.masks = masks
        self.found: dict[str, InputStatistics] = {}
        # Which modules share an input is known only when they are called, so the first measures what any of them needs.
        together = Needs()
        for need in needs.values():
            together |= need
        self._needs = dict.fromkeys(needs, together) if share else dict(needs)
        self._masks: tuple[torch.Tensor, ...] = ()  # of the current batch
        self._leaders: dict[str, str] = {}  # the module that measures the input of each module
        self._tokens: dict[str, int] = {}
        self._latest: dict[str, tuple[torch.Tensor, int]] = {}  # the last input of each leader, and its version
        self._calls: list[str] = []  # of the current batch
        self._first_calls: list[str] | None = None  # of the first batch
        self._may_stop = may_stop

    def begin(self, batch: int) -> None:
        """Start a batch."""
        if self._calls and self._first_calls is None:
            self._first_calls = self._calls
        self._calls = []
        mask = self.masks[batch] if batch < len(self.masks) else None
        parts = mask if isinstance(mask, tuple) else () if mask is None else (mask,)
        is_whole = all(bool(part.all()) for part in parts)
        self._masks = () if is_whole else tuple(part.to(self.device, torch.bool) for part in parts)

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._observe(name, args[0] if args else next(iter(kwargs.values())), module.__dict__.get(ROWS))
            self._calls.append(name)
            if self._may_stop and self._calls == self._first_calls:
                raise EnoughSeenError

        return observe

    def _observe(self, name: str, inputs: torch.Tensor, rows: torch.Tensor | None) -> None:
        if name not in self._leaders:
            self._leaders[name] = self._find_leader(inputs) or name
        leader = self._leaders[name]
        num_tokens = inputs.numel() // inputs.shape[-1]
        self._tokens[name] = self._tokens.get(name, 0) + num_tokens
        if leader == name:
            if name not in self.found:
                self.found[name] = InputStatistics(inputs.shape[-1], self._needs[name], self.device)
            self.found[name].add(inputs, self._counts(inputs, num_tokens, rows))
            self._latest[name] = (inputs, inputs._version)
        elif self._is_latest(leader, inputs):
            self.found[name] = self.found[leader]
        else:
            raise _SharingBrokenError

    def _counts(self, inputs: torch.Tensor, num_tokens: int, rows: torch.Tensor | None) -> torch.Tensor | None:
        """Select the inputs that are measured; None for all."""
        if rows is not None:
            chosen = self._masks[0].flatten()[rows] if len(self._masks) == 1 else None
            return chosen if chosen is not None and chosen.numel() == num_tokens else None
        fit = [mask for mask in self._masks if mask.numel() == num_tokens]
        if len(fit) > 1 and inputs.dim() == 3:
            fit = [mask for mask in fit if mask.shape == inputs.shape[:2]] or fit
        return fit[0] if fit else None

    def _find_leader(self, inputs: torch.Tensor) -> str | None:
        """Find a module that has received this tensor and no other."""
        num_tokens = inputs.numel() // inputs.shape[-1]
        names = (name for name in self._latest if self._is_latest(name, inputs) and self._tokens[name] == num_tokens)
        return next(names, None) if self.share else None

    def _is_latest(self, leader: str, inputs: torch.Tensor) -> bool:
        tensor, version = self._latest[leader]
        return tensor is inputs and version == inputs._version

    def require_agreement(self) -> None:
        """Check that all modules have received every input of their leaders."""
        for name, leader in self._leaders.items():
            if self._tokens[name] != self._tokens[leader]:
                raise _SharingBrokenError
