"""Make samples from documents: tokenize them, cut windows or documents, choose samples, and report what was done.

Shapes: S tokens of a sample, T tokens of the joined documents.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.data.chats import MERGED_SYSTEM, NO_TEMPLATE
from runtime.data.document_tokens import DocumentTokens, document_tokens, target_tokens
from runtime.data.documents import Document, require_pairs
from runtime.data.file_formats import Record
from runtime.data.mixing import (
    Enough,
    ReadDocuments,
    group_counts,
    interleaved,
    read_in_order,
    read_shuffled,
    spread,
)
from runtime.data.named_samples import have_media, process_documents
from runtime.data.named_tensors import NamedSamples
from runtime.data.options import DataOptions, data_sources, names_of
from runtime.data.origin import DataOrigin
from runtime.data.processor import MediaProcessor, load_processor
from runtime.data.reading import parts_of
from runtime.data.sources import DataPart, DataSource
from runtime.data.token_file import Tokenized
from runtime.data.tokenizer import load_tokenizer, tokenizer_digest
from runtime.errors import DataError, UsageError
from runtime.host.regular_files import read_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_LARGE_CHARACTERS = 2**26  # kept in memory of sources that are larger
_CHARACTERS_OF_A_TOKEN = 16  # at most, in almost every text
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSummary:
    """What became of the records.

    Attributes:
        num_documents: the documents that were used.
        num_blank: the records without text.
        num_cut: the documents that were cut at the maximum length.
        num_left: the tokens at the end of the text that did not fill a window.
        shares: the number of samples of each source, in order.
        remarks: what a user should know, one line each.
        num_merged: the system messages that became part of the user's, because the chat template rejects them.
    """

    num_documents: int
    num_blank: int
    num_cut: int
    num_left: int
    shares: tuple[tuple[str, int], ...]
    remarks: tuple[str, ...]
    num_merged: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedData:
    """Samples, and how they were made."""

    tokens: Tokenized | NamedSamples
    seq_len: int | None
    summary: DataSummary


@dataclass(frozen=True, slots=True)
class _Sample:
    tokens: DocumentTokens
    target: Tensor | None
    source: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pool:
    """The samples that documents can become."""

    available: int
    there_are: str  # for messages
    take: Callable[[Sequence[int]], list[_Sample]]
    num_left: int = 0


def prepare_data(options: DataOptions, tokenizer_dir: Path, tokenizer_name: str = "") -> PreparedData:
    """Make samples of the data.

    Args:
        options: the sources, and how they become samples.
        tokenizer_dir: a directory with the tokenizer's files.
        tokenizer_name: the name of the tokenizer in the origin, by default that of its directory.

    Raises:
        DataError: the data cannot be read, are invalid, or have too few samples; or only some documents are pairs.
        UsageError: an option is invalid.
    """
    sources = data_sources(options)
    _require_length(options)
    parts = [parts_of(source) for source in sources]
    groups = read_groups(sources, parts, options)
    digests = [(part.name, part.digest()) for of_source in parts for part in of_source]
    names = [source.location for source in sources]
    weights = [1.0 if source.weight is None else source.weight for source in sources]
    if have_media(groups):
        processor = load_processor(tokenizer_dir)
        return processed_samples(groups, names, weights, processor, options, sources=digests, name=tokenizer_name)
    tokenizer = load_tokenizer(tokenizer_dir)
    origin = DataOrigin(
        tokenizer=tokenizer_name or tokenizer_dir.resolve().name,
        tokenizer_digest=tokenizer_digest(tokenizer, tokenizer_dir),
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        sources=tuple(digests),
    )
    longest = _longest(tokenizer, tokenizer_dir)
    return samples_of(groups, names, weights, tokenizer, options, origin=origin, longest=longest)


def samples_of(
    groups: Sequence[ReadDocuments],
    names: Sequence[str],
    weights: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    *,
    origin: DataOrigin,
    longest: int | None = None,
) -> PreparedData:
    """Make samples of documents.

    Args:
        groups: the documents, of each source its own if they are mixed by weight.
        names: of the sources.
        weights: of the groups, if there are several.
        tokenizer: tokenizes them.
        options: how they become samples.
        origin: the tokenizer and the texts.
        longest: the maximum length of the tokenizer's model; None if unknown.

    Raises:
        DataError: as for `prepare_data`.
        UsageError: text is packed without a length.
    """
    _require_length(options)
    what = names_of(names)
    labels = [what] if len(groups) == 1 else names
    is_paired = _require_documents(groups, labels, options)
    seq_len = _seq_len(options, longest)
    maker = _SampleMaker(tokenizer=tokenizer, options=options, seq_len=seq_len)
    is_packed = options.pack and not is_paired
    pools = [
        maker.windows(group, label) if is_packed else maker.documents(group, label)
        for group, label in zip(groups, labels, strict=True)
    ]
    available = [pool.available for pool in pools]
    counts = group_counts(weights, available, options.num_samples, options.default_samples)
    chosen = _chosen(pools, counts, options)
    if options.loss_mask:
        _require_counting(chosen, what)
    by_source = Counter(sample.source for sample in chosen)
    summary = DataSummary(
        num_documents=sum(len(group.documents) for group in groups),
        num_blank=sum(group.num_blank for group in groups),
        num_cut=sum(sample.tokens.is_cut for sample in chosen),
        num_left=sum(pool.num_left for pool, count in zip(pools, counts, strict=True) if count == pool.available),
        num_merged=maker.notes[MERGED_SYSTEM],
        shares=tuple((name, by_source[index]) for index, name in enumerate(names)),
        remarks=(*maker.all_remarks(), *_size_remarks(groups, labels, options)),
    )
    targets = tuple(sample.target for sample in chosen if sample.target is not None)
    tokens = Tokenized(
        samples=tuple(sample.tokens.ids for sample in chosen),
        masks=tuple(sample.tokens.counts for sample in chosen) if options.loss_mask else None,
        targets=targets or None,
        origin=origin,
    )
    return PreparedData(tokens=tokens, seq_len=seq_len, summary=summary)


def processed_samples(
    groups: Sequence[ReadDocuments],
    names: Sequence[str],
    weights: Sequence[float],
    processor: MediaProcessor,
    options: DataOptions,
    *,
    sources: Sequence[tuple[str, str]],
    name: str = "",
) -> PreparedData:
    """Make samples of documents of which some have images, sounds or videos, as `process_documents` describes."""
    longest = _longest(processor.tokenizer, processor.directory)
    seq_len = _seq_len(options, longest)
    made = process_documents(groups, names, weights, processor, options, sources=sources, seq_len=seq_len, name=name)
    labels = [names_of(names)] if len(groups) == 1 else names
    summary = DataSummary(
        num_documents=sum(len(group.documents) for group in groups),
        num_blank=sum(group.num_blank for group in groups),
        num_cut=made.num_cut,
        num_left=0,
        shares=tuple(zip(names, made.by_source, strict=True)),
        remarks=tuple(_size_remarks(groups, labels, options)),
    )
    return PreparedData(tokens=made.samples, seq_len=seq_len, summary=summary)


def _seq_len(options: DataOptions, longest: int | None) -> int | None:
    if options.seq_len is None and options.default_length is not None:
        return min(options.default_length, longest or options.default_length)
    return options.seq_len


def _require_documents(groups: Sequence[ReadDocuments], labels: Sequence[str], options: DataOptions) -> bool:
    """Reject sources without text, and pairs among other documents; return whether they are pairs."""
    for group, label in zip(groups, labels, strict=True):
        if not group.documents:
            raise DataError(f"{label} has only white space" if group.num_records else f"{label} has no records")
    documents = [document for group in groups for _, document in group.documents]
    is_paired = any(document.target is not None for document in documents)
    if is_paired:
        require_pairs(documents)
        if options.loss_mask:
            raise DataError("pairs of source and target have no loss mask", hint="leave --loss-mask out")
    return is_paired


def _require_counting(samples: Sequence[_Sample], what: str) -> None:
    if not any(bool(sample.tokens.counts.any()) for sample in samples):
        raise DataError(
            f"the loss mask excludes all tokens of {what}: no sample has text of the assistant",
            hint="use longer samples, or conversations with assistant messages, or leave --loss-mask out",
        )


def _size_remarks(groups: Sequence[ReadDocuments], labels: Sequence[str], options: DataOptions) -> list[str]:
    kind = "random" if options.shuffle else "evenly spread"
    return [
        f"{label} is large: only {len(group.documents):,} {kind} records of {group.num_records:,} were used"
        for group, label in zip(groups, labels, strict=True)
        if not group.is_whole
    ]


def _require_length(options: DataOptions) -> None:
    if options.pack and options.seq_len is None and options.default_length is None:
        raise UsageError("packing requires the length of a window", hint="set seq_len")


def _enough(options: DataOptions) -> Enough | None:
    """Return how much text suffices; None if all is required."""
    num_samples = options.num_samples or options.default_samples
    if num_samples is None:
        return None
    length = options.seq_len or options.default_length or 0
    return Enough(
        num_documents=1 if options.pack else num_samples,
        num_characters=num_samples * length * _CHARACTERS_OF_A_TOKEN,
        large=_LARGE_CHARACTERS,
        num_with_media=num_samples,
    )


def read_groups(
    sources: Sequence[DataSource], parts: Sequence[Sequence[DataPart]], options: DataOptions
) -> list[ReadDocuments]:
    """Read the documents of all sources, of each its own group if any has a weight."""

    def records(numbers: Sequence[int]) -> Iterator[tuple[int, Record]]:
        return ((number, record) for number in numbers for part in parts[number] for record in part.records())

    everything = range(len(sources))
    is_mixed = len(sources) > 1 and any(source.weight is not None for source in sources)
    groups = []
    for numbers in [[number] for number in everything] if is_mixed else [list(everything)]:
        found = records(numbers)
        if options.shuffle:
            groups.append(read_shuffled(found, _enough(options), options.seed or 0))
        else:
            groups.append(read_in_order(found, _enough(options)))
    return groups


def _longest(tokenizer: PreTrainedTokenizerBase, directory: Path) -> int | None:
    """Return the maximum length that the tokenizer, or the config next to it, states."""
    lengths = [tokenizer.model_max_length]
    try:
        config = json.loads(read_text(directory / "config.json"))
        config = config if isinstance(config, dict) else {}
    except (OSError, ValueError, RecursionError):
        config = {}
    tables = [config, config.get("text_config")]
    lengths += [table.get(name) for table in tables if isinstance(table, dict) for name in _LENGTHS]
    return min((length for length in lengths if type(length) is int and 1 < length < 2**31), default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class _SampleMaker:
    """Turns documents into samples.

    Attributes:
        tokenizer: tokenizes them.
        options: how they become samples.
        seq_len: the maximum length.
        notes: counts documents that had to be changed, by what was done.
        remarks: what a user should know.
    """

    tokenizer: PreTrainedTokenizerBase
    options: DataOptions
    seq_len: int | None
    notes: Counter[str] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)

    def all_remarks(self) -> list[str]:
        plain = self.notes[NO_TEMPLATE]
        return [*self.remarks, *([f"{plain} {NO_TEMPLATE}"] if plain else [])]

    def windows(self, group: ReadDocuments, what: str) -> _Pool:
        """Join the documents, and cut windows that do not overlap."""
        import torch

        seq_len = self.seq_len
        assert seq_len is not None
        parts = self._joined(group, seq_len)
        ids_T = torch.cat([part.ids for part in parts])
        counts_T = torch.cat([part.counts for part in parts])
        ends = list(accumulate(len(part.ids) for part in parts))
        num_tokens = len(ids_T)
        if self.options.seq_len is None and 2 <= num_tokens < seq_len:
            self.remarks.append(f"{what} has {num_tokens} tokens, which become one sample of less than {seq_len}")
            seq_len = num_tokens
        num_windows = num_tokens // seq_len
        windows = "window" if num_windows == 1 else "windows"
        there_are = f"{what} has {num_windows} {windows} of {seq_len} tokens ({num_tokens} tokens in all)"
        if num_windows == 0:
            raise DataError(there_are, hint="use more text or a smaller --seq-len")

        def take(indices: Sequence[int]) -> list[_Sample]:
            found = []
            for start in (index * seq_len for index in indices):
                window = slice(start, start + seq_len)
                tokens = DocumentTokens(ids_T[window].clone(), counts_T[window].clone(), False)
                found.append(_Sample(tokens, None, group.documents[bisect_right(ends, start)][0]))
            return found

        return _Pool(available=num_windows, there_are=there_are, take=take, num_left=num_tokens % seq_len)

    def _joined(self, group: ReadDocuments, seq_len: int) -> list[DocumentTokens]:
        """Tokenize the documents; in a random order only as many as the samples need."""
        options = self.options
        enough = (options.num_samples or options.default_samples) if options.shuffle else None
        parts: list[DocumentTokens] = []
        num_tokens = 0
        for _, document in group.documents:
            parts.append(document_tokens(self.tokenizer, document, None, options.loss_mask, self.notes))
            num_tokens += len(parts[-1].ids)
            if enough is not None and num_tokens >= enough * seq_len:
                break
        return parts

    def documents(self, group: ReadDocuments, what: str) -> _Pool:
        """Make one sample of each document, cut at its maximum length."""
        found = group.documents
        kind = "documents" if found[0][1].target is None else "pairs"
        return _Pool(
            available=len(found),
            there_are=f"{what} has {len(found)} {kind}",
            take=lambda indices: [self._sample(*found[index]) for index in indices],
        )

    def _sample(self, source: int, document: Document) -> _Sample:
        tokens = document_tokens(self.tokenizer, document, self.seq_len, self.options.loss_mask, self.notes)
        target = None if document.target is None else target_tokens(self.tokenizer, document, self.seq_len)
        return _Sample(tokens, target, source)


def _chosen(pools: Sequence[_Pool], counts: Sequence[int], options: DataOptions) -> list[_Sample]:
    """Take the samples of each pool, and merge them."""
    found = []
    for pool, count in zip(pools, counts, strict=True):
        if count > pool.available:
            raise DataError(f"{pool.there_are}, but {count} are required", hint="reduce --samples or use more data")
        found.append(pool.take(range(count) if options.shuffle else spread(count, pool.available)))
    return interleaved(found)
