"""Check the manifest's entries for key-value cache values, and report those values while a program runs.

A program does not mark the values that enter the cache; the manifest names them. A host that observes or quantizes
them compiles the program again, with a statement inserted after the one that completes such a value:

    key = run.cached(0, key)
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.artifact.manifest import CachedValue, Manifest

QUERY = "q"
PARTS = ("k", "v", QUERY)
_MOST_HEADS = 2**16


def hooked(source: str, entries: Sequence[CachedValue]) -> dict[str, list[tuple[int, str]]] | None:
    """Find the statements of a program after which its cached values are complete.

    Args:
        source: the checked program.
        entries: the entries of a subgraph that executes it.

    Returns:
        For each assigned name, the indices in `entries` and the names of the values that are complete after that
        assignment. None when an entry does not fit the program: its name is not assigned exactly once outside of loops,
        or its value has already been deleted.
    """
    if not entries:
        return {}
    assigned, deleted = _places(source)
    found: dict[str, list[tuple[int, str]]] = {}
    for place, entry in enumerate(entries):
        made, whole = assigned.get(entry.name), assigned.get(entry.after)
        if made is None or whole is None or not made <= whole <= deleted.get(entry.name, whole):
            return None
        found.setdefault(entry.after, []).append((place, entry.name))
    return found


def _places(source: str) -> tuple[dict[str, int], dict[str, int]]:
    """Map each name to the statement that assigns it, if exactly one does, outside of loops, and to the statement that
    deletes it.
    """
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef), "a checked program is one function"
    assigned: dict[str, int] = {}
    deleted: dict[str, int] = {}
    twice: dict[str, None] = dict.fromkeys(argument.arg for argument in function.args.args)
    for place, statement in enumerate(function.body):
        is_plain = isinstance(statement, ast.Assign)
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                if node.id in assigned or not is_plain:
                    twice[node.id] = None
                assigned[node.id] = place
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Del):
                deleted[node.id] = place
    return {name: place for name, place in assigned.items() if name not in twice}, deleted


def wrong_parts(entries: Sequence[CachedValue]) -> Iterator[str]:
    """Yield a sentence for each error in the entries that can be found without their programs."""
    parts: dict[str, list[str]] = {}
    owners: dict[str, int] = {}
    for entry in entries:
        parts.setdefault(entry.module, []).append(entry.part)
        if owners.setdefault(entry.module, entry.subgraph) != entry.subgraph:
            yield f"{entry.module!r} caches values in two subgraphs"
    for module, found in parts.items():
        if sorted(found) not in (["k", "v"], ["k", "q", "v"]):
            yield f"{module!r} has the cached parts {', '.join(found)}; it must have k and v once, and q at most once"


def _modules_of(parameters: Iterable[str]) -> set[str]:
    """Return the names of all modules that contain these parameters."""
    found: set[str] = set()
    for name in parameters:
        owner = name.rpartition(".")[0]
        while owner and owner not in found:
            found.add(owner)
            owner = owner.rpartition(".")[0]
    return found


def wrong_cached(manifest: Manifest, sources: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence for each error in the manifest's cached values.

    Args:
        manifest: the table of contents.
        sources: its checked programs by file.
    """
    by_subgraph: dict[int, list[CachedValue]] = {}
    modules = [_modules_of(entry.parameters) if manifest.cached else () for entry in manifest.subgraphs]
    for entry in manifest.cached:
        inside = 0 <= entry.subgraph < len(modules) and entry.module in modules[entry.subgraph]
        is_named = entry.kind.isidentifier() and entry.part in PARTS and 0 <= entry.heads < _MOST_HEADS
        if not entry.module or not inside or not is_named:
            yield f"the cached value {entry.name!r} is invalid, or {entry.module!r} is not in subgraph {entry.subgraph}"
            return
        by_subgraph.setdefault(entry.subgraph, []).append(entry)
    yield from wrong_parts(manifest.cached)
    known: dict[tuple[str, tuple[tuple[str, str], ...]], bool] = {}
    for index, entries in by_subgraph.items():
        file = manifest.subgraphs[index].file
        key = (file, tuple((entry.name, entry.after) for entry in entries))
        if key not in known:
            known[key] = hooked(sources[file], entries) is not None
        if not known[key]:
            yield f"{file} does not compute the cached values {', '.join(entry.name for entry in entries)} as stated"
