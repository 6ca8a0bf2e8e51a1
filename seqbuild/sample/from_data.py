"""Make a sample from calibration data with images, sounds or videos, so that it has the sizes of the model's processor.

The sample of the data with most inputs is repeated. Where the number of media does not follow from the number of rows,
one row is made a text without media: otherwise the trace would be valid only for one medium in each row.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from runtime.data.named_tensors import is_of_tokens
from runtime.errors import TraceError
from seqbuild.sample.inputs import default_sample
from seqbuild.sample.shape import REHEARSAL_SHAPES, SAMPLE_BATCH

if TYPE_CHECKING:
    from torch import nn

    from runtime.data.named_tensors import NamedSamples

Row = Mapping[str, torch.Tensor]

_IDS = "input_ids"


def sample_of_data(model: nn.Module, data: NamedSamples) -> dict[str, torch.Tensor]:
    """Return a sample of several rows with the inputs of the data.

    Args:
        model: the model to be called; neither run nor modified.
        data: the samples.
    """
    takes = inspect.signature(model.forward).parameters
    known = [{name: value for name, value in sample.items() if name != "labels"} for sample in data.samples]
    best = max(known, key=lambda row: (len(row), -sum(value.numel() for value in row.values())))
    row = {name: best[name] for name in (*takes, *best) if name in best}
    rows = [row] * SAMPLE_BATCH
    if _IDS in row:
        rows = [_ending_in_text(each, data.media_tokens) for each in rows]
        if not _has_media_by_row(model, row):
            rows[-1] = _without_media(rows[-1], data.media_tokens)
    return {name: torch.cat([each[name] for each in rows if name in each]) for name in row}


def _has_media_by_row(model: nn.Module, row: Row) -> bool:
    """Whether media have a dimension of rows of text, as in the generated sample."""
    try:
        generated = default_sample(model, REHEARSAL_SHAPES[0])
    except TraceError:
        return False
    media = [name for name, value in row.items() if not is_of_tokens(name, value, row[_IDS])]
    return any(len(generated[name]) == SAMPLE_BATCH for name in media if name in generated)


def _without_media(row: Row, media_tokens: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Return the row as a text: another token in the place of media."""
    ids_BS = row[_IDS]
    is_medium_BS = torch.isin(ids_BS, torch.tensor(media_tokens or [-1]))
    plain = int(ids_BS[~is_medium_BS][0])
    kept = {name: value for name, value in row.items() if is_of_tokens(name, value, ids_BS)}
    types = {name: torch.zeros_like(value) for name, value in kept.items() if name.endswith("token_type_ids")}
    return kept | types | {_IDS: ids_BS.masked_fill(is_medium_BS, plain)}


def _ending_in_text(row: Row, media_tokens: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Append a column of text, so that the row can be made longer by repeating its last column."""
    text = _without_media(row, media_tokens)
    return {
        name: torch.cat([value, text[name][:, -1:]], dim=1) if name in text else value for name, value in row.items()
    }
