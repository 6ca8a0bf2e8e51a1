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
    """Comparison of the model and the chain on inputs of one shape.

    Attributes:
        batch: rows of text.
        sequence: tokens in a row, including the placeholders of images.
        padding: `left`, `right` or empty.
        images: images (or sounds) in a row; None for text only.
        seed: seed of the inputs' values.
        absolute: the largest difference of any number.
        relative: the same, relative to the largest magnitude in its tensor (at least 1).
        output: the field of the model's output with the largest difference; empty if none differs.
        subgraph: the first subgraph in which a layer's output differs; None if unknown.
        problem: the reason why the chain did not run or cannot be compared, if any.
        skipped: the reason why the artifact or the model itself rejects this shape, if it does.
        is_equal: whether the outputs are equal up to the tolerance.
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
        """Return one phrase: `equal`, or the difference."""
        if self.skipped or self.problem:
            return f"not compared: {self.skipped}" if self.skipped else f"fails: {self.problem}"
        if not self.absolute:
            return "equal"
        place = "" if self.subgraph is None else f", from subgraph {self.subgraph} on"
        return f"{'within the tolerance' if self.is_equal else 'differs'}: {self.output}{place}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """Result of `seqbuild.verify_artifact`.

    Attributes:
        path: the artifact.
        class_name: the model's class.
        weights: the checkpoint that was used; None for a small model of the same architecture.
        dtype: dtype of the weights in the run.
        tolerance: the allowed relative difference.
        shapes: one entry for each shape of the inputs.
        changed: subgraph files that differ from the result of compiling the artifact's config again; None if it was
            not compiled again.
        remarks: further information for the user, a sentence each.
        seconds: the elapsed time.
    """

    path: Path
    class_name: str
    weights: Path | None
    dtype: str
    tolerance: float
    shapes: tuple[Compared, ...]
    changed: tuple[str, ...] | None
    remarks: tuple[str, ...]
    seconds: float = 0.0

    @property
    def is_equal(self) -> bool:
        """Return whether all compared outputs and files are equal."""
        return not self.changed and all(shape.is_equal or shape.skipped for shape in self.shapes)

    @property
    def verdict(self) -> str:
        """Return the result as one sentence."""
        done = [shape for shape in self.shapes if not shape.skipped]
        bad = [shape for shape in done if not shape.is_equal]
        if bad:
            return f"NOT EQUAL: the chain differs from the model on {len(bad)} of {len(done)} shapes"
        if self.changed:
            return f"NOT EQUAL: compiling its config again gives a different {self.changed[0]}"
        how = f"up to {self.tolerance:g}" if any(shape.absolute for shape in done) else "bit for bit"
        return f"equal {how} on {len(done)} shapes"


def as_plain(found: Verification) -> dict[str, Any]:
    """Convert the report to plain values for `json.dumps`; an infinite difference is null."""
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
