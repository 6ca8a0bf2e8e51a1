"""Make the model's inputs from rows in memory.

A row is a text, a record with text or messages, or tokenized: a mapping from `input_ids` and other inputs to numbers.
A tokenized row is one sample, [S] or [1, S]. Samples of text with equal shapes are batched, the longest first, and
nothing is padded or cut to fit a batch.

Shapes: B samples of a batch, S tokens of a sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from runtime.arguments import shown
from runtime.data.decoder import LABELS
from runtime.data.document_tokens import document_tokens, target_tokens
from runtime.data.documents import Document, _as_document
from runtime.data.inputs import BESIDE_INPUTS, DECODER_IDS, IDS, MASK
from runtime.data.token_file import LOSS_MASK
from runtime.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from seqbuild.onecall.arguments import OneshotOptions

Batch: TypeAlias = "dict[str, torch.Tensor]"

TEXT_INPUTS = (IDS, *BESIDE_INPUTS, "token_type_ids", DECODER_IDS, "decoder_attention_mask")
_SEQUENCES = (*TEXT_INPUTS, "position_ids", "mm_token_type_ids")


def row_batches(
    rows: Iterable[Any],
    options: OneshotOptions,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    length: int,
    inputs: Collection[str] | None,
) -> list[Batch]:
    """Make batches of rows.

    Args:
        rows: in order; only as many as needed are read.
        options: state the number of samples and how rows are read.
        tokenizer: loads the tokenizer, which tokenized rows do not need.
        length: the maximum number of tokens of a text.
        inputs: the inputs of the model; None if they are unknown. Other columns of tokenized rows are ignored.

    Raises:
        DataError: a row is of no supported kind, or there is no sample.
    """
    collate = options.data_collator
    if callable(collate):
        return _collated(rows, options, collate)
    samples = list(
        itertools.islice(_samples(rows, options, tokenizer, length, inputs), options.num_calibration_samples)
    )
    if not samples:
        what = f"less than {length} tokens" if options.concatenate_data else "only white space"
        raise DataError(f"the data set has {what}", hint="use more text, or a smaller max_seq_length")
    return _batched(samples, options.batch_size)


def _collated(rows: Iterable[Any], options: OneshotOptions, collate: Callable[[Any], Any]) -> list[Batch]:
    """Let the caller's function make each batch."""
    few = itertools.islice(rows, options.num_calibration_samples)
    batches: list[Batch] = []
    while chosen := list(itertools.islice(few, options.batch_size)):
        made = collate(chosen)
        if not isinstance(made, Mapping):
            raise DataError(f"data_collator returned {shown(made)}", hint="it must return a mapping of tensors")
        batches.append(dict(made))
    return batches


def _samples(
    rows: Iterable[Any],
    options: OneshotOptions,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    length: int,
    inputs: Collection[str] | None,
) -> Iterator[Batch]:
    numbered = enumerate(rows)
    number, first = next(numbered)
    rest = itertools.chain(((number, first),), numbered)
    if _is_tokenized(first):
        for number, row in rest:
            yield _sample(row, number, options.max_seq_length, inputs)
    elif options.concatenate_data:
        yield from _windows((_text_sample(row, number, options, tokenizer, None) for number, row in rest), length)
    else:
        made = (_text_sample(row, number, options, tokenizer, length) for number, row in rest)
        yield from (sample for sample in made if sample is not None)


def _is_tokenized(row: Any) -> bool:
    return isinstance(_as_mapping(row), Mapping) and IDS in _as_mapping(row)


def _as_mapping(row: Any) -> Any:
    """Give the ids of a sample, or the messages of a conversation, their name."""
    is_list = isinstance(row, (list, tuple)) and len(row) > 0
    if is_list and all(isinstance(item, Mapping) for item in row):
        return {"messages": list(row)}
    return {IDS: row} if is_list or hasattr(row, "__array__") else row


