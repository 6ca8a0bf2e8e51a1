"""Statistics of the inputs of Linear modules: Gram matrices, and magnitudes and ranges of channels.

The inputs of each lane (`runtime.data.lanes`) are summed up alone, and lanes are added in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.algorithms.drift import DriftAccumulator
from runtime.algorithms.hessian import HessianAccumulator
from runtime.algorithms.output_squares import (
    NUM_ROWS,
    WIDEST_GRAM,
    TokenSample,
    gram_square,
    sample_square,
    spread_rows,
    summed,
)
from runtime.quantize.channel_sums import ChannelSums


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """The measurements that a module needs.

    Attributes:
        hessian: the Gram matrix of its inputs.
        channels: the mean magnitude, the minimum and the maximum of each input feature.
        drift: the products of the inputs with their distance to those of the original model; with the Gram matrix.
        sample: besides, some tokens of wide inputs whose Gram matrix is measured: reports of recipes that do not need
            the matrix are computed from them.
    """

    hessian: bool = False
    channels: bool = False
    drift: bool = False
    sample: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            hessian=self.hessian or other.hessian,
            channels=self.channels or other.channels,
            drift=self.drift or other.drift,
            sample=self.sample or other.sample,
        )

    def __bool__(self) -> bool:
        return self.hessian or self.channels


class InputStatistics:
    """Statistics of the inputs of modules that read the same tensor.

    One worker, the owner, has the Gram matrix or the sample; all workers have the rest.

    Args:
        num_in_features: I.
        needs: what to measure.
        device: the device of the sums, and of the inputs.

    Attributes:
        num_tokens: number of measured inputs, of the lanes that have ended.
        owner: the rank of the owner.
        is_here: whether this worker is the owner.
        lane_tokens: number of measured inputs of the lane that runs on this worker.
        lane: its other sums; None if there are none.
        gram: the Gram matrix: of the lane that runs, and on the owner of all lanes. None before the first input, and if
            it is not measured.
        sample: tokens for the error report, in the same way.
        drift: the drift of the inputs, in the same way.
    """

    def __init__(self, num_in_features: int, needs: Needs, device: torch.device) -> None:
        self.num_tokens = self.lane_tokens = 0
        self.num_in_features = num_in_features
        self.needs = needs
        self.device = device
        self.owner, self.is_here = 0, True
        self.lane: ChannelSums | None = None
        self._channels = ChannelSums(num_in_features, device) if needs.channels else None
        self.gram: HessianAccumulator | None = None
        self.sample: TokenSample | None = None
        self.drift: DriftAccumulator | None = None
        # If no algorithm needs H, the error report uses a Gram matrix of narrow inputs, or some tokens of wide ones.
        self.has_gram = needs.hessian or (needs.channels and num_in_features <= WIDEST_GRAM)
        is_wide = num_in_features > WIDEST_GRAM
        self.has_sample = bool(needs) and (not self.has_gram or (needs.sample and is_wide))
        self._diagonal_I: torch.Tensor | None = None
        self._drift_diagonal_I: torch.Tensor | None = None
        self._scale_I: torch.Tensor | None = None

    @classmethod
    def of_sums(
        cls, needs: Needs, *, num_tokens: int, channels: ChannelSums | None, diagonal_I: torch.Tensor
    ) -> InputStatistics:
        """Return the statistics that earlier sums give; the owner adds `gram` and `sample`.

        Args:
            needs: what to take of them.
            num_tokens: number of measured inputs.
            channels: the sums of channels; None without tokens.
            diagonal_I: the diagonal of H.
        """
        found = cls(len(diagonal_I), needs, diagonal_I.device)
        found.num_tokens = num_tokens
        if needs.channels and channels is not None:
            found._channels = channels
        if needs.hessian:
            found._diagonal_I = diagonal_I
        return found

    @property
    def channels(self) -> ChannelSums | None:
        """The sums of channels of all lanes; None if they are not measured."""
        return self._channels

    def add(self, inputs: torch.Tensor, counts: torch.Tensor | None, originals: torch.Tensor | None = None) -> None:
        """Add a batch of inputs [..., I] to the lane.

        Args:
            inputs: all leading dimensions are tokens.
            counts: bool for each token, whether it is measured, or the indices of those that are; None for all.
            originals: the inputs of the original model for the same tokens, if the drift is measured.
        """
        assert self._scale_I is None, "inputs that are added after scaling would not be divided"
        flat_TI = _counted(inputs, counts)
        self.lane_tokens += len(flat_TI)
        if not len(flat_TI):
            return
        self.reserve()
        if self.gram is not None:
            self.gram.add(flat_TI)
        if self.drift is not None:
            assert originals is not None, "the drift is measured, and the original inputs are missing"
            self.drift.add(_counted(originals, counts), flat_TI)
        if self.sample is not None:
            self.sample.add(flat_TI)
        if self.needs.channels:
            self.lane = self.lane or ChannelSums(self.num_in_features, self.device)
            self.lane.add(flat_TI)

    def reserve(self) -> None:
        """Create the Gram matrix and the drift, or the sample."""
        if self.has_gram and self.gram is None:
            self.gram = HessianAccumulator(self.num_in_features, device=self.device)
        if self.needs.drift and self.drift is None:
            self.drift = DriftAccumulator(self.num_in_features, device=self.device)
        if self.has_sample and self.sample is None:
            self.sample = TokenSample()

    def take_lane(self) -> ChannelSums | None:
        """Move the small sums of the lane that runs out, and start the next lane."""
        lane, self.lane, self.lane_tokens = self.lane, None, 0
        return lane

    def fold(self, num_tokens: int, lane: ChannelSums | None) -> None:
        """Add the number of tokens and the small sums of the next lane."""
        self.num_tokens += num_tokens
        if lane is not None and self._channels is not None:
            self._channels.fold(lane)

    @property
    def matrices(self) -> list[HessianAccumulator | DriftAccumulator]:
        """The sums of products of this worker."""
        return [matrix for matrix in (self.gram, self.drift) if matrix is not None]

    @property
    def num_diagonals(self) -> int:
        """The number of matrices whose diagonals all workers get."""
        return self.needs.hessian + self.needs.drift

    def diagonals(self) -> list[torch.Tensor]:
        """The diagonals of H, and of the drift; only the owner has them."""
        found = [self.hessian_II.diagonal()] if self.needs.hessian else []
        return [*found, self.drift_II.diagonal()] if self.needs.drift else found

    def finish(self, diagonals: Sequence[torch.Tensor]) -> None:
        """End the measurement: take the `diagonals`, and free the sums of lanes and those of other owners."""
        if self.needs.hessian:
            self._diagonal_I = diagonals[0]
        if self.needs.drift:
            self._drift_diagonal_I = diagonals[-1]
        if not self.is_here:
            self.gram = self.sample = self.drift = None
        if self.drift is not None:
            self.drift.free_lane()

    @property
    def hessian_II(self) -> torch.Tensor:
        """H of the scaled inputs, float32; the sum itself, not a copy. Only the owner has it."""
        assert self.needs.hessian and self.gram is not None, "H was not measured, or is on another worker"
        return self.gram.hessian_II

    @property
    def drift_II(self) -> torch.Tensor:
        """The sum of (x - x^) x^^T of the scaled inputs, float32, not a copy. Only the owner has it."""
        assert self.needs.drift and self.drift is not None, "the drift was not measured, or is on another worker"
        return self.drift.drift_II

    @property
    def diagonal_I(self) -> torch.Tensor:
        """The diagonal of H of the scaled inputs, float32."""
        assert self._diagonal_I is not None, "H was not measured"
        return self._diagonal_I

    def is_finite(self) -> bool:
        """Whether all measured inputs and the sums of their squares are finite in float32."""
        sums = [one for one in (self._diagonal_I, self._drift_diagonal_I) if one is not None]
        if self._channels is not None:
            sums.append(self._channels.bounds_2I)
        return all(bool(torch.isfinite(one).all()) for one in sums)

    def is_zero(self) -> bool:
        """Whether all measured inputs were zero."""
        if self._channels is not None:
            return not bool(self._channels.bounds_2I.any())
        return self._diagonal_I is not None and not bool(self._diagonal_I.any())

    @property
    def num_dead(self) -> int:
        """The number of features that were zero in all measured inputs."""
        if not self.num_tokens:
            return 0
        if self._diagonal_I is not None:
            return int((self._diagonal_I == 0).sum())
        return 0 if self._channels is None else int((self._channels.bounds_2I == 0).all(dim=0).sum())

    def take_hessian(self) -> torch.Tensor:
        """Move H out; the caller may overwrite it."""
        hessian_II, self.gram = self.hessian_II, None
        return hessian_II

    def take_drift(self) -> torch.Tensor:
        """Move the drift out, which frees its memory after the solve."""
        drift_II, self.drift = self.drift_II, None
        return drift_II

    def output_square(self, weight_OI: torch.Tensor, quantized_OI: torch.Tensor | None = None) -> float:
        """Compute ||W X||^2 over the scaled inputs, or ||W X - Q X||^2 (`runtime.algorithms.output_squares`).

        It is an estimate for large weights: from some rows of W if there is a Gram matrix, otherwise from some tokens.

        Args:
            weight_OI: W [O, I], on the device of the inputs.
            quantized_OI: Q, or None.
        """
        if self.gram is not None:
            gram_II, some_RI = self.gram.hessian_II, spread_rows(weight_OI, NUM_ROWS)
            quantized_RI = None if quantized_OI is None else spread_rows(quantized_OI, NUM_ROWS)
            square = summed(some_RI, quantized_RI, lambda rows_RI: gram_square(rows_RI, gram_II))
            return square * len(weight_OI) / len(some_RI)
        assert self.sample is not None, "nothing was measured, H was moved out, or it is on another worker"
        inputs_TI = self.sample.inputs_TI
        if self._scale_I is not None:
            inputs_TI /= self._scale_I
        square = summed(weight_OI, quantized_OI, lambda rows_RI: sample_square(rows_RI, inputs_TI))
        return square * self.sample.share

    @property
    def _measured(self) -> ChannelSums:
        assert self._channels is not None, "channels were not measured"
        return self._channels

    @property
    def mean_abs_I(self) -> torch.Tensor:
        """The mean magnitude of each feature; float32."""
        mean_I = (self._measured.sum_abs_I / max(self.num_tokens, 1)).to(torch.float32)
        return mean_I if self._scale_I is None else mean_I / self._scale_I

    def feature_span(self, *, average: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Minimum and maximum of each feature, over all batches or as moving averages."""
        low_I, high_I = self._measured.averages_2I if average else self._measured.bounds_2I
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
        average = self._measured.spans[0]
        for newest in self._measured.spans[1:]:
            average = torch.lerp(average, newest, averaging)
        return average[0], average[1]

    def scale(self, scale_I: torch.Tensor) -> None:
        """Convert the statistics to those of inputs divided by positive factors [I], without a second pass."""
        factors_I = scale_I.to(self.device, torch.float32)
        self._scale_I = factors_I if self._scale_I is None else self._scale_I * factors_I
        if self.gram is not None:
            self.gram.rescale_(factors_I)
        if self.drift is not None:
            self.drift.rescale_(factors_I)
        if self._diagonal_I is not None:
            self._diagonal_I = self._diagonal_I / factors_I / factors_I


def _counted(inputs: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """The inputs that are measured, [T, I]."""
    flat_TI = inputs.detach().reshape(-1, inputs.shape[-1])
    if counts is None:
        return flat_TI
    return flat_TI[counts.reshape(-1)] if counts.dtype == torch.bool else flat_TI.index_select(0, counts)
