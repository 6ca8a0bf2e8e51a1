"""The facts of a run that a report page shows: typed, versioned, and embedded in the page as JSON.

They come from files that anyone may have written, so sizes and types are checked, and numbers that are not finite are
None. The schema grows at the end: a page of a newer minor version is read without what it adds.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import msgspec

from runtime.errors import DataError

FORMAT, FORMAT_VERSION = "seqbuild-report", 1
MOST_MODULES = 200_000
_LONGEST_NAME, _LONGEST_TEXT = 300, 100_000
_MOST_WARNINGS = 1000

Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
FINISHED = "finished"


class ModuleFields(msgspec.Struct, frozen=True):
    """The fields of `runtime.streaming.report.ModuleReport`."""

    name: str
    algorithm: str = ""
    scheme: str = ""
    error: float | None = 0.0
    loss: float | None = 0.0
    damping: float | None = 0.0
    num_tokens: Count = 0
    num_dead: Count = 0
    fallback: str = ""
    seconds: float | None = 0.0
    num_bytes: Count = 0


class ReportedModule(ModuleFields, frozen=True, array_like=True):
    """One quantized module."""

    @classmethod
    def of(cls, source: Any) -> ReportedModule:
        """Take the fields of another object."""
        return cls(*(getattr(source, name) for name in cls.__struct_fields__))


class MeasuredSubgraph(msgspec.Struct, frozen=True, array_like=True):
    """The measured cost of one subgraph; `phases` are seconds by phase, if they are known."""

    index: Count
    label: str = ""
    num_modules: Count = 0
    seconds: float | None = None
    tokens: Count = 0
    bytes_read: Count = 0
    bytes_written: Count = 0
    peak_host_bytes: Count = 0
    peak_device_bytes: Count = 0
    phases: dict[str, float] = {}


class PlannedSubgraph(msgspec.Struct, frozen=True, array_like=True):
    """The predicted cost of one subgraph."""

    index: Count
    label: str = ""
    host: Count = 0
    device: Count = 0
    read: Count = 0
    written: Count = 0
    seconds: float | None = None


class Perplexity(msgspec.Struct, frozen=True):
    """The perplexity of the model before and after, and the number of predicted tokens."""

    before: float | None = None
    after: float | None = None
    tokens: Count = 0


class RunFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A run.

    Attributes:
        model: its name.
        outcome: `finished`, or how the run ended instead.
        reason: of a perplexity that is missing.
        num_subgraphs: of the whole run.
        resumed_at: number of subgraphs that an earlier process had finished.
        seconds: time by step, such as `calibrate`.
        settings: of the run and its data, by name, as they are shown.
        digests: by what they are of.
        output_digest: of OUT/seqbuild.json, by which a page is known to belong to OUT.
        rates: whether the predicted seconds are of measured or of assumed rates.
        is_partial: whether modules or subgraphs of an earlier process are unknown.
    """

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    model: str = ""
    outcome: str = FINISHED
    command: str = ""
    recipe_name: str = ""
    recipe: str = ""
    device: str = ""
    started: float | None = None
    num_workers: Count = 1
    num_subgraphs: Count = 0
    resumed_at: Count = 0
    is_partial: bool = False
    bytes_before: Count = 0
    bytes_after: Count = 0
    perplexity: Perplexity | None = None
    reason: str = ""
    seconds: dict[str, float] = {}
    peak_host_bytes: Count = 0
    peak_device_bytes: Count = 0
    settings: dict[str, str] = {}
    versions: dict[str, str] = {}
    digests: dict[str, str] = {}
    output_digest: str = ""
    warnings: list[str] = []
    modules: list[ReportedModule] = []
    subgraphs: list[MeasuredSubgraph] = []
    plan: list[PlannedSubgraph] = []
    rates: str = ""

    @property
    def total_seconds(self) -> float:
        """The time of all steps, or of all subgraphs if no step is known."""
        return sum(self.seconds.values()) or sum(entry.seconds or 0.0 for entry in self.subgraphs)

    @property
    def has_times(self) -> bool:
        """Whether time and memory were measured."""
        return bool(self.subgraphs or self.seconds)


