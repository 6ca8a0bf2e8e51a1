"""Collect the facts of a run for its record, in a form that depends on nothing but the inputs and the options."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from runtime import __version__
from runtime.data.batches import num_samples
from runtime.errors import DataError
from runtime.provenance.record import (
    ArtifactFacts,
    DataFacts,
    GroupFacts,
    ModelFacts,
    ModuleFacts,
    RecipeFacts,
)
from runtime.provenance.source_model import card_facts, hub_origin
from runtime.recipe.examples import arguments_line, scheme_line

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest
    from runtime.provenance.origin import DataDescription, RunOrigin
    from runtime.recipe.recipe import Assignment, Recipe
    from runtime.streaming.report import ModuleReport

_LIBRARIES = ("torch", "transformers", "compressed-tensors")


def versions() -> dict[str, str]:
    """Return the versions of seqbuild and of the libraries that results depend on."""
    return {"seqbuild": __version__, **{name: importlib.metadata.version(name) for name in _LIBRARIES}}


def model_facts(manifest: Manifest, directory: Path, origin: RunOrigin) -> ModelFacts:
    """Describe the source model."""
    home = origin.directory or directory
    hub_id, revision = hub_origin(home)
    return ModelFacts(
        name=hub_id.rpartition("/")[2] or directory.absolute().name or manifest.model.class_name,
        hub_id=hub_id,
        revision=revision,
        class_name=manifest.model.class_name,
        model_type=manifest.model.model_type,
        card=card_facts(home),
    )


def artifact_facts(manifest: Manifest) -> ArtifactFacts:
    """Describe the compiled model."""
    return ArtifactFacts(sha256=hashlib.sha256(manifest.to_bytes()).hexdigest(), input_key=manifest.input_key)


def recipe_facts(
    recipe: Recipe, text: str, jobs: Mapping[str, Assignment], own_modifiers: Sequence[object]
) -> RecipeFacts:
    """Describe the recipe; `text` is that of recipe.yaml."""
    counts = [0] * len(recipe.groups)
    for job in jobs.values():
        counts[job.group] += 1
    kinds = [type(entry) for entry in own_modifiers]
    names = [type(entry).__name__ for entry in (*recipe.rotations, *recipe.transforms, *recipe.modifiers)]
    return RecipeFacts(
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        modifiers=tuple(names),
        own_modifiers=tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds),
        groups=tuple(
            GroupFacts(name=group.name, scheme=scheme_line(group.scheme), num_modules=count)
            for group, count in zip(recipe.groups, counts, strict=True)
        ),
        cache="" if recipe.cache is None else arguments_line(recipe.cache),
    )


def data_facts(
    manifest: Manifest, batches: Sequence[Mapping[str, Any]], digest: str, description: DataDescription
) -> DataFacts | None:
    """Describe the calibration data; None if no batch was needed."""
    if not batches:
        return None
    firsts = [batch.get(manifest.inputs[0].name) for batch in batches]
    return DataFacts(
        sources=description.sources,
        num_samples=sum(num_samples(manifest, batch) or 0 for batch in batches),
        num_tokens=sum(first.numel() for first in firsts if isinstance(first, torch.Tensor)),
        settings=dict(description.settings),
        inputs_sha256=digest,
    )


def encoded_facts(facts: DataFacts | None) -> str:
    """Encode the description of data, to be saved with statistics."""
    return msgspec.json.encode(facts).decode()


def decoded_facts(text: str, folder: Path) -> DataFacts | None:
    """Decode the description of the data of statistics in `folder`.

    Raises:
        DataError: it is damaged.
    """
    try:
        return msgspec.json.decode(text, type=DataFacts | None)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the description of the data in {folder} is damaged: {error}", hint="measure again") from error


def module_facts(reports: Sequence[ModuleReport]) -> tuple[ModuleFacts, ...]:
    """Describe the quantized modules, without times."""
    known: Collection[str] = ModuleFacts.__struct_fields__
    return tuple(
        ModuleFacts(**{name: value for name, value in asdict(report).items() if name in known}) for report in reports
    )
