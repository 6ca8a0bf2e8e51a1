"""A directory of saved statistics: what it was measured with, and a reader for each step."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from runtime.data.lanes import NUM_LANES, TOKENS_PER_LANE
from runtime.errors import DataError
from runtime.host.half_precision import names_of_slow_halves
from runtime.saved_statistics.records import (
    FORMAT,
    INDEX_NAME,
    VERSION,
    SavedIndex,
    SavedStep,
    damaged,
    read_record,
    step_name,
)
from runtime.saved_statistics.step_reader import StepReader
from runtime.streaming.identity import checkpoint_identity
from runtime.workers.comparison import FILE_TIMES

if TYPE_CHECKING:
    from runtime.chain import Artifact
    from runtime.checkpoint.reader import Checkpoint

_WORDS = {"checkpoint": "weights"}
_ANOTHER = {"artifact": "another", "checkpoint": "other", "rotations": "other"}
DATA = "data"  # the ingredient of an identity that a run from saved statistics takes over


def statistics_identity(
    artifact: Artifact, checkpoint: Checkpoint, dtype: torch.dtype, rotations: Sequence[Any] = ()
) -> dict[str, str]:
    """Return what decides the statistics of some data: a digest or a value for each ingredient, by name.

    Args:
        artifact: as it was loaded, before its experts are split.
        checkpoint: the original weights.
        dtype: of weights and activations.
        rotations: changes of the model that are applied before anything is measured, by name and field.
    """
    return {
        "artifact": hashlib.sha256(artifact.manifest.to_bytes()).hexdigest(),
        **checkpoint_identity(checkpoint),
        "dtype": str(dtype).removeprefix("torch."),
        "rotations": _digest_of(rotations) if rotations else "none",
    }


def _digest_of(values: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(list(values), default=str).encode()).hexdigest()


def surroundings(device: torch.device) -> dict[str, str]:
    """Return what may change the last bits of statistics."""
    return {
        "torch": str(torch.__version__),
        "device": device.type,
        "threads": str(torch.get_num_threads()),
        "slow 16-bit types": ",".join(names_of_slow_halves()) or "none",
        "lanes": f"{NUM_LANES} of at least {TOKENS_PER_LANE} tokens",
    }


class StatisticsStore:
    """A complete directory of saved statistics.

    Args:
        folder: the directory.
        index: its list.
        digest: of the list, and so of everything in the directory.
    """

    def __init__(self, folder: Path, index: SavedIndex, digest: str) -> None:
        self.folder, self.index, self.digest = folder, index, digest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> StatisticsStore:
        """Open a directory.

        Raises:
            DataError: it is missing, incomplete, damaged, or of another version.
        """
        folder = Path(path)
        if not (folder / INDEX_NAME).exists():
            missing = "is not a directory" if folder.exists() else "does not exist"
            what = f"has no {INDEX_NAME}" if folder.is_dir() else missing
            hint = "pass a directory that a run with --keep-statistics has finished"
            raise DataError(f"the statistics directory {folder} {what}", hint=hint)
        index, digest = read_record(folder / INDEX_NAME, SavedIndex)
        if index.format != FORMAT or index.format_version != VERSION:
            stated = f"format {index.format!r}, version {index.format_version}"
            raise damaged(folder / INDEX_NAME, f"it has {stated}, and this release reads {FORMAT!r}, version {VERSION}")
        if index != index.sealed():
            raise damaged(folder / INDEX_NAME, "its SHA-256 differs from the one that it states")
        return cls(folder, index, digest)

    @property
    def identity(self) -> Mapping[str, str]:
        """A digest or a value for each ingredient of the statistics, by name."""
        return self.index.identity

    @property
    def num_steps(self) -> int:
        """The number of steps, which is that of the artifact's subgraphs."""
        return len(self.index.steps)

    def require_same(self, identity: Mapping[str, str], num_steps: int) -> None:
        """Reject statistics of another model.

        Args:
            identity: of the run, see `statistics_identity`; data may differ.
            num_steps: of the run.

        Raises:
            DataError: naming the ingredients that differ.
        """
        names = [name for name, value in identity.items() if self.identity.get(name) != value and name != FILE_TIMES]
        if names:
            shown = [_difference(name, self.identity.get(name), identity[name]) for name in names]
            raise DataError(
                f"the statistics in {self.folder} were measured with {' and '.join(shown)}",
                hint="measure them again with --keep-statistics, or pass --data",
            )
        if num_steps != self.num_steps:
            raise damaged(self.folder / INDEX_NAME, f"it has {self.num_steps} steps, and the artifact {num_steps}")

    def remarks(self, identity: Mapping[str, str], device: torch.device) -> list[str]:
        """Warn of what may change the result without changing the identity."""
        now, found = surroundings(device), []
        names = [name for name, value in now.items() if self.index.surroundings.get(name) != value]
        if names:
            shown = " and ".join(_difference(name, self.index.surroundings.get(name), now[name]) for name in names)
            found.append(f"the saved statistics were measured with {shown}: the last bits may differ")
        times = [str(one.get(FILE_TIMES)) for one in (self.identity, identity)]
        if times[0] != times[1] and times[0].partition(" ")[0] == times[1].partition(" ")[0]:
            what = "the files of the weights were written again after the statistics were measured"
            found.append(f"{what}; their sizes, headers and samples of all tensors are the same")
        return [f"warning: {text}" for text in found]

    def step(self, index: int) -> StepReader:
        """Return the reader of a step.

        Raises:
            DataError: its list is damaged.
        """
        saved, _ = read_record(self.folder / step_name(index), SavedStep, self.index.steps[index])
        return StepReader(self.folder, index, saved)


def _difference(name: str, before: str | None, now: str) -> str:
    word = _WORDS.get(name, name)
    return f"{_ANOTHER[name]} {word}" if name in _ANOTHER else f"{word} {before} instead of {now}"
