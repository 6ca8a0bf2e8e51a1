"""The passes of a compilation, in order.

model       build the module tree without weights                       seqbuild.model.from_config
sample      read or generate the inputs to trace with                   seqbuild.trace.attempts
targets     choose the modules to cut at                                seqbuild.chain.targets
key         look up the artifact by its input key                       seqbuild.cache
trace       run once on fake tensors and cut into subgraphs             seqbuild.trace
assemble    write the code, map checkpoint tensors, build the manifest  seqbuild.manifest.assemble
publish     move the complete artifact to its final name atomically     runtime.host.publish
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.artifact.check import check_artifact, check_programs
from runtime.artifact.config_policy import check_config
from runtime.artifact.manifest import MANIFEST_NAME, Manifest
from runtime.errors import ArtifactError, TargetError, TraceError
from runtime.host.own_process import RARELY, settle
from runtime.host.publish import move_aside, publish_directory, write_files
from runtime.language.opaque import is_harmless
from runtime.status import doing
from seqbuild.cache.key import Compilation, digest, resolved
from seqbuild.cache.recall import Compiled, find_artifact, is_recorded, remember
from seqbuild.cache.store import locked
from seqbuild.chain.targets import candidate_targets
from seqbuild.manifest.assemble import assemble
from seqbuild.model.from_config import build_weightless
from seqbuild.model.relied_on import defining_sources
from seqbuild.trace.attempts import Traced, read_sample, trace_first_working, with_larger
from seqbuild.trace.model import TraceOptions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from seqbuild.blame import Function


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltModel:
    """A model without weights, and what its compilation depends on.

    Attributes:
        model: the model.
        sample: the inputs to trace with.
        candidates: the patterns to cut at, best first.
        sources: the library files that define the model, module name to sha256.
        ingredients: the ingredients of the input key.
    """

    model: PreTrainedModel
    sample: Mapping[str, torch.Tensor]
    candidates: tuple[tuple[str, ...], ...]
    sources: Mapping[str, str]
    ingredients: Mapping[str, str]


def run_passes(compilation: Compilation, request: Mapping[str, str]) -> Compiled:
    """Compile a model whose request is not in the cache."""
    settle(RARELY)
    options, built = compilation.options, build_model(compilation, request)
    key, remarks = digest(built.ingredients), list[str]()
    path = compilation.artifact_path(key)
    with locked(path):
        existing = None if options.force else _find(path, key, remarks)
        is_cached = existing is not None and is_recorded(request, options.out, existing)
        if existing is None or not is_cached:
            traced = _trace(compilation, built, remarks)
            doing("writing the code of the subgraphs")
            files, manifest = assemble(compilation, built.model, traced, built.ingredients)
            _require_accepted(files, manifest, compilation.own_modules)
            if existing is not None and existing != manifest:
                place = move_aside(path)
                remarks.append(f"{path} differed from the result of this compilation; it was moved to {place}")
                existing = None
            existing = existing or _publish(path, files, manifest)
        remember(request, path, existing, built.sources)
    return Compiled(path=path, manifest=existing, is_cached=is_cached, remarks=tuple(remarks))


def build_model(compilation: Compilation, request: Mapping[str, str]) -> BuiltModel:
    """Build the model without weights, and complete the ingredients of the input key."""
    options = compilation.options
    doing("building the model without weights")
    model = build_weightless(compilation.source, attn_implementation=options.attn_implementation, own=compilation.own)
    sample = read_sample(model, options)
    candidates = (options.targets,) if options.targets else tuple(candidate_targets(model))
    sources = defining_sources(model, compilation.own_modules)
    ingredients = resolved(request, model, targets=candidates[0], sample=sample, sources=sources)
    return BuiltModel(model=model, sample=sample, candidates=candidates, sources=sources, ingredients=ingredients)


def _find(path: Path, key: str, remarks: list[str]) -> Manifest | None:
    """Return the existing artifact; move a damaged one aside, so that it can be inspected."""
    try:
        return find_artifact(path, key)
    except ArtifactError as error:
        place = move_aside(path)
        remarks.append(f"the existing artifact is damaged and was moved to {place}: {error.message}")
        return None


def _trace(compilation: Compilation, built: BuiltModel, remarks: list[str]) -> Traced:
    """Trace the model.

    Raises:
        TargetError: if a function to ignore does not exist.
    """
    options, model = compilation.options, built.model
    doing("tracing")

    def may_ignore(function: Function) -> bool:
        own_modules = compilation.own_modules
        return options.auto_ignore and is_harmless(function.path, (type(model).__module__,), own_modules)

    traced = trace_first_working(
        model,
        with_larger(model, built.sample, options),
        built.candidates,
        TraceOptions(
            ignore=options.ignore,
            may_ignore=may_ignore,
            targets_per_subgraph=options.targets_per_subgraph,
            is_batch_only=options.sample is not None,
            leaves=options.leaves,
        ),
    )
    for name in traced.trace.tracer.unmatched_ignore:
        if name in options.ignore:
            raise TargetError(
                f"--ignore {name} matches no function of the model",
                hint="write it as function, Class.method or module.path.function",
            )
    remarks += traced.trace.remarks
    if traced.hindrance:
        remarks.append(f"layers are not traced through: {traced.hindrance}")
    return traced


def _require_accepted(files: Mapping[str, bytes], manifest: Manifest, own_modules: tuple[str, ...]) -> None:
    """Reject an artifact that no host would accept.

    An opaque function must not be part of a forward or do more than compute, and a config must not name files or code.
    """
    try:
        check_config(files, has_own_code=bool(own_modules))
        if not manifest.is_portable:
            check_programs(manifest, files, own_modules)
    except ArtifactError as error:
        raise TraceError(
            f"no host would accept this artifact: {error.message}",
            hint="name another function with --ignore, or remove the entry from the model's files",
        ) from error


def _publish(path: Path, files: Mapping[str, bytes], manifest: Manifest) -> Manifest:
    """Check the artifact as a host does, publish it, and return the manifest as a host reads it."""
    doing("checking the artifact")
    with publish_directory(path, replace=True) as partial:
        write_files(partial, {**files, MANIFEST_NAME: manifest.to_bytes()})
        return check_artifact(partial).manifest
