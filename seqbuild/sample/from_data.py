"""Make a sample from calibration data with images, sounds or videos, so that it has the sizes of the model's processor.

The sample of the data with most inputs is repeated, together with samples that have further inputs. Where the number of
media does not follow from the number of rows, one row is a text without media: otherwise the trace would be valid only
for one medium in each row.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from runtime.data.decoder import LABELS
from runtime.data.named_tensors import IDS, is_of_tokens
from runtime.errors import TraceError
from seqbuild.sample.inputs import default_sample
from seqbuild.sample.shape import REHEARSAL_SHAPES, SAMPLE_BATCH

if TYPE_CHECKING:
    from torch import nn

    from runtime.data.named_tensors import NamedSamples

Row = Mapping[str, torch.Tensor]


def sample_of_data(model: nn.Module, data: NamedSamples) -> dict[str, torch.Tensor]:
    """Return a sample of several rows with the inputs of the data.

    Args:
        model: the model to be called; neither run nor modified.
        data: the samples.
    """
    known = [{name: value for name, value in sample.items() if name != LABELS} for sample in data.samples]
    rows: list[Row] = _covering(known)
    if IDS not in rows[0] or _has_media_by_row(model, rows[0]):
        rows = rows[:1] * SAMPLE_BATCH
    else:
        longest = max(row[IDS].shape[1] for row in rows) + 1
        longer = [_ending_in_text(row, longest, data.media_tokens) for row in rows]
        rows = [*longer, *longer, _without_media(longer[0], data.media_tokens)]
    given = dict.fromkeys(name for row in rows for name in row)
    names = [name for name in inspect.signature(model.forward).parameters if name in given]
    return {
        name: torch.cat([row[name] for row in rows if name in row])
        for name in (*names, *(name for name in given if name not in names))
    }


def _covering(known: Sequence[Row]) -> list[Row]:
    """Return few samples that together have all inputs of the data; of several alike, the smallest."""
    absent = dict.fromkeys(name for row in known for name in row)
    chosen: list[Row] = []
    while absent:
        best = max(known, key=lambda row: (sum(name in row for name in absent), -_size(row)))
        chosen.append(best)
        absent = dict.fromkeys(name for name in absent if name not in best)
    return chosen


def _size(row: Row) -> int:
    return sum(value.numel() for value in row.values())


def _has_media_by_row(model: nn.Module, row: Row) -> bool:
    """Whether media have a dimension of rows of text, as in the generated sample."""
    try:
        generated = default_sample(model, REHEARSAL_SHAPES[0])
    except TraceError:
        return False
    media = [name for name, value in row.items() if not is_of_tokens(name, value, row[IDS])]
    return any(len(generated[name]) == SAMPLE_BATCH for name in media if name in generated)


def _without_media(row: Row, media_tokens: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Return the row as a text: another token in the place of media."""
    ids_BS = row[IDS]
    is_medium_BS = torch.isin(ids_BS, torch.tensor(media_tokens or [-1]))
    plain = int(ids_BS[~is_medium_BS][0])
    kept = {name: value for name, value in row.items() if is_of_tokens(name, value, ids_BS)}
    types = {name: torch.zeros_like(value) for name, value in kept.items() if name.endswith("token_type_ids")}
    return kept | types | {IDS: ids_BS.masked_fill(is_medium_BS, plain)}


def _ending_in_text(row: Row, length: int, media_tokens: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Append columns of text, so that rows are equally long, and longer ones can repeat the last column."""
    text = _without_media(row, media_tokens)
    count = length - row[IDS].shape[1]
    return {
        name: torch.cat([value, *[text[name][:, -1:]] * count], dim=1) if name in text else value
        for name, value in row.items()
    }
