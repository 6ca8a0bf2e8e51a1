"""Explain a cache hit or miss of a compilation: each ingredient of the input key, and the differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runtime.errors import ArtifactError
from runtime.language.library_sources import changed_sources
from seqbuild.build import opened
from seqbuild.cache.key import Compilation, digest, requested
from seqbuild.cache.recall import find_artifact, is_recorded, read_record, recall, record_path
from seqbuild.cache.store import entries, nearest
from seqbuild.options import CompileOptions

EXCLUDED = {
    "path": "the locations of the model, the artifact and the cache",
    "time": "the time of the compilation, and the times of files",
    "user": "the user, the machine, the working directory and the environment",
    "values": "the values of the sample; its shapes and dtypes count",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """Explanation of a hit or miss.

    Attributes:
        ingredients: of the input key, by name.
        input_key: the digest of the ingredients.
        path: the artifact's directory.
        reason: the reason for a miss; empty for a hit.
        nearest: the artifact with the fewest differences; None if there is none, or for a hit.
        differing: names of the differing ingredients, with the nearest artifact's value and the requested one.
        changed: names of library files that changed since its compilation, as far as known.
    """

    ingredients: Mapping[str, str]
    input_key: str
    path: Path
    reason: str = ""
    nearest: Path | None = None
    differing: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    changed: tuple[str, ...] = ()

    @property
    def is_hit(self) -> bool:
        """Return whether the complete artifact exists."""
        return not self.reason


def explain(options: CompileOptions) -> Explanation:
    """Explain what `seqbuild compile` would do with these options. Nothing is traced or written.

    Raises:
        ModelError, TargetError, DataError: as `seqbuild.build.build`.
    """
    with opened(options) as compilation:
        request = requested(compilation)
        known = recall(compilation, request)
        if known is not None:
            found = known.manifest
            return Explanation(ingredients=found.ingredients, input_key=found.input_key, path=known.path)
        from seqbuild.passes import build_model

        ingredients = dict(sorted(build_model(compilation, request).ingredients.items()))
        return _explained(compilation, request, ingredients)


def _explained(compilation: Compilation, request: Mapping[str, str], ingredients: Mapping[str, str]) -> Explanation:
    key, out = digest(ingredients), compilation.options.out
    path = compilation.artifact_path(key)
    reason = _reason(path, key, request)
    known = nearest(ingredients, entries(out)) if out.is_dir() and reason else None
    record = read_record(record_path(out, request))
    return Explanation(
        ingredients=ingredients,
        input_key=key,
        path=path,
        reason=reason,
        nearest=known[0] if known is not None else None,
        differing=known[1] if known is not None else {},
        changed=tuple(changed_sources(record.sources)) if record is not None else (),
    )


def _reason(path: Path, key: str, request: Mapping[str, str]) -> str:
    """Return the reason for a miss; empty for a hit."""
    try:
        found = find_artifact(path, key)
    except ArtifactError as error:
        return f"the existing artifact is damaged: {error.message}"
    if found is not None:
        is_hit = is_recorded(request, path.parent, found)
        return "" if is_hit else "no record confirms that a compilation made this artifact"
    return "library files that the artifact relies on have changed" if path.is_dir() else "no artifact has this key"
