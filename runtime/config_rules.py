"""What an artifact's config.json may not say: it goes to libraries that build modules from it, and would believe it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from runtime.console import shown
from runtime.errors import ArtifactError

CONFIG_NAME = "config.json"
_LIMIT_BYTES, _LIMIT_DEPTH = 16 * 2**20, 24
# Arguments that go as they are to timm, which reads files that they name, pickles among them.
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
# By the name of an entry, the largest number that is a model's: the first that fits counts.
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
    "others": (re.compile(r"(.*_)?(size|groups)|(num|n)_.*"), 2**24),
}
_MOST_EXPERTS, _MOST_ITEMS = 2**20, 2**17
_PLACE = re.compile(r"[./~]|[A-Za-z_-]+:")


def check_config(contents: Mapping[str, bytes], *, has_own_code: bool) -> None:
    """Refuse a config that is none, or that would make a library read files or code which the artifact does not list.

    Args:
        contents: the artifact's files by path.
        has_own_code: whether the artifact lists code of the model's own.

    Raises:
        ArtifactError: naming the entry.
    """
    data = contents.get(CONFIG_NAME)
    if data is None:
        return  # whoever needs one says so
    try:
        if len(data) > _LIMIT_BYTES:
            raise ValueError("it is too large")
        table = json.loads(data.decode("utf-8"))
        if not isinstance(table, dict):
            raise ValueError("it holds no table")
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{CONFIG_NAME} describes no model: {error}") from error
    for name, value, depth in _entries(table, "", 0):
        wrong = _wrong(name, value, depth)
        if wrong:
            raise ArtifactError(f"{CONFIG_NAME} has {name}, {wrong}", hint="nothing of the artifact was executed")
    require_possible(table, CONFIG_NAME)
    auto_map = table.get("auto_map")
    names = auto_map if isinstance(auto_map, dict) else {}
    if any(key.startswith(("AutoConfig", "AutoModel")) and value for key, value in names.items()) and not has_own_code:
        raise ArtifactError(f"{CONFIG_NAME} has an auto_map, and the artifact lists no code of the model's own")


def require_possible(table: Mapping[str, Any], origin: str) -> None:
    """Refuse a config with numbers that no model has: whoever builds modules from it would be busy for hours.

    Args:
        table: the config.
        origin: what messages call it.

    Raises:
        ArtifactError: naming the entry.
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
        if not value <= _LIMITS[kind][1]:  # nor is what is no number
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
    if own in _NAMES_OF_CODE and isinstance(value, str) and _PLACE.match(value):
        return "which names a place to load a model from"
    if type(value) is int and abs(value) > 2**63:
        return "a number of more than 64 bits"
    return ""


def _entries(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any, int]]:
    if name:
        yield name, value, depth
    if depth > _LIMIT_DEPTH:
        return
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _entries(item, f"{name}.{key}" if name else str(key), depth + 1)
