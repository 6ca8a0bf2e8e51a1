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

Clipping (in the authors' code, next to section 3.2): for each row and group the range is shrunk by the factor, of
1, 1 - 1/n, ... 1/2, with the least error on the group's own block of H:   e_g H_gg e_g^T.

Shapes: O out features, I in features, R sampled rows, G groups of g columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs

from runtime.algorithms import grid
from runtime.algorithms.observers import fitted_grid
from runtime.algorithms.products import multiplied
from runtime.algorithms.result import QuantizedWeight
from runtime.algorithms.rtn import rounded
from runtime.algorithms.smoothquant import pooled
from runtime.errors import QuantizationError

NUM_ROWS = 512  # rows of each weight that the search samples
_MOST_ROWS, _FEWEST_ROWS = 8 * NUM_ROWS, 16  # limits of the rows of all weights together and of each
_MISFIT = "inputs have {} features, but the weights that read them do not"
_STEPS_OF_CLIPPING = 20
_LEAST_CLIPPING = 0.5
_SMALLEST = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleSearch:
    """The result of the search for scales.

    Args:
        scale_I: s, float32, the same for features that come from one channel of the producer.
        ratio: a.
        is_duo: whether s_W was used.
        loss: of the sampled rows, with s.
        loss_before: of the sampled rows, with s = 1; never smaller than `loss`, because s = 1 is a candidate.
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

    Raises:
        QuantizationError: for shapes that do not match, and numbers that are not finite.
    """
    _check(hessian_II, mean_abs_I, n_grid)
    num_rows = rows_of_each(len(schemes)) if num_rows is None else num_rows
    sample, relative_I = _sampled(weights, schemes, len(mean_abs_I), num_rows)
    dtype = grid.work_dtype(hessian_II, *sample)
    sample = [rows_RI.to(dtype) for rows_RI in sample]
    gram_II = hessian_II.to(dtype)
    inputs_I = pooled(mean_abs_I.to(dtype), channel_I, "mean").clamp(min=_SMALLEST)
    relative_I = pooled(relative_I.to(dtype), channel_I, "mean")

    def loss_with(scale_I: torch.Tensor) -> float:
        return sum(
            _loss(rows_RI, scale_I, gram_II, args, scale_dtype) for rows_RI, args in zip(sample, schemes, strict=True)
        )

    ones_I = torch.ones_like(inputs_I)
    before = loss_with(ones_I)
    best = ScaleSearch(scale_I=ones_I.float(), ratio=0.0, is_duo=False, loss=before, loss_before=before)
    for is_duo in {True: (True,), False: (False,), "both": (False, True)}[duo_scaling]:
        for step in range(n_grid + 1):
            ratio = step / n_grid
            scale_I = _candidate(inputs_I, relative_I if is_duo else None, ratio)
            loss = loss_with(scale_I)
            if loss < best.loss:
                best = ScaleSearch(scale_I=scale_I.float(), ratio=ratio, is_duo=is_duo, loss=loss, loss_before=before)
    return best


def rows_of_each(num_weights: int) -> int:
    """The number of rows to sample of each weight; fewer if there are many, as the experts of a mixture."""
    return min(NUM_ROWS, max(_FEWEST_ROWS, _MOST_ROWS // max(num_weights, 1)))


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
        sample.append(weight_OI[:: max(1, -(-len(weight_OI) // num_rows))].clone())
        size_OI = weight_OI.abs().to(grid.work_dtype(weight_OI))
        tiles_RhCw = grid.tile(size_OI, args)
        relative = tiles_RhCw / tiles_RhCw.amax(dim=(1, 3), keepdim=True).clamp(min=1e-8)
        own_I = grid.untile(relative, shape=(weight_OI.shape[0], num_in)).sum(dim=0)
        total_I = total_I + own_I if count else own_I
        count += len(weight_OI)
        del weight_OI, size_OI, tiles_RhCw, relative
    if not sample:
        raise QuantizationError(_MISFIT.format(num_in))
    return sample, total_I / count


def _candidate(inputs_I: torch.Tensor, relative_I: torch.Tensor | None, ratio: float) -> torch.Tensor:
    scale_I = inputs_I.pow(ratio)
    if relative_I is not None:
        scale_I = scale_I / (relative_I.pow(1 - ratio) + _SMALLEST)
    scale_I = scale_I.clamp(min=_SMALLEST)
    return scale_I / (scale_I.max() * scale_I.min()).sqrt()


def _loss(
    rows_RI: torch.Tensor,
    scale_I: torch.Tensor,
    gram_II: torch.Tensor,
    args: QuantizationArgs,
    scale_dtype: torch.dtype,
) -> float:
    """Compute tr(E H E^T) of some rows."""
    scaled_RI = rows_RI * scale_I
    importance_I = gram_II.diagonal() / scale_I.square()
    found = fitted_grid(scaled_RI, args, scale_dtype=scale_dtype, importance_I=importance_I)
    error_RI = rounded(scaled_RI, found, args).div_(scale_I).sub_(rows_RI)
    return float(multiplied(error_RI, gram_II).mul_(error_RI).sum(dtype=torch.float64))


def quantize_clipped(
    weight_OI: torch.Tensor,
    hessian_II: torch.Tensor,
    args: QuantizationArgs,
    *,
    scale_dtype: torch.dtype,
    global_scale: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Round a weight to nearest, with each group's range clipped for the least error on its own inputs.

    Args:
        weight_OI: [O, I], any float dtype; not changed.
        hessian_II: H, the sum of x x^T over the layer's inputs after scaling.
        args: strategy, bits and symmetry; the observer is ignored.
        scale_dtype: the dtype that the checkpoint stores scales in.
        global_scale: NVFP4's [1], if siblings share one.

    Returns:
        The dequantized weight with its scales; `loss` is tr(E H E^T) of all rows.

    Raises:
        QuantizationError: for an unsupported strategy, type or shape, and numbers that are not finite.
    """
    weight_OI = weight_OI.detach()
    grid.check_weight(weight_OI, args, supported=("channel", "group", "tensor_group"))
    if hessian_II.shape != (weight_OI.shape[1],) * 2 or not grid.is_finite(hessian_II):
        raise QuantizationError(
            f"a Gram matrix of shape {list(hessian_II.shape)} is not finite, or does not match a weight of shape "
            f"{list(weight_OI.shape)}"
        )
    global_scale = grid.shared_global_scale(args, global_scale, [weight_OI])
    dtype = grid.work_dtype(weight_OI, hessian_II)
    found = _clipped_grid(weight_OI, hessian_II.to(dtype), args, scale_dtype, global_scale)
    quantized_OI = rounded(weight_OI.to(dtype), found, args)
    error_OI = quantized_OI - weight_OI.to(dtype)
    return QuantizedWeight(
        weight_OI=quantized_OI.to(torch.float32),
        scale=grid.stored(found.scale_RC, args),
        zero_point=None if found.zero_point_RC is None else grid.stored(found.zero_point_RC, args),
        global_scale=found.global_scale,
        loss=float(multiplied(error_OI, hessian_II.to(dtype)).mul_(error_OI).sum(dtype=torch.float64)),
        damping=0.0,
    )


def _clipped_grid(
    weight_OI: torch.Tensor,
    gram_II: torch.Tensor,
    args: QuantizationArgs,
    scale_dtype: torch.dtype,
    global_scale: torch.Tensor | None,
) -> grid.Grid:
    tiles_OCw = grid.tile(weight_OI, args)[:, 0]
    width = tiles_OCw.shape[2]
    blocks_Cww = torch.stack(
        [gram_II[left : left + width, left : left + width] for left in range(0, len(gram_II), width)]
    )
    minimum, maximum = tiles_OCw.amin(dim=2), tiles_OCw.amax(dim=2)
    best_min, best_max = minimum, maximum
    best_OC = torch.full_like(minimum, torch.inf, dtype=gram_II.dtype)
    values = tiles_OCw.to(gram_II.dtype)
    for step in range(int(_STEPS_OF_CLIPPING * (1 - _LEAST_CLIPPING)) + 1):
        factor = 1 - step / _STEPS_OF_CLIPPING
        low, high = factor * minimum, factor * maximum
        scale_OC, zero_OC = grid.fit(low, high, args, scale_dtype=scale_dtype, global_scale=global_scale)
        spread = grid.effective(scale_OC, global_scale).to(values.dtype)[:, :, None]
        zero = None if zero_OC is None else zero_OC.to(values.dtype)[:, :, None]
        error_COw = grid.snap_(values.clone(), spread, zero, args).sub_(values).transpose(0, 1)
        error_OC = (error_COw @ blocks_Cww).mul_(error_COw).sum(dim=2).t()
        is_better = error_OC < best_OC
        best_OC = torch.where(is_better, error_OC, best_OC)
        best_min, best_max = torch.where(is_better, low, best_min), torch.where(is_better, high, best_max)
    scale_OC, zero_OC = grid.fit(best_min, best_max, args, scale_dtype=scale_dtype, global_scale=global_scale)
    return grid.Grid(scale_RC=scale_OC, zero_point_RC=zero_OC, global_scale=global_scale)
