"""What the tests of both command lines share: a place with all that a run takes, and what an error looks like."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtime.artifact.manifest import MANIFEST_NAME
from runtime.chain import read_manifest
from tests.runtime.small import Small, write_token_file

ROOT = Path(__file__).parents[2]
GPTQ = "GPTQModifier: {targets: Linear, scheme: W4A16, ignore: [lm_head]}\n"
RTN = "QuantizationModifier: {targets: Linear, scheme: W4A16, ignore: [lm_head]}\n"

Run = Callable[..., tuple[int, str, str]]


class Place:
    """A directory with all that a calibration takes, each of which a test may spoil."""

    def __init__(self, folder: Path, small: Small) -> None:
        self.folder = folder
        self.artifact = folder / "artifact"
        self.weights = folder / "weights"
        shutil.copytree(small.artifact, self.artifact)
        shutil.copytree(small.weights, self.weights)
        self.data = write_token_file(folder / "tokens.safetensors")
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(GPTQ)
        self.out = folder / "out"

    def calibrate(self, *more: str | Path) -> list[str]:
        command = ["calibrate", self.artifact, "--weights", self.weights, *self._data(more)]
        return [str(part) for part in (*command, "--recipe", self.recipe, "-o", self.out, *more)]

    def evaluate(self, *more: str | Path) -> list[str]:
        command = ["evaluate", self.artifact, "--weights", self.weights, *self._data(more)]
        return [str(part) for part in (*command, *more)]

    def _data(self, more: tuple[str | Path, ...]) -> list[str | Path]:
        """The token file, unless a test passes its own data."""
        return [] if "--data" in more else ["--data", self.data]

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def tree(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*"))


def assert_refused(result: tuple[int, str, str], *parts: str, program: str = "runtime") -> None:
    """One line that says what is wrong, and exit code 2."""
    code, _, complaint = result
    assert complaint.endswith("\n")
    assert complaint.count("\n") == 1, complaint
    assert complaint.startswith(f"{program}: error: ")
    assert "Traceback" not in complaint
    for part in parts:
        assert part in complaint
    assert code == 2


def edit_manifest(place: Place, **changes: Any) -> None:
    """Write another manifest with a digest that fits it."""
    manifest = replace(read_manifest(place.artifact), **changes)
    (place.artifact / MANIFEST_NAME).write_bytes(manifest.to_bytes())


def rely_on_other_sources(place: Place) -> None:
    """Let the artifact look as if another transformers had compiled it, whose Llama is another file and is called."""
    manifest = read_manifest(place.artifact)
    changed = {"transformers.models.llama.modeling_llama": "ab" * 32}
    edit_manifest(
        place,
        versions={**manifest.versions, "transformers": "4.99.0"},
        sources={**manifest.sources, **changed},
        policy="target",
    )
