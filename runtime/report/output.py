"""The facts of a run that its output states in its record, and those of the page that was written beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from runtime.errors import DataError
from runtime.host.regular_files import file_digest, is_there, read_regular
from runtime.provenance.record import RECIPE_NAME, RECORD_NAME, NamedDigest, ProvenanceRecord, read_record
from runtime.report.facts import FINISHED, ReportedModule, RunFacts, checked

_MOST_RECIPE_BYTES = 2**20
_MEASURED = (
    *("started", "device", "num_workers", "num_subgraphs", "resumed_at", "is_partial", "seconds", "peak_host_bytes"),
    *("peak_device_bytes", "subgraphs", "plan", "rates", "reason"),
)


def with_record(facts: RunFacts, out: Path) -> RunFacts:
    """Add what the record in an output directory states; a directory without one, such as a part, adds nothing."""
    if not (out / RECORD_NAME).is_file():
        return facts
    stated = facts_of_record(out)
    changes = {
        name: getattr(stated, name) for name in RunFacts.__struct_fields__ if name not in (*_MEASURED, "modules")
    }
    kept = [*dict.fromkeys((*stated.warnings, *facts.warnings))]  # also those that are no facts about the result
    known = {"perplexity": facts.perplexity or stated.perplexity, "command": stated.command or facts.command}
    known["recipe_name"] = facts.recipe_name or stated.recipe_name
    return msgspec.structs.replace(facts, **changes | known | {"warnings": kept})


def facts_of_record(out: Path) -> RunFacts:
    """Return what the record of an output states: no times, and no memory.

    Raises:
        WeightsError: if it is missing or damaged.
        DataError: if it has too many modules for a page.
    """
    record = read_record(out)
    evaluation = record.evaluation
    fields: dict[str, Any] = {
        "model": record.model.hub_id or record.model.name,
        "outcome": FINISHED,
        "command": record.command,
        "recipe_name": _recipe_name(record),
        "recipe": _recipe(out),
        "bytes_before": record.weights.bytes,
        "bytes_after": record.output.bytes,
        "perplexity": None
        if evaluation is None
        else {"before": evaluation.before, "after": evaluation.after, "tokens": evaluation.num_tokens},
        "settings": _settings(record),
        "versions": record.versions,
        "digests": dict(_digests(record)),
        "output_digest": file_digest(out / RECORD_NAME),
        "warnings": list(record.warnings),
        "modules": [
            {name: getattr(module, name, 0.0) for name in ReportedModule.__struct_fields__} for module in record.modules
        ],
    }
    try:
        modules = [ReportedModule(**module) for module in fields.pop("modules")]
        found = msgspec.convert(fields, RunFacts)
        modules = msgspec.convert([list(msgspec.structs.astuple(one)) for one in modules], list[ReportedModule])
    except msgspec.ValidationError as error:
        raise DataError(f"{out / RECORD_NAME} is damaged: {error}", hint="copy the checkpoint again") from error
    return checked(msgspec.structs.replace(found, modules=modules), str(out / RECORD_NAME))


def with_page(facts: RunFacts, page: RunFacts) -> RunFacts:
    """Add what only the page of the run knows: time and memory."""
    changes = {name: getattr(page, name) for name in _MEASURED}
    times = {module.name: module.seconds for module in page.modules}
    modules = [msgspec.structs.replace(one, seconds=times.get(one.name, 0.0)) for one in facts.modules]
    warnings = [*dict.fromkeys((*facts.warnings, *page.warnings))]
    known: dict[str, Any] = {
        name: getattr(page, name) or getattr(facts, name) for name in ("perplexity", "recipe_name")
    }
    return msgspec.structs.replace(facts, **changes, modules=modules, warnings=warnings, **known)


def _recipe_name(record: ProvenanceRecord) -> str:
    """The presets of a recipe, or its modifiers."""
    names = [group.name for group in record.recipe.groups if not group.name.startswith("group_")]
    return ", ".join(dict.fromkeys(filter(None, names))) or ", ".join(record.recipe.modifiers)


def _recipe(out: Path) -> str:
    path = out / RECIPE_NAME
    if not is_there(path) or path.stat().st_size > _MOST_RECIPE_BYTES:
        return ""
    return read_regular(path).decode("utf-8", errors="replace")


def _settings(record: ProvenanceRecord) -> dict[str, str]:
    model = record.model
    found = {"model": f"{model.class_name} ({model.model_type})", "hub revision": model.revision}
    if record.data is not None:
        found |= {"calibration data": ", ".join(source.name for source in record.data.sources)}
        found |= {"samples": f"{record.data.num_samples:,}", "tokens": f"{record.data.num_tokens:,}"}
        found |= {f"data: {name}": text for name, text in record.data.settings.items()}
    if record.evaluation is not None:
        found["evaluation data"] = ", ".join(source.name for source in record.evaluation.sources)
    for group in record.recipe.groups:
        found[f"scheme {group.name}"] = f"{group.scheme}, {group.num_modules:,} modules"
    if record.recipe.cache:
        found["key-value cache"] = record.recipe.cache
    found |= record.options
    if record.unquantized:
        found["not quantized"] = _some(record.unquantized)
    if record.unreached:
        found["never called"] = _some(record.unreached)
    return {name: text for name, text in found.items() if text}


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 20:,} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more


def _digests(record: ProvenanceRecord) -> list[tuple[str, str]]:
    """Name the digests of what went in; those of single files are in the record."""
    found = [
        ("artifact", record.artifact.sha256),
        ("artifact's input key", record.artifact.input_key),
        ("recipe.yaml", record.recipe.sha256),
        ("source weights", record.weights.sha256),
    ]
    sources: Sequence[NamedDigest] = record.data.sources if record.data is not None else ()
    found += [(f"data: {source.name}", source.sha256) for source in sources[:20]]
    if record.data is not None:
        found.append(("model inputs", record.data.inputs_sha256))
    return [(name, digest) for name, digest in found if digest]
