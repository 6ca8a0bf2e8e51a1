"""Result of a verification, and its presentation as text and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADINGS = ("batch", "sequence", "padding", "images", "seed", "absolute", "relative", "result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """The model and the chain on inputs of one shape.

    Attributes:
        batch: rows of text.
        sequence: tokens of a row; where there are images, with those that stand for them.
        padding: `left`, `right` or nothing.
        images: how many images (or sounds) a row has; None for a model of text alone.
        seed: of the inputs' values.
        absolute: the largest difference of any number.
        relative: the same, by the largest magnitude in its tensor (at least 1).
        output: the field of the model's output with the largest difference; empty where none differs.
        subgraph: the first one in which a layer returned something else; None where that is not known.
        problem: why the chain could not be run, or not be compared; empty if it could.
        skipped: why nothing was to be compared: the artifact or the model itself refuses this shape; else empty.
        is_equal: whether the chain is the model, up to the tolerance.
    """

    batch: int
    sequence: int
    padding: str = ""
    images: int | None = None
    seed: int = 0
    absolute: float = 0.0
    relative: float = 0.0
    output: str = ""
    subgraph: int | None = None
    problem: str = ""
    skipped: str = ""
    is_equal: bool = False

    @property
    def result(self) -> str:
        """One phrase: `equal`, or what is wrong."""
        if self.skipped or self.problem:
            return f"not compared: {self.skipped}" if self.skipped else f"fails: {self.problem}"
        if not self.absolute:
            return "equal"
        place = "" if self.subgraph is None else f", from subgraph {self.subgraph} on"
        return f"{'within the tolerance' if self.is_equal else 'differs'}: {self.output}{place}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What `seqbuild.verify_artifact` found.

    Attributes:
        path: the artifact.
        class_name: the model's class.
        weights: the checkpoint that was used; None when a small model of the same architecture stood for it.
        dtype: of the weights in the run.
        tolerance: the relative difference that was allowed.
        shapes: one entry for each shape of the inputs.
        changed: subgraph files that are not what this compiler makes of the artifact's config; None when the artifact
            was not compiled again.
        remarks: what a reader should know, a sentence each.
        seconds: the time it took.
    """

    path: Path
    class_name: str
    weights: Path | None
    dtype: str
    tolerance: float
    shapes: tuple[Compared, ...]
    changed: tuple[str, ...] | None
    remarks: tuple[str, ...]
    seconds: float

    @property
    def is_equal(self) -> bool:
        """Whether all that was compared is equal."""
        return not self.changed and all(shape.is_equal or shape.skipped for shape in self.shapes)

    @property
    def verdict(self) -> str:
        """Return the result as one sentence."""
        done = [shape for shape in self.shapes if not shape.skipped]
        bad = [shape for shape in done if not shape.is_equal]
        if bad:
            return f"NOT EQUAL: on {len(bad)} of {len(done)} shapes the chain does not compute what the model does"
        if self.changed:
            return f"NOT EQUAL: {self.changed[0]} is not what compiling its config gives"
        how = f"up to {self.tolerance:g}" if any(shape.absolute for shape in done) else "bit for bit"
        return f"equal {how} on {len(done)} shapes"


def as_plain(found: Verification) -> dict[str, Any]:
    """The report as plain values, ready for `json.dumps`; an infinite difference is null."""
    shapes: list[dict[str, Any]] = []
    for shape in found.shapes:
        values: Mapping[str, Any] = {name: getattr(shape, name) for name in Compared.__dataclass_fields__}
        shapes.append({name: None if value == math.inf else value for name, value in values.items()})
    return {
        "path": str(found.path),
        "equal": found.is_equal,
        "verified": "architecture" if found.weights is None else "artifact",
        "model": found.class_name,
        "weights": None if found.weights is None else str(found.weights),
        "dtype": found.dtype,
        "tolerance": found.tolerance,
        "shapes": shapes,
        "changed": None if found.changed is None else list(found.changed),
        "remarks": list(found.remarks),
        "seconds": found.seconds,
    }
