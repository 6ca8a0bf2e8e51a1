"""Compare two runs, A and B: key numbers, errors by module, schemes, recipes and settings."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.report.errors_by_layer import OUTPUT, WEIGHT, measure_of
from runtime.report.facts import Perplexity, ReportedModule, RunFacts
from runtime.report.summary import GOOD, NOTE, PageVerdict, level_of
from runtime.report.wording import NONE, change_text, count_text, error_text, perplexity_text, seconds_text, size_text

_MOST_LISTED = 30
_MOST_LINES = 500  # of each recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyNumber:
    """A number of both runs; `is_better` says whether B's is, None if they are equal or it is no matter of better."""

    title: str
    first: str
    second: str
    change: str = ""
    is_better: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModulePair:
    """A module of both runs."""

    name: str
    first: ReportedModule
    second: ReportedModule

    @property
    def ratio(self) -> float | None:
        """The error of B by that of A; None if it is unknown, or if the two do not measure the same."""
        if measure_of(self.first) != measure_of(self.second) or not self.first.error or self.second.error is None:
            return None
        return self.second.error / self.first.error


@dataclass(frozen=True, kw_only=True, slots=True)
class RunComparison:
    """Two runs.

    Attributes:
        numbers: key numbers.
        pairs: modules of both, in the order of A.
        changed: those of another scheme or algorithm, by the change, with their number and some of their names.
        only_first, only_second: modules of one run.
        recipe: lines of the difference of the recipes, each with its kind.
        differing: settings, versions and digests that differ.
    """

    numbers: Sequence[KeyNumber]
    pairs: Sequence[ModulePair]
    changed: Sequence[tuple[str, str, int, Sequence[str]]]
    only_first: Sequence[str]
    only_second: Sequence[str]
    recipe: Sequence[tuple[str, str]]
    differing: Sequence[tuple[str, str, str]]

    @property
    def worse(self) -> list[ModulePair]:
        """The modules whose errors grow most from A to B."""
        found = sorted(self._known(), key=lambda pair: (-(pair.ratio or 0.0), pair.name))
        return [pair for pair in found if (pair.ratio or 0.0) > 1][:_MOST_LISTED]

    @property
    def better(self) -> list[ModulePair]:
        """The modules whose errors shrink most from A to B."""
        found = sorted(self._known(), key=lambda pair: (pair.ratio or 0.0, pair.name))
        return [pair for pair in found if (pair.ratio or 0.0) < 1][:_MOST_LISTED]

    @property
    def is_comparable(self) -> bool:
        """Whether the errors of a module measure the same in both runs."""
        return bool(self._known())

    def _known(self) -> list[ModulePair]:
        return [pair for pair in self.pairs if pair.ratio is not None]


def compare(first: RunFacts, second: RunFacts) -> RunComparison:
    """Compare two runs."""
    ours, theirs = ({one.name: one for one in facts.modules} for facts in (first, second))
    pairs = [ModulePair(name=name, first=one, second=theirs[name]) for name, one in ours.items() if name in theirs]
    return RunComparison(
        numbers=list(_numbers(first, second)),
        pairs=pairs,
        changed=_changed(pairs),
        only_first=[name for name in ours if name not in theirs],
        only_second=[name for name in theirs if name not in ours],
        recipe=_recipe_lines(first.recipe, second.recipe),
        differing=list(_differing(first, second)),
    )


def compared_verdict(first: RunFacts, second: RunFacts, found: RunComparison) -> PageVerdict:
    """State the result of a comparison in words."""
    level, headline = _headline(first, second)
    sentences = []
    ratios = [pair.ratio for pair in found.pairs if pair.ratio is not None]
    if ratios:
        grown, shrunk = sum(ratio > 1.0001 for ratio in ratios), sum(ratio < 0.9999 for ratio in ratios)
        same = len(ratios) - grown - shrunk
        sentences.append(
            f"From A to B the error grows in {count_text(grown, 'module')}, shrinks in {shrunk:,}, and is the same in "
            f"{same:,}."
        )
        logs = [math.log(ratio) for ratio in ratios if ratio]
        if logs:
            mean = math.exp(sum(logs) / len(logs))
            sentences.append(f"On average (geometric mean) the error of B is {mean:.3g} times that of A.")
    num_other = sum(measure_of(pair.first) != measure_of(pair.second) for pair in found.pairs)
    if num_other:
        sentences.append(
            f"The errors of {count_text(num_other, 'module')} are not compared: only one run measured their inputs."
        )
    num_changed = sum(entry[2] for entry in found.changed)
    if num_changed:
        sentences.append(f"{count_text(num_changed, 'module')} differ in scheme or algorithm.")
    for letter, names in (("A", found.only_first), ("B", found.only_second)):
        if names:
            sentences.append(f"Quantized only in {letter}: {count_text(len(names), 'module')}.")
    if first.model != second.model:
        level = NOTE if level == GOOD else level
        sentences.insert(0, f"The runs are of models with different names: {first.model} and {second.model}.")
    return PageVerdict(level=level, headline=headline, sentences=sentences)


