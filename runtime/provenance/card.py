"""Write the model card, README.md: a header that the hub reads, and the facts of the record for people."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from textwrap import indent

from runtime.console import human_bytes
from runtime.provenance.record import FILES, RECIPE_NAME, RECORD_NAME, ModuleFacts, ProvenanceRecord
from runtime.provenance.serving import NO_READER
from runtime.recipe.yaml import in_blocks
from runtime.terminal import printable

PLACE = "PATH"  # stands for the place of the checkpoint, which is not part of its content
_MARKS = re.compile(r"([\\`*_{}\[\]<>|#!~$&])")
_NUM_WORST, _NUM_NAMES, _NUM_SOURCES = 5, 20, 20


def card_text(record: ProvenanceRecord) -> str:
    """Return the card of a checkpoint; it follows from the record."""
    sections = [
        _opening(record),
        _numbers(record),
        _quantization(record),
        _data(record),
        _use(record),
        _reproduction(record),
        _warnings(record),
    ]
    body = "\n\n".join("\n".join(lines) for section in sections if (lines := list(section)))
    return f"---\n{in_blocks(_header(record))}---\n\n{body}\n"


def _header(record: ProvenanceRecord) -> dict[str, str | list[str]]:
    """Return the fields that the hub reads; it rejects empty ones."""
    model, card = record.model, record.model.card
    fields: dict[str, str | list[str]] = {
        "base_model": model.hub_id,
        "base_model_relation": "quantized" if model.hub_id else "",
        "library_name": "transformers",
        "license": card.license,
        "license_name": card.license_name,
        "license_link": card.license_link,
        "language": list(card.language),
        "pipeline_tag": card.pipeline_tag,
        "tags": ["compressed-tensors", "seqbuild"],
    }
    return {name: value for name, value in fields.items() if value}


def _opening(record: ProvenanceRecord) -> Iterator[str]:
    model = record.model
    schemes = ", ".join(dict.fromkeys(_plain(group.name) for group in record.recipe.groups))
    yield f"# {_plain(model.name)}{f', {schemes}' if schemes else ''}"
    yield ""
    if model.hub_id:
        name = f"[{model.hub_id}](https://huggingface.co/{model.hub_id})"
        name += f" (commit {model.revision})" if model.revision else ""
    else:
        name = _plain(model.name)
    version = record.versions.get("seqbuild", "")
    yield (
        f"{name}, quantized with seqbuild {version}. The weights are stored in the format of "
        "[compressed-tensors](https://github.com/vllm-project/compressed-tensors), which vLLM and transformers read."
    )


def _numbers(record: ProvenanceRecord) -> Iterator[str]:
    yield "| | source | quantized |"
    yield "|---|---:|---:|"
    yield f"| size of the weights | {human_bytes(record.weights.bytes)} | {human_bytes(record.output.bytes)} |"
    measured = record.evaluation
    if measured is not None:
        change = f"{measured.after / measured.before - 1:+.2%}" if measured.before else ""
        yield f"| perplexity | {measured.before:.4f} | {measured.after:.4f} ({change}) |"
        yield ""
        sources = _listed([source.name for source in measured.sources], _NUM_SOURCES)
        yield f"Perplexity is measured over {measured.num_tokens:,} tokens{f' of {sources}' if sources else ''}."


def _quantization(record: ProvenanceRecord) -> Iterator[str]:
    yield "## Quantization"
    yield ""
    for group in record.recipe.groups:
        yield f"- {_plain(group.name)}: {group.num_modules:,} modules, {_plain(group.scheme)}"
    if record.recipe.cache:
        yield f"- key-value cache: {record.num_caches} attention modules, {_plain(record.recipe.cache)}"
    modifiers = (*record.recipe.modifiers, *record.recipe.own_modifiers)
    yield f"- modifiers: {', '.join(_plain(name) for name in modifiers)}"
    if record.unquantized:
        yield f"- not quantized: {_listed(record.unquantized, _NUM_NAMES)}"
    for is_measured, what in ((True, "output error (‖WX−QX‖/‖WX‖)"), (False, "weight error (‖W−Q‖/‖W‖)")):
        yield from _worst([module for module in record.modules if bool(module.num_tokens) is is_measured], what)


def _worst(modules: Sequence[ModuleFacts], what: str) -> Iterator[str]:
    known = [(module.error, module) for module in modules if module.error is not None]
    if known:
        yield ""
        yield f"| module | relative {what} |"
        yield "|---|---:|"
        for error, module in sorted(known, key=lambda entry: -entry[0])[:_NUM_WORST]:
            yield f"| {_plain(module.name)} | {error:.4f} |"


def _data(record: ProvenanceRecord) -> Iterator[str]:
    yield "## Calibration data"
    yield ""
    data = record.data
    if data is None:
        yield "None: the recipe needs no data."
        return
    sources = _listed([source.name for source in data.sources], _NUM_SOURCES)
    yield f"{data.num_samples:,} samples with {data.num_tokens:,} tokens{f' of {sources}' if sources else ''}."
    settings = {name: value for name, value in data.settings.items() if not name.endswith("sha256")}
    if settings:
        yield ""
        yield "; ".join(f"{_plain(name)}: {_plain(value)}" for name, value in settings.items())


def _use(record: ProvenanceRecord) -> Iterator[str]:
    yield "## Use"
    yield ""
    if record.serving == (NO_READER,):
        yield "None of the tested programs loads all of this checkpoint, see the warnings."
        return
    yield from map(_code, record.serving)
    yield ""
    yield f"{PLACE} is a directory with the files of this checkpoint, or the id of its repository on the hub."


def _reproduction(record: ProvenanceRecord) -> Iterator[str]:
    yield "## Reproduction"
    yield ""
    if record.command:
        yield _code(record.command)
        yield ""
    facts = "the digests of the source weights, the artifact, the data and the files"
    own = ", ".join(_plain(name) for name in record.recipe.own_modifiers)
    yield f"`{RECIPE_NAME}` is the complete recipe, and `{RECORD_NAME}` has {facts}, versions and options."
    if own:
        yield f"The run had modifiers that no recipe states: {own}."
    if record.weights.form != FILES:
        yield "The source was a model in memory, so its digest is over tensors."
    yield f"Versions: {', '.join(f'{name} {version}' for name, version in record.versions.items())}."


def _warnings(record: ProvenanceRecord) -> Iterator[str]:
    if record.warnings:
        yield "## Warnings"
        yield ""
        yield from (f"- {_plain(text.removeprefix('warning: '))}" for text in record.warnings)


def _listed(names: Sequence[str], most: int) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(_plain(name) for name in names[:most]) + more


def _code(text: str) -> str:
    """Indent all lines, so that none of a name with line breaks is text of the card."""
    return indent(printable(text), "    ")


def _plain(text: str) -> str:
    """Escape what Markdown and HTML give a meaning to: names come from untrusted files."""
    return _MARKS.sub(r"\\\1", printable(" ".join(text.split())))
