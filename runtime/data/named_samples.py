"""Make samples of named tensors from documents, by the processor of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.data.named_tensors import NamedSamples
from runtime.data.processor import PROCESSOR_FILES, load_processor
from runtime.data.token_file import DataOrigin
from runtime.data.tokenizer import tokenizer_digest
from runtime.errors import DataError

if TYPE_CHECKING:
    from runtime.data.documents import Document


def process_documents(
    documents: Sequence[Document],
    directory: Path,
    *,
    sources: Sequence[tuple[str, str]],
    seq_len: int | None,
    name: str = "",
) -> NamedSamples:
    """Make one sample from each document.

    Args:
        documents: those without media are samples of text.
        directory: of the model, with its processor.
        sources: name and digest of each source.
        seq_len: the maximum number of tokens; None to cut nothing.
        name: of the processor in the origin, by default that of its directory.

    Raises:
        DataError: the processor cannot be loaded, or rejects a document.
    """
    pairs = next((document for document in documents if document.target is not None), None)
    if pairs is not None:
        raise DataError(
            f"{pairs.where} is a pair of source and target beside records with media",
            hint='use records like {"audio": "NAME", "text": "..."}',
        )
    processor = load_processor(directory)
    samples = tuple(processor.sample(document, seq_len) for document in documents)
    tokenizer = processor.tokenizer
    origin = DataOrigin(
        tokenizer=name or directory.resolve().name,
        tokenizer_digest=tokenizer_digest(tokenizer, directory, PROCESSOR_FILES),
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        sources=tuple(sources),
    )
    return NamedSamples(
        samples=samples,
        origin=origin,
        media_tokens=processor.media_tokens,
        padding_token=processor.padding_token,
        is_joinable=processor.is_joinable(next((document for document in documents if document.media), documents[0])),
        seq_len=seq_len,
    )
