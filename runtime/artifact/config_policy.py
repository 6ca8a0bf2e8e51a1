"""Reject unsafe entries in an artifact's config.json: libraries build modules from it without checking it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runtime.console import shown
from runtime.errors import ArtifactError

CONFIG_NAME, _TOKENIZER_NAME = "config.json", "tokenizer_config.json"
_TOKENIZER = re.compile(
    r"(?!Auto)\w{0,80}(Tokenizer|Tokenizers|SentencePiece|MistralCommon|Python)(Backend)?(Fast|V\d)?"
)
_LIMIT_BYTES, _LIMIT_DEPTH = 16 * 2**20, 24
# Arguments that are passed unchanged to timm, which reads the files that they name, including pickles.
_HANDED_ON = ("model_args", "backbone_kwargs", "timm_kwargs")
_READS = (
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "cache_dir",
    "features_only_path",
)
_NAMES_OF_CODE = ("architecture", "backbone")
# The largest plausible number by the name of an entry: the first pattern that matches counts.
_LIMITS = {
    "layers": (re.compile(r"(.*_)?n?(layers?|depths?|blocks|stages)", re.IGNORECASE), 1024),
    "experts": (re.compile(r".*experts", re.IGNORECASE), 2**16),
    "positions": (re.compile(r".*(max_|position|length|ctx|window|context|tokens).*", re.IGNORECASE), 2**40),
    "sizes": (
        re.compile(
            r"(.*_)?(hidden_size|intermediate_size|dims?|rank|width|heads?|channels|embd|inner|model|ff|kv)|d_.*"
        ),
        2**20,
    ),
    "others": (
        re.compile(r"(.*_)?(vocab|image|patch|kernel|chunk|block|group|state|codebook)_size|(.*_)?groups"),
        2**24,
    ),
}
_MOST_EXPERTS, _MOST_ITEMS = 2**20, 2**17
# The only key of a table that transformers writes for a number that JSON cannot represent.
_NUMBER = "__float__"
_NUMBERS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}
_PLACE = re.compile(r"[./~]|[A-Za-z_-]+:")
# Implementations by name: transformers fetches any name that is not a plain word from the hub and executes it.
_IMPLEMENTATION = re.compile(r"_?(attn|attention|experts|kernel|linear)_implementation(_internal)?\Z")
_WORD = re.compile(r"[a-z0-9_]{1,60}\Z")
# Attributes that the config's class defines and no config may set: aliases of entries, sub-configs, other files.
_OF_THE_CLASS = ("attribute_map", "sub_configs", "base_config_key", "configuration_files", "_auto_class")


def check_config(contents: Mapping[str, bytes], *, has_own_code: bool) -> None:
    """Reject an invalid config, and one that makes a library read files or code that the artifact does not list.

    Args:
        contents: the artifact's files by path.
        has_own_code: whether the artifact lists the model's own code.

    Raises:
        ArtifactError: naming the entry.
    """
    _check_tokenizer(contents)
    data = contents.get(CONFIG_NAME)
    if data is None:
        return  # code that needs a config reports that it is missing
    try:
        if len(data) > _LIMIT_BYTES:
            raise ValueError("it is too large")
        table = json.loads(data.decode("utf-8"))
        if not isinstance(table, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{CONFIG_NAME} is not a valid config: {error}") from error
    for name, value, depth in _entries(table, "", 0):
        wrong = _wrong(name, value, depth) or ("" if has_own_code else _wrong_without_code(name, value))
        if wrong:
            raise ArtifactError(f"{CONFIG_NAME} has {name}, {wrong}", hint="nothing of the artifact was executed")
    require_possible(table, CONFIG_NAME)


def stated_tokenizers(directory: Path) -> list[str]:
    """List the class names that the files of a directory state for its tokenizer."""
    found: list[str] = []
    for name in (_TOKENIZER_NAME, CONFIG_NAME):
        if (directory / name).is_file():
            found += [str(value) for value in _classes((directory / name).read_bytes()) if value is not None]
    return found


def _check_tokenizer(contents: Mapping[str, bytes]) -> None:
    """Reject class names that are not those of tokenizers: transformers would load any object of that name."""
    for name in (_TOKENIZER_NAME, CONFIG_NAME):
        for value in _classes(contents.get(name, b"")):
            if value is not None and (not isinstance(value, str) or _TOKENIZER.fullmatch(value) is None):
                raise ArtifactError(
                    f"{name} has the tokenizer_class {str(value)[:60]!r}, which is not the name of a tokenizer class"
                )


def _classes(data: bytes) -> list[Any]:
    try:
        table = json.loads(data.decode("utf-8")) if len(data) <= _LIMIT_BYTES else None
    except (ValueError, RecursionError):
        return []  # no library can load it
    return [table.get("tokenizer_class")] if isinstance(table, dict) else []


def require_possible(table: Mapping[str, Any], origin: str) -> None:
    """Reject a config with implausibly large numbers: building modules from it would take hours.

    Raises:
        ArtifactError: naming the entry and `origin`.
    """
    counts = {"layers": 1.0, "experts": 1.0}
    for name, value, _ in _entries(table, "", 0):
        if isinstance(value, (list, dict)):
            if len(value) > _MOST_ITEMS:
                raise ArtifactError(f"{origin} has {name} with {len(value)} items, more than {_MOST_ITEMS}")
            continue
        own = next((part for part in reversed(name.split(".")) if not part.isdigit()), "")
        kind = next((kind for kind, (pattern, _) in _LIMITS.items() if pattern.fullmatch(own)), "")
        if not kind or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if not value <= _LIMITS[kind][1]:  # not-a-number is rejected, too
            raise ArtifactError(
                f"{origin} has {name} = {shown(value)}, and no model has more than {_LIMITS[kind][1]}",
                hint="correct the entry",
            )
        if kind in counts:
            counts[kind] = max(counts[kind], value)
    if counts["layers"] * counts["experts"] > _MOST_EXPERTS:
        raise ArtifactError(
            f"{origin} has {counts['layers']:.0f} layers of {counts['experts']:.0f} experts, "
            f"and no model has more than {_MOST_EXPERTS} experts"
        )


def _wrong(name: str, value: Any, depth: int) -> str:
    *outer, own = name.split(".")
    if depth > _LIMIT_DEPTH:
        return "which is nested too deep"
    if own == "checkpoint_path" or (own in _READS and outer and outer[-1] in _HANDED_ON and value):
        return "which names a file for a library to read"
    if _IMPLEMENTATION.match(own) and not _are_words(value):
        return "which names a kernel to fetch and execute"
    if own.startswith("__"):
        return "which is not a valid entry"
    if own in _NAMES_OF_CODE and isinstance(value, str) and (_PLACE.match(value) or "/" in value or "\\" in value):
        return "which is a path or an address to load a model from"
    if type(value) is int and abs(value) > 2**63:
        return "a number of more than 64 bits"
    return ""


def _wrong_without_code(name: str, value: Any) -> str:
    """Describe an entry that is allowed only for a model with its own code, which runs by consent."""
    own = name.rpartition(".")[2]
    if own == "auto_map" and any(
        str(key).startswith(("AutoConfig", "AutoModel", "AutoBackbone")) and item for key, item in _items(value)
    ):
        return "but the artifact does not contain the model's own code"
    if own in _OF_THE_CLASS:
        return "which only the config's class may define"
    return ""


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the pairs of a table; any other value counts as a single entry."""
    yield from value.items() if isinstance(value, dict) else [("AutoModel", value)]


def _are_words(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_are_words(item) for item in value.values())
    return value is None or (isinstance(value, str) and _WORD.match(value) is not None)


def _entries(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any, int]]:
    if isinstance(value, dict) and list(value) == [_NUMBER] and isinstance(value[_NUMBER], str):
        value = _NUMBERS.get(value[_NUMBER], value)
    if name:
        yield name, value, depth
    if depth > _LIMIT_DEPTH:
        return
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _entries(item, f"{name}.{key}" if name else str(key), depth + 1)
