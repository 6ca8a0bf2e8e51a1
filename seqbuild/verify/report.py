"""Result of a verification, and its presentation as text and JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """Comparison of the model and the chain on inputs of one shape.

    Attributes:
        batch: the number of rows.
        sequence: the number of tokens in a row, including those that represent images.
        padding: `left`, `right` or "".
        images: the number of images (or sounds) in a row; None for a text model.
        seed: the seed of the inputs' values.
        absolute: the largest difference.
        relative: the largest difference divided by the largest magnitude in its tensor (at least 1).
        output: the field of the model's output with the largest difference; empty if there is none.
        subgraph: the first subgraph in which a layer's result differs; None if unknown.
        problem: why the chain could not be run or compared; empty otherwise.
        skipped: why there is nothing to compare (the artifact or the model rejects this shape); empty otherwise.
        is_equal: whether chain and model are equal up to the tolerance.
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
        """Return the result as one phrase."""
        if self.skipped or self.problem:
            return f"not compared: {self.skipped}" if self.skipped else f"fails: {self.problem}"
        if not self.absolute:
            return "equal"
        place = "" if self.subgraph is None else f", from subgraph {self.subgraph} on"
        return f"{'within the tolerance' if self.is_equal else 'differs'}: {self.output}{place}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """Report of `seqbuild.verify_artifact`.

    Attributes:
        path: the artifact.
        class_name: the model's class.
        weights: the checkpoint; None if a small model of the same architecture was used.
        dtype: the dtype of the weights in the run.
        tolerance: the allowed relative difference.
        shapes: one entry for each shape of the inputs.
        changed: files that differ from the result of compiling the artifact's config again; None if it was not
            compiled again.
        remarks: further information, one sentence each.
        seconds: the duration.
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
        """Return whether everything that was compared is equal."""
        return not self.changed and all(shape.is_equal or shape.skipped for shape in self.shapes)

    @property
    def verdict(self) -> str:
        """Return the result as one sentence."""
        done = [shape for shape in self.shapes if not shape.skipped]
        bad = [shape for shape in done if not shape.is_equal]
        if bad:
            return f"NOT EQUAL: the results of chain and model differ for {len(bad)} of {len(done)} shapes"
        if self.changed:
            return f"NOT EQUAL: {self.changed[0]} differs from the result of compiling the artifact's config again"
        how = f"up to {self.tolerance:g}" if any(shape.absolute for shape in done) else "bit for bit"
        return f"equal {how} on {len(done)} shapes"


def as_plain(found: Verification) -> dict[str, Any]:
    """Convert the report to plain values for `json.dumps`; an infinite difference becomes null."""
    shapes = [
        {name: None if value == math.inf else value for name, value in asdict(shape).items()} for shape in found.shapes
    ]
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