def _headline(first: RunFacts, second: RunFacts) -> tuple[str, str]:
    parts = []
    level = GOOD
    values = [facts.perplexity.after if facts.perplexity else None for facts in (first, second)]
    if values[0] is not None and values[1] is not None:
        change = change_text(values[0], values[1])
        level = level_of(values[1] / values[0] - 1 if values[0] else 0.0)
        parts.append("the same perplexity" if values[0] == values[1] else f"{change} perplexity")
    if first.bytes_after and second.bytes_after:
        is_same = first.bytes_after == second.bytes_after
        parts.append("the same size" if is_same else f"{change_text(first.bytes_after, second.bytes_after)} size")
    return level, f"B compared with A: {' and '.join(parts)}" if parts else "Two runs compared"


def _numbers(first: RunFacts, second: RunFacts) -> Iterator[KeyNumber]:
    runs = (first, second)

    def perplexity(value: float | None) -> str:
        return NONE if value is None else perplexity_text(value)

    def count(number: int) -> str:
        return f"{number:,}"

    found = [run.perplexity or Perplexity() for run in runs]
    yield _key("Size of the weights", first.bytes_after, second.bytes_after, size_text)
    yield _key("Perplexity after", found[0].after, found[1].after, perplexity)
    yield _key("Perplexity before", found[0].before, found[1].before, perplexity, is_judged=False)
    yield _key("Quantized modules", len(first.modules), len(second.modules), count, is_judged=False)
    for measure in (OUTPUT, WEIGHT):  # one is not comparable with the other
        worst = [
            max((one.error or 0.0 for one in run.modules if measure_of(one) == measure), default=None) for run in runs
        ]
        if worst != [None, None]:
            yield _key(
                f"Largest {measure}", worst[0], worst[1], lambda value: NONE if value is None else error_text(value)
            )
    yield _key("Time", first.total_seconds or None, second.total_seconds or None, seconds_text)
    yield _key("Peak host memory", first.peak_host_bytes, second.peak_host_bytes, size_text)
    if first.peak_device_bytes or second.peak_device_bytes:
        yield _key("Peak device memory", first.peak_device_bytes, second.peak_device_bytes, size_text)
    yield _key("Warnings", len(first.warnings), len(second.warnings), count, is_judged=False)


def _key(title: str, first: Any, second: Any, show: Callable[[Any], str], *, is_judged: bool = True) -> KeyNumber:
    are_known = bool(first) and bool(second)
    return KeyNumber(
        title=title,
        first=show(first),
        second=show(second),
        change=("same" if first == second else change_text(first, second)) if are_known else "",
        is_better=second < first if are_known and is_judged and first != second else None,
    )


def _changed(pairs: Sequence[ModulePair]) -> Sequence[tuple[str, str, int, Sequence[str]]]:
    """Group modules of another scheme or algorithm by the change."""
    groups: dict[tuple[str, str], list[str]] = {}
    for pair in pairs:
        texts = tuple(", ".join(filter(None, (one.scheme, one.algorithm))) for one in (pair.first, pair.second))
        if texts[0] != texts[1]:
            groups.setdefault((texts[0], texts[1]), []).append(pair.name)
    return [(before, after, len(names), names[:_MOST_LISTED]) for (before, after), names in groups.items()][:50]


def _recipe_lines(first: str, second: str) -> list[tuple[str, str]]:
    """The lines of a difference, each with `added`, `removed` or nothing."""
    if first == second:
        return []
    ours, theirs = (text.splitlines()[:_MOST_LINES] for text in (first, second))
    kinds = {"+": "added", "-": "removed"}
    found = difflib.unified_diff(ours, theirs, "A", "B", lineterm="")
    return [(kinds.get(line[:1], ""), line) for line in found if not line.startswith(("---", "+++"))]


def _differing(first: RunFacts, second: RunFacts) -> Iterator[tuple[str, str, str]]:
    kinds: Sequence[tuple[Mapping[str, str], Mapping[str, str]]] = (
        (first.settings, second.settings),
        (first.versions, second.versions),
        (first.digests, second.digests),
    )
    for ours, theirs in kinds:
        for name in dict.fromkeys((*ours, *theirs)):
            if ours.get(name) != theirs.get(name):
                yield name, ours.get(name, NONE), theirs.get(name, NONE)
