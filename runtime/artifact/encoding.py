"""The canonical encoding of a manifest: MessagePack with sorted keys."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any

import msgpack

from runtime.errors import ArtifactError

FORMAT_VERSION = (1, 6)
MANIFEST_LIMIT_BYTES = 64 * 2**20
_TABLES_LIMIT = 2**22  # lists and tables in a manifest; an empty one takes a byte there and 64 in memory


def sha256(data: bytes) -> str:
    """Compute the digest in lower-case hex."""
    return hashlib.sha256(data).hexdigest()


def canonical(plain: Any) -> bytes:
    """Encode as MessagePack with sorted keys; values that the format cannot hold are rejected."""
    return packed(in_key_order(plain))


def packed(plain: Any) -> bytes:
    """Encode plain data whose keys are already sorted."""
    encoded: bytes = msgpack.packb(plain, use_bin_type=True)
    return encoded


def in_key_order(value: Any) -> Any:
    """Sort the keys of all tables.

    Raises:
        TypeError: for a value that a manifest cannot hold.
    """
    if isinstance(value, Mapping):
        if any(type(key) is not str for key in value):
            raise TypeError("a manifest's keys are text")
        return {key: in_key_order(value[key]) for key in sorted(value, key=str.encode)}
    if isinstance(value, (list, tuple)):
        return [in_key_order(item) for item in value]
    if value is None or type(value) in (str, int, bool):
        return value
    raise TypeError(f"a manifest cannot hold {type(value).__name__}")


def decoded(data: bytes, origin: str) -> tuple[dict[str, Any], bytes]:
    """Decode a table; return it with its canonical encoding."""
    if len(data) > MANIFEST_LIMIT_BYTES:
        raise ArtifactError(f"{origin} has {len(data)} bytes, more than the {MANIFEST_LIMIT_BYTES} allowed")
    number = itertools.count(1)

    def counted(value: Any) -> Any:
        if next(number) > _TABLES_LIMIT:
            raise ValueError(f"it contains more than {_TABLES_LIMIT} tables")
        return value

    try:
        plain = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_ext_len=0,
            max_bin_len=0,
            list_hook=counted,
            object_hook=counted,
        )
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise ArtifactError(f"{origin} is damaged: {error or type(error).__name__}") from error
    if not isinstance(plain, dict):
        raise ArtifactError(f"{origin} is damaged: it does not contain a table")
    try:
        return plain, canonical(plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{origin} is damaged: {error}") from error


def to_plain(value: Any) -> Any:
    """Convert dataclasses to tables and tuples to lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def from_plain(kind: Any, value: Any, where: str, *, minor: int) -> Any:
    """Build `kind` (a dataclass, tuple, mapping or scalar type) from decoded data, or report where it does not fit.

    Unknown entries of a newer minor version are ignored. Entries introduced after the file's own minor version must be
    absent, and take their defaults.
    """
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ArtifactError(f"{where} is not a table")
        names = [entry.name for entry in dataclasses.fields(kind) if entry.metadata.get("since", 0) <= minor]
        missing = [name for name in names if name not in value]
        unknown = [name for name in value if name not in names and minor <= FORMAT_VERSION[1]]
        if missing or unknown:
            what = "no" if missing else "an unknown"
            raise ArtifactError(f"{where} has {what} entry {(missing + unknown)[0]!r}")
        hints = _hints(kind)  # type: ignore[arg-type]
        fields = {name: from_plain(hints[name], value[name], f"{where}: {name}", minor=minor) for name in names}
        return kind(**fields)  # type: ignore[operator]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise ArtifactError(f"{where} is not a list")
        item_kind = arguments[0]
        return tuple(from_plain(item_kind, item, f"{where}[{i}]", minor=minor) for i, item in enumerate(value))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise ArtifactError(f"{where} is not a table")
        return {k: from_plain(arguments[1], v, f"{where}[{k!r}]", minor=minor) for k, v in value.items()}
    allowed = arguments if origin in (typing.Union, types.UnionType) else (kind,)
    if type(value) not in allowed:
        expected = " or ".join(option.__name__ for option in allowed)
        raise ArtifactError(f"{where} is {type(value).__name__}, not {expected}")
    return value
