"""The rows of a benchmark's table: what was measured, the least that it could take, and what was not run."""

from __future__ import annotations

import json
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_COLUMNS = ("what", "measured", "floor", "share", "note")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A line of the table.

    Attributes:
        what: that was measured.
        measured: the value; None if it was not measured, and `note` states the reason.
        unit: of the value and the floor; "s" is printed as ms below a second.
        floor: the least seconds, by operations or bytes over the rates of the same machine; None if there is no floor.
        note: how it was measured.
    """

    what: str
    measured: float | None = None
    unit: str = "s"
    floor: float | None = None
    note: str = ""

    @property
    def share(self) -> float | None:
        """The floor beside the value: 1 is the limit of the machine."""
        return self.floor / self.measured if self.floor is not None and self.measured else None

    def cells(self) -> tuple[str, ...]:
        """The cells of the row, as text."""
        share = "" if self.share is None else f"{self.share:.0%}"
        return self.what, _shown(self.measured, self.unit), _shown(self.floor, self.unit), share, self.note


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "s" and value < 1:
        return f"{value * 1e3:.2f} ms"
    return f"{value:.2f} {unit}" if abs(value) < 100 else f"{value:.0f} {unit}"


def as_markdown(rows: Sequence[Row]) -> str:
    """The table, with columns of equal width, so that it can be read in a terminal as well."""
    cells = [_COLUMNS, *(tuple(cell.replace("|", "\\|") for cell in row.cells()) for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(_COLUMNS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def write_table(rows: Sequence[Row], facts: Mapping[str, Any], directory: Path) -> None:
    """Write the table as `table.md` and `table.json`, with the facts of the machine and the run."""
    directory.mkdir(parents=True, exist_ok=True)
    heading = "".join(f"- {name}: {value}\n" for name, value in facts.items())
    (directory / "table.md").write_text(f"{heading}\n{as_markdown(rows)}", encoding="utf-8")
    content = {"facts": dict(facts), "rows": [asdict(row) | {"share": row.share} for row in rows]}
    (directory / "table.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A part of the benchmark.

    Attributes:
        name: of the part.
        seconds: that it is expected to take; it is stopped after twice as many.
        rows: measures, and yields the rows; gets the seconds that are left.
    """

    name: str
    seconds: float
    rows: Callable[[float], Iterable[Row]]


def run_parts(parts: Sequence[Part], budget: float, clock: Callable[[], float] = time.monotonic) -> Iterator[Row]:
    """Run the parts in their order, each if the budget has room for it, and yield their rows.

    A part that fails or takes too long yields one row with the reason, after those that it has yielded before.
    """
    begin = clock()
    for part in parts:
        left = budget - (clock() - begin)
        if part.seconds > left:
            yield Row(what=part.name, note=f"not run: needs about {part.seconds:.0f} s, {max(left, 0):.0f} s are left")
            continue
        try:
            with _Alarm(min(left, 2 * part.seconds)):
                yield from part.rows(left)
        except Exception as error:
            text = " ".join(str(error).split())
            yield Row(what=part.name, note=f"failed: {type(error).__name__}: {text[:300]}")


class _Alarm:
    """Raises TimeoutError in the main thread when its seconds are over."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGALRM, self._stop)
        signal.setitimer(signal.ITIMER_REAL, max(self.seconds, 0.001))

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)

    def _stop(self, *_: object) -> None:
        raise TimeoutError(f"stopped after {self.seconds:.0f} s")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Operations a second in bf16 and float32; bytes a second in the device's memory, to and from it, and of the disk;
    seconds of a launch.
    """

    narrow: float
    wide: float
    memory: float
    upload: float
    download: float
    read: float
    write: float
    launch_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """The sizes of a decoder layer, and of the data.

    Attributes:
        shapes: [O, I] of each Linear.
        inputs: the width of each distinct input.
        hidden: the width of attention.
        num_tokens: of the data.
        seq_len: of a sample.
    """

    shapes: tuple[tuple[int, int], ...]
    inputs: tuple[int, ...]
    hidden: int
    num_tokens: int
    seq_len: int

    @classmethod
    def of(cls, config: Mapping[str, Any], num_samples: int, seq_len: int) -> Layer:
        """The layer of a Llama."""
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
        shapes = ((hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden))
        return cls(
            shapes=(*shapes, (inner, hidden), (inner, hidden), (hidden, inner)),
            inputs=(hidden, hidden, hidden, inner),
            hidden=hidden,
            num_tokens=num_samples * seq_len,
            seq_len=seq_len,
        )


def layer_floor(layer: Layer, rates: Rates) -> float:
    """The least seconds of GPTQ of a layer, if nothing but products took time.

    Each batch passes twice, the first time without the last Linear; half of each symmetric Hessian is summed up; one
    factorization takes I^3 / 3 for each input, and a solve O I^2.
    """
    *first, last = (2 * rows * columns for rows, columns in layer.shapes)
    attention = 2 * layer.seq_len * layer.hidden  # causal: half of two products
    forwards = layer.num_tokens * (2 * (sum(first) + attention) + last)
    sums = layer.num_tokens * sum(width**2 for width in layer.inputs)
    solves = sum(width**3 / 3 for width in layer.inputs) + sum(rows * width**2 for rows, width in layer.shapes)
    return (forwards + sums) / rates.narrow + solves / rates.wide


def extrapolated(seconds: Sequence[float], num_layers: int) -> float:
    """The seconds of `num_layers` layers: those of the first, and the median of the others for each other.

    Args:
        seconds: of each layer that was run, at least one.
        num_layers: at least one.
    """
    first, others = seconds[0], seconds[1:] or seconds
    return first + (num_layers - 1) * statistics.median(others)
