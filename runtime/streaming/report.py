"""The result of a run, with a report for each module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from runtime.console import human_bytes
from runtime.terminal import Column, printable, table_lines

_NUM_SHOWN = 5
_COLUMNS = (
    Column(heading="module", is_flexible=True),
    Column(heading="error", is_number=True),
    Column(heading="loss", is_number=True),
    Column(heading="dampening", is_number=True, dropped=1),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleReport:
    """The quantization of one module.

    Attributes:
        name: its dotted name.
        algorithm: that quantized it.
        scheme: the format of its weight and inputs, in words.
        loss: ‖WX-QX‖² over the measured inputs X, before these are rounded themselves; ‖W-Q‖² without measured inputs.
            Of a large weight that is rounded to nearest it is an estimate, from some of the rows or inputs.
        damping: as in `QuantizedWeight`.
        num_tokens: number of measured inputs.
        num_dead: number of input features that were zero in all of them; 0 if the recipe measures no features.
        fallback: why another algorithm was used, or a part of it left out; empty otherwise.
        error: ‖WX-QX‖ / ‖WX‖ over the same inputs, ‖W-Q‖ / ‖W‖ without; 0 if the output is zero. Of a large weight it
            is an estimate from some of the rows or inputs, see `runtime.algorithms.output_squares`.
        seconds: time of the solve.
        num_bytes: size of its tensors in the checkpoint.
    """

    name: str
    algorithm: str
    loss: float
    damping: float
    num_tokens: int
    num_dead: int = 0
    fallback: str = ""
    scheme: str = ""
    error: float = field(default=0.0, compare=False)
    seconds: float = field(default=0.0, compare=False)
    num_bytes: int = field(default=0, compare=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The result of a run.

    Attributes:
        path: the checkpoint's directory.
        num_bytes: size of its tensors.
        modules: reports of the quantized modules, in order.
        unreached: modules that the recipe targets and the model's forward never calls, so they stay unchanged.
        remarks: warnings of the run, a line each.
        seconds: time in this process.
        resumed_at: number of subgraphs that an earlier process had finished.
        num_caches: number of attention modules with scales for their key-value cache.
    """

    path: Path
    num_bytes: int
    modules: tuple[ModuleReport, ...]
    unreached: tuple[str, ...]
    remarks: tuple[str, ...]
    seconds: float
    resumed_at: int = 0
    num_caches: int = 0


def summary_lines(result: Calibration, width: int | None = None) -> Iterator[str]:
    """Summarize a run: its size, the modules with the largest errors, and every warning.

    Args:
        result: of the run.
        width: of the terminal; None for files and pipes.
    """
    again = f", after {result.resumed_at} subgraphs of an earlier process" if result.resumed_at else ""
    size = human_bytes(result.num_bytes)
    caches = f" and scales of {result.num_caches} key-value caches measured" if result.num_caches else ""
    yield f"{len(result.modules)} modules quantized{caches} in {result.seconds:.1f} s{again}; {size} in {result.path}"
    measured = [module for module in result.modules if module.num_tokens]
    others = [module for module in result.modules if not module.num_tokens]
    if measured:
        yield "Largest relative output error (‖WX−QX‖/‖WX‖):"
        yield from _table(measured, width)
    if others:
        yield "Largest relative weight error (‖W−Q‖/‖W‖) of modules whose inputs were not measured:"
        yield from _table(others, width)
    yield from result.remarks


def _table(modules: Iterable[ModuleReport], width: int | None) -> Iterator[str]:
    worst = sorted(modules, key=lambda module: -module.error)[:_NUM_SHOWN]
    rows = [
        (printable(module.name), f"{module.error:.4f}", f"{module.loss:.4g}", f"{module.damping:g}") for module in worst
    ]
    for line in table_lines(_COLUMNS, rows, None if width is None else width - 2):
        yield f"  {line}"
