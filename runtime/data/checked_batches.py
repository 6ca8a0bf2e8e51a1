"""Check batches from a caller of the Python API, and convert them to the model's inputs.

Batches are mappings from the names of inputs to tensors with values on the CPU. Unambiguous values are converted:
iterators are consumed once, tensors on another device are copied, narrow integers get the dtype that the model was
compiled with. All others are rejected with the batch, the input and what is expected.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from runtime.arguments import shown
from runtime.data.decoder import LABELS, NOT_A_LABEL
from runtime.data.inputs import BESIDE_INPUTS, DECODER_IDS, IDS, MASK, completed, require_in_range, with_single_sizes
from runtime.data.token_file import LOSS_MASK
from runtime.errors import DataError

if TYPE_CHECKING:
    from runtime.artifact.manifest import InputEntry
    from runtime.chain import Artifact

_TOKENS = (IDS, DECODER_IDS)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_EXPECTED = "a list of batches, each a dict from input names to tensors [batch, ...]"


def as_batches(batches: Any) -> list[dict[str, torch.Tensor]]:
    """Convert batches to a list of tensors with values on the CPU.

    Args:
        batches: a sequence or an iterable of mappings, such as a DataLoader.

    Raises:
        DataError: a batch is not a mapping of such tensors.
    """
    if isinstance(batches, (str, bytes, Mapping, torch.Tensor)) or not isinstance(batches, Iterable):
        hint = "put it into a list: [batch]" if isinstance(batches, Mapping) else f"pass {_EXPECTED}"
        raise DataError(f"batches is {shown(batches)}", hint=hint)
    if type(batches).__module__.partition(".")[0] == "datasets":
        raise DataError(
            f"batches is {shown(batches)}, which yields samples, not batches",
            hint="make batches with runtime.batches([torch.tensor(row['input_ids']) for row in dataset], batch_size)",
        )
    found = list(batches)
    if not found and isinstance(batches, Iterator):
        raise DataError(f"batches is {shown(batches)} that is exhausted", hint="pass a new one, or a list of batches")
    return [_as_batch(index, batch) for index, batch in enumerate(found)]


def _as_batch(index: int, batch: Any) -> dict[str, torch.Tensor]:
    if not isinstance(batch, Mapping):
        raise DataError(f"batch {index} is {shown(batch)}", hint=f"pass {_EXPECTED}")
    return {name: _as_tensor(f"batch {index}: {name}", name, value) for name, value in batch.items()}


def _as_tensor(where: str, name: Any, value: Any) -> torch.Tensor:
    if not isinstance(name, str):
        raise DataError(f"{where} is not the name of an input", hint=f"pass {_EXPECTED}")
    if not isinstance(value, torch.Tensor):
        hint = "pass a tensor [batch, ...]"
        if isinstance(value, (list, tuple)) or hasattr(value, "__array__"):
            hint += ", for instance torch.as_tensor(values)"
        raise DataError(f"{where} is {shown(value)}", hint=hint)
    if value.is_meta or hasattr(value, "fake_mode"):
        raise DataError(f"{where} is a tensor without values", hint="pass real data")
    if value.is_nested or value.is_quantized:
        raise DataError(f"{where} is a nested or quantized tensor", hint="pass a plain one")
    if value.layout is not torch.strided:
        raise DataError(f"{where} is a tensor of layout {value.layout}", hint="pass a dense one: tensor.to_dense()")
    if not value.numel():
        raise DataError(f"{where} has the shape {list(value.shape)}, which is empty", hint="leave out empty batches")
    return value.detach().cpu()


def model_batches(artifact: Artifact, batches: Any, *, is_scored: bool = False) -> list[dict[str, torch.Tensor]]:
    """Convert batches to the inputs of an artifact, in its dtypes; inputs that follow from others are added.

    Args:
        artifact: states its inputs.
        batches: as for `as_batches`.
        is_scored: whether labels of a causal model are checked too; those of a decoder always are.

    Raises:
        DataError: a batch does not fit the artifact.
    """
    from runtime.model.config import text_limits

    manifest = with_single_sizes(artifact.manifest)
    inputs = {entry.name: entry for entry in manifest.inputs}
    given = as_batches(batches)
    is_text = all(entry.dtype.startswith(("int", "bool")) for entry in inputs.values())
    num_tokens, longest = text_limits(artifact) if is_text and given else (None, None)
    found: list[dict[str, torch.Tensor]] = []
    for index, batch in enumerate(given):
        where = f"batch {index}: "
        if LABELS in batch and (is_scored or DECODER_IDS in inputs):
            batch[LABELS] = _label_ids(where, batch, num_tokens)
        _require_token_masks(where, batch, inputs)
        batch = completed(manifest, batch)
        _require_names(index, batch, inputs)
        made = {name: value for name, value in batch.items() if name in inputs or name in BESIDE_INPUTS}
        for name, entry in inputs.items():
            made[name] = _fitting(f"{where}{name}", batch[name], entry)
            if is_text and name in _TOKENS:
                _require_known(f"{where}{name}", made[name], num_tokens, longest)
        found.append(made)
        try:
            require_in_range(manifest, [made])
        except DataError as error:
            message = error.message.removeprefix("a batch has ")
            raise DataError(f"batch {index} has {message}", hint=error.hint) from None
    return found


def _label_ids(where: str, batch: Mapping[str, torch.Tensor], num_tokens: int | None) -> torch.Tensor:
    """Convert labels to int64; they must be token ids or -100."""
    labels, ids, own = batch[LABELS], batch.get(IDS), batch.get(DECODER_IDS)
    expected = "expected integers [batch, sequence], -100 at positions without a label"
    if labels.dtype not in _INTEGERS:
        raise DataError(f"{where}{LABELS} is {labels.dtype}", hint=expected)
    if labels.dim() != 2:
        raise DataError(f"{where}{LABELS} has the shape {list(labels.shape)}", hint=expected)
    if ids is not None and ids.dim() == 2 and len(ids) != len(labels):
        raise DataError(f"{where}{LABELS} has the shape {list(labels.shape)} for {len(ids)} samples", hint=expected)
    if own is not None and own.shape != labels.shape:
        raise DataError(f"{where}{LABELS} has the shape {list(labels.shape)} for {DECODER_IDS} of {list(own.shape)}")
    known = labels[labels != NOT_A_LABEL]
    if known.numel() and int(known.min()) < 0:
        raise DataError(f"{where}{LABELS} has the token id {int(known.min())}", hint=expected)
    _require_known(f"{where}{LABELS}", known, num_tokens, None)
    return labels.to(torch.int64)


def _require_token_masks(where: str, batch: Mapping[str, torch.Tensor], inputs: Container[str]) -> None:
    """Require masks of integers, with the shape of the tokens."""
    ids = batch.get(IDS)
    for name in (MASK, LOSS_MASK):
        mask = batch.get(name)
        if mask is None or name in inputs:
            continue
        if mask.dtype not in (*_INTEGERS, torch.bool):
            raise DataError(f"{where}{name} is {mask.dtype}", hint="expected integers [batch, sequence], 0 or 1")
        if ids is not None and mask.shape != ids.shape:
            raise DataError(f"{where}{name} has the shape {list(mask.shape)} for {list(ids.shape)} tokens")


def _require_names(index: int, batch: Mapping[str, torch.Tensor], inputs: Mapping[str, InputEntry]) -> None:
    expected = ", ".join(f"{name} {entry.dtype} {_shape(entry)}" for name, entry in inputs.items())
    missing = [name for name in inputs if name not in batch]
    if missing:
        has = f"it has {', '.join(batch)}" if batch else "it is empty"
        raise DataError(f"batch {index} has no {missing[0]}; {has}", hint=f"inputs of the artifact are {expected}")
    for name, value in batch.items():
        # For text, token_type_ids are zeros, which is the same as none.
        is_harmless = name in BESIDE_INPUTS or (name == "token_type_ids" and not bool(value.any()))
        if name not in inputs and not is_harmless:
            raise DataError(
                f"batch {index} has {name}, which is not an input of the artifact",
                hint=f"inputs are {expected}; leave {name} out, or compile the model with a --sample that has it",
            )


def _fitting(where: str, value: torch.Tensor, entry: InputEntry) -> torch.Tensor:
    """Convert a tensor to the dtype of an input."""
    expected = f"expected {entry.dtype} {_shape(entry)}"
    if value.dim() != len(entry.shape):
        raise DataError(f"{where} has the shape {list(value.shape)}", hint=expected)
    if not entry.dtype.startswith(("int", "uint", "bool")):
        if not value.is_floating_point():
            raise DataError(f"{where} is {value.dtype}", hint=expected)
        return value
    dtype: torch.dtype = getattr(torch, entry.dtype)
    is_narrowed = dtype is torch.bool and value.dtype is not torch.bool and bool(((value != 0) & (value != 1)).any())
    if value.is_floating_point() or value.is_complex() or is_narrowed:
        raise DataError(f"{where} is {value.dtype}", hint=expected)
    return value.to(dtype)


def _require_known(where: str, ids: torch.Tensor, num_tokens: int | None, longest: int | None) -> None:
    if longest is not None and ids.shape[-1] > longest:
        raise DataError(
            f"{where} has {ids.shape[-1]} tokens, but the model's config allows {longest} (max_position_embeddings)",
            hint="use shorter samples",
        )
    if not ids.numel():
        return
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0:
        raise DataError(f"{where} has the token id {lowest}", hint="ids must not be negative; use a mask for padding")
    if num_tokens is not None and highest >= num_tokens:
        raise DataError(
            f"{where} has the token id {highest}, but the model's vocabulary has {num_tokens} entries",
            hint="use the model's own tokenizer",
        )


def _shape(entry: InputEntry) -> str:
    return f"[{', '.join(map(str, entry.shape))}]"
