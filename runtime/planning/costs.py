"""The cost of statistics, solves and rescaling in bytes, by formula.

The formulas describe the code that they name; tests compare them with the memory that this code allocates.
Shapes: O out features, I in features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from runtime.algorithms.drift import drift_bytes
from runtime.algorithms.hessian import FLOAT32, FLOAT64, accumulator_bytes, hessian_bytes
from runtime.quantize.solve_batches import may_overwrite, num_together, solved_together

if TYPE_CHECKING:
    from runtime.artifact.manifest import ParameterEntry
    from runtime.quantize.needs import RecipeNeeds
    from runtime.quantize.statistics import Needs
    from runtime.recipe.recipe import Assignment

Sums = Mapping[tuple[str, ...], int]  # the bytes of each sum, by the modules that share it


def parameter_bytes(parameters: Mapping[str, ParameterEntry], names: Sequence[str], dtype: torch.dtype) -> int:
    """The size of parameters in a run in `dtype`; tied parameters count once."""
    owners = dict.fromkeys(parameters[name].tied_to or name for name in names)
    entries = [parameters[owner] for owner in owners if owner in parameters]
    return sum(
        math.prod(entry.shape) * (dtype if entry.dtype == "model" else getattr(torch, entry.dtype)).itemsize
        for entry in entries
    )


def statistics_bytes(num_in: int, needs: Needs, dtype: torch.dtype = torch.float32, device_type: str = "cpu") -> int:
    """The size of `statistics.InputStatistics` of one distinct input: H, and some numbers of each feature if these are
    needed, with a small H or some tokens in the run's dtype. Its other numbers are negligible.

    One matrix holds H of a lane and of all earlier ones (`hessian.HessianAccumulator`). With several workers, each has
    so much for an input while it is measured, and only the owner of the input afterwards.
    """
    from runtime.algorithms.output_squares import NUM_SAMPLED, WIDEST_GRAM

    # `ChannelSums` of all lanes and of the one that runs.
    channels = 2 * num_in * (FLOAT64 + 6 * FLOAT32) if needs.channels else 0
    drift = drift_bytes(num_in) if needs.drift else 0
    sample = NUM_SAMPLED * num_in * dtype.itemsize if needs.channels else 0
    if needs.hessian or (needs.channels and num_in <= WIDEST_GRAM):
        is_sampled = needs.sample and num_in > WIDEST_GRAM
        return channels + drift + accumulator_bytes(num_in, device_type) + (sample if is_sampled else 0)
    return channels + sample


def bounded_sums(sums: Sums, experts: Mapping[str, tuple[str, int, int]], bound: int | None) -> tuple[int, int]:
    """The bytes of sums at a time, and the number of passes: experts are measured in groups, of one at least.

    Args:
        sums: of all inputs.
        experts: by module of an expert, its mixture and the position of its input.
        bound: the most bytes of experts at a time; None for all.
    """
    of_experts = {names: size for names, size in sums.items() if names[0] in experts}
    total = sum(of_experts.values())
    others = sum(sums.values()) - total
    if bound is None:
        return others + total, 1
    largest: dict[tuple[str, int], int] = {}
    for names, size in of_experts.items():
        module, position, _ = experts[names[0]]
        largest[module, position] = max(size, largest.get((module, position), 0))
    at_a_time = min(total, max(bound, sum(largest.values())))
    return others + at_a_time, math.ceil(total / max(at_a_time, 1)) or 1


def original_input_bytes(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> int:
    """The copies of a batch's original inputs (`quantize.original_inputs`), each a matrix of tokens."""
    return sum(rows * width for rows, width in shapes) * dtype.itemsize


def copy_bytes(shape: Sequence[int]) -> int:
    """The size of a parameter in float32."""
    return math.prod(shape) * FLOAT32


