"""What the caller of a run knows about its inputs, besides their content. Importing this does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runtime.provenance.record import NamedDigest


@dataclass(frozen=True, kw_only=True, slots=True)
class DataDescription:
    """Where the model inputs of a run come from.

    Attributes:
        sources: name and SHA-256 of each file or data set.
        settings: how samples were made of them, by name.
    """

    sources: tuple[NamedDigest, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOrigin:
    """What the caller of a run knows about its inputs, besides their content.

    Attributes:
        data: of the calibration data.
        directory: that a model in memory was loaded from; None if its weights are read from a directory.
        command: repeats the run.
    """

    data: DataDescription = DataDescription()
    directory: Path | None = None
    command: str = ""
