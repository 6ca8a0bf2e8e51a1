"""Write recipe.yaml, README.md and seqbuild.json into a checkpoint, and add an evaluation to the latter two."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from runtime.host.publish import write_file
from runtime.provenance.card import PLACE, card_text
from runtime.provenance.facts import (
    artifact_facts,
    model_facts,
    module_facts,
    recipe_facts,
    versions,
)
from runtime.provenance.output_files import listed_files
from runtime.provenance.record import (
    CARD_NAME,
    FORMAT,
    RECIPE_NAME,
    RECORD_NAME,
    VERSION,
    EvaluationFacts,
    OutputFacts,
    ProvenanceRecord,
    encode_record,
    read_record,
)
from runtime.provenance.serving import serving_lines

if TYPE_CHECKING:
    from runtime.chain import Artifact
    from runtime.provenance.origin import RunOrigin
    from runtime.provenance.record import DataFacts, WeightsFacts
    from runtime.quantize.preparation import Prepared
    from runtime.recipe.recipe import Recipe
    from runtime.streaming.report import ModuleReport


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedRun:
    """A run that has written all tensors.

    Attributes:
        origin: what the caller knows about its inputs.
        artifact: the compiled model.
        prepared: the same, prepared with weights and recipe.
        recipe: that ran.
        recipe_text: the text of recipe.yaml.
        own_modifiers: that ran before it.
        data: the calibration data; None if none was needed.
        options: that decide the result, by name.
        weights: the source weights, with digests.
        written: SHA-256 of files of the checkpoint that are known already, by name.
        has_files: whether all files of the checkpoint are here; those of a part are listed when it is joined.
        reports: of the modules.
        unquantized: patterns of the modules that are not.
        warnings: about the result.
        num_caches: number of attention modules with scales.
        num_bytes: size of the tensors.
    """

    origin: RunOrigin
    artifact: Artifact
    prepared: Prepared
    recipe: Recipe
    recipe_text: str
    own_modifiers: Sequence[object]
    data: DataFacts | None
    options: Mapping[str, object]
    weights: WeightsFacts
    written: Mapping[str, str]
    has_files: bool
    reports: Sequence[ModuleReport]
    unquantized: Sequence[str]
    warnings: Sequence[str]
    num_caches: int
    num_bytes: int


def write_provenance(directory: Path, run: FinishedRun) -> None:
    """Write the three files into a checkpoint whose other files are complete.

    Raises:
        OSError: one cannot be written.
    """
    (directory / RECIPE_NAME).write_text(run.recipe_text, encoding="utf-8")
    record = _record(directory, run)
    (directory / CARD_NAME).write_text(card_text(record), encoding="utf-8")
    (directory / RECORD_NAME).write_bytes(encode_record(record))


def add_evaluation(directory: Path, evaluation: EvaluationFacts) -> None:
    """Add an evaluation to the record and the card of a complete checkpoint; each is replaced atomically.

    Raises:
        WeightsError: the record is damaged.
        OutputError: a file cannot be written; the checkpoint is still complete.
    """
    record = msgspec.structs.replace(read_record(directory), evaluation=evaluation)
    write_file(directory / RECORD_NAME, encode_record(record))
    write_file(directory / CARD_NAME, card_text(record).encode())


def _in_order(reports: Sequence[ModuleReport], jobs: Iterable[str]) -> list[ModuleReport]:
    """Sort reports as the model lists its modules, because memory for statistics decides which ones come first."""
    places = {name: place for place, name in enumerate(jobs)}
    return sorted(reports, key=lambda report: places.get(report.name, len(places)))


def _record(directory: Path, run: FinishedRun) -> ProvenanceRecord:
    prepared, checkpoint = run.prepared, run.prepared.weights.checkpoint
    manifest = run.artifact.manifest
    model = model_facts(manifest, checkpoint.directory, run.origin)
    warnings = tuple(dict.fromkeys(text.replace(str(checkpoint.directory), model.name) for text in run.warnings))
    return ProvenanceRecord(
        format=FORMAT,
        format_version=VERSION,
        versions=versions(),
        model=model,
        artifact=artifact_facts(manifest),
        recipe=recipe_facts(run.recipe, run.recipe_text, prepared.jobs, run.own_modifiers),
        weights=run.weights,
        data=run.data,
        options={name: str(value) for name, value in run.options.items()},
        modules=module_facts(_in_order(run.reports, prepared.jobs)),
        unquantized=tuple(run.unquantized),
        unreached=tuple(prepared.unreached),
        num_caches=run.num_caches,
        warnings=warnings,
        serving=serving_lines(manifest, Path(PLACE), warnings),
        output=OutputFacts(bytes=run.num_bytes, files=listed_files(directory, run.written) if run.has_files else ()),
        evaluation=None,
        command=run.origin.command,
    )
