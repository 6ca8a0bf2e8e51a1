"""What steps of a calibration cost in bytes, by formula: statistics, solves, and tensors in the checkpoint.

The formulas are those of the code that they name; tests compare them with what that code holds.
Shapes: O out features, I in features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from runtime.algorithms.hessian import FLOAT32, FLOAT64, hessian_bytes

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

    from runtime.artifact.manifest import ParameterEntry
    from runtime.quantize.statistics import Needs
    from runtime.recipe.recipe import Assignment


def itemsize(name: str, dtype: torch.dtype) -> int:
    """Bytes of a number whose dtype a manifest gives; `model` is the run's."""
    own: torch.dtype = dtype if name == "model" else getattr(torch, name)
    return own.itemsize


def parameter_bytes(parameters: Mapping[str, ParameterEntry], names: Sequence[str], dtype: torch.dtype) -> int:
    """What parameters take in a run; those that are tied once."""
    owners = dict.fromkeys(parameters[name].tied_to or name for name in names)
    return sum(
        math.prod(parameters[owner].shape) * itemsize(parameters[owner].dtype, dtype)
        for owner in owners
        if owner in parameters
    )


def statistics_bytes(num_in: int, needs: Needs, dtype: torch.dtype = torch.float32) -> int:
    """What `statistics.InputStatistics` holds of one distinct input: H, and five numbers of each feature where these
    are asked for, with a small H or some tokens in the run's dtype; the few that it always holds are nothing beside H.
    """
    from runtime.algorithms.output_squares import NUM_SAMPLED, WIDEST_GRAM

    channels = num_in * (FLOAT64 + 4 * FLOAT32) if needs.channels else 0
    if needs.hessian or (needs.channels and num_in <= WIDEST_GRAM):
        return channels + hessian_bytes(num_in)
    return channels + (NUM_SAMPLED * num_in * dtype.itemsize if needs.channels else 0)


def copy_bytes(shape: Sequence[int]) -> int:
    """A parameter in float32."""
    return math.prod(shape) * FLOAT32


def solve_bytes(shapes: Sequence[Sequence[int]], job: Assignment, *, overwrites: bool = False) -> int:
    """The most that quantizing and packing weights that are solved together holds beside them and their statistics.

    `quantize_siblings` holds a matrix [I, I], the factor of H, unless that is made in the memory of H itself, and two
    copies of the weights of a pass, residuals and results, with those of four blocks and of one twice, and copies of
    what is multiplied. Round-to-nearest holds four copies, with a search of ranges on Gram matrices five, `refine` six
    beside a matrix. Packing holds one copy of one weight, in the dtype of the run twice, and a few more of some of its
    rows, beside the results of the pass and, where another follows, the factor.

    Args:
        shapes: [O, I] each.
        job: what is done to them.
        overwrites: whether H is overwritten, as nobody needs it any more.
    """
    from runtime.algorithms.gptq import BLOCKS_AT_A_TIME, in_passes
    from runtime.algorithms.hessian import PANEL_WIDTH
    from runtime.algorithms.products import SQUARE, reach
    from runtime.formats.compressed import NUMBERS_AT_A_TIME

    num_in = max(shapes[0][1], 1)
    largest = max(copy_bytes(shape) for shape in shapes)
    if job.algorithm != "gptq":
        return (5 if job.clip else 4) * largest
    hessian = hessian_bytes(num_in)
    refining = hessian + 5 * largest if job.options is not None and job.options.refine else 0
    block = min(job.options.block_size if job.options is not None else num_in, num_in)
    packing = largest + min(2 * largest, 6 * NUMBERS_AT_A_TIME * FLOAT32)
    passes = list(in_passes(shapes))
    kept = hessian
    if overwrites:
        hessian, kept = 0, min(copy_bytes((num_in, PANEL_WIDTH + reach(torch.device("cpu")))), hessian)
    most = kept
    for part in passes:
        total = sum(copy_bytes(shape) for shape in shapes[part])
        factor = 0 if part is passes[-1] else hessian
        targets = min((BLOCKS_AT_A_TIME + 3) * total * block // num_in, 2 * total)
        solving = hessian + 2 * total + targets + min(4 * copy_bytes((SQUARE, SQUARE)), hessian_bytes(num_in))
        most = max(most, solving, factor + total + packing, factor + total + refining)
    return most


def search_bytes(shapes: Sequence[Sequence[int]], algorithm: str) -> int:
    """The most that finding the factors of a group of weights holds beside its statistics.

    Weights are looked at one after the other, each in float32. `awq.search_scales` makes three copies more of one while
    it compares columns, keeps some rows of each, and holds five copies of those of one that it tries candidates on.
    """
    from runtime.algorithms.awq import rows_of_each

    largest = max(copy_bytes(shape) for shape in shapes)
    if algorithm != "awq":
        return 2 * largest
    rows = [copy_bytes((min(shape[0], rows_of_each(len(shapes))), shape[1])) for shape in shapes]
    return sum(rows) + max(3 * largest, 5 * max(rows))


def rounding_itemsize(job: Assignment, dtype: torch.dtype) -> int:
    """Bytes that rounding an input takes for each of its numbers, `schemes.quantize_activation`."""
    args = job.scheme.input_activations
    if args is None:
        return 0
    return (10 if args.strategy in ("group", "tensor_group") else 4) * dtype.itemsize


def stored_bytes(shape: tuple[int, ...], scheme: QuantizationScheme, dtype: torch.dtype) -> int:
    """What a checkpoint holds for a quantized weight [O, I] that it had in `dtype`, as its scales are."""
    from runtime.formats.compressed import stored_dtypes, stored_shapes

    shapes = stored_shapes(shape, scheme)
    return sum(math.prod(shapes[name]) * own.itemsize for name, own in stored_dtypes(scheme, dtype).items())