def _sample(row: Any, number: int, length: int | None, inputs: Collection[str] | None) -> Batch:
    """Convert a tokenized row to a batch of one."""
    row = _as_mapping(row)
    if not isinstance(row, Mapping) or IDS not in row:
        raise DataError(f"row {number} has no {IDS}, but the first row has", hint="pass rows of one kind")
    wanted = {name: value for name, value in row.items() if inputs is None or name in inputs or name in BESIDE_INPUTS}
    found = {name: tensor for name, value in wanted.items() if (tensor := _tensor(value)) is not None}
    if IDS not in found or found[IDS].dim() not in (1, 2) or not found[IDS].numel():
        raise DataError(
            f"{IDS} of row {number} is {shown(row[IDS])}", hint="it must be a list of integers, or a tensor"
        )
    if found[IDS].dim() == 1:
        found = {name: tensor.unsqueeze(0) for name, tensor in found.items()}
    if len(found[IDS]) != 1:
        raise DataError(
            f"row {number} has {len(found[IDS])} samples",
            hint="pass batches in a DataLoader, or one sample in each row",
        )
    cut = {name: value[:, :length] for name, value in found.items() if name in _SEQUENCES and value.dim() == 2}
    found |= cut
    found.setdefault(MASK, torch.ones_like(found[IDS]))
    return found


def _tensor(value: Any) -> torch.Tensor | None:
    """Convert numbers to a tensor; None for anything else, and for a single number."""
    if not isinstance(value, torch.Tensor):
        if isinstance(value, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in value):
            return None
        try:
            value = torch.as_tensor(value)
        except (ValueError, TypeError, RuntimeError):  # texts, nulls, lists of different lengths
            return None
    return value.detach() if value.dim() else None


def _text_sample(
    row: Any,
    number: int,
    options: OneshotOptions,
    load_tokenizer: Callable[[], PreTrainedTokenizerBase],
    length: int | None,
) -> Batch | None:
    """Tokenize a text or a record; None for white space."""
    where, row = f"row {number}", _as_mapping(row)
    if not isinstance(row, (str, Mapping)):
        raise DataError(f"{where} is {shown(row)}", hint="a row is a text, a record or a mapping with input_ids")
    if isinstance(row, Mapping) and options.text_column != "text":
        row = {"text": row.get(options.text_column)}
    document = Document(where, row) if isinstance(row, str) else _as_document(row, where)
    if document.is_blank:
        return None
    tokenizer = load_tokenizer()
    ids_S, counts_S = document_tokens(tokenizer, document, length, options.use_loss_mask)
    sample = {IDS: ids_S[None], MASK: torch.ones_like(ids_S)[None]}
    if options.use_loss_mask:
        sample[LOSS_MASK] = counts_S[None].to(torch.int64)
    if document.target is not None:
        sample[LABELS] = target_tokens(tokenizer, document, length)[None]
    return sample


def _windows(samples: Iterable[Batch | None], length: int) -> Iterator[Batch]:
    """Join texts in order, and cut windows that do not overlap."""
    rest: Batch | None = None
    for sample in samples:
        if sample is None:
            continue
        if LABELS in sample:
            raise DataError("pairs of source and target cannot be joined", hint="leave concatenate_data out")
        rest = sample if rest is None else {name: torch.cat((rest[name], sample[name]), 1) for name in rest}
        while rest[IDS].shape[1] >= length:
            yield {name: tensor[:, :length].clone() for name, tensor in rest.items()}
            rest = {name: tensor[:, length:] for name, tensor in rest.items()}


def _batched(samples: Sequence[Batch], size: int) -> list[Batch]:
    """Join samples of text that have the same names and shapes, the longest first."""
    alike: dict[Any, list[Batch]] = {}
    for number, sample in enumerate(samples):
        is_text = all(name in TEXT_INPUTS for name in sample)
        shapes = tuple((name, sample[name].shape[1:], sample[name].dtype) for name in sorted(sample))
        alike.setdefault(shapes if is_text else number, []).append(sample)
    ordered = sorted(alike.values(), key=lambda few: _lengths(few[0]), reverse=True)
    batches = []
    for few in ordered:
        for begin in range(0, len(few), size):
            part = few[begin : begin + size]
            batches.append({name: torch.cat([sample[name] for sample in part]) for name in part[0]})
    return batches


def _lengths(sample: Batch) -> tuple[int, int]:
    return sample[IDS].shape[1], sample[LABELS].shape[-1] if LABELS in sample else 0
