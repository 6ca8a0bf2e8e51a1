"""The facts of a run that has just ended: what its watcher saw, its result, and its record in the output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from runtime.report.collect import Collector
from runtime.report.facts import FINISHED, ReportedModule, RunFacts, checked
from runtime.report.output import with_record

if TYPE_CHECKING:
    from runtime.streaming.report import Calibration


def facts_of_run(collector: Collector, result: Calibration, out: Path, known: Mapping[str, Any]) -> RunFacts:
    """Return the facts of a run.

    Args:
        collector: the watcher of this process.
        result: of the calibration, which has the modules and warnings of earlier processes too.
        out: the output directory.
        known: fields that the caller knows better.
    """
    facts = collector.facts("this run")
    fields = {name: getattr(facts, name) for name in RunFacts.__struct_fields__}
    fields |= {
        "outcome": FINISHED,
        "modules": [ReportedModule.of(module) for module in result.modules],
        "warnings": list(result.remarks),
        "bytes_after": result.num_bytes,
        "seconds": facts.seconds or {"calibrate": result.seconds},
        "resumed_at": result.resumed_at,
    }
    return with_record(checked(msgspec.convert(fields | dict(known), RunFacts), "this run"), out)
