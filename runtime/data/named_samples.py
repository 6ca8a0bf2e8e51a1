"""Make samples of named tensors from documents, by the processor of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.data.mixing import ReadDocuments, group_counts, interleaved, spread
from runtime.data.named_tensors import NamedSamples, shortened
from runtime.data.options import DataOptions, names_of
from runtime.data.origin import DataOrigin
from runtime.data.processor import MediaProcessor
from runtime.data.processor_files import PROCESSOR_FILES
from runtime.data.tokenizer import tokenizer_digest
from runtime.errors import DataError

if TYPE_CHECKING:
    from runtime.data.documents import Document


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessedData:
    """Samples, and how they were made.

    Attributes:
        samples: the samples.
        num_cut: the samples whose text was cut at the maximum length.
        by_source: the number of samples of each source.
    """

    samples: NamedSamples
    num_cut: int
    by_source: tuple[int, ...]


def have_media(groups: Sequence[ReadDocuments]) -> bool:
    """Whether a document has images, sounds or videos."""
    return any(document.media for group in groups for _, document in group.documents)


def process_documents(
    groups: Sequence[ReadDocuments],
    names: Sequence[str],
    weights: Sequence[float],
    processor: MediaProcessor,
    options: DataOptions,
    *,
    sources: Sequence[tuple[str, str]],
    seq_len: int | None,
    name: str = "",
) -> ProcessedData:
    """Make one sample from each chosen document; those without media are samples of text.

    Args:
        groups: the documents, of each source its own if they are mixed by weight.
        names: of the sources.
        weights: of the groups, if there are several.
        processor: of the model.
        options: which documents are chosen.
        sources: name and digest of each source.
        seq_len: the maximum number of tokens; None to cut nothing.
        name: of the processor in the origin, by default that of its directory.

    Raises:
        DataError: there are too few documents, or the processor rejects one.
    """
    labels = names if len(groups) > 1 else [names_of(names)]
    chosen = _chosen(groups, labels, weights, options)
    documents = [document for _, document in chosen]
    _require_possible(documents, options)
    made = [processor.sample(document) for document in documents]
    cut = [
        shortened(sample, seq_len, processor.media_tokens, document.where)
        for sample, document in zip(made, documents, strict=True)
    ]
    tokenizer = processor.tokenizer
    origin = DataOrigin(
        tokenizer=name or processor.directory.resolve().name,
        tokenizer_digest=tokenizer_digest(tokenizer, processor.directory, PROCESSOR_FILES),
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        sources=tuple(sources),
    )
    samples = NamedSamples(
        samples=tuple(cut),
        origin=origin,
        media_tokens=processor.media_tokens,
        padding_token=processor.padding_token,
        is_joinable=processor.is_joinable(next((document for document in documents if document.media), documents[0])),
        seq_len=seq_len,
    )
    numbers = [number for number, _ in chosen]
    return ProcessedData(
        samples=samples,
        num_cut=sum(before is not after for before, after in zip(made, cut, strict=True)),
        by_source=tuple(numbers.count(number) for number in range(len(names))),
    )


def _chosen(
    groups: Sequence[ReadDocuments], labels: Sequence[str], weights: Sequence[float], options: DataOptions
) -> list[tuple[int, Document]]:
    """Choose documents of each group, each with the number of its source."""
    available = [len(group.documents) for group in groups]
    counts = group_counts(weights, available, options.num_samples, options.default_samples)
    found = []
    for group, label, count in zip(groups, labels, counts, strict=True):
        total = len(group.documents)
        if count > total:
            raise DataError(
                f"{label} has {total} records, but {count} are required", hint="reduce --samples or use more data"
            )
        indices = range(count) if options.shuffle else spread(count, total)
        found.append([group.documents[index] for index in indices])
    return interleaved(found)


def _require_possible(documents: Sequence[Document], options: DataOptions) -> None:
    pair = next((document for document in documents if document.target is not None), None)
    if pair is not None:
        raise DataError(
            f"{pair.where} is a pair of source and target beside records with images, sounds or videos",
            hint='use records like {"audio": "NAME", "text": "..."}',
        )
    if options.loss_mask:
        first = next(document for document in documents if document.media)
        raise DataError(
            f"{first.where} has {first.media[0].kind} data, for which no loss mask is made",
            hint="leave --loss-mask out",
        )
