"""Relative errors by layer and kind of module: the numbers of a heat map, and tables of the worst."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from runtime.report.facts import ReportedModule
from runtime.report.places import Place, places, short_kinds

OUTPUT, WEIGHT = "relative output error ‖WX−QX‖/‖WX‖", "relative weight error ‖W−Q‖/‖W‖"
_MOST_KINDS, _MOST_LAYERS = 40, 1000
_LEAST_SHARE = 0.05  # of the modules: fewer are listed, not drawn


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A row of a heat map: the error of a kind by layer, None where there is none.

    Attributes:
        kind: its full name, and for experts whether the row has their median or their maximum.
        label: its short name.
        values: by layer, in the order of `ErrorMap.layers`.
        modules: the module of each value; for experts, the one with the largest error.
    """

    kind: str
    label: str
    values: Sequence[float | None]
    modules: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorMap:
    """A heat map of one stack of layers and one measure."""

    stack: str
    measure: str
    layers: Sequence[int]
    rows: Sequence[Row]
    num_left_out: int = 0

    @property
    def values(self) -> list[float]:
        """All errors."""
        return [value for row in self.rows for value in row.values if value is not None]


@dataclass(frozen=True, kw_only=True, slots=True)
class KindSummary:
    """The errors of all modules of a kind."""

    kind: str
    num_modules: int
    median: float
    largest: float
    module: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """The errors of a run.

    Attributes:
        maps: heat maps.
        kinds: by kind, the largest error first.
        worst: modules with the largest errors.
        outside: modules outside of layers.
        unknown: modules whose error is not finite.
    """

    maps: Sequence[ErrorMap] = ()
    kinds: Sequence[KindSummary] = ()
    worst: Sequence[ReportedModule] = ()
    outside: Sequence[ReportedModule] = ()
    unknown: Sequence[ReportedModule] = field(default_factory=list)


def measure_of(module: ReportedModule) -> str:
    """What the error of a module measures."""
    return OUTPUT if module.num_tokens else WEIGHT


def errors_of(modules: Sequence[ReportedModule], num_worst: int = 15) -> Errors:
    """Summarize the errors of modules."""
    found = places(module.name for module in modules)
    known = [module for module in modules if module.error is not None]
    groups: dict[tuple[str, str], list[ReportedModule]] = {}
    for module in known:
        if found[module.name].layer >= 0:
            groups.setdefault((measure_of(module), found[module.name].stack), []).append(module)
    sizes: dict[str, int] = {}
    for (measure, _), members in groups.items():
        sizes[measure] = sizes.get(measure, 0) + len(members)
    least = _LEAST_SHARE * max(sizes.values(), default=0)
    maps = [
        error_map(stack, measure, members, found)
        for (measure, stack), members in sorted(
            groups.items(), key=lambda entry: (entry[0][0] != OUTPUT, -len(entry[1]))
        )
        if sizes[measure] >= least
    ][:8]
    return Errors(
        maps=maps,
        kinds=_kinds(known, found),
        worst=sorted(known, key=_by_error)[:num_worst],
        outside=sorted((one for one in known if found[one.name].layer < 0), key=_by_error)[:50],
        unknown=[module for module in modules if module.error is None],
    )


def _by_error(module: ReportedModule) -> tuple[float, str]:
    return -(module.error or 0.0), module.name


def error_map(stack: str, measure: str, members: Sequence[ReportedModule], found: Mapping[str, Place]) -> ErrorMap:
    """Make the heat map of one stack; experts have a row with their largest error and one with the median."""
    cells: dict[str, dict[int, list[ReportedModule]]] = {}
    for module in members:
        place = found[module.name]
        cells.setdefault(place.kind, {}).setdefault(place.layer, []).append(module)
    layers = sorted({layer for by_layer in cells.values() for layer in by_layer})[:_MOST_LAYERS]
    kinds = list(cells)
    if len(kinds) > _MOST_KINDS:
        kinds.sort(key=lambda kind: min(_by_error(one) for found in cells[kind].values() for one in found))
    chosen = kinds[:_MOST_KINDS]
    labels = short_kinds(chosen)
    rows = []
    for kind in chosen:
        worst = [min(cells[kind].get(layer, ()), key=_by_error, default=None) for layer in layers]
        names = ["" if one is None else one.name for one in worst]
        is_many = any(len(some) > 1 for some in cells[kind].values())
        suffix = ", largest" if is_many else ""
        values = [None if one is None else one.error for one in worst]
        rows.append(Row(kind=f"{kind}{suffix}", label=f"{labels[kind]}{suffix}", values=values, modules=names))
        if is_many:
            medians = [_median(cells[kind].get(layer, ())) for layer in layers]
            rows.append(Row(kind=f"{kind}, median", label=f"{labels[kind]}, median", values=medians, modules=names))
    return ErrorMap(stack=stack, measure=measure, layers=layers, rows=rows, num_left_out=len(kinds) - len(chosen))


def _median(modules: Sequence[ReportedModule]) -> float | None:
    return float(f"{statistics.median(one.error or 0.0 for one in modules):.6g}") if modules else None


def _kinds(modules: Sequence[ReportedModule], found: Mapping[str, Place]) -> list[KindSummary]:
    groups: dict[str, list[ReportedModule]] = {}
    for module in modules:
        groups.setdefault(found[module.name].kind, []).append(module)
    summaries = []
    for kind, members in groups.items():
        worst = min(members, key=_by_error)
        summaries.append(
            KindSummary(
                kind=kind,
                num_modules=len(members),
                median=_median(members) or 0.0,
                largest=worst.error or 0.0,
                module=worst.name,
            )
        )
    return sorted(summaries, key=lambda entry: (-entry.largest, entry.kind))[:100]
