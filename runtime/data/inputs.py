"""Make a model's inputs from batches of tokens, and check that the artifact is valid for their sizes.

Data has what a plain call of the model takes: `input_ids` and `attention_mask`, and `labels` for an encoder-decoder
model. Another input is added only if the compiler determined the value that is equivalent to leaving it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
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
# Tensors of a batch besides the model's inputs, all [B, S] or [B, T]: they state which tokens count in statistics.
BESIDE_INPUTS = (MASK, LOSS_MASK, LABELS)
COMPILE_FOR_DATA = "compile for this data: seqbuild compile MODEL --sample FILE.safetensors, made by `seqbuild data`"


def model_inputs(manifest: Manifest, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Make the inputs of an artifact's model from a batch of tokens.

    Args:
        manifest: states the inputs.
        batch: `input_ids` and `attention_mask`, int64 [B, S]; for an encoder-decoder model also `labels`, int64 [B, T],
            -100 at positions without a label: by default the labels are the text itself. A `loss_mask` is kept.

    Returns:
        The inputs, and the tensors that state which tokens count: `labels`, `loss_mask`, and `attention_mask` if there
        is padding.

    Raises:
        DataError: the model has an input that cannot be made from text.
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
    """Add the missing inputs that follow from those of a batch.

    Raises:
        DataError: the artifact does not state how inputs of the decoder follow from labels.
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
    """Return the labels of a batch, by default its text."""
    if LABELS not in batch:
        ids_BS, mask_BS = batch[IDS], batch.get(MASK)
        if mask_BS is None or mask_BS.shape != ids_BS.shape:
            return ids_BS
        return ids_BS.masked_fill(mask_BS == 0, NOT_A_LABEL)
    found = batch[LABELS]
    if not isinstance(found, torch.Tensor) or found.dim() != 2 or found.dtype != torch.int64:
        kind = f"{found.dtype} {list(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise DataError(f"a batch has labels of {kind}", hint="pass an int64 tensor [batch, sequence], -100 for none")
    return found


def _rule(manifest: Manifest) -> Mapping[str, int]:
    if manifest.decoder:
        return manifest.decoder
    raise DataError(
        f"the artifact does not state how decoder_input_ids of {manifest.model.class_name} follow from labels",
        hint="compile the model again, with decoder_start_token_id in its config, or pass decoder_input_ids in Python",
    )


def _stand_in(entry: InputEntry, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Return the tensor that is equivalent to leaving an input out, for each token or each row."""
    of_tokens, of_each = tokens_BS.shape[: len(entry.shape)], entry.shape[tokens_BS.dim() :]
    return torch.full([*of_tokens, *map(int, of_each)], entry.absent, dtype=getattr(torch, entry.dtype))


def is_text_only(manifest: Manifest) -> bool:
    """Whether all inputs are integers: no images, sounds or videos."""
    return not any(entry.dtype == "model" or "float" in entry.dtype for entry in manifest.inputs)


def _not_given(manifest: Manifest, name: str) -> DataError:
    if not is_text_only(manifest):
        return DataError(
            f"the model has an input {name!r}, which cannot be made from text",
            hint="compile it with --text-only, if it supports text without images and sounds",
        )
    return DataError(
        f"the artifact has an input {name!r}, which is missing in the data, and {manifest.model.class_name} may "
        "not treat zeros like a missing input",
        hint="compile the model again without this input in --sample, or pass batches that have it in Python",
    )


def require_decoder(manifest: Manifest, targets: Sequence[torch.Tensor] | None) -> None:
    """Reject pairs of source and target for a model that is not an encoder-decoder model.

    Raises:
        DataError: the model is another one.
    """
    if targets is not None and DECODER_IDS not in {entry.name for entry in manifest.inputs}:
        raise DataError(
            f"the data has pairs of source and target, but {manifest.model.class_name} is not an encoder-decoder model",
            hint='use texts: {"text": "..."}',
        )


def require_length(samples: Sequence[torch.Tensor], longest: int | None) -> None:
    """Reject samples that are longer than the model's positions.

    Raises:
        DataError: a sample is longer.
    """
    found = max((len(sample) for sample in samples), default=0)
    if longest is not None and found > longest:
        raise DataError(
            f"a sample has {found} tokens, but the model's config allows {longest} (max_position_embeddings)",
            hint=f"use --seq-len {longest} or less",
        )


def with_single_sizes(manifest: Manifest) -> Manifest:
    """Return the manifest with a minimum of one where it states two.

    A minimum of two comes from the tracer, which treats a size of one as special whatever the model's code does.
    """
    return replace(manifest, dims=tuple(replace(dim, min=1) if dim.min == 2 else dim for dim in manifest.dims))


def require_in_range(manifest: Manifest, batches: Sequence[Mapping[str, Any]]) -> None:
    """Reject batches of sizes for which the artifact is not valid.

    Raises:
        DataError: a size is out of range or violates a condition.
    """
    hint = "" if is_text_only(manifest) else COMPILE_FOR_DATA
    dims = {dim.name: (dim.min, dim.max) for dim in manifest.dims}
    for batch in batches:
        sizes: dict[str, int] = {}
        for entry in manifest.inputs:
            shape = list(batch[entry.name].shape)
            for symbol, size in zip(entry.shape, shape, strict=True):
                valid = f"a size of {symbol}"
                is_inside = symbol == size
                if isinstance(symbol, str):
                    if sizes.setdefault(symbol, size) != size:
                        raise DataError(
                            f"a batch has {entry.name} of shape {shape}, but its {symbol} is {sizes[symbol]} elsewhere",
                            hint=hint,
                        )
                    low, high = dims.get(symbol, (0, -1))
                    valid = f"a {symbol} of {low} to {high}" if high >= 0 else f"a {symbol} of {low} or more"
                    is_inside = low <= size and (high < 0 or size <= high)
                if not is_inside:
                    raise DataError(
                        f"a batch has {entry.name} of shape {shape}, but the artifact is valid for {valid}", hint=hint
                    )
        for condition in manifest.conditions:
            if not holds(condition, sizes):
                stated = ", ".join(f"{name} = {size}" for name, size in sizes.items() if name in condition)
                raise DataError(
                    f"a batch has {stated}, but the artifact is valid only if {condition}",
                    hint=hint
                    or "the model's code takes another path otherwise; "
                    "choose another --seq-len (for tasks, --max-length) or --batch-size",
                )
