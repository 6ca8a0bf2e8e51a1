"""AWQ: protect salient weights by scaling their columns up before they are rounded.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han, "AWQ: Activation-aware Weight Quantization for LLM
Compression and Acceleration", arXiv 2306.00978. Multiplying column j of W by s_j and dividing input j by it changes
nothing before rounding, and divides the rounding error of that column by s_j (equations 1 to 3). The best s is
found by a search (equations 4 and 5):

    s(a) = s_X^a,   s_X = mean |X_j|,    a* = argmin over a in [0, 1] of    || Q(W diag(s)) diag(s)^-1 X - W X ||^2

With duo scaling, as in the authors' later code, s(a) = s_X^a / s_W^(1-a), where s_W is the mean over rows of |w| over
the largest |w| of its group: a column that is large in every row should not be scaled up as well.

Other implementations run the layer forward for each a. Here the loss is a quadratic form of the error
E = Q(W diag(s)) diag(s)^-1 - W and the inputs' Gram matrix H = X X^T, summed up in one pass over the data:

    || E X ||^2 = tr(E H E^T)

so a candidate costs one rounding and one matrix product, whatever the number of tokens, and a sample of rows is enough
to choose one number a for all of them. All siblings that read X share s, and their losses are added up.

The candidates race: all are tried on one part of the sampled rows after the other, and after each part the candidates
that are behind by more than chance explains leave the race. Rows are independent, so the difference of two candidates
over m of M rows extrapolates to all rows with the standard error

    M / sqrt(m) * sqrt(1 - m / M) * (standard deviation of the difference of one row)

A candidate leaves when it is `_ERRORS` standard errors behind. Near the optimum the curve is flat and its noise
decides, which is why a search that assumes one minimum, as the golden section does, ends at a different a. The race may
use bf16, which changes the ratio of two losses by less than `_TOLERANCE`. Candidates that are closer than that at the
end are computed again in float32, so that processors with and without bf16 products choose the same s.

Shapes: O out features, I in features, R sampled rows, K candidates.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms import grid
from runtime.algorithms.observers import fitted_grid
from runtime.algorithms.output_squares import gram_squares, spread_rows
from runtime.algorithms.rtn import rounded
from runtime.algorithms.smoothquant import pooled
from runtime.errors import QuantizationError

NUM_ROWS = 512  # rows of each weight that the search samples
_MOST_ROWS, _FEWEST_ROWS = 8 * NUM_ROWS, 16  # limits of the rows of all weights together and of each
_MISFIT = "inputs have {} features, but the weights that read them do not"
_SMALLEST = 1e-4
_MOST_PARTS = 8  # of the sampled rows
_FEWEST_OF_A_PART, _FEWEST_NUMBERS = 32, 2**16  # rows and numbers of a part: for fewer, calls take longer than work
_ERRORS = 3.5
_TOLERANCE = 2.0**-10
# The race uses float32 for fewer rows, whose rounding errors do not cancel each other if the inputs are few as well,
# and for smaller inputs, whose squares bf16 products may take for 0.
_FEWEST_IN_BFLOAT16, _SMALLEST_SQUARE = 128, 2.0**-80
_STACK, _STACK_STEP = 2048, 256  # rows of all candidates that are multiplied by H at a time, and their granularity
_ROWS_OF_A_SUM, _SUMS_OF_A_SUM = 256, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleSearch:
    """The result of the search for scales.

    Args:
        scale_I: s, float32, the same for features that come from one channel of the producer.
        ratio: a.
        is_duo: whether s_W was used.
        loss: of the sampled rows, with s; in the precision of the race if no other candidate came close.
        loss_before: the same with s = 1; never smaller than `loss`, because s = 1 is a candidate.
    """

    scale_I: torch.Tensor
    ratio: float
    is_duo: bool
    loss: float
    loss_before: float


def search_scales(
    weights: Iterable[torch.Tensor],
    hessian_II: torch.Tensor,
    mean_abs_I: torch.Tensor,
    schemes: Sequence[QuantizationArgs],
    *,
    scale_dtype: torch.dtype,
    n_grid: int = 20,
    duo_scaling: bool | str = True,
    channel_I: torch.Tensor | None = None,
    num_rows: int | None = None,
    race_dtype: torch.dtype = torch.float32,
) -> ScaleSearch:
    """Find the factors by which to multiply the columns of weights that read one input.

    Args:
        weights: [O, I] each; read one after the other, so they may be generated on demand.
        hessian_II: H, the sum of x x^T over the inputs.
        mean_abs_I: mean |x|.
        schemes: the scheme of each weight.
        scale_dtype: the dtype that the checkpoint stores scales in.
        n_grid: the number of steps of a from 0 to 1.
        duo_scaling: whether s_W is used; "both" tries both.
        channel_I: the producer's channel that each feature is proportional to; by default each has its own.
        num_rows: the rows of each weight to sample, evenly spread; None for `rows_of_each`.
        race_dtype: bfloat16 if the device multiplies it faster than float32. Ignored for numbers in float64.

    Raises:
        QuantizationError: for shapes that do not match, and numbers that are not finite.
    """
    _check(hessian_II, mean_abs_I, n_grid)
    num_rows = rows_of_each(len(schemes)) if num_rows is None else num_rows
    sample, relative_I = _sampled(weights, schemes, len(mean_abs_I), num_rows)
    dtype = grid.work_dtype(hessian_II, *sample)
    groups = _grouped(sample, schemes, dtype)
    del sample
    inputs_I = pooled(mean_abs_I.to(dtype), channel_I, "mean").clamp(min=_SMALLEST)
    relative_I = pooled(relative_I.to(dtype), channel_I, "mean")
    race = _Race(
        groups=groups,
        gram_II=hessian_II.to(dtype),
        candidates=_candidates(inputs_I, relative_I, n_grid, duo_scaling),
        scale_dtype=scale_dtype,
    )
    return race.result(torch.float64 if dtype == torch.float64 else race_dtype)


def rows_of_each(num_weights: int) -> int:
    """The number of rows to sample of each weight; fewer if there are many, as the experts of a mixture."""
    return min(NUM_ROWS, max(_FEWEST_ROWS, _MOST_ROWS // max(num_weights, 1)))


def stacked_rows(num_rows: int) -> int:
    """The number of rows that are multiplied by H at a time, if so many are sampled of all weights together."""
    return min(_STACK, 2 * -(-num_rows // _STACK_STEP) * _STACK_STEP)


def _check(hessian_II: torch.Tensor, mean_abs_I: torch.Tensor, n_grid: int) -> None:
    if hessian_II.shape != (len(mean_abs_I),) * 2:
        raise QuantizationError(_MISFIT.format(len(mean_abs_I)))
    if not torch.isfinite(mean_abs_I).all() or not grid.is_finite(hessian_II):
        raise QuantizationError(
            "the inputs of an AWQ search are not finite", hint="an activation overflowed: calibrate in a wider dtype"
        )
    if n_grid < 1:
        raise QuantizationError(f"n_grid must be at least 1, not {n_grid}")


def _sampled(
    weights: Iterable[torch.Tensor], schemes: Sequence[QuantizationArgs], num_in: int, num_rows: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Sample rows of each weight, and compute s_W [I]: |w| over the largest |w| of its group, averaged over all rows.

    Weights are read once, in order, and not kept.
    """
    sample: list[torch.Tensor] = []
    total_I, count = torch.zeros(0), 0
    for weight_OI, args in zip(weights, schemes, strict=True):
        if weight_OI.shape[1] != num_in:
            raise QuantizationError(_MISFIT.format(num_in))
        sample.append(spread_rows(weight_OI, num_rows).clone())
        own_I = _relative_sum(weight_OI, args)
        total_I = total_I + own_I if count else own_I
        count += len(weight_OI)
        del weight_OI
    if not sample:
        raise QuantizationError(_MISFIT.format(num_in))
    return sample, total_I / count


