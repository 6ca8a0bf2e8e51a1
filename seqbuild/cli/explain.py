"""Explain a cache hit or miss of a compilation: each ingredient of the input key, and the differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import ArtifactError
from runtime.language.library_sources import changed_sources
from seqbuild.cache import key as cache
from seqbuild.cache.recall import read_record, recall, record_path, request, vouched
from seqbuild.cache.store import entries, nearest
from seqbuild.model.own_code import own_code_of
from seqbuild.model.source import resolve_source
from seqbuild.options import Options

EXCLUDED = {
    "path": "where the model, the artifact and the cache lie",
    "time": "when it is compiled, and the times of files",
    "user": "who compiles it, on which machine, in which directory and with which environment",
    "values": "the values of the sample; its shapes and dtypes count",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """Explanation of a hit or miss.

    Attributes:
        ingredients: of the input key, by name.
        input_key: the hash of the ingredients.
        path: the artifact's directory.
        is_hit: whether the complete artifact exists.
        reason: the reason for a miss.
        nearest: the artifact with the fewest differences; None if there is none, or for a hit.
        differing: names of the differing ingredients, with the nearest artifact's value and the requested one.
        changed: names of library files that changed since its compilation, as far as known.
    """

    ingredients: Mapping[str, str]
    input_key: str
    path: Path
    is_hit: bool
    reason: str
    nearest: Path | None = None
    differing: Mapping[str, tuple[str, str]]
    changed: tuple[str, ...] = ()


def explain(
    model: str, options: Options, *, out: Path, revision: str | None = None, trust_remote_code: bool = False
) -> Explanation:
    """Explain what `seqbuild compile` would do. Nothing is traced or written.

    Args:
        model: as `seqbuild.build.build` takes it.
        options: what is asked for.
        out: where artifacts are.
        revision: of a hub id.
        trust_remote_code: whether the model's own code may be executed, which its ingredients need.

    Raises:
        ModelError, TargetError, DataError: as `build`.
    """
    source = resolve_source(model, revision=revision)
    with own_code_of(source, is_allowed=trust_remote_code) as own:
        parts = request(source, options, own.files if own is not None else {})
        known = recall(parts, source.name, out)
        if known is not None:
            found = known.manifest
            return Explanation(
                ingredients=found.ingredients,
                input_key=found.input_key,
                path=known.path,
                is_hit=True,
                reason="",
                differing={},
            )
        from seqbuild.build import prepared

        *_, made = prepared(source, own, options)
        ingredients = dict(sorted(made.items()))
    key = cache.input_key(ingredients)
    path = out / f"{source.name}-{key[:12]}"
    reason = "there is no artifact with this key"
    try:
        there = cache.find_artifact(path, key)
        if there is None and path.is_dir():
            reason = "library files that the artifact relies on have changed"
        elif there is not None:
            reason = "no record says that a compilation made this artifact"
        is_hit = there is not None and vouched(parts, out, there)
    except ArtifactError as error:
        is_hit, reason = False, f"what is there is damaged: {error.message}"
    closest = nearest(ingredients, entries(out)) if out.is_dir() and not is_hit else None
    record = read_record(record_path(out, parts))
    return Explanation(
        ingredients=ingredients,
        input_key=key,
        path=path,
        is_hit=is_hit,
        reason="" if is_hit else reason,
        nearest=closest[0].path if closest is not None else None,
        differing=_values(ingredients, closest[0].manifest.ingredients, closest[1])
        if closest is not None and closest[0].manifest is not None
        else {},
        changed=tuple(changed_sources(record.sources)) if record is not None else (),
    )


def _values(ours: Mapping[str, str], theirs: Mapping[str, str], names: list[str]) -> dict[str, tuple[str, str]]:
    return {name: (theirs.get(name, "not there"), ours.get(name, "not there")) for name in names}
