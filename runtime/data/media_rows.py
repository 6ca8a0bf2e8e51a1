"""Find the images, sounds and videos of a record, and bring its messages into one form.

Media are parts of messages, as transformers' processors take them:

    {"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "..."}]}

or fields of the record (`image`, `images`, `audio`, `video`, ...) beside `text` or `messages`. A part without a value,
or the text `<image>`, takes the next medium of the fields; media of fields that have no place in the messages stand at
the beginning of the first one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runtime.arguments import shown
from runtime.data.media import AUDIO, IMAGE, KINDS, MEDIA_FIELDS, VIDEO, Medium
from runtime.data.records import TEXT_KINDS, Content, Messages
from runtime.errors import DataError

_PART_KINDS = {
    **{kind: kind for kind in KINDS},
    "image_url": IMAGE,
    "input_image": IMAGE,
    "audio_url": AUDIO,
    "input_audio": AUDIO,
    "video_url": VIDEO,
}
_RAW = ("base64", "data")
_PART_VALUES = ("path", "url", "bytes", *_RAW)
_PLACE = re.compile(r"<(image|audio|video)>")


def with_media(content: Content, record: Mapping[str, Any], where: str) -> tuple[Content, tuple[Medium, ...]]:
    """Mark the place of each medium in the content of a record, and list the media.

    Args:
        content: the record's text or messages.
        record: may have fields of media.
        where: the record, for messages.

    Returns:
        The text unchanged, or messages in which each medium is a part `{"type": kind}`; and the media in order.

    Raises:
        DataError: a part of a message is not one of text or media, or the number of places and media differs.
    """
    fields = {kind: list[Any]() for kind in KINDS}
    for name, kind in MEDIA_FIELDS.items():
        value: Any = record.get(name)
        if _is_given(value):
            # A list of frames is one video; a list of numbers (a sound) one sound.
            is_several = isinstance(value, (list, tuple)) and (name not in KINDS or kind == IMAGE)
            fields[kind] += value if is_several else [value]
    if isinstance(content, str):
        media = (Medium(kind=kind, value=value, where=where) for kind in KINDS for value in fields[kind])
        return content, tuple(media)
    if not any(fields.values()) and not any(_kind(part) for part in _parts(content)):
        return content, ()
    return _Placed(where, fields).messages(content)


class _Placed:
    """Assigns media to the places of a conversation."""

    def __init__(self, where: str, fields: Mapping[str, list[Any]]) -> None:
        self._where = where
        self._fields = fields
        self._media: list[Medium] = []

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> tuple[Messages, tuple[Medium, ...]]:
        has_places = any(self._places(message.get("content")) for message in messages)
        found: Messages = []
        for message in messages:
            content = message.get("content")
            if not has_places and any(self._fields.values()) and message.get("role") == "user":
                parts = [] if content is None else _as_parts(content)
                content = [{"type": kind} for kind in KINDS for _ in self._fields[kind]] + parts
                has_places = True
            kept = {name: value for name, value in message.items() if value is not None}
            found.append(kept | {"content": self._placed(content)} if content is not None else kept)
        left = [kind for kind, values in self._fields.items() if values]
        if left:
            raise DataError(f"{self._where} has more {left[0]}s than places for them in its messages")
        return found, tuple(self._media)

    def _places(self, content: Any) -> bool:
        """Whether content has places for media of the record's fields."""
        if isinstance(content, str):
            return any(self._fields[kind] for kind in _PLACE.findall(content))
        return any(_kind(part) and _value(part) is None for part in _as_parts(content or []))

    def _placed(self, content: Any) -> Any:
        if isinstance(content, str):
            if not self._places(content):
                return content
            content = _split(content)
        return [self._part(part) for part in _as_parts(content)]

    def _part(self, part: Any) -> dict[str, Any]:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        kind = _kind(part)
        if kind:
            value = _value(part)
            if value is None:
                if not self._fields[kind]:
                    raise DataError(
                        f"{self._where} has a part of type {kind} without a file", hint=f'add "{kind}": "NAME" to it'
                    )
                value = self._fields[kind].pop(0)
            self._media.append(Medium(kind=kind, value=value, where=self._where))
            return {"type": kind}
        if not isinstance(part, Mapping) or (part.get("type") in TEXT_KINDS and not isinstance(part.get("text"), str)):
            raise DataError(
                f"{self._where} has {shown(part)} as a part of a message",
                hint='a part looks like {"type": "text", "text": "..."} or {"type": "image", "image": "NAME"}',
            )
        known = {name: value for name, value in part.items() if value is not None}
        return known | {"type": "text"} if part.get("type") in TEXT_KINDS or "type" not in known else known


def _as_parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _split(text: str) -> list[dict[str, Any]]:
    """Split a text at the places of media; white space around a place belongs to it."""
    pieces = _PLACE.split(text)
    parts: list[dict[str, Any]] = []
    for index, piece in enumerate(pieces):
        if index % 2:
            parts.append({"type": piece})
        elif piece.strip():
            parts.append({"type": "text", "text": piece.strip("\n")})
    return parts


def _parts(messages: Any) -> Iterator[Any]:
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        yield from content if isinstance(content, (list, tuple)) else ()


def _kind(part: Any) -> str | None:
    """Return the kind of the medium that a part is; None for text and others."""
    return _PART_KINDS.get(str(part.get("type"))) if isinstance(part, Mapping) else None


def _value(part: Mapping[str, Any]) -> Any:
    """Return the value of a part: under its type, or under one of the names of transformers and OpenAI."""
    names = (str(part.get("type")), _kind(part), f"{_kind(part)}_url", *_PART_VALUES)
    for name in names:
        found = part.get(name or "")
        if isinstance(found, Mapping) and found.get("bytes") is None and found.get("array") is None:
            name, found = next(((key, found[key]) for key in _PART_VALUES if _is_given(found.get(key))), (name, None))
        if _is_given(found):
            is_raw = name in _RAW and isinstance(found, str) and not found.startswith("data:")
            return f"data:;base64,{found}" if is_raw else found
    return None


def _is_given(value: Any) -> bool:
    return value is not None and not (isinstance(value, (str, list, tuple, dict)) and not value)
