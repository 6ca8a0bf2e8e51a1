"""Make the model's inputs from rows in memory.

A row is a text, a record with text or messages, or tokenized: a mapping from `input_ids` and other inputs to numbers.
A tokenized row is one sample, [S] or [1, S]. Samples of text with equal shapes are batched, the longest first, and
nothing is padded or cut to fit a batch.

Shapes: B samples of a batch, S tokens of a sample.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from runtime.arguments import shown
from runtime.data.checked_batches import as_batches
from runtime.data.decoder import LABELS
from runtime.data.document_tokens import document_tokens, target_tokens
from runtime.data.documents import Document, as_document
from runtime.data.inputs import BESIDE_INPUTS, DECODER_IDS, IDS, MASK
from runtime.data.named_tensors import NamedSamples, shortened
from runtime.data.origin import DataOrigin
from runtime.data.token_file import LOSS_MASK
from runtime.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from runtime.data.processor import MediaProcessor
    from seqbuild.onecall.arguments import OneshotOptions

Batch: TypeAlias = "dict[str, torch.Tensor]"

TEXT_INPUTS = (IDS, *BESIDE_INPUTS, "token_type_ids", DECODER_IDS, "decoder_attention_mask")
_TOKENIZED = (IDS, DECODER_IDS, "input_features", "input_values")
_SEQUENCES = (*TEXT_INPUTS, "position_ids", "mm_token_type_ids")


@dataclass(frozen=True, kw_only=True, slots=True)
class RowReader:
    """Makes batches of rows.

    Attributes:
        options: state the number of samples and how rows are read.
        load_tokenizer: is called for texts only.
        load_processor: is called for rows with images, sounds or videos only.
        length: the maximum number of tokens of a text.
        inputs: the inputs of the model; None if they are unknown. Other columns of tokenized rows are ignored.
        notes: counts documents that had to be changed, by what was done.
    """

    options: OneshotOptions
    load_tokenizer: Callable[[], PreTrainedTokenizerBase]
    load_processor: Callable[[], MediaProcessor]
    length: int
    inputs: Collection[str] | None
    notes: Counter[str] = field(default_factory=Counter)

    def batches(self, rows: Iterable[Any]) -> list[Batch] | NamedSamples:
        """Read as many rows as needed, in order. Batches of records with media depend on the compiled model.

        Raises:
            DataError: a row is of no supported kind, or there is no sample.
        """
        options, count = self.options, self.options.num_calibration_samples
        if callable(options.data_collator):
            return self._collated(rows, options.data_collator)
        numbered = enumerate(rows)
        number, first = next(numbered)
        rest = itertools.chain(((number, first),), numbered)
        if _is_tokenized(first):
            samples = [self._sample(row, number) for number, row in itertools.islice(rest, count)]
        elif options.concatenate_data:
            samples = list(itertools.islice(self._windows(rest), count))
        else:
            documents = list(itertools.islice(self._documents(rest), count))
            if any(document.media for document in documents):
                return self._processed(documents)
            samples = [self._tokens(document, self.length) for document in documents]
        if not samples:
            what = f"less than {self.length} tokens" if options.concatenate_data else "only white space"
            raise DataError(f"the data set has {what}", hint="use more text, or a smaller max_seq_length")
        for note, number in sorted(self.notes.items()):
            warnings.warn(f"{number} {note}", stacklevel=5)
        return _batched(samples, options.batch_size)

    def _collated(self, rows: Iterable[Any], collate: Callable[[Any], Any]) -> list[Batch]:
        """Let the caller's function make each batch."""
        few = itertools.islice(rows, self.options.num_calibration_samples)
        batches: list[Batch] = []
        while chosen := list(itertools.islice(few, self.options.batch_size)):
            made = collate(chosen)
            if not isinstance(made, Mapping):
                raise DataError(f"data_collator returned {shown(made)}", hint="it must return a mapping of tensors")
            batches.append(dict(made))
        return as_batches(batches)

    def _sample(self, row: Any, number: int) -> Batch:
        """Convert a tokenized row to a batch of one."""
        row, inputs = _as_mapping(row), self.inputs
        if not _is_tokenized(row):
            raise DataError(f"row {number} has no {IDS}, but the first row has", hint="pass rows of one kind")
        own = [name for name in row if inputs is None or name in inputs or name in BESIDE_INPUTS]
        found = {name: tensor for name in own if (tensor := _tensor(row[name])) is not None}
        text = next((name for name in (IDS, DECODER_IDS, LABELS) if name in found), None)
        if IDS in row and (text != IDS or found[IDS].dim() not in (1, 2) or not found[IDS].numel()):
            hint = "it must be a list of integers, or a tensor"
            raise DataError(f"{IDS} of row {number} is {shown(row[IDS])}", hint=hint)
        if text is not None and found[text].dim() == 1:
            found = {name: tensor.unsqueeze(0) for name, tensor in found.items()}
        if text is not None and len(found[text]) != 1:
            hint = "pass batches in a DataLoader, or one sample in each row"
            raise DataError(f"row {number} has {len(found[text])} samples", hint=hint)
        length = self.options.max_seq_length
        found |= {name: value[:, :length] for name, value in found.items() if name in _SEQUENCES and value.dim() == 2}
        if IDS in found:
            found.setdefault(MASK, torch.ones_like(found[IDS]))
        return found

    def _documents(self, rows: Iterable[tuple[int, Any]]) -> Iterator[Document]:
        """Read texts and records, and skip white space."""
        column = self.options.text_column
        for number, given in rows:
            where, row = f"row {number}", _as_mapping(given)
            if not isinstance(row, (str, Mapping)):
                hint = "a row is a text, a record or a mapping with input_ids"
                raise DataError(f"{where} is {shown(row)}", hint=hint)
            columns = () if isinstance(row, str) or column == "text" else (column,)
            document = as_document(row, where, columns)
            if not document.is_blank:
                yield document

    def _tokens(self, document: Document, length: int | None) -> Batch:
        """Tokenize a document without media to a batch of one."""
        tokenizer, has_mask = self.load_tokenizer(), self.options.use_loss_mask
        tokens = document_tokens(tokenizer, document, length, has_mask, self.notes)
        sample = {IDS: tokens.ids[None], MASK: torch.ones_like(tokens.ids)[None]}
        if has_mask:
            sample[LOSS_MASK] = tokens.counts[None].to(torch.int64)
        if document.target is not None:
            sample[LABELS] = target_tokens(tokenizer, document, length)[None]
        return sample

    def _windows(self, rows: Iterable[tuple[int, Any]]) -> Iterator[Batch]:
        """Join texts in order, and cut windows that do not overlap."""
        rest: Batch | None = None
        for document in self._documents(rows):
            if document.target is not None or document.media:
                what = "pairs of source and target" if document.target is not None else "records with media"
                raise DataError(f"{what} cannot be joined", hint="leave concatenate_data out")
            sample = self._tokens(document, None)
            rest = sample if rest is None else {name: torch.cat((rest[name], sample[name]), 1) for name in rest}
            while rest[IDS].shape[1] >= self.length:
                yield {name: tensor[:, : self.length].clone() for name, tensor in rest.items()}
                rest = {name: tensor[:, self.length :] for name, tensor in rest.items()}

    def _processed(self, documents: Sequence[Document]) -> NamedSamples:
        """Make a sample from each document by the model's processor."""
        processor, length = self.load_processor(), self.options.max_seq_length
        made = [(processor.sample(document), document.where) for document in documents]
        medial = next(document for document in documents if document.media)
        samples = [shortened(sample, length, processor.media_tokens, where) for sample, where in made]
        return replace(
            as_named(samples, processor.media_tokens),
            padding_token=processor.padding_token,
            is_joinable=self.options.batch_size > 1 and processor.is_joinable(medial),
            seq_len=length,
        )


