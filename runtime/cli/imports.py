"""Import compressed-tensors without the parts of transformers that a portable artifact does not need.

compressed-tensors imports transformers' base classes of models for type checks that this project never reaches, which
takes 2 to 3 s of processor time and 200 MB, about half of what a small run needs. So both command lines put empty
classes in their place while compressed-tensors is imported, and removes them afterwards: code that imports transformers
later gets the real package. Triton is left out in the same way on hosts without a GPU.

A process that runs other code as well must not do this, so `prepare` has an effect only in a process of our own.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

from runtime.host.own_process import is_ours

_MODULES = (
    "huggingface_hub",
    "transformers",
    "transformers.file_utils",
    "transformers.utils",
    "transformers.modeling_utils",
    "transformers.masking_utils",
    "transformers.cache_utils",
    "transformers.models.auto",
    "transformers.models.auto.configuration_auto",
    "transformers.models.auto.modeling_auto",
)
# Names in these modules that are strings and not classes.
_STRINGS = {
    "CONFIG_NAME": "config.json",
    "SAFE_WEIGHTS_NAME": "model.safetensors",
    "SAFE_WEIGHTS_INDEX_NAME": "model.safetensors.index.json",
}


def prepare(artifact: Path) -> None:
    """Import compressed-tensors alone if that is allowed and the artifact needs no model code.

    An artifact that cannot be read is reported by the command that loads it.
    """
    if not is_ours() or "compressed_tensors" in sys.modules or "transformers" in sys.modules:
        return
    from runtime.chain import read_manifest
    from runtime.errors import ArtifactError

    try:
        is_portable = read_manifest(artifact).is_portable
    except (ArtifactError, OSError):
        return
    if is_portable:
        import_alone()


def import_alone() -> None:
    """Import compressed-tensors without transformers; if that fails, leave it to be imported as usual."""
    import torch

    replaced = [name for name in _MODULES if name not in sys.modules]
    sys.modules.update({name: _Placeholder(name) for name in replaced})
    is_without_triton = "triton" not in sys.modules and not torch.cuda.is_available()
    if is_without_triton:
        sys.modules["triton"] = None  # type: ignore[assignment] # the import system's mark of a missing module
    try:
        import compressed_tensors  # noqa: F401
    except Exception:  # a release that uses these classes during its import
        _forget("compressed_tensors")
    finally:
        for name in (*replaced, "triton") if is_without_triton else replaced:
            sys.modules.pop(name, None)


def _forget(package: str) -> None:
    for name in list(sys.modules):
        if name == package or name.startswith(f"{package}."):
            del sys.modules[name]


class _Placeholder(types.ModuleType):
    """A module whose attributes are empty classes, or the strings of `_STRINGS`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _STRINGS:
            return _STRINGS[name]
        made = type(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made
