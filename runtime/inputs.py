"""From token batches to a model's inputs, and the check that the artifact holds for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from runtime.conditions import holds
from runtime.errors import DataError
from runtime.token_file import LOSS_MASK

if TYPE_CHECKING:
    from runtime.manifest import Manifest


def model_inputs(manifest: Manifest, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs that the artifact's model takes, from a batch of tokens.

    Args:
        manifest: names the inputs.
        batch: `input_ids` and `attention_mask`, int64 [B, S]; a `loss_mask` is handed on.

    Returns:
        Those, and as the model asks for them: `token_type_ids` of zeros, and for encoder-decoder models the same
        tokens as `decoder_input_ids`.

    Raises:
        DataError: when the model takes an input that text cannot give.
    """
    known = {
        **batch,
        "decoder_input_ids": batch["input_ids"],
        "decoder_attention_mask": batch["attention_mask"],
        "token_type_ids": torch.zeros_like(batch["input_ids"]),
    }
    for entry in manifest.inputs:
        if entry.name not in known:
            raise DataError(
                f"the model takes an input {entry.name!r}, which text data cannot give",
                hint="compile it with --text-only to calibrate it with text, if it does without images and sounds",
            )
    masks = {LOSS_MASK: batch[LOSS_MASK]} if LOSS_MASK in batch else {}
    return {entry.name: known[entry.name] for entry in manifest.inputs} | masks


def require_length(samples: Sequence[torch.Tensor], longest: int | None) -> None:
    """Refuse samples that are longer than the model's positions reach.

    Raises:
        DataError: stating both lengths.
    """
    found = max((len(sample) for sample in samples), default=0)
    if longest is not None and found > longest:
        raise DataError(
            f"a sample has {found} tokens, and the model's config allows {longest} (max_position_embeddings)",
            hint=f"give --seq-len {longest} or less",
        )


def require_in_range(manifest: Manifest, batches: Sequence[Mapping[str, Any]]) -> None:
    """Refuse batches of sizes for which the trace does not hold.

    Raises:
        DataError: naming the size and the range.
    """
    dims = {dim.name: dim for dim in manifest.dims}
    for batch in batches:
        sizes: dict[str, int] = {}
        for entry in manifest.inputs:
            for symbol, size in zip(entry.shape, batch[entry.name].shape, strict=True):
                dim = dims.get(symbol) if isinstance(symbol, str) else None
                if isinstance(symbol, str) and sizes.setdefault(symbol, int(size)) != size:
                    raise DataError(
                        f"a batch has {entry.name} of shape {list(batch[entry.name].shape)}, but its {symbol} is "
                        f"{sizes[symbol]} elsewhere"
                    )
                if dim is None:
                    is_inside = isinstance(symbol, str) or symbol == size
                    bounds = str(symbol)
                else:
                    is_inside = dim.min <= size and (dim.max < 0 or size <= dim.max)
                    bounds = f"{dim.min} to {dim.max}" if dim.max >= 0 else f"{dim.min} or more"
                if not is_inside:
                    raise DataError(
                        f"a batch has {entry.name} of shape {list(batch[entry.name].shape)}, but the artifact "
                        f"holds for a {symbol} of {bounds}"
                    )
        for condition in manifest.conditions:
            if not holds(condition, sizes):
                stated = ", ".join(f"{name} = {size}" for name, size in sizes.items() if name in condition)
                raise DataError(
                    f"a batch has {stated}, but the artifact holds only where {condition}",
                    hint="the model's code computes otherwise there; choose another --seq-len or --batch-size",
                )
