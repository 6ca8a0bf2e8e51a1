"""What steps of a calibration cost in bytes, by formula: statistics, solves, and tensors in the checkpoint.

The formulas are those of the code that they name; tests compare them with what that code holds.
Shapes: O out features, I in features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

    from runtime.manifest import ParameterEntry
    from runtime.recipe import Assignment

FLOAT32 = 4


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


def hessian_bytes(num_in: int) -> int:
    """A sum of x x^T, `gptq.HessianAccumulator`: [I, I] in float32."""
    return num_in * num_in * FLOAT32


def solve_bytes(shape: Sequence[int], algorithm: str) -> int:
    """The most that quantizing and packing one weight holds beside the weight and its Hessian.

    `quantize_gptq` holds two matrices [I, I] while it factorizes; in the end one, and with it errors, results in both
    orders and squares in two widths, which come to six weights in float32. Round-to-nearest, and packing what either
    has found, hold up to four.
    """
    num_out, num_in = shape
    copy = num_out * num_in * FLOAT32
    if algorithm != "gptq":
        return 4 * copy
    return max(2 * hessian_bytes(num_in), hessian_bytes(num_in) + 6 * copy)


def stored_bytes(shape: tuple[int, ...], scheme: QuantizationScheme, dtype: torch.dtype) -> int:
    """What a checkpoint holds for a quantized weight [O, I] that it had in `dtype`, as its scales are."""
    from runtime.schemes import stored_dtypes, stored_shapes

    shapes = stored_shapes(shape, scheme)
    return sum(math.prod(shapes[name]) * own.itemsize for name, own in stored_dtypes(scheme, dtype).items())


def passes_statistics(job: Assignment) -> bool:
    """Whether a module is measured before it is quantized."""
    return job.algorithm == "gptq"
