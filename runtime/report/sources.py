"""Read the facts of a run from its output directory, its event log, or its report page.

All of them are untrusted: sizes are limited, types are checked, and anything malformed is one error.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from runtime.errors import DataError
from runtime.host.event_log import BEGINNING
from runtime.host.regular_files import open_regular, reason_of
from runtime.report.collect import Collector
from runtime.report.facts import RunFacts, decode
from runtime.report.html import REPORT, is_page
from runtime.report.output import facts_of_record, with_page

_MOST_LINE_BYTES = 32 * 2**20
_MOST_LOG_BYTES = 2**30
_MOST_PAGE_BYTES = 128 * 2**20
_FACTS, _FACTS_END = b'<script type="application/json" id="facts">', b"</script>"


def beside(source: Path, suffix: str) -> Path:
    """Return the default path of a page about an output or a log: beside it."""
    name = source.name if source.name not in ("", "..") else source.resolve().name or "output"
    return (source if source.name == name else source.resolve()).with_name(f"{name}{suffix}")


def read_facts(source: Path) -> RunFacts:
    """Read the facts of a run.

    Args:
        source: a checkpoint's directory, an event log, or a report page.

    Raises:
        DataError: if it is none of these, or is damaged.
    """
    try:
        if source.is_dir():
            return facts_of_output(source)
        return facts_of_page(source) if is_page(source, REPORT) else facts_of_log(source)
    except OSError as error:
        raise DataError(f"cannot read {source}: {reason_of(error)}", hint="pass an output, a log or a page") from error


def facts_of_output(out: Path) -> RunFacts:
    """Read the record of an output, and time and memory from the page beside it, if it is of the same run.

    Raises:
        WeightsError, DataError: if the record is missing or damaged.
        OSError: if it cannot be read.
    """
    facts, path = facts_of_record(out), beside(out, ".report.html")
    if path.is_file() and is_page(path, REPORT):
        with contextlib.suppress(DataError):  # a page of anything else
            page = facts_of_page(path)
            if page.output_digest == facts.output_digest:
                return with_page(facts, page)
    return facts


def facts_of_page(path: Path) -> RunFacts:
    """Read the facts that a page embeds.

    Raises:
        DataError: if it embeds none, or they are damaged.
        OSError: if it cannot be read.
    """
    with open_regular(path) as file:
        data = file.read(_MOST_PAGE_BYTES + 1)
    if len(data) > _MOST_PAGE_BYTES:
        raise DataError(f"{path} is larger than {_MOST_PAGE_BYTES // 2**20} MiB, too large for a report page")
    begin = data.find(_FACTS)
    end = data.find(_FACTS_END, begin)
    if begin < 0 or end < 0:
        raise DataError(f"{path} has no facts of one run", hint="pass the page of a run, not a comparison of two")
    return decode(data[begin + len(_FACTS) : end], str(path))


def facts_of_log(path: Path) -> RunFacts:
    """Read the facts of the last run in an event log.

    Raises:
        DataError: if it is no event log, or damaged.
        OSError: if it cannot be read.
    """
    collector = Collector()
    with open_regular(path) as file:
        for number, line in enumerate(_lines(file, path), start=1):
            _tell(collector, line, f"{path}, line {number}")
    if not collector.num_events:
        raise DataError(f"{path} has no events of a run", hint="pass a file that calibrate --log has written")
    return collector.facts(str(path))


def _lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yield lines, except an incomplete one at the end, which a process that was killed may have left."""
    num_bytes = 0
    while line := file.readline(_MOST_LINE_BYTES + 1):
        num_bytes += len(line)
        if num_bytes > _MOST_LOG_BYTES:
            raise DataError(f"{path} is larger than {_MOST_LOG_BYTES // 2**20} MiB, too large for an event log")
        if line.endswith(b"\n") or len(line) > _MOST_LINE_BYTES:
            yield line


def _tell(collector: Collector, line: bytes, origin: str) -> None:
    if not line.strip():
        return
    if len(line) > _MOST_LINE_BYTES:
        raise DataError(f"{origin} is longer than {_MOST_LINE_BYTES // 2**20} MiB, too long for an event")
    # A process that was killed may have left a part of a line, which the next one continued with its own.
    whole = line[max(line.rfind(BEGINNING), 0) :]
    try:
        event = json.loads(whole)  # which reads NaN, as logs may have it
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin} is not an event: it is not JSON", hint="pass an event log") from error
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise DataError(f"{origin} is not an event: it has no name", hint="pass an event log")
    name = event.pop("event")
    try:
        collector.receive(name, event)
    except (msgspec.ValidationError, RecursionError) as error:
        raise DataError(f"{origin} is damaged: {name}: {error}", hint="pass the log as it was written") from error
