"""What an artifact's config.json may not say: it goes to libraries that build modules from it, and would believe it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

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
    auto_map = table.get("auto_map")
    names = auto_map if isinstance(auto_map, dict) else {}
    if any(key.startswith(("AutoConfig", "AutoModel")) and value for key, value in names.items()) and not has_own_code:
        raise ArtifactError(f"{CONFIG_NAME} has an auto_map, and the artifact lists no code of the model's own")


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
