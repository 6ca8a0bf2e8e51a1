"""Check that the subgraphs of a manifest form a chain: each input must be an input of the model or a value that an
earlier subgraph returned and no subgraph has consumed since.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from runtime.artifact.manifest import DTYPES, Manifest, SubgraphEntry

# Targets are layers or, in fine partitions, their Linear modules: hundreds. Planning executes each at least once.
MOST_SUBGRAPHS = 8192


def wrong_chain(manifest: Manifest) -> Iterator[str]:
    """Yield a sentence for each error in the order of the subgraphs and in the values they pass on."""
    entries = manifest.subgraphs
    if not 0 < len(entries) <= MOST_SUBGRAPHS:
        yield f"the manifest has {len(entries)} subgraphs, and 1 to {MOST_SUBGRAPHS} are supported"
        return
    for given in manifest.inputs:
        if given.dtype not in DTYPES and given.dtype != "model":
            yield f"the input {given.name!r} has the unsupported dtype {given.dtype!r}"
    present = dict.fromkeys(given.name for given in manifest.inputs)
    for index, entry in enumerate(entries):
        where = f"subgraph {index + 1} of {len(entries)}"
        yield from _wrong_names(entry, where)
        for name in entry.input_names:
            if name not in present:
                yield f"{where} takes {name!r}, which is neither an input of the model nor an available output"
        for name in entry.consumed_names:
            present.pop(name, None)
        for name in entry.output_names:
            if name in present:
                yield f"{where} returns {name!r}, which already exists"
            if name not in manifest.values:
                yield f"{where} returns {name!r}, whose dtype and shape the manifest does not state"
            present[name] = None
    if not entries[-1].output_names:
        yield "the last subgraph returns nothing"
    yield from _wrong_targets(manifest)


def _wrong_names(entry: SubgraphEntry, where: str) -> Iterator[str]:
    names = {
        "takes": entry.input_names,
        "consumes": entry.consumed_names,
        "returns": entry.output_names,
        "needs": entry.parameters,
        "names the input": entry.arguments,
        "names the result": entry.results,
    }
    for verb, listed in names.items():
        for name in _twice(listed):
            yield f"{where} {verb} {name!r} twice"
    if entry.results and len(entry.results) != len(entry.output_names):
        yield f"{where} has {len(entry.output_names)} outputs, and its program {len(entry.results)} results"


def _wrong_targets(manifest: Manifest) -> Iterator[str]:
    reached = [name for entry in manifest.subgraphs for name in entry.targets]
    for name in _twice(manifest.targets):
        yield f"the target {name!r} is listed twice"
    listed = dict.fromkeys(manifest.targets)
    for name in reached:
        if name not in listed:
            yield f"a subgraph has the target {name!r}, which the manifest does not list"


def _twice(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]
