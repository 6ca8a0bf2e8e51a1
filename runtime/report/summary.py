"""The head of a report page: the verdict in words, and the key numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from runtime.report.errors_by_layer import OUTPUT, measure_of
from runtime.report.experts import ExpertTokens
from runtime.report.facts import FINISHED, ReportedModule, RunFacts
from runtime.report.wording import NONE, change_text, count_text, error_text, perplexity_text, seconds_text, size_text

GOOD, NOTE, BAD = "good", "note", "bad"
ASSUMED = "assumed"  # rates, see `runtime.planning`
_NOTED_CHANGE, _LARGE_CHANGE = 0.02, 0.10  # of the perplexity
_MOST_LISTED = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyTile:
    """A key number, with what it is compared with."""

    title: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PageVerdict:
    """The result in words: a level, a headline, and sentences."""

    level: str
    headline: str
    sentences: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Modules that need attention for one reason.

    Attributes:
        title: of the table.
        explanation: what it means.
        heading: of the column with the reason.
        num_modules: all of them.
        rows: the name and the reason of the first ones.
    """

    title: str
    explanation: str
    heading: str
    num_modules: int
    rows: Sequence[tuple[str, str]]


def findings(modules: Sequence[ReportedModule]) -> list[Attention]:
    """List fallbacks, raised dampening and dead input channels."""
    fallbacks = [(one.name, f"{one.algorithm}: {one.fallback}") for one in modules if one.fallback]
    used = [one.damping for one in modules if one.algorithm == "gptq" and one.damping is not None]
    usual = Counter(used).most_common(1)[0][0] if used else 0.0
    raised = sorted((one for one in modules if (one.damping or 0) > usual), key=lambda one: -(one.damping or 0))
    dead = sorted((one for one in modules if one.num_dead), key=lambda one: -one.num_dead)
    found = (
        (
            "Fallbacks",
            "Another algorithm than that of the recipe was used, or a part of it was left out.",
            "Used, and why",
            fallbacks,
        ),
        (
            "Raised dampening",
            f"The Hessian did not factor with the usual dampening {usual:g}: inputs are few or strongly correlated.",
            "Dampening",
            [(one.name, f"{one.damping:g}") for one in raised],
        ),
        (
            "Dead input channels",
            "These input features were zero for every measured token, so their weights were rounded without data.",
            "Dead channels",
            [(one.name, f"{one.num_dead:,}") for one in dead],
        ),
    )
    return [
        Attention(title=title, explanation=text, heading=heading, num_modules=len(rows), rows=rows[:_MOST_LISTED])
        for title, text, heading, rows in found
        if rows
    ]


def verdict(facts: RunFacts, experts: Sequence[ExpertTokens], found: Sequence[Attention]) -> PageVerdict:
    """State the result of a run."""
    level, headline = _headline(facts)
    sentences = list(_sentences(facts))
    num_unused = sum(table.num_unused for table in experts)
    if num_unused:
        sentences.append(f"{count_text(num_unused, 'expert')} saw no calibration token.")
    unknown = sum(one.error is None for one in facts.modules)
    if unknown:
        sentences.append(f"The error of {count_text(unknown, 'module')} is not finite.")
    for one in found:
        sentences.append(f"{one.title}: {count_text(one.num_modules, 'module')}.")
    if facts.warnings:
        sentences.append(f"{count_text(len(facts.warnings), 'warning')}, listed below.")
    if unknown:
        level = BAD
    elif level == GOOD and (num_unused or facts.warnings or any(one.title == "Fallbacks" for one in found)):
        level = NOTE
    return PageVerdict(level=level, headline=headline, sentences=sentences)


def level_of(change: float) -> str:
    """The level of a relative change of the perplexity."""
    return GOOD if change < _NOTED_CHANGE else NOTE if change < _LARGE_CHANGE else BAD


def _headline(facts: RunFacts) -> tuple[str, str]:
    if facts.outcome != FINISHED:
        done = f"after {len(facts.subgraphs):,} of {facts.num_subgraphs:,} subgraphs" if facts.num_subgraphs else ""
        return BAD, f"Run {facts.outcome.partition(':')[0]} {done}".strip()
    perplexity = facts.perplexity
    if perplexity is None:
        return GOOD, "Quantized; perplexity was not measured"
    before, after = perplexity.before, perplexity.after
    if before is None or after is None:
        return BAD, "Quantized, but the perplexity is not finite"
    change = after / before - 1 if before else 0.0
    level = level_of(change)
    verb = "rises" if change > 0 else "falls" if change < 0 else "stays the same"
    return level, f"Quantized; perplexity {verb} by {change_text(before, after).lstrip('+-')}" if change else (
        f"Quantized; perplexity {verb}"
    )


