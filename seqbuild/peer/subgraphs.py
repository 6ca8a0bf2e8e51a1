"""Subgraphs of an artifact that call the modules of a model in memory."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.chain import LoadedSubgraph, load
from runtime.data.inputs import require_in_range
from runtime.errors import ModelError
from runtime.language.program import run_device, run_dtype
from seqbuild.build import compile_with
from seqbuild.chain.targets import match_modules
from seqbuild.model.source import loaded_name
from seqbuild.onecall.options import user_artifacts
from seqbuild.options import CompileOptions

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from runtime.chain import Artifact

_TEXT = ("input_ids", "attention_mask")
_USE_SEQUENTIAL = 'use pipeline="sequential"'


@dataclass(frozen=True, kw_only=True, slots=True)
class OneshotSubgraph:
    """A subgraph as llm-compressor's sequential pipeline calls it.

    Attributes:
        loaded: the subgraph.
        artifact: that contains it.
        is_first: whether it also takes all inputs of the model, to check their sizes.
    """

    loaded: LoadedSubgraph
    artifact: Artifact
    is_first: bool

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the values that `forward` takes."""
        inputs = (entry.name for entry in self.artifact.manifest.inputs) if self.is_first else ()
        return tuple(dict.fromkeys((*self.loaded.input_names, *inputs)))

    @property
    def consumed_names(self) -> tuple[str, ...]:
        """Names of the inputs that no later subgraph takes."""
        return self.loaded.consumed_names

    def forward(self, model: nn.Module, **inputs: Any) -> dict[str, Any]:
        """Execute the subgraph with the modules of a model, and return its outputs by name.

        Raises:
            DataError: if the artifact is not valid for the sizes of a batch.
        """
        if self.is_first:
            require_in_range(self.artifact.manifest, [inputs])
        run = self.artifact.run(run_device(inputs, model), run_dtype(model))
        return self.loaded.compute(model, {name: inputs[name] for name in self.loaded.input_names}, run)

    def submodules(self, model: nn.Module, recurse: bool = True) -> list[nn.Module]:
        """List the modules that it calls, with those inside of them."""
        return self.loaded.submodules(model, recurse)


def load_subgraphs(
    model: PreTrainedModel,
    sample: Mapping[str, Any],
    *,
    targets: tuple[str, ...],
    ignore: tuple[str, ...],
    targets_per_subgraph: int,
    attention: str,
) -> list[OneshotSubgraph]:
    """Find the artifact of a model's config, or compile it, and check that it fits the model.

    Args:
        model: in memory; its modules may have been replaced by others with the same names.
        sample: a batch of its inputs.
        targets: patterns of the modules to cut at.
        ignore: functions to record as one opaque step each.
        targets_per_subgraph: the number of targets in each subgraph.
        attention: the implementation of attention that the model runs with.

    Raises:
        ModelError: if the model differs from what its config describes.
        TraceError, TargetError: if it cannot be compiled.
    """
    own_code = type(model).__module__.startswith("transformers_modules")
    with tempfile.TemporaryDirectory(prefix="seqbuild-") as folder:
        options = CompileOptions(
            model=str(model.config.name_or_path) if own_code else str(_written(model, Path(folder))),
            targets=targets,
            ignore=ignore,
            targets_per_subgraph=targets_per_subgraph,
            attn_implementation=attention,
            sample=_sample_file(model, sample, Path(folder)),
            text_only=True,
            out=user_artifacts(),
            leaves="target",
            trust_remote_code=own_code,
        )
        path = compile_with(options).path
    artifact = load(path, trust_remote_code=own_code)
    _require_same_modules(model, artifact, targets)
    return [
        OneshotSubgraph(loaded=subgraph, artifact=artifact, is_first=index == 0)
        for index, subgraph in enumerate(artifact.subgraphs)
    ]


def _written(model: PreTrainedModel, folder: Path) -> Path:
    """Write the config to a directory with the model's name, which becomes the name of the artifact."""
    directory = folder / loaded_name(model.config, model.config.model_type)
    model.config.save_pretrained(directory)
    return directory


def _sample_file(model: PreTrainedModel, sample: Mapping[str, Any], folder: Path) -> Path | None:
    """Write the model's inputs in a batch to a file; None for plain text, whose sample the compiler generates."""
    import torch
    from safetensors.torch import save_file

    takes = inspect.signature(model.forward).parameters
    tensors: dict[str, torch.Tensor] = {
        name: value.cpu().contiguous()
        for name, value in sample.items()
        if name in takes and name != "labels" and isinstance(value, torch.Tensor)
    }
    if sorted(tensors) == sorted(_TEXT):
        return None
    save_file(tensors, folder / "sample.safetensors")
    return folder / "sample.safetensors"


def _require_same_modules(model: PreTrainedModel, artifact: Artifact, targets: tuple[str, ...]) -> None:
    """Check that the model has the modules which the artifact calls, and no other targets."""
    manifest = artifact.manifest
    names = {name for name, _ in model.named_modules()}
    for name in (name for entry in manifest.subgraphs for name in entry.submodules):
        if name not in names:
            raise ModelError(f"the model has no module {name}, which its config describes", hint=_USE_SEQUENTIAL)
    found, inside = match_modules(model, targets), tuple(f"{name}." for name in manifest.targets)
    for name, module in model.named_modules():
        if module in found and name not in manifest.targets and not name.startswith(inside):
            raise ModelError(f"the target {name} of the model is not a target of its artifact", hint=_USE_SEQUENTIAL)
