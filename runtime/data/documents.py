"""A document: a text, a conversation, or a pair of source and target; and how a record becomes one.

A record is a JSON object, a row of a table, or a mapping in memory. `runtime.data.records` lists the supported kinds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runtime.data.media import Medium
from runtime.data.media_rows import with_media
from runtime.data.records import Content, content_of, with_columns
from runtime.errors import DataError
from runtime.host.regular_files import open_regular


@dataclass(frozen=True, slots=True)
class Document:
    """A text, a conversation, or a pair of source and target.

    Attributes:
        where: its file and line, for messages.
        content: a text, or the messages of a conversation, each with the fields that the chat template reads.
        target: the text that an encoder-decoder model should generate for `content`; None for other documents.
        tools: descriptions of the functions that the assistant may call, for the chat template; None for none.
        media: its images, sounds and videos, in the order of their places in the messages.
    """

    where: str
    content: Content
    target: str | None = None
    tools: list[Any] | None = None
    media: tuple[Medium, ...] = ()

    @property
    def is_blank(self) -> bool:
        """Whether a text of the document is white space."""
        texts = [text for text in (self.content, self.target) if isinstance(text, str)]
        return not self.media and not all(text.strip() for text in texts)

    @property
    def num_characters(self) -> int:
        """The characters of all its texts, and the bytes of media that it contains."""
        return _num_characters((self.content, self.target, self.tools, [medium.value for medium in self.media]))

    def relative_to(self, base: Path, home: Path | None = None) -> Document:
        """Return the document with media whose file names are relative to `base`, in `home` if that is given."""
        media = tuple(replace(medium, base=base, home=home) for medium in self.media)
        return replace(self, media=media) if media else self


def as_document(record: Mapping[str, Any] | str, where: str, columns: Sequence[str] = ()) -> Document:
    """Make a document from a record, or from a text.

    A record without a value in the fields of its kind, such as `{"text": null}`, becomes a blank document.

    Args:
        record: fields by name.
        where: its file and line, or its number, for messages.
        columns: the fields to read: `NAME`, the text or the messages; `FIELD=NAME`, a field with another name. By
            default, the fields of the kinds in `runtime.data.records`.

    Raises:
        DataError: the record is of no supported kind, a field is missing, or a value is invalid.
    """
    if isinstance(record, str):
        return Document(where, record)
    try:
        chosen = with_columns(record, where, columns) if columns else record
        content, target, tools = content_of(chosen, where)
        content, media = with_media(content, {**record, **chosen}, where)
    except RecursionError as error:
        raise DataError(f"{where} is nested too deeply", hint="remove it") from error
    return Document(where, content, target, tools, media)


def require_file(path: Path) -> None:
    """Raise a `DataError` unless `path` is a readable file that is not empty."""
    try:
        with open_regular(path) as file:
            is_empty = not file.read(1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if is_empty:
        raise DataError(f"{path} is empty")


def require_pairs(documents: Sequence[Document]) -> None:
    """Raise a `DataError` unless each document has a target."""
    alone = next((document for document in documents if document.target is None), None)
    if alone is not None:
        raise DataError(
            f"{alone.where} has no target, but other records have one", hint="put pairs into a file of their own"
        )


def _num_characters(value: Any) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_num_characters, value.values()))
    return sum(map(_num_characters, value)) if isinstance(value, (list, tuple)) else 0
