"""Which functions of the model's code an artifact may name, to be called whole."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Collection

from runtime.errors import ArtifactError
from runtime.host_sources import source_file

# Where opaque steps may lie, and what of it they may not be.
_OPAQUE = re.compile(
    r"transformers\.(models\.[a-z0-9_]+\.(modeling_[a-z0-9_]+|vision|perceiver)|masking_utils|modeling_attn_mask_utils"
    r"|modeling_rope_utils|modeling_layers|pytorch_utils|activations|cache_utils|integrations\.(sdpa_attention|moe))"
    r":_?[A-Za-z][A-Za-z0-9_]*(\._?[A-Za-z][A-Za-z0-9_]*)*\Z"
)
_REACHES_FILES = re.compile(
    r"pretrained|load|save|push|fetch|import|register_|apply_chunking|create_timm", re.IGNORECASE
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}\Z")


def is_opaque_path(path: str, own_modules: Collection[str] = ()) -> bool:
    """Whether `module:function` or `module:Class.method` may name an opaque step: it lies where transformers keeps
    what models calculate, and not among the functions that read, write or fetch files.

    It may also lie in one of `own_modules`, the code that the artifact brings: whoever runs that has allowed all of it.
    """
    module, _, qualified = path.partition(":")
    if module in own_modules:
        return all(_NAME.match(part) and not part.startswith("__") for part in qualified.split("."))
    return _OPAQUE.match(path) is not None and _REACHES_FILES.search(path.partition(":")[2]) is None


def require_defined(path: str, own_modules: Collection[str] = ()) -> None:
    """Refuse the path of an opaque step under which its module has something that it does not define itself: `os`, for
    instance, which it imports. The module's source is looked at; nothing is imported.

    Raises:
        ArtifactError: naming the path.
    """
    module, _, qualified = path.partition(":")
    if module in own_modules:
        return  # whoever runs it has allowed all of it
    parts = qualified.split(".")
    for depth in range(1, len(parts) + 1):
        if ".".join(parts[:depth]) in _brought_in(module):
            raise ArtifactError(f"opaque step {path!r} is not a function that {module} defines")


@functools.lru_cache(maxsize=64)
def _brought_in(module: str) -> frozenset[str]:
    """Dotted names that a module's source binds to anything but its own functions and classes; empty where this host
    has no such module, which is found out when it is needed.
    """
    file = source_file(module)
    if file is None:
        return frozenset()
    found: set[str] = set()
    _collect(ast.parse(file.read_bytes()), "", found)
    return frozenset(found)


def _collect(node: ast.AST, prefix: str, found: set[str]) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            found.update(prefix + (alias.asname or alias.name).split(".")[0] for alias in child.names)
        elif isinstance(child, ast.Assign):
            found.update(prefix + target.id for target in child.targets if isinstance(target, ast.Name))
        elif isinstance(child, ast.ClassDef):
            _collect(child, f"{prefix}{child.name}.", found)
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.expr)):
            _collect(child, prefix, found)