def decode(data: bytes, origin: str) -> RunFacts:
    """Decode and check facts.

    Raises:
        DataError: if they are damaged or of another version; `origin` names the file.
    """
    try:
        facts = msgspec.json.decode(data, type=RunFacts)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise DataError(f"the facts in {origin} are damaged: {error}", hint="write the page again") from error
    if facts.format != FORMAT or facts.format_version != FORMAT_VERSION:
        version = f"{facts.format[:40]} {facts.format_version}"
        raise DataError(f"{origin} has facts of {version}; {FORMAT} {FORMAT_VERSION} is supported")
    return checked(facts, origin)


def checked(facts: RunFacts, origin: str) -> RunFacts:
    """Limit the length of names and texts, and replace numbers that are not finite or negative by None.

    Raises:
        DataError: if there are too many modules for a page.
    """
    if max(len(facts.modules), len(facts.subgraphs), len(facts.plan)) > MOST_MODULES:
        raise DataError(f"{origin} has more than {MOST_MODULES:,} modules or subgraphs, too many for a page")
    extra = len(facts.warnings) - _MOST_WARNINGS
    more = [f"and {extra:,} more warnings"] if extra > 0 else []
    perplexity = facts.perplexity
    return msgspec.structs.replace(
        facts,
        **{
            name: name_of(getattr(facts, name))
            for name in ("model", "recipe_name", "device", "reason", "outcome", "output_digest", "rates")
        },
        command=text_of(facts.command),
        recipe=text_of(facts.recipe),
        started=number_of(facts.started),
        perplexity=None
        if perplexity is None
        else Perplexity(_finite(perplexity.before), _finite(perplexity.after), perplexity.tokens),
        seconds=_numbers(facts.seconds),
        settings=_texts(facts.settings),
        versions=_texts(facts.versions),
        digests=_texts(facts.digests),
        warnings=[text_of(line, 4000) for line in facts.warnings[:_MOST_WARNINGS]] + more,
        modules=[_checked_entry(module) for module in facts.modules],
        subgraphs=[_checked_entry(entry) for entry in facts.subgraphs],
        plan=[_checked_entry(entry) for entry in facts.plan],
    )


def _checked_entry(entry: Any) -> Any:
    """Check the texts and numbers of an entry of a list."""
    changes: dict[str, Any] = {}
    for name in entry.__struct_fields__:
        value = getattr(entry, name)
        if isinstance(value, str):
            new: Any = name_of(value)
        elif isinstance(value, float):
            new = number_of(value)
        elif isinstance(value, dict):
            new = _numbers(value)
        else:
            continue
        if new is not value:
            changes[name] = new
    return msgspec.structs.replace(entry, **changes) if changes else entry


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) and value >= 0 else None


def number_of(value: float | None) -> float | None:
    """A number with six digits; None if it is negative or not finite."""
    found = _finite(value)
    return float(f"{found:.6g}") if isinstance(found, float) else found


def name_of(text: str) -> str:
    """A name in printable characters, shortened in the middle."""
    shown = text if text.isprintable() else "".join(c if c.isprintable() else "�" for c in text[:4000])
    if len(shown) <= _LONGEST_NAME:
        return shown
    return f"{shown[: _LONGEST_NAME * 2 // 3]}…{shown[-_LONGEST_NAME // 4 :]}"


def text_of(text: str, most: int = _LONGEST_TEXT) -> str:
    """A text of several lines in printable characters, cut at the end."""
    kept = most - 50  # so that a shortened text is not shortened again
    cut = text if len(text) <= most else f"{text[:kept]}\n… ({len(text) - kept:,} more characters)"
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() or c == "\n" else " " if c == "\t" else "�" for c in cut)


def _numbers(values: dict[str, float]) -> dict[str, float]:
    found = {name_of(name): number_of(value) for name, value in list(values.items())[:100]}
    return {name: value for name, value in found.items() if value is not None}


def _texts(values: dict[str, str]) -> dict[str, str]:
    return {name_of(name): text_of(text, 4000) for name, text in list(values.items())[:200]}