def _is_tokenized(row: Any) -> bool:
    found = _as_mapping(row)
    return isinstance(found, Mapping) and any(name in found for name in _TOKENIZED)


def _as_mapping(row: Any) -> Any:
    """Give the ids of a sample, or the messages of a conversation, their name."""
    is_list = isinstance(row, (list, tuple)) and len(row) > 0
    if is_list and all(isinstance(item, Mapping) for item in row):
        return {"messages": list(row)}
    return {IDS: row} if is_list or hasattr(row, "__array__") else row


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


def as_named(samples: Sequence[Batch], media_tokens: tuple[int, ...]) -> NamedSamples:
    """Return batches of one as the samples of a token file; `media_tokens` stand for media."""
    ids = [sample[name] for sample in samples for name in (IDS, DECODER_IDS, LABELS) if name in sample]
    largest = max((int(one.max()) for one in ids), default=0)
    return NamedSamples(
        samples=tuple(samples),
        origin=DataOrigin(tokenizer="", tokenizer_digest="", vocab_size=largest + 1, sources=()),
        media_tokens=media_tokens,
        padding_token=0,
        is_joinable=False,
        seq_len=None,
    )


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
    first = sample[IDS] if IDS in sample else next(iter(sample.values()))
    return first.shape[-1], sample[LABELS].shape[-1] if LABELS in sample else 0
