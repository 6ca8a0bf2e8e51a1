"""From batches of tokens to a model's inputs, and the check that the artifact holds for them.

Data gives what a plain call of the model takes: `input_ids` and `attention_mask`, and `labels` of an encoder-decoder
model. What else the artifact takes is made up only if the compiler has found out what stands for its absence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from runtime.artifact.manifest import UNKNOWN_ABSENCE
from runtime.artifact.size_expressions import holds
from runtime.data.decoder import LABELS, NOT_A_LABEL, shifted
from runtime.data.token_file import LOSS_MASK
from runtime.errors import DataError

if TYPE_CHECKING:
    from runtime.artifact.manifest import InputEntry, Manifest

IDS, MASK, DECODER_IDS = "input_ids", "attention_mask", "decoder_input_ids"
# What a batch may hold besides the model's inputs, all [B, S] or [B, T]: it says which tokens count.
BESIDE_INPUTS = (MASK, LOSS_MASK, LABELS)


def model_inputs(manifest: Manifest, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs that the artifact's model takes, from a batch of tokens.

    Args:
        manifest: names the inputs.
        batch: `input_ids` and `attention_mask`, int64 [B, S]; of an encoder-decoder model also `labels`, int64 [B, T],
            -100 where there is none: without them, the text itself is to be written. A `loss_mask` is handed on.

    Returns:
        The inputs, and what says which tokens count: `labels`, `loss_mask`, and the mask of padding if there is some.

    Raises:
        DataError: when the model takes an input that text cannot give.
    """
    known = completed(manifest, batch)
    names = [entry.name for entry in manifest.inputs]
    for name in names:
        if name not in known:
            raise _not_given(manifest, name)
    beside = [LOSS_MASK, LABELS] if DECODER_IDS in names else [LOSS_MASK]
    if MASK in known and not bool(known[MASK].all()):
        beside.append(MASK)
    return {name: known[name] for name in names} | {
        name: known[name] for name in beside if name in known and name not in names
    }


def completed(manifest: Manifest, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch, and those inputs that it lacks and that follow from it.

    Raises:
        DataError: when it has no inputs for the decoder, and the artifact does not say how they follow from labels.
    """
    made = dict(batch)
    names = [entry.name for entry in manifest.inputs]
    has_text = LABELS in made or (IDS in made and made[IDS].dim() == 2)
    if DECODER_IDS in names and DECODER_IDS not in made and has_text:
        rule = _rule(manifest)
        made[LABELS] = _labels(made)
        made[DECODER_IDS] = shifted(made[LABELS], rule)
    for entry in manifest.inputs:
        like = made.get(DECODER_IDS if entry.name.startswith("decoder_") else IDS)
        if entry.name not in made and entry.absent != UNKNOWN_ABSENCE and like is not None:
            made[entry.name] = _stand_in(entry, like)
    return made


def _labels(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A batch's labels; without any, the text is to be written as it is."""
    if LABELS not in batch:
        ids_BS, mask_BS = batch[IDS], batch.get(MASK)
        if mask_BS is None or mask_BS.shape != ids_BS.shape:
            return ids_BS
        return ids_BS.masked_fill(mask_BS == 0, NOT_A_LABEL)
    found = batch[LABELS]
    if not isinstance(found, torch.Tensor) or found.dim() != 2 or found.dtype != torch.int64:
        kind = f"{found.dtype} {list(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise DataError(f"a batch has labels of {kind}", hint="give an int64 tensor [batch, sequence], -100 for none")
    return found


def _rule(manifest: Manifest) -> Mapping[str, int]:
    if manifest.decoder:
        return manifest.decoder
    raise DataError(
        f"the artifact does not say what the decoder of {manifest.model.class_name} reads for a text",
        hint="compile it again, from a config with decoder_start_token_id; or give decoder_input_ids from Python",
    )


def _stand_in(entry: InputEntry, tokens_BS: torch.Tensor) -> torch.Tensor:
    """A tensor of the number that stands for absence: for each token, or for each row."""
    of_tokens, of_each = tokens_BS.shape[: len(entry.shape)], entry.shape[tokens_BS.dim() :]
    return torch.full([*of_tokens, *map(int, of_each)], entry.absent, dtype=getattr(torch, entry.dtype))


def _not_given(manifest: Manifest, name: str) -> DataError:
    if any(entry.dtype == "model" or "float" in entry.dtype for entry in manifest.inputs):
        return DataError(
            f"the model takes an input {name!r}, which text data cannot give",
            hint="compile it with --text-only to calibrate it with text, if it does without images and sounds",
        )
    return DataError(
        f"the artifact takes an input {name!r}, which the data does not give, and {manifest.model.class_name} "
        "may compute something else with zeros than without it",
        hint="compile the model again, without this input in --sample, or give batches that have it from Python",
    )


def require_decoder(manifest: Manifest, targets: Sequence[torch.Tensor] | None) -> None:
    """Refuse pairs of source and target for a model that does not read the one and write the other.

    Raises:
        DataError: naming the model.
    """
    if targets is not None and DECODER_IDS not in {entry.name for entry in manifest.inputs}:
        raise DataError(
            f"the data has pairs of source and target, and {manifest.model.class_name} is no encoder-decoder model",
            hint='give texts: {"text": "..."}',
        )


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
