"""Make batches of samples with named tensors.

Samples of equal shapes are concatenated, each tensor along its first dimension; none is padded, because padding would
affect sums. A sample without an input of the artifact (a text beside records with images, or an image beside videos)
cannot run alone. It runs with a sample that has the input: their tokens are padded at the end to one length, and
padding does not count in statistics. A sample is never used twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from runtime.arguments import require_count
from runtime.data.decoder import LABELS, NOT_A_LABEL
from runtime.data.inputs import (
    BESIDE_INPUTS,
    COMPILE_FOR_DATA,
    DECODER_IDS,
    IDS,
    MASK,
    completed,
    require_in_range,
    with_single_sizes,
)
from runtime.data.named_tensors import NamedSamples, Sample, is_of_tokens
from runtime.errors import DataError

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest


def named_batches(manifest: Manifest, data: NamedSamples, batch_size: int) -> list[Sample]:
    """Make the inputs of an artifact from samples; the largest batches come first.

    Args:
        manifest: states the inputs.
        data: the samples.
        batch_size: the maximum number of samples of a batch; at least two if inputs are missing in samples.

    Raises:
        DataError: an input is missing in the artifact or in the samples.
    """
    require_count("batch_size", batch_size)
    rows = [_known_inputs(manifest, index, sample) for index, sample in enumerate(data.samples)]
    missing = [_missing(manifest, row) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: -_size(rows[index]))
    whole, partial = ([index for index in order if bool(missing[index]) is is_partial] for is_partial in (False, True))
    mixed = _mixed(manifest, missing, whole, partial, batch_size) if partial else []
    made = [_together(rows, indices, data.padding_token) for indices in mixed]
    used = {index for indices in mixed for index in indices}
    groups: dict[Any, list[int]] = {}
    for index in (index for index in whole if index not in used):
        groups.setdefault(_shapes(rows[index]) if data.is_joinable else index, []).append(index)
    for equals in groups.values():
        for start in range(0, len(equals), batch_size):
            made.append(_joined([rows[index] for index in equals[start : start + batch_size]]))
    made = [completed(manifest, batch) for batch in made]
    require_in_range(with_single_sizes(manifest), made)
    return made


def _known_inputs(manifest: Manifest, index: int, sample: Mapping[str, torch.Tensor]) -> Sample:
    """Reject inputs that the artifact does not have, unless they have no effect."""
    names = {entry.name for entry in manifest.inputs}
    row: Sample = {}
    for name, value in sample.items():
        if name in names or name in BESIDE_INPUTS:
            row[name] = value
        elif name != DECODER_IDS and (not name.endswith("token_type_ids") or bool(value.any())):
            raise DataError(
                f"sample {index} has {name} {list(value.shape)}, but the inputs of the artifact are {', '.join(names)}",
                hint=COMPILE_FOR_DATA,
            )
    return row


def _missing(manifest: Manifest, row: Mapping[str, torch.Tensor]) -> list[str]:
    known = completed(manifest, row)
    return [entry.name for entry in manifest.inputs if entry.name not in known]


def _mixed(
    manifest: Manifest, missing: Sequence[Sequence[str]], whole: Sequence[int], partial: Sequence[int], batch_size: int
) -> list[list[int]]:
    """Distribute samples without some inputs over batches that have all inputs.

    Raises:
        DataError: an input is missing in all samples, is needed for each sample, or too few samples have it.
    """
    first = min(partial)
    name, shapes = missing[first][0], {entry.name: entry.shape for entry in manifest.inputs}
    what = f"sample {first} has no {name}, which is an input of the artifact"
    kinds = [whole] if whole else _covering(missing, partial)
    if not kinds:
        raise DataError(
            f"{what}, and no sample has it",
            hint="compile the model for such data: with --text-only for text, or with --sample FILE, this data",
        )
    batch = shapes[IDS][0] if IDS in shapes else None
    if batch is None or any(shapes[other][:1] == (batch,) for index in partial for other in missing[index]):
        raise DataError(f"{what} for every sample", hint="put such samples into a file of their own")
    count = min(len(partial), *map(len, kinds))
    mixed = [[kind[place] for kind in kinds] for place in range(count)]
    used = {index for indices in mixed for index in indices}
    rest = [index for index in partial if index not in used]
    size = len(kinds) + -(-len(rest) // count)
    if size > max(len(kinds) + 1, batch_size):
        raise DataError(
            f"{len(partial)} samples have no {name} or another input; each runs in a batch with one that has it, but "
            f"there are only {count}",
            hint=f"use --batch-size {size}, or put them into a file of their own",
        )
    return [[*indices, *rest[place::count]] for place, indices in enumerate(mixed)]


def _covering(missing: Sequence[Sequence[str]], partial: Sequence[int]) -> list[list[int]]:
    """Return groups of samples with the same inputs that together have all inputs; none if there are no such."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for index in partial:
        groups.setdefault(tuple(missing[index]), []).append(index)
    absent: dict[str, None] = dict.fromkeys(name for names in groups for name in names)
    chosen = []
    for names, indices in sorted(groups.items(), key=lambda group: (len(group[0]), group[0])):
        left = [name for name in absent if name in names]
        if len(left) < len(absent):
            chosen.append(indices)
            absent = dict.fromkeys(left)
    return [] if absent else chosen


def _together(rows: Sequence[Sample], indices: Sequence[int], padding_token: int) -> Sample:
    """Join samples of different inputs and lengths; tokens are padded at the end."""
    chosen = [rows[index] for index in indices]
    longest = max(row[IDS].shape[1] for row in chosen)
    chosen = [_padded({MASK: torch.ones_like(row[IDS])} | row, longest, padding_token) for row in chosen]
    return _joined(chosen)


def _padded(row: Sample, length: int, padding_token: int) -> Sample:
    ids_BS = row[IDS]
    count = length - ids_BS.shape[1]
    fills = {IDS: padding_token, LABELS: NOT_A_LABEL}
    return {
        name: torch.cat([value, value.new_full((len(value), count, *value.shape[2:]), fills.get(name, 0))], dim=1)
        if count and is_of_tokens(name, value, ids_BS)
        else value
        for name, value in row.items()
    }


def _joined(rows: Sequence[Sample]) -> Sample:
    """Concatenate each tensor of the samples that have it."""
    joined = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        if any(value.shape[1:] != values[0].shape[1:] for value in values):
            shapes = ", ".join(str(list(value.shape)) for value in values)
            hint = "put samples with and without them into files of their own"
            raise DataError(f"samples whose {name} have the shapes {shapes} cannot be joined", hint=hint)
        joined[name] = torch.cat(values)
    return joined


def _shapes(row: Mapping[str, torch.Tensor]) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    return tuple((name, tuple(value.shape), value.dtype) for name, value in sorted(row.items()))


def _size(row: Mapping[str, torch.Tensor]) -> int:
    return sum(value.numel() for value in row.values())