def solve_bytes(
    shapes: Sequence[Sequence[int]],
    job: Assignment,
    *,
    overwrites: bool,
    device_type: str,
    is_measured: bool = True,
    has_copies: bool = False,
    is_corrected: bool = False,
) -> int:
    """The peak of quantizing and packing weights that are solved together, besides the weights and their statistics.

    `solve_tiles` holds a matrix [I, I], the factor of H, unless it overwrites H, and two copies of a tile, residuals
    and results (three, if there is a second pass), with those of four blocks, of one in four copies, and of the
    operands of products. Each piece is packed before the next tile is solved, with copies of some of its rows, and
    stays packed. Unpacking holds one copy of one weight, in the dtype of the run twice, and a few more of some of its
    rows. `refine` holds six copies of one weight beside a matrix and all results. A correction takes a matrix beside H
    and the drift, and its computation two; it takes the place of a drift that nothing else reads.

    Round-to-nearest holds three copies of some rows, or of a part if it searches ranges on Gram matrices. If the inputs
    were measured, it also holds the result of the whole weight, otherwise all packed rows twice.

    Args:
        shapes: [O, I] each.
        job: of the weights.
        overwrites: whether the solve overwrites H.
        device_type: the type of device that solves.
        is_measured: whether there are statistics of their inputs.
        has_copies: whether residuals are copied to bf16 for the products.
        is_corrected: whether the weights are corrected by the drift of their inputs.
    """
    from runtime.algorithms.clipping import NUMBERS_OF_A_PART
    from runtime.algorithms.grid import numbers_at_a_time
    from runtime.algorithms.hessian import PANEL_WIDTH
    from runtime.algorithms.products import reach
    from runtime.formats.compressed import NUMBERS_AT_A_TIME, NUMBERS_ON_DEVICE

    num_in = max(shapes[0][1], 1)
    largest = max(copy_bytes(shape) for shape in shapes)
    args = job.scheme.weights
    if job.algorithm != "gptq":
        part, packed = numbers_at_a_time(device_type), largest * int(args.num_bits) // 32
        rounding = 3 * min(largest, FLOAT32 * (NUMBERS_OF_A_PART if job.clip else part))
        return rounding + (largest if is_measured else 2 * packed)
    hessian, kept, refining = hessian_bytes(num_in), hessian_bytes(num_in), 0
    if job.options is not None and job.options.refine:
        refining = hessian + (5 + is_corrected) * largest + sum(map(copy_bytes, shapes))
    correcting, correction = (2 * hessian, 0 if overwrites else hessian) if is_corrected else (0, 0)
    if overwrites:
        hessian = 0
        if device_type == "cpu":  # a GPU factors a copy, and frees H
            kept = min(copy_bytes((num_in, PANEL_WIDTH + reach(torch.device("cpu")))), kept)
    some_rows = 6 * (NUMBERS_AT_A_TIME if device_type == "cpu" else NUMBERS_ON_DEVICE) * FLOAT32
    packed = sum(math.prod(shape) for shape in shapes) * int(args.num_bits) // 8
    solving = hessian + _tile_bytes(shapes, job, some_rows, device_type=device_type, has_copies=has_copies)
    solved = packed + max(solving, largest + min(largest, some_rows))
    return max(kept, hessian + correcting, correction + max(solved, hessian + refining))


def _tile_bytes(
    shapes: Sequence[Sequence[int]], job: Assignment, some_rows: int, *, device_type: str, has_copies: bool
) -> int:
    """The peak of solving a tile and of packing its pieces, of which `some_rows` bytes are copied at a time."""
    from runtime.algorithms.gptq_tiles import BLOCKS_AT_A_TIME, tiles_of
    from runtime.algorithms.products import SQUARE

    num_in = max(shapes[0][1], 1)
    tiles = tiles_of(shapes, job.scheme.weights, device_type)
    tile = copy_bytes((max(sum(piece.stop - piece.start for piece in pieces) for pieces in tiles), num_in))
    block = min(job.options.block_size if job.options is not None else num_in, num_in)
    targets = tile * (min(BLOCKS_AT_A_TIME * block, num_in) + 4 * block) // num_in
    operands = min(4 * copy_bytes((SQUARE, SQUARE)), hessian_bytes(num_in))
    copies = tile // 2 if has_copies else 0
    again = tile if job.options is not None and job.options.range_passes > 1 else 0
    return 2 * tile + again + copies + max(targets + operands, min(2 * tile, some_rows), again + operands)