def _sentences(facts: RunFacts) -> Iterator[str]:
    if facts.outcome != FINISHED:
        yield f"{facts.outcome[:1].upper()}{facts.outcome[1:]}."
    schemes = Counter(one.scheme for one in facts.modules if one.scheme)
    words = " and ".join(scheme for scheme, _ in schemes.most_common(2))
    more = f" and {count_text(len(schemes) - 2, 'more scheme')}" if len(schemes) > 2 else ""
    if facts.modules:
        yield f"{count_text(len(facts.modules), 'module')} quantized{f' to {words}{more}' if words else ''}."
    if facts.bytes_before and facts.bytes_after:
        share = f"{facts.bytes_after / facts.bytes_before:.0%}".replace("%", " %")
        yield f"The weights take {size_text(facts.bytes_after)} instead of {size_text(facts.bytes_before)} ({share})."
    if facts.perplexity is None and facts.reason:
        yield f"Perplexity was not measured: {facts.reason}."
    if facts.resumed_at:
        unknown = ", whose time and modules are known only in part" if facts.is_partial else ""
        yield f"An earlier process had finished {count_text(facts.resumed_at, 'subgraph')}{unknown}."


def tiles(facts: RunFacts) -> list[KeyTile]:
    """The key numbers of a run."""
    found = [_size_tile(facts), _perplexity_tile(facts), _modules_tile(facts)]
    if facts.has_times:
        found += [_time_tile(facts), _memory_tile(facts)]
    return found


def _size_tile(facts: RunFacts) -> KeyTile:
    before, after = facts.bytes_before, facts.bytes_after
    share = f"{after / max(before, 1):.0%}".replace("%", " %")
    note = f"{share} of {size_text(before)}" if before and after else ""
    return KeyTile(title="Size of the weights", value=size_text(after), note=note)


def _perplexity_tile(facts: RunFacts) -> KeyTile:
    found = facts.perplexity
    if found is None:
        return KeyTile(title="Perplexity", value=NONE, note="not measured")
    before, after = found.before, found.after
    are_known = before is not None and after is not None
    note = f"{change_text(before or 0, after or 0)} from {perplexity_text(before)}" if are_known else ""
    return KeyTile(title="Perplexity", value=perplexity_text(after), note=note)


def _modules_tile(facts: RunFacts) -> KeyTile:
    known = [one for one in facts.modules if one.error is not None]
    worst = max(known, key=lambda one: one.error or 0.0, default=None)
    kind = "output" if worst is not None and measure_of(worst) == OUTPUT else "weight"
    note = f"largest relative {kind} error {error_text(worst.error)}" if worst is not None else ""
    return KeyTile(title="Quantized modules", value=f"{len(facts.modules):,}", note=note)


def _time_tile(facts: RunFacts) -> KeyTile:
    planned = [entry.seconds for entry in facts.plan]
    known = [seconds for seconds in planned if seconds is not None]
    measured = sum(entry.seconds or 0.0 for entry in facts.subgraphs)
    steps = facts.seconds if len(facts.seconds) > 1 else {}
    note = ", ".join(f"{name} {seconds_text(seconds)}" for name, seconds in steps.items())
    if known and len(known) == len(planned) and facts.rates != ASSUMED:
        note = f"subgraphs {seconds_text(measured)}, {seconds_text(sum(known))} predicted"
    return KeyTile(title="Time", value=seconds_text(facts.total_seconds), note=note)


def _memory_tile(facts: RunFacts) -> KeyTile:
    where = "device" if facts.peak_device_bytes else "host"
    peak = facts.peak_device_bytes or facts.peak_host_bytes
    planned = max((getattr(entry, where) for entry in facts.plan), default=0)
    notes = [f"{size_text(planned)} predicted for the calibration"] if planned else []
    if where == "device":
        notes.append(f"host {size_text(facts.peak_host_bytes)}")
    return KeyTile(
        title="Peak memory of the device" if where == "device" else "Peak memory",
        value=size_text(peak),
        note=", ".join(notes),
    )
