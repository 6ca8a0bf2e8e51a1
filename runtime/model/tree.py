"""Build the module tree of a portable artifact from its tables: leaves, parameters and computed tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from runtime.errors import ArtifactError
from runtime.model.experts import Branch, branch
from runtime.model.leaves import build_leaf

if TYPE_CHECKING:
    from runtime.artifact.manifest import ParameterEntry
    from runtime.artifact.parts import ArtifactParts


def build_tree(artifact: ArtifactParts, dtype: torch.dtype) -> nn.Module:
    """Build the tree with parameters on the meta device; tensors that are computed, not loaded, are real.

    Args:
        artifact: a portable one.
        dtype: of the parameters that follow the run's dtype.

    Raises:
        ArtifactError: when the tables contradict each other.
    """
    try:
        return _tree(artifact, dtype)
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())  # torch rejects names and shapes in many ways
        raise ArtifactError(f"cannot build a module tree from the tables of {artifact.path}: {reason}") from error


def _tree(artifact: ArtifactParts, dtype: torch.dtype) -> nn.Module:
    manifest = artifact.manifest
    root = Branch()
    root.__dict__["run_dtype"] = dtype
    owned: dict[str, dict[str, ParameterEntry]] = {}
    needed = dict.fromkeys(name for entry in manifest.subgraphs for name in entry.parameters)
    for name in dict.fromkeys((*needed, *manifest.parameters)):
        owner, _, own = name.rpartition(".")
        owned.setdefault(owner, {})[own] = manifest.parameters[name]
    called = dict.fromkeys(name for entry in manifest.subgraphs for name in entry.submodules)
    for name in dict.fromkeys((*called, *manifest.leaves)):  # in the order of execution
        kind = manifest.leaf_kinds[manifest.leaves[name]]
        inner = [str(own) for own in kind.options.get("stacked", ()) if "." in str(own)]
        shapes = {own: entry.shape for own, entry in owned.get(name, {}).items()}
        shapes |= {own: manifest.parameters[f"{name}.{own}"].shape for own in inner}
        program = artifact.leaf_programs[kind.program] if kind.program else None
        owner, _, own = name.rpartition(".")
        branch(root, owner).add_module(own, build_leaf(kind, name, shapes, program))
    for owner, entries in owned.items():
        module = branch(root, owner)
        for own, entry in entries.items():
            module._parameters.pop(own, None)
            if entry.is_buffer:
                module.register_buffer(own, _empty(entry, dtype))
            else:
                module.register_parameter(own, nn.Parameter(_empty(entry, dtype), requires_grad=False))
    for name, buffer in manifest.buffers.items():
        owner, _, own = name.rpartition(".")
        value = artifact.constants[_constant(buffer.constants, dtype, name)]
        branch(root, owner).register_buffer(own, value, persistent=False)
    return root.eval()


def _empty(entry: ParameterEntry, dtype: torch.dtype) -> torch.Tensor:
    own = dtype if entry.dtype == "model" else getattr(torch, entry.dtype)
    return torch.empty(entry.shape, dtype=own, device="meta")


def _constant(constants: Mapping[str, str], dtype: torch.dtype, name: str) -> str:
    found = constants.get("") or constants.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ArtifactError(f"the artifact has no values of {name} for {dtype}", hint="use another dtype")
    return found
