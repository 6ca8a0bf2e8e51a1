"""Predict the files of saved statistics, and the memory of reading one."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from runtime.algorithms.hessian import FLOAT32
from runtime.algorithms.output_squares import NUM_SAMPLED, WIDEST_GRAM
from runtime.checkpoint.dtypes import dtype_name
from runtime.saved_statistics.records import SavedCache, SavedInput, SavedPass, SavedStep, encoded
from runtime.saved_statistics.step_reader import matrix_kinds, sums_kinds
from runtime.saved_statistics.tensor_file import ROWS_AT_A_TIME, file_bytes

if TYPE_CHECKING:
    from runtime.planning.forecast import Workload

_DIGEST = "0" * 64
_COPIES = 4  # of some rows of a matrix while they are read


def reading_bytes(widths: Sequence[int]) -> int:
    """The memory that reading one of these inputs takes beside its matrix."""
    return max((_COPIES * min(width, ROWS_AT_A_TIME) * width * FLOAT32 for width in widths), default=0)


def saved_bytes(
    label: str,
    passes: Sequence[tuple[bool, Sequence[Sequence[str]]]],
    width_of: Callable[[str], int],
    experts: Collection[str],
    caches: Sequence[tuple[str, str, int]],
    work: Workload,
) -> int:
    """The size of the files of a step on disk.

    Args:
        label: of the step.
        passes: whether experts are measured on all tokens, with the modules of each distinct input.
        width_of: returns the input features of a module.
        experts: the modules of experts.
        caches: module, part and number of heads of the values whose ranges are recorded.
        work: the sizes of the data.
    """
    num_batches = math.ceil(work.num_samples / work.batch_size)
    inputs: list[SavedInput] = []
    lists: list[SavedPass] = []
    for all_tokens, groups in passes:
        calls: dict[str, int] = {}
        for names in groups:
            width = width_of(names[0])
            calls |= dict.fromkeys(names, len(inputs))
            is_wide = width > WIDEST_GRAM
            inputs.append(
                SavedInput(
                    width=width,
                    num_tokens=work.num_tokens,
                    num_batches=num_batches,
                    num_sampled=min(NUM_SAMPLED, work.num_tokens) if is_wide else 0,
                    sample_dtype=dtype_name(work.dtype) if is_wide else "",
                    has_gram=True,
                    matrix=_DIGEST,
                )
            )
        lists.append(SavedPass(all_tokens=all_tokens, measured=tuple(calls), calls=calls))
    step = SavedStep(
        label=label,
        inputs=tuple(inputs),
        passes=tuple(lists),
        experts=tuple(name for one in lists for name in one.measured if name in experts),
        caches=tuple(
            SavedCache(module=module, part=part, num_calls=num_batches, num_heads=max(heads, 1))
            for module, part, heads in caches
        ),
        sums=_DIGEST,
    )
    return len(encoded(step)) + file_bytes(sums_kinds(step)) + sum(file_bytes(matrix_kinds(one)) for one in inputs)
