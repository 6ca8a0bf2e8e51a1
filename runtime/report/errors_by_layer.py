"""Relative errors by layer and kind of module: the numbers of a heat map, and tables of the worst."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime.report.facts import ReportedModule
from runtime.report.places import ModulePlace, places, short_kinds

OUTPUT, WEIGHT = "relative output error ‖WX−QX‖/‖WX‖", "relative weight error ‖W−Q‖/‖W‖"
_MOST_KINDS, _MOST_LAYERS, _MOST_STACKS = 40, 1000, 6
_LEAST_SHARE = 0.2  # of the modules: fewer are listed, not drawn


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorRow:
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
    rows: Sequence[ErrorRow]
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
    """The errors of a run by one measure.

    Attributes:
        measure: what they measure.
        maps: heat maps.
        kinds: by kind, the largest error first.
        worst: modules with the largest errors.
        outside: modules outside of layers.
    """

    measure: str
    maps: Sequence[ErrorMap]
    kinds: Sequence[KindSummary]
    worst: Sequence[ReportedModule]
    outside: Sequence[ReportedModule]

    @property
    def largest(self) -> float:
        """The largest error."""
        return self.worst[0].error or 0.0


def measure_of(module: ReportedModule) -> str:
    """What the error of a module measures."""
    return OUTPUT if module.num_tokens else WEIGHT


def errors_of(modules: Sequence[ReportedModule], num_worst: int = 15) -> list[Errors]:
    """Summarize the errors of modules by what they measure."""
    found = places(module.name for module in modules)
    groups: dict[str, list[ReportedModule]] = {OUTPUT: [], WEIGHT: []}
    for module in modules:
        if module.error is not None:
            groups[measure_of(module)].append(module)
    least = _LEAST_SHARE * max(map(len, groups.values()))
    return [
        Errors(
            measure=measure,
            maps=_maps(measure, members, found) if len(members) >= least else [],
            kinds=_kinds(members, found),
            worst=sorted(members, key=_by_error)[:num_worst],
            outside=sorted((one for one in members if found[one.name].layer < 0), key=_by_error)[:50],
        )
        for measure, members in groups.items()
        if members
    ]


def _maps(measure: str, modules: Sequence[ReportedModule], found: Mapping[str, ModulePlace]) -> list[ErrorMap]:
    """Make a heat map of each stack of layers, the largest first."""
    stacks: dict[str, list[ReportedModule]] = {}
    for module in modules:
        if found[module.name].layer >= 0:
            stacks.setdefault(found[module.name].stack, []).append(module)
    largest = sorted(stacks.items(), key=lambda entry: -len(entry[1]))[:_MOST_STACKS]
    return [error_map(stack, measure, members, found) for stack, members in largest]


def _by_error(module: ReportedModule) -> tuple[float, str]:
    return -(module.error or 0.0), module.name


def error_map(
    stack: str, measure: str, members: Sequence[ReportedModule], found: Mapping[str, ModulePlace]
) -> ErrorMap:
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
        rows.append(ErrorRow(kind=f"{kind}{suffix}", label=f"{labels[kind]}{suffix}", values=values, modules=names))
        if is_many:
            medians = [_median(cells[kind].get(layer, ())) for layer in layers]
            rows.append(
                ErrorRow(kind=f"{kind}, median", label=f"{labels[kind]}, median", values=medians, modules=names)
            )
    return ErrorMap(stack=stack, measure=measure, layers=layers, rows=rows, num_left_out=len(kinds) - len(chosen))


def _median(modules: Sequence[ReportedModule]) -> float | None:
    return float(f"{statistics.median(one.error or 0.0 for one in modules):.6g}") if modules else None


def _kinds(modules: Sequence[ReportedModule], found: Mapping[str, ModulePlace]) -> list[KindSummary]:
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
