"""Source files of libraries on this host, found and read without importing them."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

LONGEST_NAME = 512  # a regular expression with a repeated group takes 80 bytes for each repetition
_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*\Z")


def is_module_name(name: str) -> bool:
    """Whether a name is a dotted path of identifiers, so that its source file can only lie inside its package."""
    return len(name) <= LONGEST_NAME and _MODULE.match(name) is not None


def source_file(module: str) -> Path | None:
    """Find the source file of a module of an installed package; None if it has none."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest and spec.origin is not None and spec.has_location:
        return Path(spec.origin)
    candidates = (
        path
        for folder in spec.submodule_search_locations or ()
        for path in (Path(folder, *rest[:-1], f"{rest[-1]}.py"), Path(folder, *rest, "__init__.py"))
    )
    return next((path for path in candidates if path.is_file()), None) if rest else None


def source_digest(module: str) -> str:
    """sha256 (hex) of a module's source file; empty if it has none."""
    file = source_file(module)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file is not None else ""


def changed_sources(sources: Mapping[str, str]) -> list[str]:
    """Names of the modules whose source file on this host is missing or differs from the recorded digest."""
    return [module for module, digest in sources.items() if source_digest(module) != digest]
