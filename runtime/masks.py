"""Which tokens of a batch count in statistics: not padding, and not what a loss mask leaves out.

A batch may bring a `loss_mask` besides the model's inputs: [B, S], nonzero where tokens count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from runtime.errors import DataError
from runtime.token_file import LOSS_MASK


def token_mask(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """The tokens of a batch that count, bool [B, S]; None when all do, or it is not said."""
    masks = [batch.get("attention_mask"), batch.get(LOSS_MASK)]
    found = [mask != 0 for mask in masks if isinstance(mask, torch.Tensor) and mask.dim() == 2]
    if not found:
        return None
    together = found[0] if len(found) == 1 else found[0] & found[1]
    return None if bool(together.all()) else together


def require_tokens(batches: Sequence[Mapping[str, Any]]) -> None:
    """Refuse masks that fit no tokens, or leave none.

    Raises:
        DataError: naming the batch.
    """
    for index, batch in enumerate(batches):
        mask = batch.get(LOSS_MASK)
        ids = batch.get("input_ids")
        if isinstance(mask, torch.Tensor) and isinstance(ids, torch.Tensor) and mask.shape != ids.shape:
            raise DataError(f"batch {index} has a loss_mask of {list(mask.shape)} for {list(ids.shape)} tokens")
    masks = [token_mask(batch) for batch in batches]
    if masks and all(mask is not None and not bool(mask.any()) for mask in masks):
        raise DataError("no token counts: every one is padding or masked", hint="check loss_mask and attention_mask")
