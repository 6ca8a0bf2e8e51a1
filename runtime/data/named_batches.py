"""Make batches of samples with named tensors.

Samples of equal shapes are concatenated, each tensor along its first dimension; none is padded, because padding would
affect sums. A sample that lacks an input of the artifact (a text beside records with images) cannot run alone. It runs
with a sample that has the input: their tokens are padded at the end to one length, and padding does not count in
statistics. A sample is never used twice.
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
        batch_size: the maximum number of samples of a batch; at least two if samples lack inputs.

    Raises:
        DataError: the artifact lacks an input of the samples, or the samples an input of the artifact.
    """
    require_count("batch_size", batch_size)
    rows = [_known_inputs(manifest, index, sample) for index, sample in enumerate(data.samples)]
    missing = [_missing(manifest, row) for row in rows]
    whole = [index for index in range(len(rows)) if not missing[index]]
    lacking = [index for index in range(len(rows)) if missing[index]]
    if lacking:
        _require_carriers(manifest, missing, whole, lacking, batch_size)
    order = sorted(whole, key=lambda index: -_size(rows[index]))
    carriers = order[: len(lacking)]
    made = [
        _together(rows, [carrier, *lacking[place :: len(carriers)]], data.padding_token)
        for place, carrier in enumerate(carriers)
    ]
    groups: dict[Any, list[int]] = {}
    for index in order[len(carriers) :]:
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


def _require_carriers(
    manifest: Manifest, missing: Sequence[Sequence[str]], whole: Sequence[int], lacking: Sequence[int], batch_size: int
) -> None:
    """Require that samples without an input can run together with others."""
    first = lacking[0]
    name, shapes = missing[first][0], {entry.name: entry.shape for entry in manifest.inputs}
    what = f"sample {first} has no {name}, which is an input of the artifact"
    if not whole:
        raise DataError(
            f"{what}, and no sample has all of its inputs",
            hint="compile the model for such data: with --text-only for text, or with --sample FILE, this data",
        )
    batch = shapes[IDS][0] if IDS in shapes else None
    if batch is None or any(shapes[other][:1] == (batch,) for index in lacking for other in missing[index]):
        raise DataError(f"{what} for every sample", hint="put such samples into a file of their own")
    per_carrier = -(-len(lacking) // len(whole)) + 1
    if per_carrier > max(2, batch_size):
        raise DataError(
            f"{len(lacking)} samples have no {name}; each runs in a batch with one that has it, but there are only "
            f"{len(whole)}",
            hint=f"use --batch-size {per_carrier}, or put them into a file of their own",
        )


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
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: torch.cat([row[name] for row in rows if name in row]) for name in names}


def _shapes(row: Mapping[str, torch.Tensor]) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    return tuple((name, tuple(value.shape), value.dtype) for name, value in sorted(row.items()))


def _size(row: Mapping[str, torch.Tensor]) -> int:
    return sum(value.numel() for value in row.values())
