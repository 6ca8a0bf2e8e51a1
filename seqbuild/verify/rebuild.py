"""Verify that an artifact is reproducible: compile its model again and compare every byte."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from runtime.artifact.check import Checked, check_artifact
from runtime.artifact.manifest import MANIFEST_NAME
from runtime.artifact.own_code import is_own_module
from runtime.errors import UsageError
from runtime.host.publish import write_files
from seqbuild.verify.recompile import recompile


@dataclass(frozen=True, kw_only=True, slots=True)
class Rebuilt:
    """Result of compiling again.

    Attributes:
        path: the artifact that was compared.
        num_files: the number of compared files, including the manifest.
        differing: names of files that differ in any byte, or exist on one side only.
        ingredients: names of the input key's ingredients that differ here; if there are any, different bytes are
            expected.
    """

    path: Path
    num_files: int
    differing: tuple[str, ...]
    ingredients: tuple[str, ...]

    @property
    def is_same(self) -> bool:
        """Return whether all bytes are equal."""
        return not self.differing

    def __str__(self) -> str:
        if self.is_same:
            return f"{self.path}: compiling again gives the same {self.num_files} files, byte for byte"
        what = f"{self.path}: compiling again gives different bytes in {', '.join(self.differing[:8])}"
        return what + (f"; these ingredients differ here: {', '.join(self.ingredients)}" if self.ingredients else "")


def rebuild(
    artifact: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> Rebuilt:
    """Compile an artifact's model again with the options in its manifest.

    Args:
        artifact: its directory.
        source: the model's directory or hub id; None uses the config, tokenizer and code in the artifact.
        trust_remote_code: allow executing the model's own code, if any.

    Raises:
        UsageError: if the artifact alone is not sufficient.
        ArtifactError, ModelError, TargetError, TraceError: as `seqbuild.build.build`.
    """
    root = Path(artifact)
    checked = check_artifact(root)
    if checked.code is not None and not trust_remote_code:
        model = checked.manifest.model
        named = {model.config_module: model.config_class_name, model.module: model.class_name}
        own = {module: name for module, name in named.items() if is_own_module(module)}
        raise checked.code.refusal(str(root), own.values(), own)
    if source is None and checked.manifest.ingredients.get("checkpoint_names") != "none":
        raise UsageError(
            f"{root} was compiled with a checkpoint, and its tensors' names are part of the artifact",
            hint="give the model's directory with --source",
        )
    with tempfile.TemporaryDirectory(prefix="seqbuild-") as name:
        directory = _described(checked, Path(name, "model")) if source is None else Path(source)
        again = check_artifact(recompile(checked.manifest, directory, Path(name, "out")).path)
    ours, theirs = ({MANIFEST_NAME: one.manifest_bytes, **one.contents} for one in (checked, again))
    mine, other = checked.manifest.ingredients, again.manifest.ingredients
    return Rebuilt(
        path=root,
        num_files=len(ours),
        differing=tuple(name for name in dict.fromkeys((*ours, *theirs)) if ours.get(name) != theirs.get(name)),
        ingredients=tuple(name for name in dict.fromkeys((*mine, *other)) if mine.get(name) != other.get(name)),
    )


def _described(checked: Checked, folder: Path) -> Path:
    """Write the part of the model's directory that the artifact contains, with the same names and bytes."""
    files = {
        name: data for name, data in checked.contents.items() if name.endswith((".json", ".txt", ".model", ".jinja"))
    }
    files |= dict(checked.code.files) if checked.code is not None else {}
    write_files(folder, files)
    return folder
