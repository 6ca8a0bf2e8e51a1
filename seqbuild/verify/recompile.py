"""Compile an artifact's source, or a small version of its architecture, again with the same options.

An artifact contains the config, the model's own code and the options of its compilation, so nothing else is needed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.artifact.own_code import FOLDER
from runtime.errors import ModelError, SeqbuildError, TargetError, TraceError
from runtime.host.publish import write_files
from runtime.host.regular_files import read_text
from runtime.model.config import artifact_config
from seqbuild.build import compile_with
from seqbuild.cache.recall import Compiled
from seqbuild.chain.targets import candidate_targets, match_modules
from seqbuild.model.from_config import build_weightless
from seqbuild.model.own_code import own_code_of
from seqbuild.model.source import COMPANIONS, resolve_source
from seqbuild.options import ATTENTIONS, CompileOptions
from seqbuild.sample.inputs import default_sample
from seqbuild.sample.shape import SampleShape
from seqbuild.shrink.config import shrink_table

if TYPE_CHECKING:
    import torch
    from torch import nn

    from runtime.artifact.manifest import Manifest
    from runtime.chain import Artifact

_WITH_WEIGHTS = "verify the artifact itself, with --weights"
# Ingredients of the input key that do not affect the code of the subgraphs, or are equal by construction.
_WITHOUT_EFFECT = ("companions", "config", "checkpoint_names", "format", "version_seqbuild")


def _small_model_directory(artifact: Artifact, folder: Path) -> Path:
    """Write a model directory without weights: the artifact's architecture with a small config."""
    config = artifact_config(artifact)
    try:
        small = type(config).from_dict(shrink_table(stated(config.to_dict())))
        small.architectures = [artifact.manifest.model.class_name]
        small.save_pretrained(folder)
        table = json.loads(read_text(folder / "config.json"))
    except MemoryError:
        raise
    except Exception as error:  # transformers validates with many kinds of exceptions
        why = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"the config of {artifact.path} cannot be reduced to a small model: {why[:300]}", hint=_WITH_WEIGHTS
        ) from error
    return _write(artifact, table, folder)


def _write(artifact: Artifact, table: dict[str, Any], folder: Path) -> Path:
    """Write a directory with this config and the artifact's other files."""
    files = {name: data for name, data in artifact.companions.items() if name in COMPANIONS}
    if artifact.model_code is not None:
        stated = json.loads(artifact.companions["config.json"].decode("utf-8"))
        table |= {"auto_map": _local(stated.get("auto_map"))}
        files |= artifact.model_code.files
    write_files(folder, {**files, "config.json": json.dumps(table).encode()})
    return folder


def _local(auto_map: Any) -> Any:
    """Make an auto_map refer to the model's own directory, which contains the artifact's copy of the code."""
    if isinstance(auto_map, dict):
        return {key: _local(value) for key, value in auto_map.items()}
    if isinstance(auto_map, list):
        return [_local(value) for value in auto_map]
    return auto_map.rpartition("--")[2] if isinstance(auto_map, str) else auto_map


def stated(table: Mapping[str, Any]) -> dict[str, Any]:
    """Remove entries that a config file does not have: some config classes reject what their own `to_dict` adds."""
    plain = {key: value for key, value in table.items() if key not in ("_name_or_path", "output_attentions")}
    return {key: stated(value) if isinstance(value, dict) else value for key, value in plain.items()}


def recompile(manifest: Manifest, directory: Path, out: Path) -> Compiled:
    """Compile the model in `directory` under `out` with the options of `manifest`.

    The manifest does not distinguish given options from defaults, so options that equal the model's default are
    omitted.

    Raises:
        TargetError, TraceError, ModelError: as `build`; also if a sample with the same inputs cannot be generated.
    """
    source, wanted = resolve_source(str(directory)), manifest.model.attn_implementation
    with own_code_of(source, is_allowed=True) as own:
        model = build_weightless(source, own=own)
        is_usual = str(model.config._attn_implementation) == wanted
        names = [entry.name for entry in manifest.inputs]
        text_only = is_text_only(model, names)
        with _sample_file(model, names, out, text_only=text_only) as sample:
            options = CompileOptions(
                model=str(directory),
                targets=_targets(model, manifest.target_patterns),
                ignore=manifest.ignore,
                auto_ignore=manifest.ingredients.get("auto_ignore") != "false",
                sample=sample,
                text_only=text_only,
                targets_per_subgraph=manifest.targets_per_subgraph,
                attn_implementation=None if is_usual or wanted not in ATTENTIONS else wanted,
                out=out,
                trust_remote_code=True,
                leaves=manifest.ingredients.get("leaves", "target"),
            )
            return compile_with(options)


