"""Choose documents and samples: evenly spread or in a random order, with bounded memory, and by weight.

**Even spread** takes the items with index `i * total // count`. **A random order** sorts documents by the SHA-256 of
seed and number, so a seed gives the same order on every machine and with every version of Python.

**Bounded memory.** Documents are kept up to a number of characters that suffices for the samples. Beyond it, every
second document is dropped each time, so that those kept stay evenly spread; of a random order, the last ones are
dropped. Records that are not kept are not parsed.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from runtime.data.documents import Document
from runtime.data.file_formats import Record
from runtime.errors import DataError

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadDocuments:
    """The documents that were read and kept.

    Attributes:
        documents: in the order in which they are used, each with the number of its source.
        num_records: the records that the sources have.
        num_blank: the records without text.
        is_whole: whether all other records were kept.
    """

    documents: Sequence[tuple[int, Document]]
    num_records: int
    num_blank: int
    is_whole: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Enough:
    """How many documents suffice.

    Attributes:
        num_documents: their number.
        num_with_media: their number if they have images, sounds or videos, of which each becomes one sample.
        num_characters: their characters.
        large: the characters of a source of which only some documents are kept.
    """

    num_documents: int
    num_characters: int
    large: int
    num_with_media: int = 1

    def least(self, document: Document) -> int:
        """The number of documents that suffice, if they are like this one."""
        return max(self.num_documents, self.num_with_media) if document.media else self.num_documents


def read_in_order(records: Iterable[tuple[int, Record]], enough: Enough | None) -> ReadDocuments:
    """Read documents in their order; of too many, evenly spread ones.

    Args:
        records: each with the number of its source.
        enough: what is kept of a large source, or up to twice as much; None for all.
    """
    kept: list[tuple[int, Document]] = []
    stride, num_characters, num_blank, total, least = 1, 0, 0, 0, 0
    most = None if enough is None else max(enough.large, 2 * enough.num_characters)
    for number, (source, record) in enumerate(records):
        total = number + 1
        if number % stride:
            continue
        document = record()
        if document.is_blank:
            num_blank += 1
            continue
        kept.append((source, document))
        num_characters += document.num_characters
        least = max(least, enough.least(document) if enough else 0)
        while enough and most and num_characters > most and len(kept) > 2 * least:
            most = 2 * enough.num_characters
            stride *= 2
            kept = kept[::2]
            num_characters = sum(document.num_characters for _, document in kept)
    return ReadDocuments(documents=kept, num_records=total, num_blank=num_blank, is_whole=stride == 1)


def read_shuffled(records: Iterable[tuple[int, Record]], enough: Enough | None, seed: int) -> ReadDocuments:
    """Read documents in a random order; of too many, the first ones of this order."""
    kept: list[tuple[int, int, int, Document]] = []  # a heap: the last document of the order is its first entry
    num_characters, num_blank, total, least = 0, 0, 0, 0
    is_whole = True
    most = None if enough is None else max(enough.large, enough.num_characters)
    for number, (source, record) in enumerate(records):
        total = number + 1
        place = _place(seed, number)
        if not is_whole and place > -kept[0][0]:
            continue
        document = record()
        if document.is_blank:
            num_blank += 1
            continue
        heapq.heappush(kept, (-place, number, source, document))
        num_characters += document.num_characters
        least = max(least, enough.least(document) if enough else 0)
        while enough and most and num_characters > most and len(kept) > least:
            is_whole = False
            num_characters -= heapq.heappop(kept)[3].num_characters
    documents = [(source, document) for _, _, source, document in sorted(kept, key=lambda entry: -entry[0])]
    return ReadDocuments(documents=documents, num_records=total, num_blank=num_blank, is_whole=is_whole)


def _place(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8], "big")


def spread(count: int, total: int) -> list[int]:
    """Return `count` indices below `total` at equal distances, beginning with 0."""
    return [index * total // count for index in range(count)]


def num_taken(available: int, required: int | None, most: int | None) -> int:
    """Return the number of samples to take: those that are required, or all, at most `most`."""
    return required or min(available, most or available)


def group_counts(
    weights: Sequence[float], available: Sequence[int], required: int | None, most: int | None
) -> list[int]:
    """Return how many samples to take of each group: of several as `shares`, of one as `num_taken`."""
    if len(available) > 1:
        return shares(weights, available, required, most)
    return [num_taken(available[0], required, most)]


def shares(weights: Sequence[float], available: Sequence[int], required: int | None, most: int | None) -> list[int]:
    """Return how many samples each source contributes, in the ratio of the weights.

    Args:
        weights: of the sources.
        available: the samples that each source has.
        required: the number of samples in all; None for as many as the ratio allows.
        most: the maximum if none are required.

    Raises:
        DataError: a source has too few samples.
    """
    parts = [weight / sum(weights) for weight in weights]
    total = required
    if total is None:
        total = min(int(count / part) for count, part in zip(available, parts, strict=True))
        total = total if most is None else min(total, most)
    exact = [part * total for part in parts]
    found = [int(number) for number in exact]
    by_rest = sorted(range(len(parts)), key=lambda index: (found[index] - exact[index], index))
    for index in by_rest[: total - sum(found)]:
        found[index] += 1
    if required is None:
        found = [min(number, count) for number, count in zip(found, available, strict=True)]
    for index, (number, count) in enumerate(zip(found, available, strict=True)):
        if number > count or not sum(found):
            raise DataError(
                f"source {index + 1} has {count} samples, but its weight requires {number}",
                hint="reduce --samples or its weight, or use more data",
            )
    return found


def interleaved(groups: Sequence[Sequence[_T]]) -> list[_T]:
    """Merge lists so that each is evenly spread over the result."""
    places = [
        ((2 * index + 1) / (2 * len(group)), number, index)
        for number, group in enumerate(groups)
        for index in range(len(group))
    ]
    return [groups[number][index] for _, number, index in sorted(places)]
