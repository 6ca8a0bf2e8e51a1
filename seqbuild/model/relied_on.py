"""Determine the library source files that affect an artifact's results.

A run executes the modules that the artifact calls and its opaque steps. The files that define these, and those of
their imports that compute, determine the result. Files for reading, writing, training or generation do not, and they
change with every release.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from runtime.artifact.manifest import SubgraphEntry
from runtime.artifact.own_code import is_own_module, parse_imports
from runtime.language.library_sources import source_digest, source_file

if TYPE_CHECKING:
    from types import ModuleType

# Packages of transformers that contain model computation. Caches are excluded, because a run keeps none.
_COMPUTES = re.compile(
    r"transformers\.(models\.(?!auto\.)\w+\.(modeling|configuration)_\w+|masking_utils|modeling_attn_mask_utils"
    r"|modeling_layers|modeling_rope_utils|pytorch_utils|activations|integrations\.(sdpa_attention|moe))"
)
_BASE_CLASSES = "transformers.modeling_utils"
_SDPA = "transformers.integrations.sdpa_attention"


def relied_on(model: nn.Module, entries: Sequence[SubgraphEntry], own_modules: Collection[str]) -> dict[str, str]:
    """Return the sha256 of each library source file that a run relies on, by module name, ascending.

    Args:
        model: the model that was traced.
        entries: its subgraphs, which list the calls.
        own_modules: module names of the model's own code; their digests are recorded elsewhere.
    """
    return _followed([*sorted(_roots(model, entries)), *own_modules])


def defining_sources(model: nn.Module, own_modules: Collection[str]) -> dict[str, str]:
    """Return the sha256 of each library source file that defines a model, by module name, ascending.

    These are the files that define its modules' classes, and their imports that compute. torch's files are excluded,
    because torch's version covers them.
    """
    classes = [type(module) for module in model.modules()]
    homes = {name for name in _homes(classes) if _is_library(name)}
    return _followed([*sorted(homes | _roots(model, ())), *own_modules])


def _followed(pending: list[str]) -> dict[str, str]:
    """Return the digests of these modules and of their imports that compute."""
    found: dict[str, str] = {}
    seen: dict[str, None] = {}
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen[name] = None
        digest = "" if is_own_module(name) else source_digest(name)
        if digest:
            found[name] = digest
        pending.extend(sorted(_computing_imports(name)))
    return dict(sorted(found.items()))


def _roots(model: nn.Module, entries: Sequence[SubgraphEntry]) -> set[str]:
    """Return the modules that define the called classes and opaque steps; of other modules, only those that compute."""
    config: Any = getattr(model, "config", None)
    around = [type(config), *(type(part) for part in model.modules())]
    names = {name for name in _homes(around) if _COMPUTES.fullmatch(name)}
    modules = dict(model.named_modules(remove_duplicate=False))
    for entry in entries:
        called = [modules[name] for name in (*entry.submodules, *entry.objects) if name in modules]
        for name in _homes(type(inner) for outer in called for inner in outer.modules()):
            if _is_library(name) and (name.split(".")[0] != "transformers" or name == _BASE_CLASSES):
                names.add(name)
        names.update(home for home in (path.partition(":")[0] for path in entry.opaque) if _is_library(home))
    if getattr(config, "_attn_implementation", "") == "sdpa":
        names.add(_SDPA)
    return names


def _homes(classes: Any) -> set[str]:
    return {base.__module__ for cls in dict.fromkeys(classes) for base in cls.__mro__}


def _is_library(name: str) -> bool:
    top = name.split(".")[0]
    return top != "torch" and top not in sys.stdlib_module_names and not is_own_module(name)


def _computing_imports(name: str) -> set[str]:
    """Return a module's imports that compute, including those re-exported by a package."""
    module = sys.modules.get(name)
    found: set[str] = set()
    for target in _imports(name, module):
        if _COMPUTES.fullmatch(target) and source_file(target) is not None:
            found.add(target)
    return found


def _imports(name: str, module: ModuleType | None) -> Iterator[str]:
    data = _source(name, module)
    namespace = vars(module) if module is not None else {}
    is_package = hasattr(module, "__path__")
    parts = name.split(".")
    for statement in parse_imports(data):
        base = parts[: len(parts) - statement.level + is_package] if statement.level else []
        target = ".".join([*base, statement.module] if statement.module else base)
        yield target
        for attribute, bound_as in statement.names:
            yield f"{target}.{attribute}"
            yield str(getattr(namespace.get(bound_as), "__module__", ""))


def _source(name: str, module: ModuleType | None) -> bytes:
    if is_own_module(name):
        loader: Any = module.__spec__.loader if module is not None and module.__spec__ is not None else None
        return str(loader.get_source(name)).encode() if loader is not None else b""
    file = source_file(name)
    return file.read_bytes() if file is not None and file.suffix == ".py" else b""
