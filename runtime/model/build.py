"""Build the module tree of an artifact's model, without weights."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from runtime.errors import ArtifactError, ModelError
from runtime.host.offline import offline

if TYPE_CHECKING:
    import torch
    from torch import nn

    from runtime.artifact.manifest import Manifest
    from runtime.artifact.parts import ArtifactParts


def build_skeleton(artifact: ArtifactParts, dtype: torch.dtype | None) -> nn.Module:
    """Build the model with parameters on the meta device; buffers that are computed, not loaded, are real.

    Args:
        artifact: names the class and contains config.json.
        dtype: of floating point parameters; None for the manifest's.

    Raises:
        ModelError: when the class does not exist on this host, or cannot be built from the config.
    """
    from runtime.model.config import artifact_config
    from runtime.model.weightless import calculate_buffers, from_config, without_weights

    entry, path = artifact.manifest.model, artifact.path
    if artifact.manifest.is_portable:
        from runtime.model.tree import build_tree

        return build_tree(artifact, artifact.run_dtype(dtype))
    cls = model_class(artifact)
    config = artifact_config(artifact)
    dtype = artifact.run_dtype(dtype)
    try:
        with without_weights(), offline():
            model: nn.Module = from_config(cls, config, dtype=dtype, attention=entry.attn_implementation)
            calculate_buffers(model)
    except Exception as error:
        raise ModelError(f"{entry.class_name} cannot be built from {path / 'config.json'}: {error}") from error
    _require_shapes(model, artifact.manifest)
    _apply_dtypes(model, artifact.manifest, dtype)
    if artifact.code is not None:
        model.__dict__["_own_code"] = artifact.code  # its functions may import more of it when they are called
    return model.eval()


def model_class(artifact: ArtifactParts) -> Any:
    """Find the class of the artifact's model.

    Raises:
        ArtifactError: when the class is not a model, or is part of neither transformers nor the model's own code.
        ModelError: when the class does not exist on this host.
    """
    from transformers import PreTrainedModel

    artifact.require_consent()
    module_name, class_name = artifact.manifest.model.module, artifact.manifest.model.class_name
    code = artifact.code
    if code is not None and module_name in code.modules:
        return code.find(module_name, class_name, PreTrainedModel)
    if module_name.split(".")[0] != "transformers":
        raise ArtifactError(f"the model's class {module_name}.{class_name} is not part of transformers")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"the installed transformers has no {module_name}.{class_name}",
            hint="install the version that the artifact was compiled with",
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise ArtifactError(f"{module_name}.{class_name} is not a model class")
    return cls


def _require_shapes(model: nn.Module, manifest: Manifest) -> None:
    """Compare the shapes in the manifest with the modules, which follow from the config.

    Raises:
        ArtifactError: when they differ.
    """
    found = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, entry in manifest.parameters.items():
        if name not in found:
            raise ArtifactError(
                f"the manifest lists {name!r}, but the model of config.json has no such tensor",
                hint="compile the model again",
            )
        shape = tuple(found[name].shape)
        if shape != tuple(entry.shape):
            raise ArtifactError(
                f"{name} has shape {list(entry.shape)} in the manifest, but {list(shape)} by config.json",
                hint="compile the model again",
            )


def _apply_dtypes(model: nn.Module, manifest: Manifest, dtype: torch.dtype) -> None:
    """Set the dtype of parameters that do not follow the run's (float32 routers, for instance)."""
    import torch
    from torch import nn

    for name, parameter in model.named_parameters():
        entry = manifest.parameters.get(name)
        wanted = dtype if entry is None or entry.dtype == "model" else getattr(torch, entry.dtype)
        if parameter.is_floating_point() and parameter.dtype != wanted:
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            module._parameters[leaf] = nn.Parameter(parameter.to(wanted), requires_grad=False)