def _relative_sum(weight_OI: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """Sum up |w| over the largest |w| of its group, [I], a few rows at a time.

    Sums are added in the order in which torch adds the rows of a whole weight, so the parts do not change the bits.
    """
    num_rows = _ROWS_OF_A_SUM if _has_independent_rows(args) else len(weight_OI)
    total_I = torch.zeros(weight_OI.shape[1], dtype=grid.work_dtype(weight_OI), device=weight_OI.device)
    for part_OI in torch.split(weight_OI, _SUMS_OF_A_SUM * num_rows):
        part_I = torch.zeros_like(total_I)
        for rows_RI in torch.split(part_OI, num_rows):
            tiles_RhCw = grid.tile(rows_RI.abs().to(total_I.dtype), args)
            tiles_RhCw.div_(tiles_RhCw.amax(dim=(1, 3), keepdim=True).clamp_(min=1e-8))
            part_I += grid.untile(tiles_RhCw, shape=(len(rows_RI), len(total_I))).sum(dim=0)
        total_I += part_I
    return total_I


def _has_independent_rows(args: QuantizationArgs) -> bool:
    """Whether some rows of a weight are rounded as in the whole weight, given its global scale."""
    return grid.strategy_of(args) in ("channel", "group", "tensor_group")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    scale_I: torch.Tensor
    ratio: float
    is_duo: bool


def _candidates(
    inputs_I: torch.Tensor, relative_I: torch.Tensor, n_grid: int, duo_scaling: bool | str
) -> list[_Candidate]:
    """List the candidates; the first is s = 1."""
    found = [_Candidate(scale_I=torch.ones_like(inputs_I), ratio=0.0, is_duo=False)]
    for is_duo in {True: (True,), False: (False,), "both": (False, True)}[duo_scaling]:
        for ratio in (step / n_grid for step in range(n_grid + 1)):
            scale_I = inputs_I.pow(ratio)
            if is_duo:
                scale_I = scale_I / (relative_I.pow(1 - ratio) + _SMALLEST)
            scale_I = scale_I.clamp(min=_SMALLEST)
            scale_I = scale_I / (scale_I.max() * scale_I.min()).sqrt()
            if not torch.equal(scale_I, found[0].scale_I):
                found.append(_Candidate(scale_I=scale_I, ratio=ratio, is_duo=is_duo))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _SampledRows:
    """Sampled rows that are rounded in the same way."""

    rows_RI: torch.Tensor
    args: QuantizationArgs


def _grouped(
    sample: Sequence[torch.Tensor], schemes: Sequence[QuantizationArgs], dtype: torch.dtype
) -> list[_SampledRows]:
    """Join the rows of weights with equal schemes, as the experts of a mixture have, if rows are independent."""
    parts: list[tuple[QuantizationArgs, list[torch.Tensor]]] = []
    for rows_RI, args in zip(sample, schemes, strict=True):
        is_joinable = _has_independent_rows(args) and not grid.needs_global_scale(args)
        same = [rows for known, rows in parts if is_joinable and known == args]
        if same:
            same[0].append(rows_RI)
        else:
            parts.append((args, [rows_RI]))
    return [_SampledRows(rows_RI=torch.cat(rows).to(dtype), args=args) for args, rows in parts]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Race:
    """The race of candidates for the least loss; see the module.

    Attributes:
        groups: the sampled rows.
        gram_II: H.
        candidates: the first is s = 1, which stays until the end.
        scale_dtype: the dtype that the checkpoint stores scales in.
    """

    groups: Sequence[_SampledRows]
    gram_II: torch.Tensor
    candidates: Sequence[_Candidate]
    scale_dtype: torch.dtype

    @property
    def num_rows(self) -> int:
        """The number of sampled rows."""
        return sum(len(group.rows_RI) for group in self.groups)

    def result(self, dtype: torch.dtype) -> ScaleSearch:
        """Run the race in products of this dtype, and return the first candidate with the least loss."""
        num_rows = self.num_rows
        if num_rows < _FEWEST_IN_BFLOAT16 or bool(self.gram_II.diagonal().amax() < _SMALLEST_SQUARE):
            dtype = self.gram_II.dtype
        is_divisible = all(_has_independent_rows(group.args) for group in self.groups)
        fewest = max(_FEWEST_OF_A_PART, _FEWEST_NUMBERS // len(self.gram_II))
        num_parts = min(_MOST_PARTS, max(1, num_rows // fewest)) if is_divisible else 1
        parts = [slice(part, None, num_parts) for part in range(num_parts)]
        tolerance = 0.0 if dtype == self.gram_II.dtype else _TOLERANCE
        stack_SI = self._stack(dtype)
        places = list(range(len(self.candidates)))
        loss_KR = self.gram_II.new_empty(len(places), 0, dtype=torch.float64)
        for part in parts:
            loss_KR = torch.cat((loss_KR, self._losses(places, part, stack_SI)), dim=1)
            kept = _contenders(loss_KR, num_rows, tolerance)
            places, loss_KR = [places[index] for index in kept], loss_KR[kept]
        losses = dict(zip(places, loss_KR.sum(dim=1).nan_to_num(nan=torch.inf).tolist(), strict=True))
        least = min(losses.values())
        bound = max(least, (1 + tolerance) * least)  # rounding may make a loss that is near zero negative
        finalists = [place for place in places if losses[place] <= bound]
        if tolerance and len(finalists) > 1:
            del stack_SI
            stack_SI = self._stack(self.gram_II.dtype)
            loss_KR = torch.cat([self._losses(finalists, part, stack_SI) for part in parts], dim=1)
            losses |= zip(finalists, loss_KR.sum(dim=1).nan_to_num(nan=torch.inf).tolist(), strict=True)
        place = min(finalists, key=losses.__getitem__)
        winner = self.candidates[place]
        return ScaleSearch(
            scale_I=winner.scale_I.float(),
            ratio=winner.ratio,
            is_duo=winner.is_duo,
            loss=losses[place],
            loss_before=losses[0],
        )

    def _stack(self, dtype: torch.dtype) -> torch.Tensor:
        return self.gram_II.new_zeros(stacked_rows(self.num_rows), len(self.gram_II), dtype=dtype)

    def _losses(self, places: Sequence[int], rows: slice, stack_SI: torch.Tensor) -> torch.Tensor:
        """Compute the loss of some rows of each group with some candidates, [K, R].

        The rows of several candidates are stacked, so that each square of H is read for many of them.
        """
        found: list[torch.Tensor] = []
        count = 0

        def multiply() -> None:
            padded_SI = stack_SI[: -(-count // _STACK_STEP) * _STACK_STEP]
            found.append(gram_squares(padded_SI, self.gram_II)[:count])

        for place, group in itertools.product(places, self.groups):
            if not len(group.rows_RI[rows]):
                continue
            for error_RI in torch.split(self._error(group, rows, self.candidates[place].scale_I), _STACK_STEP):
                if count + len(error_RI) > len(stack_SI):
                    multiply()
                    count = 0
                stack_SI[count : count + len(error_RI)] = error_RI
                count += len(error_RI)
        multiply()
        losses_R = torch.cat(found)
        return losses_R.view(len(places), len(losses_R) // len(places))

    def _error(self, group: _SampledRows, rows: slice, scale_I: torch.Tensor) -> torch.Tensor:
        """Compute Q(W diag(s)) diag(s)^-1 - W of some rows."""
        rows_RI, args = group.rows_RI[rows], group.args
        global_scale = grid.global_scale_of(group.rows_RI * scale_I) if grid.needs_global_scale(args) else None
        scaled_RI = rows_RI * scale_I
        found = fitted_grid(
            scaled_RI,
            args,
            scale_dtype=self.scale_dtype,
            global_scale=global_scale,
            importance_I=self.gram_II.diagonal() / scale_I.square(),
        )
        return rounded(scaled_RI, found, args).div_(scale_I).sub_(rows_RI)


def _contenders(loss_KR: torch.Tensor, num_rows: int, tolerance: float) -> list[int]:
    """List the candidates that can have the least loss of all rows, with the first, from their losses of some rows."""
    count = loss_KR.shape[1]
    loss_K = loss_KR.mean(dim=1)
    leader = int(loss_K.nan_to_num(nan=torch.inf).argmin())
    bound_K = tolerance * loss_K[leader].abs()
    if count < num_rows:
        deviation_K = (loss_KR - loss_KR[leader]).std(dim=1)
        bound_K = bound_K + _ERRORS * deviation_K * ((1 - count / num_rows) / count) ** 0.5
    is_behind_K = loss_K - loss_K[leader] > bound_K
    is_behind_K[0] = False
    return torch.nonzero(~is_behind_K).flatten().tolist()
