"""Determine which tokens of a batch count in statistics: no padding, and none that a loss mask excludes.

A batch may have a `loss_mask` besides the model's inputs: [B, S], nonzero for tokens that count. Tokens of the decoder
of an encoder-decoder model count if they have a label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from runtime.data.decoder import LABELS, NOT_A_LABEL
from runtime.data.token_file import LOSS_MASK
from runtime.errors import DataError

# Bool [B, S]; for an encoder-decoder model that and the decoder's, [B, T]; None if all tokens count.
TokenMask: TypeAlias = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None


def token_mask(batch: Mapping[str, Any]) -> TokenMask:
    """Return the tokens of a batch that count; None if all do or no mask is present."""
    masks = [batch.get("attention_mask"), batch.get(LOSS_MASK)]
    found = [mask != 0 for mask in masks if isinstance(mask, torch.Tensor) and mask.dim() == 2]
    together = None
    if found:
        together = found[0] if len(found) == 1 else found[0] & found[1]
    labels = batch.get(LABELS)
    if "decoder_input_ids" in batch and isinstance(labels, torch.Tensor):
        own = labels != NOT_A_LABEL
        if "input_ids" not in batch:  # the encoder reads sounds or images, all of which count
            return None if bool(own.all()) else own
        together = torch.ones_like(batch["input_ids"], dtype=torch.bool) if together is None else together
        return None if bool(together.all()) and bool(own.all()) else (together, own)
    return None if together is None or bool(together.all()) else together


def require_tokens(batches: Sequence[Mapping[str, Any]]) -> None:
    """Reject masks that do not fit the tokens, or exclude all of them.

    Raises:
        DataError: a mask has another shape, encoder and decoder cannot be told apart, or no token counts.
    """
    for index, batch in enumerate(batches):
        mask = batch.get(LOSS_MASK)
        ids = batch.get("input_ids")
        if isinstance(mask, torch.Tensor) and isinstance(ids, torch.Tensor) and mask.shape != ids.shape:
            raise DataError(f"batch {index} has a loss_mask of {list(mask.shape)} for {list(ids.shape)} tokens")
    masks = [token_mask(batch) for batch in batches]
    for index, both in enumerate(masks):
        # Modules of the decoder also read tokens of the encoder; both are told apart by their number.
        if isinstance(both, tuple) and both[0].shape == both[1].shape and not torch.equal(*both):
            raise DataError(
                f"batch {index} has as many labels as input_ids, but other padding, so tokens of encoder and decoder "
                "cannot be told apart",
                hint="pad them to different lengths, or leave padding out",
            )
    if masks and all(mask is not None and not _leaves_any(mask) for mask in masks):
        raise DataError("no token counts: all are padding or masked", hint="check loss_mask and attention_mask")


def _leaves_any(mask: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> bool:
    parts = mask if isinstance(mask, tuple) else (mask,)
    return any(bool(part.any()) for part in parts)
