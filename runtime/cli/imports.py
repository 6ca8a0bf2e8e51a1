"""Import compressed-tensors without transformers, of which it uses nothing here.

Its modules name classes of transformers' models, for type checks on models that this project never hands to it, and
importing those classes costs half of what a small run takes: two seconds and more, and a hundred megabytes for as long
as the process lives. Where nothing else of transformers will be needed either, empty classes stand in for them while it
is imported. What was imported meanwhile is forgotten afterwards: whoever asks for transformers later gets it whole.
Without a GPU the same goes for Triton, whose kernels compressed-tensors can do without.

This is for a process that does nothing else: `python -m runtime` allows it, nobody else does.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

_STAND_INS = (
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
# Of them what is no class, but a file's name.
_NAMES = {
    "CONFIG_NAME": "config.json",
    "SAFE_WEIGHTS_NAME": "model.safetensors",
    "SAFE_WEIGHTS_INDEX_NAME": "model.safetensors.index.json",
}
_is_allowed = False


def allow() -> None:
    """Say that this process does nothing but run a command of ours."""
    global _is_allowed
    _is_allowed = True


def prepare(artifact: Path) -> None:
    """Import compressed-tensors in the cheaper way, if that is allowed and the artifact needs no model code.

    Args:
        artifact: its directory; what is wrong with it is for others to say.
    """
    if not _is_allowed or _is_imported("compressed_tensors") or _is_imported("transformers"):
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
    """Import compressed-tensors with stand-ins for transformers' models; as usual where that fails."""
    import torch

    sys.modules.update({name: _StandIn(name) for name in _STAND_INS})
    has_no_triton = "triton" not in sys.modules and not torch.cuda.is_available()
    if has_no_triton:
        sys.modules["triton"] = None  # type: ignore[assignment] # how Python is told that there is no such module
    try:
        import compressed_tensors  # noqa: F401
    except Exception:  # a version that does more with these classes: it is imported whole when it is needed
        _forget("compressed_tensors")
    finally:
        _forget("transformers")
        if has_no_triton:
            _forget("triton")


def _is_imported(package: str) -> bool:
    return package in sys.modules


def _forget(package: str) -> None:
    for name in list(sys.modules):
        if name == package or name.startswith(f"{package}."):
            del sys.modules[name]


class _StandIn(types.ModuleType):
    """A module that has whatever it is asked for: classes with nothing in them, and names of files."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _NAMES:
            return _NAMES[name]
        made = type(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made
