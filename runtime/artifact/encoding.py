"""The canonical encoding of a manifest: MessagePack whose map keys are in ascending order."""

from __future__ import annotations

import hashlib
from typing import Any, TypeVar

import msgspec

from runtime.errors import ArtifactError

FORMAT_VERSION = (2, 1)
MANIFEST_LIMIT_BYTES = 64 * 2**20
_T = TypeVar("_T")


def sha256(data: bytes) -> str:
    """Compute the digest in lower-case hex."""
    return hashlib.sha256(data).hexdigest()


def canonical(value: Any) -> bytes:
    """Encode tables, lists, strings, integers, booleans, None and dataclasses of these; there is one encoding of each.

    Keys are in ascending order of their UTF-8 bytes, and integers have their shortest form.
    """
    return msgspec.msgpack.encode(value, order="sorted")


def decoded(data: bytes | msgspec.Raw, kind: type[_T], origin: str) -> _T:
    """Decode data as `kind` (a dataclass, tuple, mapping or scalar type); entries that it does not have are skipped.

    Nothing else is created, so the memory is bounded by the size of the data.

    Raises:
        ArtifactError: for damaged data, a missing entry, or a value of another type; the message has its path.
    """
    if isinstance(data, bytes) and len(data) > MANIFEST_LIMIT_BYTES:
        raise ArtifactError(f"{origin} has {len(data)} bytes, more than the {MANIFEST_LIMIT_BYTES} allowed")
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{origin} is damaged: {error or type(error).__name__}") from error
