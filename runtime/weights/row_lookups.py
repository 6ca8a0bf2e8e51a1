"""Which parameters an artifact's code only takes rows of: tables of embeddings, mostly.

On the CPU such a table need not be read into memory. It stays in the file, and the rows that are looked up are in the
page cache: for a small model with a large vocabulary most of what its first subgraph would hold.
"""

from __future__ import annotations

import ast
import functools
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from runtime.language.expressions import dotted

if TYPE_CHECKING:
    from runtime.chain import Artifact

_LOOKUP = ["torch", "ops", "aten", "embedding", "default"]
_GETTERS = (["self", "get_parameter"], ["self", "get_buffer"])


def lookup_tables(artifact: Artifact) -> frozenset[str]:
    """The names of parameters that are looked up in and used for nothing else; none of an artifact that calls the
    model's own modules.
    """
    manifest = artifact.manifest
    tables = dict.fromkeys(
        f"{name}.weight" for name, kind in manifest.leaves.items() if manifest.leaf_kinds[kind].kind == "Embedding"
    )
    others: dict[str, None] = {}
    for subgraph in artifact.subgraphs:
        scope = f"{subgraph.entry.scope}." if subgraph.entry.scope else ""
        for name, is_lookup in _uses(subgraph.source):
            (tables if is_lookup else others)[f"{scope}{name}"] = None
    return frozenset(name for name in tables if name not in others)


@functools.lru_cache(maxsize=64)  # layers that are alike have one source
def _uses(source: str) -> tuple[tuple[str, bool], ...]:
    """The parameters that code asks for by name, and whether each is only looked up in."""
    return tuple(_found(ast.parse(source)))


def _found(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """A parameter is a variable, or stands where it is used; a variable that is assigned twice may be anything."""
    nodes = list(ast.walk(tree))
    assigned = Counter(node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    lookups = {id(call.args[0]) for call in calls if dotted(call.func) == _LOOKUP and call.args}
    variables: dict[str, str] = {}
    held: dict[int, None] = {}
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, variable = _parameter(node.value), node.targets[0].id
            if name is not None and assigned[variable] == 1:
                variables[variable] = name
                held[id(node.value)] = None
    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in variables:
            yield variables[node.id], id(node) in lookups
        name = _parameter(node)
        if name is not None and id(node) not in held:
            yield name, id(node) in lookups


def _parameter(node: ast.AST) -> str | None:
    """The name in `self.get_parameter("name")`."""
    if not isinstance(node, ast.Call) or dotted(node.func) not in _GETTERS:
        return None
    (name,) = node.args
    assert isinstance(name, ast.Constant), "the grammar says so"
    return str(name.value)