def is_text_only(model: nn.Module, names: list[str]) -> bool:
    """Return whether a text-only sample has these inputs."""
    try:
        return set(names) <= set(default_sample(model, text_only=True, wanted=names))
    except TraceError:
        return False


def sample_of(model: nn.Module, names: list[str], shape: SampleShape, *, text_only: bool) -> dict[str, torch.Tensor]:
    """Generate a sample with exactly these inputs.

    Raises:
        TraceError: if one of them cannot be generated.
    """
    made = default_sample(model, shape, text_only=text_only, wanted=names)
    missing = [name for name in names if name not in made]
    if missing:
        raise TraceError(
            f"the artifact has an input {missing[0]!r}, for which {type(model).__name__} has no default sample",
            hint="it was compiled with --sample; such an artifact can be run but not verified",
        )
    return {name: made[name] for name in names}


@contextlib.contextmanager
def _sample_file(model: nn.Module, names: list[str], folder: Path, *, text_only: bool) -> Iterator[Path | None]:
    """Write a sample with these inputs to a file; None if the compiler's default sample has the same inputs."""
    if list(default_sample(model, text_only=text_only)) == names:
        yield None
        return
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "sample.safetensors"
    sample = sample_of(model, names, SampleShape(images=2), text_only=text_only)
    save_file({name: value.contiguous() for name, value in sample.items()}, file)
    yield file


def _targets(model: nn.Module, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Return the patterns to cut at, without those that match no layer of a small model; empty for the default.

    Raises:
        TargetError: if no pattern matches.
    """
    with contextlib.suppress(TargetError):
        if patterns in candidate_targets(model):
            return ()
    found = tuple(pattern for pattern in patterns if match_modules(model, [pattern]))
    if not found:
        raise TargetError(
            f"the artifact is cut at {patterns[0]}, which matches no module in a small model of its architecture",
            hint=_WITH_WEIGHTS,
        )
    return found


def compile_small(artifact: Artifact, folder: Path) -> Path:
    """Compile a small model of the artifact's architecture with the same options and return its directory.

    Raises:
        ModelError: if its config cannot be reduced to a small model.
        SeqbuildError: if the small model cannot be compiled.
    """
    directory = _small_model_directory(artifact, folder / "small")
    try:
        return recompile(artifact.manifest, directory, folder / "artifacts").path
    except SeqbuildError as error:
        raise type(error)(
            f"a small {artifact.manifest.model.class_name} cannot be compiled with the artifact's options: "
            f"{error.message}",
            hint=error.hint or _WITH_WEIGHTS,
        ) from error


def changed_files(artifact: Artifact, folder: Path) -> tuple[tuple[str, ...] | None, str]:
    """Compile the artifact's config again and compare the code.

    Returns:
        The names of the files that differ, or None and the reason if the code cannot be compared.
    """
    manifest = artifact.manifest
    try:
        config = json.loads(artifact.companions["config.json"].decode("utf-8"))
        directory = _write(artifact, config, folder / "again")
        again = recompile(manifest, directory, folder / "artifacts").manifest
    except SeqbuildError as error:
        return None, f"its config cannot be compiled again: {error.message}"
    other = [
        name
        for name, value in again.ingredients.items()
        if manifest.ingredients.get(name) != value and name not in _WITHOUT_EFFECT
    ]
    if other:
        return None, f"it was compiled with a different {', '.join(other)}"
    ours, theirs = _programs(manifest), _programs(again)
    return tuple(name for name in dict.fromkeys((*ours, *theirs)) if ours.get(name) != theirs.get(name)), ""


def _programs(manifest: Manifest) -> dict[str, Any]:
    """Return the parts to compare, by file: each subgraph with its entry, and the constants."""
    digests = {entry.path: entry.sha256 for entry in manifest.files}
    programs: dict[str, Any] = {entry.file: (entry, digests[entry.file]) for entry in manifest.subgraphs}
    folders = ("subgraphs/", "constants", f"{FOLDER}/")
    return {path: digest for path, digest in digests.items() if path.startswith(folders)} | programs