def search_bytes(shapes: Sequence[Sequence[int]], algorithm: str) -> int:
    """The peak of finding the factors of a group of weights, besides its statistics.

    Weights are read one after the other, each in float32. `awq.search_scales` compares the columns of some rows at a
    time, keeps some rows of each weight, joins them, and then holds a stack of errors, and products as wide as a part
    of H.
    """
    from runtime.algorithms.awq import rows_of_each, stacked_rows
    from runtime.algorithms.output_squares import SQUARE

    largest = max(copy_bytes(shape) for shape in shapes)
    if algorithm != "awq":
        return 2 * largest
    width = shapes[0][1]
    num_rows = sum(min(shape[0], rows_of_each(len(shapes))) for shape in shapes)
    sample, stacked = copy_bytes((num_rows, width)), stacked_rows(num_rows)
    race = sample // 2 + copy_bytes((stacked, width)) + copy_bytes((stacked, min(width, SQUARE)))
    if width > SQUARE:
        race += copy_bytes((stacked, SQUARE)) + 2 * copy_bytes((SQUARE, SQUARE))
    return sample + max(largest, sample, race)


def rounding_itemsize(job: Assignment, dtype: torch.dtype) -> int:
    """Bytes per number of an input that `rounded_inputs.quantize_activation` takes to round it."""
    args = job.scheme.input_activations
    if args is None:
        return 0
    return (10 if args.strategy in ("group", "tensor_group") else 4) * dtype.itemsize


def quantization_bytes(
    modules: Sequence[str],
    needs: RecipeNeeds,
    shape_of: Callable[[str], tuple[int, ...]],
    sums: Sums,
    most_sums: int,
    device_type: str,
    *,
    has_copies: bool = False,
    is_split: bool = False,
) -> int:
    """The peak of `RecipeModifier.apply` after the batches have run, besides the original weights.

    Sums of statistics stay until the last module that needs them is quantized. Rescaled matrices are multiplied in
    float32 when they are quantized or written, rescaled vectors at once. `most_sums` are the bytes of sums at a time:
    experts are measured and quantized in groups. If the step `is_split`, weights may be corrected.
    """
    most = 0
    copies: dict[str, int] = {}  # rescaled vectors
    rescaled: dict[str, int] = {}  # rescaled matrices

    def held(left: Collection[str] | None = None) -> int:
        """With the sums of the modules that are left, by default of all."""
        waiting = sum(size for names, size in sums.items() if left is None or any(name in left for name in names))
        return min(waiting, most_sums) + sum(copies.values())

    for transform, rescaling in needs.rescaled(modules):
        group = rescaling.group
        weights = [f"{name}.weight" for name in group.modules]
        most = max(most, held() + search_bytes([shape_of(name) for name in weights], transform.algorithm))
        touched = [*weights, group.producer, group.bias, *(other.name for other in group.others)]
        for name in (name for name in touched if name):
            if len(shape_of(name)) == 1:
                copies[name] = copy_bytes(shape_of(name))
            else:
                rescaled[name] = 2 * copy_bytes(shape_of(name)[-2:])
    most = max(most, held() + max(rescaled.values(), default=0))
    left = dict.fromkeys(modules)
    inputs = {name: number for number, names in enumerate(sums) for name in names}
    for together in solved_together(modules, needs.jobs, inputs):
        shapes = [shape_of(f"{name}.weight") for name in together]
        job, width = needs.jobs[together[0]], shapes[0][1]
        users = {name for names in sums if together[0] in names for name in names if name in left}
        is_measured = together[0] in inputs
        solving = solve_bytes(
            shapes,
            job,
            overwrites=is_measured and may_overwrite(job, together, users),
            device_type=device_type,
            is_measured=is_measured,
            has_copies=has_copies,
            is_corrected=is_split and is_measured and job.is_error_aware,
        )
        if device_type != "cpu":
            num_stacked = num_together(together, job, width, needs.experts, needs.mixture_sizes)
            solving = _in_a_stack(solving, num_stacked, width)
        multiplied = sum(rescaled.get(f"{name}.weight", 0) for name in together)
        most = max(most, held(left) + multiplied + solving)
        left = dict.fromkeys(name for name in left if name not in together)
    return most


def _in_a_stack(solving: int, num_stacked: int, num_in: int) -> int:
    """The peak of several solves at a time; their Hessians are copied into one tensor before they are factored."""
    return solving if num_stacked == 1 else num_stacked * (solving + hessian_bytes(num_in))
